//! `qcow2 compact`: a smaller file for the same image, or one in order.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use qcow2_image::{CompactMode, CompactOptions, CompactReport, Image};
use qcow2_io::Storage;
use serde::Serialize;

use super::answer::{Answer, name};
use super::args::{ConsentArgs, OpenArgs, OutputArgs, bytes};
use super::failure::{Failure, NOTHING_MADE};
use super::fresh::{self, Fresh};
use super::open::{self, Want};
use super::progress::Bar;
use crate::audit::shown;
use crate::words::size;

/// Make the file of an image smaller, or put it in order, in place
///
/// What the disk and all snapshots show stays the same, and so do bitmaps and compressed clusters. A crash in between leaves a sound
/// image; so does Ctrl-C, and the command goes on where it was when it is called again.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 compact disk.qcow2
  qcow2 compact --sequential disk.qcow2
  qcow2 compact --into small.qcow2 disk.qcow2")]
pub(crate) struct Command {
    /// The image
    image: PathBuf,

    /// Put everything in the order of the disk, too; that moves more
    #[arg(long)]
    sequential: bool,

    /// Make a compacted copy, with snapshots and bitmaps, and leave the image as it is
    #[arg(long, value_name = "FILE")]
    into: Option<PathBuf>,

    /// Bytes that are moved at a time; by so much the file may grow in between [default: 64M]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    slice: Option<u64>,

    #[command(flatten)]
    consent: ConsentArgs,

    #[command(flatten)]
    open: OpenArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Compacted {
    filename: String,
    complete: bool,
    moved_bytes: u64,
    bytes_before: u64,
    bytes_after: u64,
    fragments_before: u64,
    fragments_after: u64,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        if let Some(path) = &self.into {
            self.consent.ask_to_replace(path)?;
        }
        let bar = Bar::new(self.output, "compacting")?;
        let mode = if self.sequential {
            CompactMode::Sequential
        } else {
            CompactMode::Truncate
        };
        let mut options = CompactOptions::new().mode(mode).monitor(&bar);
        if let Some(bytes) = self.slice {
            options = options.slice(bytes);
        }
        // What lies below has nothing to do with where clusters lie.
        let want = Want {
            write: self.into.is_none(),
            no_backing: true,
            ..Want::default()
        };
        let image = open::image(&self.image, &self.open, &want)?;
        let mut files = Vec::new();
        let (path, report) = match &self.into {
            Some(path) => {
                let (report, fresh) = self.copy(&image, path, &options)?;
                files.push(fresh);
                (path.as_path(), report)
            }
            None => (
                self.image.as_path(),
                image
                    .compact(&options)
                    .map_err(|error| Failure::from(error).about(&self.image))?,
            ),
        };
        bar.end();
        image
            .close()
            .map_err(|error| Failure::from(error).about(&self.image))?;
        if !report.complete && self.into.is_some() {
            return Err(Failure::new("the copy was ended before it was complete")
                .about(path)
                .hint(NOTHING_MADE));
        }
        fresh::keep(files)?;
        let told = Compacted {
            filename: name(path),
            complete: report.complete,
            moved_bytes: report.moved_bytes,
            bytes_before: report.bytes_before,
            bytes_after: report.bytes_after,
            fragments_before: report.fragments_before,
            fragments_after: report.fragments_after,
        };
        answer.give(&told, || {
            format!(
                "{}: {} instead of {}, {} moved, in {} instead of {} stretches{}\n",
                shown(path),
                size::human(told.bytes_after),
                size::human(told.bytes_before),
                size::human(told.moved_bytes),
                told.fragments_after,
                told.fragments_before,
                if told.complete {
                    ""
                } else {
                    "; it was ended before all was done, and the same command goes on"
                }
            )
        })?;
        Ok(u8::from(!told.complete))
    }

    fn copy(
        &self,
        image: &Image,
        path: &Path,
        options: &CompactOptions<'_>,
    ) -> Result<(CompactReport, Fresh), Failure> {
        let mut open = Image::options();
        for (layer, secret) in self.open.passphrases.read()? {
            open = open.layer_secret(layer, secret);
        }
        let (fresh, file) = Fresh::begin(path)?;
        let file: Arc<dyn Storage> = Arc::new(file);
        let report = image
            .compact_into(file, open, options)
            .map_err(|error| Failure::from(error).about(path))?;
        Ok((report, fresh))
    }
}
