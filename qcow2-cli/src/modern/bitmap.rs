//! `qcow2 bitmap`: what has changed since when, kept inside of an image.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use qcow2_image::difference::Changes;
use qcow2_image::{BitmapInfo, BitmapOptions, BitmapRecovery, BitmapState, Image, ImageError};
use serde::Serialize;

use super::answer::{Answer, lossy, name, table};
use super::args::{ConsentArgs, OpenArgs, OutputArgs, ReadArgs, bytes};
use super::export::{self, ExportArgs};
use super::failure::Failure;
use super::open::{self, Want};
use crate::audit::{Look, clean, plural, shown};
use crate::words::size;

/// List, add, change, merge and read the dirty bitmaps of an image
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 bitmap add disk.qcow2 since-monday
  qcow2 bitmap ranges disk.qcow2 since-monday
  qcow2 bitmap export disk.qcow2 since-monday tuesday.qcow2 --backing monday.qcow2 -F qcow2
  qcow2 bitmap merge disk.qcow2 week since-monday")]
pub(crate) struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List them
    List(List),
    /// Make one; it records what changes from now on
    Add(Add),
    /// Remove one, and what it has recorded
    Remove(Remove),
    /// Forget what one has recorded
    Clear(Change),
    /// Let one record from now on
    Enable(Change),
    /// Let one be as it is from now on
    Disable(Change),
    /// Add to one what others have recorded
    Merge(Merge),
    /// Make one usable again that was not closed
    Recover(Recover),
    /// Tell which parts of the disk one has as changed
    Ranges(Ranges),
    /// Store what one has as changed in a new overlay: an incremental backup
    Export(Export),
}

/// A bitmap of an image.
#[derive(Debug, Args)]
struct Named {
    /// The image
    image: PathBuf,
    /// Name of the bitmap
    bitmap: String,
}

