//! `qcow2 snapshot`: the states that an image keeps inside.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use qcow2_image::difference::{Changes, Comparison, Differences};
use qcow2_image::{SnapshotInfo, SnapshotKey, SnapshotOptions};
use serde::Serialize;

use super::answer::{Answer, lossy, name, table};
use super::args::{ConsentArgs, OpenArgs, OutputArgs, ReadArgs, bytes, snapshot};
use super::export::{self, ExportArgs};
use super::failure::Failure;
use super::open::{self, Disk, Want};
use crate::audit::{Look, clean, plural, shown};
use crate::words::{size, system};

/// List, take, apply, delete and compare the snapshots inside of an image
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 snapshot create disk.qcow2 before-upgrade
  qcow2 snapshot list disk.qcow2
  qcow2 snapshot diff disk.qcow2 before-upgrade
  qcow2 snapshot apply --yes disk.qcow2 before-upgrade")]
pub(crate) struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one, and it lives as long as the program"
)]
enum Action {
    /// List them
    List(List),
    /// Take one of the disk as it is now
    Create(Create),
    /// Make the disk what it was when one was taken; what it is now is lost
    Apply(Lose),
    /// Delete one; what only it held is free then
    Delete(Lose),
    /// Tell where the disk, or a newer snapshot, differs from one
    Diff(Diff),
    /// Store what has changed since one in a new overlay: an incremental backup
    Export(Export),
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
struct Create {
    /// The image
    image: PathBuf,
    /// Name of the snapshot
    name: String,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct Lose {
    /// The image
    image: PathBuf,
    /// Id or name of the snapshot
    #[arg(value_parser = snapshot)]
    snapshot: SnapshotKey,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    consent: ConsentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct States {
    /// The image
    image: PathBuf,
    /// Id or name of the older snapshot
    #[arg(value_parser = snapshot)]
    old: SnapshotKey,
    /// Read data where the tables don't tell, and compare pieces of so many bytes; else what was written since counts as different
    #[arg(long, value_name = "BYTES", num_args = 0..=1, default_missing_value = "4096", value_parser = bytes)]
    exact: Option<u64>,
    /// A newer snapshot instead of the disk as it is now
    #[arg(long, value_name = "SNAPSHOT", value_parser = snapshot)]
    new: Option<SnapshotKey>,
    #[command(flatten)]
    read: ReadArgs,
}

#[derive(Debug, Args)]
struct Diff {
    #[command(flatten)]
    states: States,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct Export {
    #[command(flatten)]
    states: States,
    #[command(flatten)]
    into: ExportArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// A snapshot.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct SnapshotRow {
    id: String,
    name: String,
    disk_size: u64,
    vm_state_size: u64,
    date_sec: u64,
    date_nsec: u32,
    vm_clock_nsec: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    icount: Option<u64>,
}

impl SnapshotRow {
    /// What is known of one.
    pub(crate) fn of(info: &SnapshotInfo) -> Self {
        Self {
            id: lossy(&info.id),
            name: lossy(&info.name),
            disk_size: info.disk_size,
            vm_state_size: info.vm_state_size,
            date_sec: info.date.as_secs(),
            date_nsec: info.date.subsec_nanos(),
            vm_clock_nsec: u64::try_from(info.vm_clock.as_nanos()).unwrap_or(u64::MAX),
            icount: info.icount,
        }
    }
}

/// The table of snapshots.
pub(crate) fn table_of(rows: &[SnapshotRow], look: Look) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let date = std::time::Duration::new(row.date_sec, row.date_nsec);
            vec![
                clean(&row.id),
                clean(&row.name),
                system::local_time(date),
                size::human(row.disk_size),
                size::human(row.vm_state_size),
            ]
        })
        .collect();
    table(&["ID", "NAME", "TAKEN", "DISK ", "VM STATE "], &cells, look)
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Listed {
    filename: String,
    snapshots: Vec<SnapshotRow>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    filename: String,
    action: &'static str,
    id: String,
    name: String,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Stretch {
    start: u64,
    length: u64,
    zero: bool,
}

impl Command {
    pub(super) fn output(&self) -> OutputArgs {
        match &self.action {
            Action::List(args) => args.output,
            Action::Create(args) => args.output,
            Action::Apply(args) | Action::Delete(args) => args.output,
            Action::Diff(args) => args.output,
            Action::Export(args) => args.output,
        }
    }

    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        match &self.action {
            Action::List(args) => args.run(answer),
            Action::Create(args) => args.run(answer),
            Action::Apply(args) => args.run(answer, false),
            Action::Delete(args) => args.run(answer, true),
            Action::Diff(args) => args.run(answer),
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
            snapshots: image.snapshots()?.iter().map(SnapshotRow::of).collect(),
        };
        answer.tell(&listed, || match listed.snapshots.as_slice() {
            [] => format!("{} has no snapshots\n", shown(&self.image)),
            rows => table_of(rows, answer.look),
        })
    }
}

impl Create {
    fn run(&self, answer: &Answer<'_>) -> Result<(), Failure> {
        let about = |failure: Failure| failure.about(&self.image);
        if self.name.is_empty() {
            return Err(about(Failure::new("a snapshot needs a name")));
        }
        let image = open::image(&self.image, &self.open, &Want::write())?;
        let name_taken = |one: &SnapshotInfo| one.name == self.name.as_bytes();
        if let Some(one) = image.snapshots()?.iter().find(|one| name_taken(one)) {
            let id = clean(&lossy(&one.id));
            return Err(about(
                Failure::new(format!(
                    "snapshot {id} has the name {} already",
                    clean(&self.name)
                ))
                .hint(
                    "take another name, or delete that one first: `qcow2 snapshot delete IMAGE ID`",
                ),
            ));
        }
        let id = image
            .create_snapshot(&SnapshotOptions::new(self.name.as_str()))
            .map_err(|error| about(error.into()))?;
        image.close().map_err(|error| about(error.into()))?;
        let done = Done {
            filename: name(&self.image),
            action: "create",
            id: lossy(&id),
            name: self.name.clone(),
        };
        answer.give(&done, || {
            format!(
                "{}: snapshot {} ({}) was taken\n",
                shown(&self.image),
                clean(&done.id),
                clean(&done.name)
            )
        })
    }
}

/// The snapshot that is meant.
fn find(all: Vec<SnapshotInfo>, key: &SnapshotKey) -> Result<SnapshotInfo, Failure> {
    let wanted = match key {
        SnapshotKey::Id(text) | SnapshotKey::Name(text) | SnapshotKey::IdOrName(text) => text,
    };
    let found = all.iter().position(|one| one.id == *wanted);
    let found = found.or_else(|| all.iter().position(|one| one.name == *wanted));
    let found = found.and_then(|at| all.into_iter().nth(at));
    found.ok_or_else(|| {
        Failure::from(qcow2_image::ImageError::NoSnapshot {
            key: clean(&lossy(wanted)),
        })
    })
}

impl Lose {
    fn run(&self, answer: &Answer<'_>, delete: bool) -> Result<(), Failure> {
        self.change(answer, delete)
            .map_err(|failure| failure.about(&self.image))
    }

