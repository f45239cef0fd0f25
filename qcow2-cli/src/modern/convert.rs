//! `qcow2 convert`: a disk into another file or format.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use qcow2_check::{Code, Options, check};
use qcow2_image::copy::{CopyError, CopyOptions, CopyReport, Target, copy, copy_bitmaps};
use qcow2_image::create::Preallocation;
use qcow2_image::{Image, SnapshotKey};
use qcow2_io::{FileOptions, Storage};
use serde::Serialize;

use super::answer::{Answer, lossy, name};
use super::args::{
    CompressArgs, ConsentArgs, Format, OpenArgs, OutputArgs, RateArgs, ReadArgs, ThreadsArgs,
    bytes, snapshot,
};
use super::failure::{Failure, NOTHING_MADE};
use super::fresh::{self, Fresh};
use super::new::{self, NewArgs, PreallocationName};
use super::open::{Disk, Want};
use super::progress::Bar;
use crate::audit::{Interrupt, Progress, clean, plural, shown};
use crate::node::Concat;
use crate::words::size;

/// Copy a disk into a new image
///
/// The source is read with its whole chain; the new image needs none, unless --backing says that it is to have one.
#[derive(Debug, Args)]
#[command(
    override_usage = "qcow2 convert [OPTIONS] <SOURCE>... <TARGET>",
    after_help = "Examples:
  qcow2 convert disk.raw disk.qcow2
  qcow2 convert --compress --compression-type zstd disk.qcow2 small.qcow2
  qcow2 convert -O raw --snapshot before disk.qcow2 before.raw
  qcow2 convert part1.raw part2.raw whole.qcow2
  qcow2 convert --backing base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2
  qcow2 convert --no-create -O raw disk.qcow2 /dev/vg0/disk --yes"
)]
pub(crate) struct Command {
    /// The disk that is copied, or several, which are copied one behind the other; and last the new image
    #[arg(required = true, value_name = "SOURCE|TARGET")]
    paths: Vec<PathBuf>,

    /// Format of the new image [default: raw if its name ends in .raw, else qcow2]
    #[arg(short = 'O', long, value_enum, value_name = "FORMAT")]
    target_format: Option<Format>,

    /// Write into TARGET as it is: a device, or an image that is there. What it holds is lost
    #[arg(short, long)]
    no_create: bool,