#[derive(Debug, Args)]
struct List {
    /// The image
    image: PathBuf,
    #[command(flatten)]
    read: ReadArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct Change {
    #[command(flatten)]
    named: Named,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct Add {
    #[command(flatten)]
    change: Change,
    /// Bytes of the disk that a bit stands for, 512 to 2G [default: a cluster, 4k to 64k]
    #[arg(short, long, value_name = "BYTES", value_parser = bytes)]
    granularity: Option<u64>,
    /// Let it record nothing yet
    #[arg(long)]
    disabled: bool,
}

#[derive(Debug, Args)]
struct Remove {
    #[command(flatten)]
    change: Change,
    #[command(flatten)]
    consent: ConsentArgs,
}

#[derive(Debug, Args)]
struct Merge {
    #[command(flatten)]
    change: Change,
    /// Bitmaps whose records are added
    #[arg(required = true)]
    sources: Vec<String>,
    /// The image that has those, if it is another one
    #[arg(long, value_name = "IMAGE")]
    from: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Recover {
    #[command(flatten)]
    change: Change,
    /// What it is taken for
    #[arg(
        long = "as",
        value_enum,
        value_name = "WHAT",
        default_value = "all-changed"
    )]
    taken_as: RecoveryName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RecoveryName {
    /// All of the disk has changed; always true enough
    AllChanged,
    /// What the file has; right only if this engine alone has written to the image
    AsStored,
}

#[derive(Debug, Args)]
struct Ranges {
    #[command(flatten)]
    named: Named,
    #[command(flatten)]
    read: ReadArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct Export {
    #[command(flatten)]
    named: Named,
    #[command(flatten)]
    into: ExportArgs,
    #[command(flatten)]
    read: ReadArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// A bitmap.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct BitmapRow {
    name: String,
    granularity: u64,
    enabled: bool,
    in_use: bool,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_bytes: Option<u64>,
}

impl BitmapRow {
    /// What is known of one.
    pub(crate) fn of(info: &BitmapInfo) -> Self {
        let (state, why) = match &info.state {
            BitmapState::Consistent => ("consistent", None),
            BitmapState::Broken { why } => ("broken", Some(why.clone())),
            _ => ("inconsistent", None),
        };
        Self {
            name: lossy(&info.name),
            granularity: info.granularity,
            enabled: info.auto,
            in_use: info.in_use,
            state,
            why,
            dirty_bytes: info.dirty_bytes,
        }
    }
}

/// The table of bitmaps.
pub(crate) fn table_of(rows: &[BitmapRow], look: Look) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let why = row.why.as_ref().map(|why| format!(": {}", clean(why)));
            vec![
                clean(&row.name),
                size::human(row.granularity),
                if row.enabled { "yes" } else { "no" }.to_owned(),
                row.dirty_bytes.map_or("?".to_owned(), size::human),
                format!("{}{}", row.state, why.unwrap_or_default()),
            ]
        })
        .collect();
    table(
        &["NAME", "GRANULARITY ", "RECORDS", "CHANGED ", "STATE"],
        &cells,
        look,
    )
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Listed {
    filename: String,
    bitmaps: Vec<BitmapRow>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done<'a> {
    filename: String,
    action: &'static str,
    bitmap: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Range {
    start: u64,
    length: u64,
}

impl Command {
    pub(super) fn output(&self) -> OutputArgs {
        match &self.action {
            Action::List(args) => args.output,
            Action::Add(Add { change, .. })
            | Action::Remove(Remove { change, .. })
            | Action::Merge(Merge { change, .. })
            | Action::Recover(Recover { change, .. })
            | Action::Clear(change)
            | Action::Enable(change)
            | Action::Disable(change) => change.output,
            Action::Ranges(args) => args.output,
            Action::Export(args) => args.output,
        }
    }

    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        match &self.action {
            Action::List(args) => args.run(answer),
            Action::Add(args) => {
                let mut options = BitmapOptions::new().enabled(!args.disabled);
                options.granularity = args.granularity;
                let add = |image: &Image, name: &[u8]| image.create_bitmap(name, &options);
                args.change.run(answer, ("add", "was added"), add)
            }
            Action::Remove(args) => args.run(answer),
            Action::Clear(args) => args.run(answer, ("clear", "is empty now"), Image::clear_bitmap),
            Action::Enable(args) => args.run(answer, ("enable", "records"), Image::enable_bitmap),
            Action::Disable(args) => args.run(
                answer,
                ("disable", "records nothing more"),
                Image::disable_bitmap,
            ),
            Action::Merge(args) => args.run(answer),
            Action::Recover(args) => {
                let how = match args.taken_as {
                    RecoveryName::AllChanged => BitmapRecovery::AllChanged,
                    RecoveryName::AsStored => BitmapRecovery::AsStored,
                };
                let recover = |image: &Image, name: &[u8]| image.recover_bitmap(name, how);
                args.change
                    .run(answer, ("recover", "can be used again"), recover)
            }
            Action::Ranges(args) => args.run(answer),
            Action::Export(args) => args.run(answer),
        }
        .map(|()| 0)
    }
}

impl List {
    fn run(&self, answer: &Answer<'_>) -> Result<(), Failure> {
        let image = open::image(&self.image, &self.read.open, &Want::facts(&self.read))?;
        let listed = Listed {
            filename: name(&self.image),
            bitmaps: image.bitmaps()?.iter().map(BitmapRow::of).collect(),
        };
        answer.tell(&listed, || match listed.bitmaps.as_slice() {
            [] => format!("{} has no bitmaps\n", shown(&self.image)),
            rows => table_of(rows, answer.look),
        })
    }
}

impl Change {
    /// Does it, and tells so: the action's name, and what is true then.
    fn run(
        &self,
        answer: &Answer<'_>,
        (action, told): (&'static str, &str),
        change: impl FnOnce(&Image, &[u8]) -> Result<(), ImageError>,
    ) -> Result<(), Failure> {
        let Named {
            image: path,
            bitmap,
        } = &self.named;
        // Bitmaps have nothing to do with what lies below.
        let want = Want {
            no_backing: true,
            ..Want::write()
        };
        let image = open::image(path, &self.open, &want)?;
        change(&image, bitmap.as_bytes())
            .and_then(|()| image.close())
            .map_err(|error| Failure::from(error).about(path))?;
        let done = Done {
            filename: name(path),
            action,
            bitmap,
        };
        answer.give(&done, || {
            format!("{}: bitmap {} {told}\n", shown(path), clean(bitmap))
        })
    }
}

impl Remove {
    fn run(&self, answer: &Answer<'_>) -> Result<(), Failure> {
        let Named { image, bitmap } = &self.change.named;
        self.consent.ask(&format!(
            "removes bitmap {} of {} and what it has recorded",
            clean(bitmap),
            shown(image)
        ))?;
        self.change
            .run(answer, ("remove", "was removed"), Image::remove_bitmap)
    }
}

impl Merge {
    fn run(&self, answer: &Answer<'_>) -> Result<(), Failure> {
        let other = match &self.from {
            None => None,
            Some(path) => {
                let want = Want {
                    no_backing: true,
                    facts_only: true,
                    ..Want::default()
                };
                Some(open::image(path, &self.change.open, &want)?)
            }
        };
        self.change
            .run(answer, ("merge", "has what was merged"), |image, name| {
                for source in &self.sources {
                    image.merge_bitmap(name, other.as_ref().unwrap_or(image), source.as_bytes())?;
                }
                Ok(())
            })
    }
}

impl Ranges {
    fn run(&self, answer: &Answer<'_>) -> Result<(), Failure> {
        let Named {
            image: path,
            bitmap,
        } = &self.named;
        let image = open::image(path, &self.read.open, &Want::facts(&self.read))?;
        let mut rows = Vec::new();
        let (mut count, mut sum) = (0_u64, 0_u64);
        for found in image.dirty_ranges(bitmap.as_bytes(), 0..image.virtual_size()) {
            let found = found.map_err(|error| Failure::from(error).about(path))?;
            let length = found.end - found.start;
            count += 1;
            sum = sum.saturating_add(length);
            if answer.is_json() {
                let range = Range {
                    start: found.start,
                    length,
                };
                answer.row(&range)?;
            } else {
                rows.push(vec![format!("{:#x}", found.start), format!("{length:#x}")]);
            }
        }
        if count > 0 {
            answer.text(&table(&["START ", "LENGTH "], &rows, answer.look));
        }
        let text = format!(
            "{}, {}, changed\n",
            plural(count, "range"),
            size::human(sum)
        );
        answer.text(&text);
        Ok(())
    }
}

impl Export {
    fn run(&self, answer: &Answer<'_>) -> Result<(), Failure> {
        let Named {
            image: path,
            bitmap,
        } = &self.named;
        let image = open::image(path, &self.read.open, &Want::read(&self.read))?;
        let mut ranges = image.dirty_ranges(bitmap.as_bytes(), 0..image.virtual_size());
        let changes = Changes::Ranges(&mut ranges);
        export::run(&image.chain(), changes, &self.into, self.output, answer)
    }
}