    fn change(&self, answer: &Answer<'_>, delete: bool) -> Result<(), Failure> {
        let image = open::image(&self.image, &self.open, &Want::write())?;
        let meant = find(image.snapshots()?, &self.snapshot)?;
        let (id, tag) = (clean(&lossy(&meant.id)), clean(&lossy(&meant.name)));
        let key = SnapshotKey::Id(meant.id);
        let (action, done) = if delete {
            self.consent.ask(&format!(
                "deletes snapshot {id} ({tag}) of {}",
                shown(&self.image)
            ))?;
            image.delete_snapshot(&key)?;
            ("delete", "was deleted")
        } else {
            self.consent.ask(&format!(
                "takes {} back to snapshot {id} ({tag}), and what its disk is now is lost",
                shown(&self.image)
            ))?;
            image.apply_snapshot(&key)?;
            ("apply", "is what the disk is now")
        };
        image.close()?;
        let told = Done {
            filename: name(&self.image),
            action,
            id,
            name: lossy(&meant.name),
        };
        answer.give(&told, || {
            format!(
                "{}: snapshot {} ({tag}) {done}\n",
                shown(&self.image),
                told.id
            )
        })
    }
}

impl States {
    /// The older state and the newer.
    fn open(&self) -> Result<(Disk, Disk), Failure> {
        let at = |snapshot: Option<SnapshotKey>| {
            let want = Want {
                snapshot,
                ..Want::read(&self.read)
            };
            open_image(&self.image, &self.read, &want)
        };
        Ok((at(Some(self.old.clone()))?, at(self.new.clone())?))
    }

    fn comparison(&self) -> Comparison {
        self.exact.map_or(Comparison::Structure, Comparison::Exact)
    }
}

fn open_image(path: &Path, read: &ReadArgs, want: &Want) -> Result<Disk, Failure> {
    let disk = Disk::open(path, &read.open, want)?;
    match disk.image() {
        Some(_) => Ok(disk),
        None => Err(Failure::new("a raw disk has no snapshots").about(path)),
    }
}

impl Diff {
    fn run(&self, answer: &Answer<'_>) -> Result<(), Failure> {
        let (old, new) = self.states.open()?;
        let (old, new) = (old.chain(), new.chain());
        let len = new.virtual_size()?;
        let mut rows = Vec::new();
        let (mut count, mut sum) = (0_u64, 0_u64);
        for found in Differences::new(&old, &new, 0..len, self.states.comparison())? {
            let found = found?;
            count += 1;
            sum = sum.saturating_add(found.len);
            if answer.is_json() {
                let stretch = Stretch {
                    start: found.offset,
                    length: found.len,
                    zero: found.is_zero,
                };
                answer.row(&stretch)?;
            } else {
                let zero = if found.is_zero { "zeros now" } else { "" };
                rows.push(vec![
                    format!("{:#x}", found.offset),
                    format!("{:#x}", found.len),
                    zero.to_owned(),
                ]);
            }
        }
        if count > 0 {
            answer.text(&table(&["START ", "LENGTH ", ""], &rows, answer.look));
        }
        let places = plural(count, "stretch").replace("stretchs", "stretches");
        answer.text(&format!("{places}, {}, may differ\n", size::human(sum)));
        Ok(())
    }
}

impl Export {
    fn run(&self, answer: &Answer<'_>) -> Result<(), Failure> {
        let (old, new) = self.states.open()?;
        let (old, new) = (old.chain(), new.chain());
        let changes = Changes::Between {
            old: &old,
            comparison: self.states.comparison(),
        };
        export::run(&new, changes, &self.into, self.output, answer)
    }
}
