//! Changes of a disk, stored in a new overlay: incremental backups.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use qcow2_image::Image;
use qcow2_image::chain::{Chain, Transferred};
use qcow2_image::difference::{Changes, ExportOptions, export};
use qcow2_io::Null;
use serde::Serialize;

use super::answer::{Answer, name};
use super::args::{CompressArgs, ConsentArgs, OutputArgs, RateArgs, ThreadsArgs};
use super::failure::{Failure, NOTHING_MADE};
use super::fresh;
use super::new::NewArgs;
use super::progress::Bar;
use crate::audit::shown;
use crate::words::size;

/// The overlay that is made.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// The overlay to make
    target: PathBuf,

    #[command(flatten)]
    new: NewArgs,

    #[command(flatten)]
    compress: CompressArgs,

    #[command(flatten)]
    rate: RateArgs,

    #[command(flatten)]
    threads: ThreadsArgs,

    #[command(flatten)]
    consent: ConsentArgs,
}

/// What was moved from one file to another.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Moved {
    filename: String,
    action: &'static str,
    read_bytes: u64,
    stored_bytes: u64,
    zeroed_bytes: u64,
    compressed_clusters: u64,
}

impl Moved {
    /// What the library tells of it.
    pub(crate) fn new(filename: String, action: &'static str, done: &Transferred) -> Self {
        Self {
            filename,
            action,
            read_bytes: done.read_bytes,
            stored_bytes: done.stored_bytes,
            zeroed_bytes: done.zeroed_bytes,
            compressed_clusters: done.compressed_clusters,
        }
    }

    /// How much it is.
    pub(crate) fn words(&self) -> String {
        let zeros = match self.zeroed_bytes {
            0 => String::new(),
            bytes => format!(", and {} of zeros", size::human(bytes)),
        };
        format!("{} of data{zeros}", size::human(self.stored_bytes))
    }
}

/// Makes the overlay, and stores changes in it.
pub(crate) fn run(
    new: &Chain<'_>,
    changes: Changes<'_>,
    args: &ExportArgs,
    output: OutputArgs,
    answer: &Answer<'_>,
) -> Result<(), Failure> {
    let Some((backing, _)) = args.new.backing.named() else {
        return Err(Failure::new("the overlay needs a backing file").hint(
            "--backing FILE --backing-format FORMAT names the copy of the old state; it is not opened",
        ));
    };
    let options = args.new.options(new.virtual_size()?)?;
    // It is not read, but zeros over it have to be noted.
    let open = Image::options().backing(Arc::new(Null::new()));
    let (target, files) = args.new.make(&args.target, &options, args.consent, open)?;
    let bar = Bar::new(output, "exporting")?;
    let mut how = ExportOptions::new()
        .threads(args.threads.count())
        .rate(args.rate.rate)
        .monitor(&bar);
    if let Some(level) = args.compress.level(target.header().compression_type)? {
        how = how.compress(level);
    }
    let done = export(new, changes, &target, &how)
        .map_err(Failure::from)
        .and_then(|done| {
            target.close()?;
            Ok(done)
        })
        .map_err(|failure| failure.about(&args.target).if_ended(NOTHING_MADE))?;
    fresh::keep(files)?;
    bar.end();
    let moved = Moved::new(name(&args.target), "export", &done);
    answer.give(&moved, || {
        format!(
            "{}: {} over {}\n",
            shown(&args.target),
            moved.words(),
            crate::audit::clean(backing)
        )
    })
}
