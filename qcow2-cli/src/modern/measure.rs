//! `qcow2 measure`: how long a file will be.

use std::path::PathBuf;

use clap::Args;
use qcow2_image::SnapshotKey;
use qcow2_image::measure::{BitmapSize, MeasureOptions, measure, measure_raw};
use serde::Serialize;

use super::answer::Answer;
use super::args::{Format, OutputArgs, ReadArgs, bytes, snapshot};
use super::failure::Failure;
use super::new::NewArgs;
use super::open::{Disk, Want};
use super::progress::Bar;
use crate::words::size;

/// Tell how long the file of a new image will be
///
/// With what the image has that is to be copied, and with every cluster written.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 measure disk.raw
  qcow2 measure --look --cluster-size 2M disk.raw
  qcow2 measure --size 100G --extended-l2")]
pub(crate) struct Command {
    /// The image that is to be copied
    #[arg(conflicts_with = "size")]
    image: Option<PathBuf>,

    /// A disk of this size, with nothing in it
    #[arg(short, long, value_name = "BYTES", value_parser = bytes)]
    size: Option<u64>,

    /// Format of the new image
    #[arg(
        short = 'O',
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "qcow2"
    )]
    target_format: Format,

    /// Of this snapshot
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = snapshot)]
    snapshot: Option<SnapshotKey>,

    /// Read the data, and leave out zeros in it, as a copy does; takes as long as reading the disk
    #[arg(long)]
    look: bool,

    #[command(flatten)]
    new: NewArgs,

    #[command(flatten)]
    read: ReadArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    format: &'static str,
    virtual_size: u64,
    required: u64,
    fully_allocated: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<u64>,
    by_qemu: ByQemu,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ByQemu {
    required: u64,
    fully_allocated: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        if self.image.is_none() && self.size.is_none() {
            return Err(Failure::new("what is to be measured is missing")
                .hint("an image that is to be copied, or --size BYTES for an empty disk"));
        }
        let disk = match &self.image {
            None => None,
            Some(path) => {
                let want = Want {
                    snapshot: self.snapshot.clone(),
                    ..Want::read(&self.read)
                };
                Some(Disk::open(path, &self.read.open, &want)?)
            }
        };
        let size = match &disk {
            Some(disk) => disk.len()?,
            None => self.size.unwrap_or(0),
        };
        let bitmaps: Vec<BitmapSize> = match disk.as_ref().and_then(Disk::image) {
            Some(image) => image.bitmaps()?.iter().map(BitmapSize::from).collect(),
            None => Vec::new(),
        };
        let source = disk.as_ref().map(Disk::storage);
        let bar = Bar::new(self.output, "measuring")?;
        let found = match (self.target_format, &source) {
            (Format::Raw, source) => {
                self.new.check_raw()?;
                let data = source.as_ref().map(|source| measure_raw(&**source));
                match data.transpose()? {
                    Some(found) => found,
                    None => return self.empty_raw(size, answer),
                }
            }
            (Format::Qcow2, source) => {
                let mut how = MeasureOptions::new()
                    .look(self.look)
                    .bitmaps(&bitmaps)
                    .monitor(&bar);
                if let Some(source) = source {
                    how = how.source(&**source);
                }
                measure(&self.new.options_to_measure(size)?, &how)?
            }
        };
        bar.end();
        let measured = Measured {
            format: self.target_format.name(),
            virtual_size: size,
            required: found.required,
            fully_allocated: found.fully_allocated,
            data_file: found.data_file,
            by_qemu: ByQemu {
                required: found.by_qemu.required,
                fully_allocated: found.by_qemu.fully_allocated,
                bitmaps: found.by_qemu.bitmaps,
            },
        };
        measured.tell(answer)
    }

    /// A raw disk without data takes no space, and its file is as long as it is.
    fn empty_raw(&self, size: u64, answer: &Answer<'_>) -> Result<u8, Failure> {
        let measured = Measured {
            format: self.target_format.name(),
            virtual_size: size,
            required: 0,
            fully_allocated: size,
            data_file: None,
            by_qemu: ByQemu {
                required: size,
                fully_allocated: size,
                bitmaps: None,
            },
        };
        measured.tell(answer)
    }
}

impl Measured {
    fn tell(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        answer.tell(self, || {
            let line = |what: &str, bytes: u64| {
                format!("{what:<18}{} ({bytes} bytes)\n", size::human(bytes))
            };
            let mut text = line("with this data", self.required);
            text.push_str(&line("with all written", self.fully_allocated));
            if let Some(bytes) = self.data_file {
                text.push_str(&line("and its data file", bytes));
            }
            text
        })?;
        Ok(0)
    }
}