    /// Copy this snapshot
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = snapshot)]
    snapshot: Option<SnapshotKey>,

    /// Leave out zeros that fill aligned pieces of so many bytes, a power of two from 512; 0 writes everything
    #[arg(short = 'S', long, value_name = "BYTES", value_parser = bytes, default_value = "4k")]
    sparse: u64,

    /// Go on where the source can't be read, with zeros in its place, and tell where; exit code 1 then
    #[arg(long)]
    salvage: bool,

    /// Carry dirty bitmaps along
    #[arg(long)]
    bitmaps: bool,

    /// But not those that can't be used
    #[arg(long, requires = "bitmaps")]
    skip_broken_bitmaps: bool,

    #[command(flatten)]
    rate: RateArgs,

    #[command(flatten)]
    compress: CompressArgs,

    #[command(flatten)]
    threads: ThreadsArgs,

    #[command(flatten)]
    consent: ConsentArgs,

    #[command(flatten)]
    new: NewArgs,

    #[command(flatten)]
    read: ReadArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Converted {
    source: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    more_sources: Vec<String>,
    target: String,
    format: &'static str,
    virtual_size: u64,
    read_bytes: u64,
    stored_bytes: u64,
    compressed_bytes: u64,
    compressed_clusters: u64,
    lost: Vec<Lost>,
    bitmaps: Vec<String>,
    bitmaps_skipped: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Lost {
    start: u64,
    length: u64,
}

/// What is copied.
struct Source {
    /// One behind the other.
    disks: Vec<Disk>,
    /// All of them.
    storage: Arc<dyn Storage>,
    /// Bytes of them together.
    len: u64,
}

impl Source {
    fn open(paths: &[PathBuf], args: &OpenArgs, want: &Want) -> Result<Self, Failure> {
        let open = |path: &PathBuf| Disk::open(path, args, want);
        let disks = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let storage: Arc<dyn Storage> = match disks.as_slice() {
            [disk] => disk.storage(),
            several => Arc::new(Concat::new(several.iter().map(Disk::storage).collect())?),
        };
        let len = storage.len()?;
        Ok(Self {
            disks,
            storage,
            len,
        })
    }

    /// The disk that has this byte of the whole.
    fn path_at(&self, offset: u64) -> &Path {
        let mut end = 0_u64;
        let holds = |disk: &&Disk| {
            end = end.saturating_add(disk.len().unwrap_or(0));
            offset < end
        };
        let found = self.disks.iter().find(holds).or(self.disks.last());
        found.map_or(Path::new(""), |disk| &disk.path)
    }
}

/// Where the copy goes.
enum Goal {
    Image(Box<Image>),
    Raw(Arc<dyn Storage>),
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        self.check()?;
        let want = Want {
            snapshot: self.snapshot.clone(),
            ..Want::read(&self.read)
        };
        let source = Source::open(self.sources(), &self.read.open, &want)?;
        if let (true, [disk]) = (self.bitmaps, source.disks.as_slice())
            && disk.image().is_none()
        {
            return Err(Failure::new("a raw disk has no bitmaps").about(&disk.path));
        }
        if !self.salvage && !self.read.force_share {
            for disk in &source.disks {
                self.check_complete(disk)?;
            }
        }
        let (goal, files) = self.goal(source.len)?;
        let done = self.copy(&source, goal)?;
        fresh::keep(files)?;
        answer.give(&done, || self.words(&done))?;
        Ok(u8::from(!done.lost.is_empty()))
    }

    fn sources(&self) -> &[PathBuf] {
        self.paths.split_last().map_or(&[], |(_, sources)| sources)
    }

    fn target(&self) -> &Path {
        self.paths.last().map_or(Path::new(""), PathBuf::as_path)
    }

    fn target_format(&self) -> Format {
        Format::of_new(self.target_format, self.target())
    }

    /// What does not go together.
    fn check(&self) -> Result<(), Failure> {
        if self.sources().is_empty() {
            return Err(Failure::new("the new image is missing")
                .hint("such as `qcow2 convert disk.raw disk.qcow2`"));
        }
        if self.target_format() == Format::Raw {
            if self.compress.compress {
                return Err(Failure::new("a raw disk holds no compressed data")
                    .hint("-O qcow2 makes an image, which does"));
            }
            if self.bitmaps {
                return Err(Failure::new("a raw disk has no bitmaps"));
            }
            if !self.no_create {
                self.new.check_raw()?;
            }
        }
        if self.no_create && !self.new.is_default() {
            return Err(Failure::new(
                "--no-create makes no image, so nothing can be chosen about it",
            ));
        }
        if self.sources().len() > 1 {
            let one = |what: &str| Err(Failure::new(format!("{what} needs a single source")));
            if self.snapshot.is_some() {
                return one("--snapshot");
            }
            if self.bitmaps {
                return one("--bitmaps");
            }
            if self.new.backing.named().is_some() {
                return one("--backing");
            }
        }
        let same = |path: &Path| std::fs::canonicalize(path).ok();
        let mut sources = self.sources().iter().map(|path| same(path));
        if same(self.target())
            .is_some_and(|target| sources.any(|source| source == Some(target.clone())))
        {
            return Err(
                Failure::new("the source and the target are the same file").about(self.target())
            );
        }
        Ok(())
    }

    /// Refuses a source whose files end before what they hold: read, that would be zeros.
    fn check_complete(&self, source: &Disk) -> Result<(), Failure> {
        let interrupt = Interrupt::listen().map_err(|error| Failure::of(&error))?;
        let chain = source.chain();
        for (depth, layer) in chain.layers().iter().enumerate() {
            let path = layer.path().or((depth == 0).then_some(&*source.path));
            let (Some(_), Some(path)) = (layer.image(), path) else {
                continue;
            };
            // It is open here already, and locked.
            let Ok(file) = FileOptions::new().force_share(true).open(path) else {
                continue;
            };
            let progress = Progress::new(self.output.progress(), &interrupt);
            let options = Options {
                threads: self.threads.count(),
                max_findings: 1,
                monitor: Some(&progress),
                ..Options::default()
            };
            let report = check(&file, &options);
            progress.finish();
            let missing = report.total(Code::ReferencePastEnd);
            if missing > 0 {
                return Err(Failure::new(format!(
                    "the file was cut short: {} in it lead behind its end",
                    plural(missing, "reference")
                ))
                .about(path)
                .hint("get it again; `qcow2 audit IMAGE` tells what is missing")
                .hint("--salvage copies what there is, with zeros in place of the rest"));
            }
        }
        Ok(())
    }

    /// Where the copy goes, and what is to be kept once it is complete.
    fn goal(&self, len: u64) -> Result<(Goal, Vec<Fresh>), Failure> {
        if self.no_create {
            self.consent
                .ask(&format!("overwrites {}", shown(self.target())))?;
            return Ok((self.existing_goal()?, Vec::new()));
        }
        if self.target_format() == Format::Raw {
            let mode = self
                .new
                .preallocation
                .map_or(Preallocation::Off, Into::into);
            let (file, fresh) = new::make_raw(self.target(), len, mode, self.consent)?;
            return Ok((Goal::Raw(Arc::new(file)), vec![fresh]));
        }
        let options = self.new.options(len)?;
        let open = self.new.open(self.target(), &self.read.open)?;
        let (image, files) = self.new.make(self.target(), &options, self.consent, open)?;
        Ok((Goal::Image(Box::new(image)), files))
    }

    fn existing_goal(&self) -> Result<Goal, Failure> {
        let mut open = self.read.open.clone();
        open.format = Some(self.target_format());
        open.passphrases = self.new.passphrase.as_passphrase();
        let target = Disk::open(self.target(), &open, &Want::write())?;
        Ok(match target.into_image() {
            Ok(image) => Goal::Image(Box::new(image)),
            Err(storage) => Goal::Raw(storage),
        })
    }

    fn copy(&self, source: &Source, goal: Goal) -> Result<Converted, Failure> {
        let bar = Bar::new(self.output, "copying")?;
        let reserved = matches!(
            self.new.preallocation,
            Some(PreallocationName::Falloc | PreallocationName::Full)
        );
        let mut options = CopyOptions::new()
            .threads(self.threads.count())
            .sparse(self.sparse)
            .salvage(self.salvage)
            .zero_rest(!self.no_create)
            .rate(self.rate.rate)
            .monitor(&bar);
        if reserved && self.target_format() == Format::Raw {
            options = options.target_is_zero(true);
        }
        if self.new.backing.named().is_some() {
            // What both have in common is not stored again.
            options = options.only_changes(true);
        }
        let storage = &source.storage;
        let result = match &goal {
            Goal::Image(image) => {
                if let Some(level) = self.compress.level(image.header().compression_type)? {
                    options = options.compress(level);
                }
                copy(&**storage, Target::Image(image), &options)
            }
            Goal::Raw(file) => copy(&**storage, Target::Storage(&**file), &options),
        };
        let report = result.map_err(|error| {
            let path = match &error {
                CopyError::Source { offset, .. } => source.path_at(*offset),
                _ => self.target(),
            };
            let at_source = matches!(error, CopyError::Source { .. });
            let failure = Failure::from(error)
                .about(path)
                .if_ended(if self.no_create {
                    "a part of the disk was overwritten; the same command copies all of it"
                } else {
                    NOTHING_MADE
                });
            if at_source {
                failure.hint("--salvage goes on with zeros in place of what can't be read")
            } else {
                failure
            }
        })?;
        bar.end();
        let mut done = self.told(source, &report);
        let first = source.disks.first();
        let image = first.and_then(Disk::image);
        if let (Goal::Image(target), Some(image), true) = (&goal, image, self.bitmaps) {
            let copied =
                copy_bitmaps(image, target, self.skip_broken_bitmaps).map_err(|error| {
                    Failure::from(error)
                        .about(source.path_at(0))
                        .hint("--skip-broken-bitmaps leaves those out that can't be used")
                })?;
            done.bitmaps = copied.copied.iter().map(|name| lossy(name)).collect();
            done.bitmaps_skipped = copied.skipped.iter().map(|name| lossy(name)).collect();
        }
        let closed = match goal {
            Goal::Image(image) => image.close().map_err(Failure::from),
            Goal::Raw(file) => file.flush().map_err(Failure::from),
        };
        closed.map_err(|failure| failure.about(self.target()))?;
        Ok(done)
    }

    fn told(&self, source: &Source, report: &CopyReport) -> Converted {
        let lost = report.lost.ranges().iter().map(|range| Lost {
            start: range.start,
            length: range.end - range.start,
        });
        let mut names = self.sources().iter().map(|path| name(path));
        Converted {
            source: names.next().unwrap_or_default(),
            more_sources: names.collect(),
            target: name(self.target()),
            format: self.target_format().name(),
            virtual_size: source.len,
            read_bytes: report.read_bytes,
            stored_bytes: report.stored_bytes,
            compressed_bytes: report.compressed_bytes,
            compressed_clusters: report.compressed_clusters,
            lost: lost.collect(),
            bitmaps: Vec::new(),
            bitmaps_skipped: Vec::new(),
        }
    }

    fn words(&self, done: &Converted) -> String {
        let packed = match done.compressed_clusters {
            0 => String::new(),
            _ => format!(", compressed to {}", size::human(done.compressed_bytes)),
        };
        let mut text = format!(
            "{}: {} of data of a disk of {}{packed}\n",
            shown(self.target()),
            size::human(done.stored_bytes),
            size::human(done.virtual_size)
        );
        for (names, what) in [
            (&done.bitmaps, "with bitmap"),
            (
                &done.bitmaps_skipped,
                "left out, since it can't be used: bitmap",
            ),
        ] {
            for name in names {
                _ = writeln!(text, "  {what} {}", clean(name));
            }
        }
        for range in &done.lost {
            let end = range.start + range.length;
            _ = writeln!(
                text,
                "  could not be read, and is zeros: {:#x}..{end:#x}",
                range.start
            );
        }
        text
    }
}
