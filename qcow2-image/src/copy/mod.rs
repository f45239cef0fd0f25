//! Copying a disk: any [`Storage`] into any other, or into an image, compressed if that is asked for.
//!
//! [`copy`] asks the source where it has data, and several threads take pieces of that in turn: they read a piece, leave out
//! what is zero, and store the rest. Nothing is read where the source knows that it has zeros.
//!
//! ```text
//!  extents ──► Plan ──► worker: read, look for zeros ──────────────────────────► store         (as it is)
//!              │
//!              └──────► worker: read, look for zeros, compress ──► Order ──────► store         (compressed)
//! ```
//!
//! What is compressed is stored in the order of the guest, whatever thread is ready first: who has a piece whose turn it is
//! stores it, and with it all that follow and wait. So the file is read from front to back later, and the same source and
//! options give the same file, however many threads there are.
//!
//! ```
//! use qcow2_image::Image;
//! use qcow2_image::copy::{CopyOptions, Target, copy};
//! use qcow2_image::create::CreateOptions;
//! use qcow2_io::{Memory, Storage};
//! use std::sync::Arc;
//!
//! let source = Memory::from(vec![7; 1 << 20]);
//! let file = Arc::new(Memory::new());
//! Image::create(&file, &CreateOptions::new(source.len()?))?;
//! let image = Image::options().open(file)?;
//! let report = copy(&source, &image, &CopyOptions::new())?;
//! assert_eq!(report.stored_bytes, 1 << 20);
//! image.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bitmaps;
mod changes;
mod checkpoint;
mod error;
mod options;
mod order;
mod pack;
mod plan;
mod run;
mod salvage;
mod target;
mod worker;
mod zeros;

use qcow2_io::{Slice, Storage};

use self::order::Order;
use self::run::Run;
use self::target::Place;
use crate::threads::on_threads;

pub use bitmaps::{BitmapCopy, copy_bitmaps};
pub use checkpoint::{Checkpoint, NoCheckpoint};
pub use error::CopyError;
pub use options::{CopyOptions, Monitor};
pub use salvage::Lost;
pub use target::Target;

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopyReport {
    /// Length of the source, or of the part of it that was copied, in bytes.
    pub len_bytes: u64,
    /// Bytes that were read from it: where it did not know that it has zeros.
    pub read_bytes: u64,
    /// Bytes of the disk that were stored as data, compressed or not.
    pub stored_bytes: u64,
    /// Bytes that those take which were compressed.
    pub compressed_bytes: u64,
    /// Clusters that were compressed.
    pub compressed_clusters: u64,
    /// What could not be read, and is zeros in the target: only if that was [asked for](CopyOptions::salvage).
    pub lost: Lost,
    /// Where the source could not tell whether it has data, and was read for it: only then, too.
    pub unmapped: Lost,
}

/// Makes the target read as the source does.
///
/// Source and target must not change meanwhile by other means. A target that is longer gets zeros behind the source's end
/// unless [told otherwise](CopyOptions::zero_rest); a storage that is shorter grows, an image that is shorter is refused.
///
/// # Errors
///
/// [`CopyError`] says which side failed, and where. All threads stop at the first error; the target has any part of the data
/// then.
///
/// # Panics
///
/// When the source or the target panics: all threads stop, then the caller's panics.
///
/// # Durability
///
/// None: [flush](Storage::flush) or [close](crate::Image::close) the target.
pub fn copy<'a>(
    source: &'a dyn Storage,
    target: impl Into<Target<'a>>,
    options: &CopyOptions<'a>,
) -> Result<CopyReport, CopyError> {
    let len = source
        .len()
        .map_err(|error| CopyError::source_at(0, 0, error))?;
    let Some((start, end)) = options.window else {
        return copy_all(source, len, target.into(), options);
    };
    let (start, end) = (start.min(len), end.min(len));
    let window = Slice::new(source, start, end - start);
    let window = window.map_err(|error| CopyError::source_at(start, end - start, error))?;
    let copied = copy_all(&window, end - start, target.into(), options);
    // Places are told as the caller knows them.
    match copied {
        Ok(mut report) => {
            report.lost.moved(start);
            report.unmapped.moved(start);
            Ok(report)
        }
        Err(CopyError::Source {
            offset,
            len,
            source,
        }) => Err(CopyError::source_at(start + offset, len, source)),
        Err(error) => Err(error),
    }
}

fn copy_all(
    source: &dyn Storage,
    len: u64,
    target: Target<'_>,
    options: &CopyOptions<'_>,
) -> Result<CopyReport, CopyError> {
    if let Some(checkpoint) = options.resume.filter(|checkpoint| checkpoint.len != len) {
        let (found, expected) = (checkpoint.len, len);
        return Err(CopyError::Checkpoint { found, expected });
    }
    let place = Place::prepare(target, len, options)?;
    let run = Run::new(source, len, place, options);
    let threads = options.thread_count();
    if options.is_ordered() {
        let order = Order::new(&run, threads);
        on_threads(threads, &|| order.work());
    } else {
        on_threads(threads, &|| worker::work(&run));
    }
    run.finish()
}
