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

mod error;
mod options;
mod order;
mod pack;
mod plan;
mod run;
mod target;
mod worker;
mod zeros;

use qcow2_io::Storage;

use self::order::Order;
use self::run::Run;
use self::target::Place;
use crate::threads::on_threads;

pub use error::CopyError;
pub use options::{CopyOptions, Monitor};
pub use target::Target;

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopyReport {
    /// Length of the source in bytes.
    pub len_bytes: u64,
    /// Bytes that were read from it: where it did not know that it has zeros.
    pub read_bytes: u64,
    /// Bytes of the disk that were stored as data, compressed or not.
    pub stored_bytes: u64,
    /// Bytes that those take which were compressed.
    pub compressed_bytes: u64,
    /// Clusters that were compressed.
    pub compressed_clusters: u64,
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
    let place = Place::prepare(target.into(), len, options)?;
    let run = Run::new(source, len, place, options);
    match place.packing() {
        None => {
            on_threads(options.thread_count(), &|| worker::work(&run));
        }
        Some((image, level)) => {
            let threads = options.thread_count();
            let order = Order::new(&run, image, level, threads);
            on_threads(threads, &|| order.work());
        }
    }
    run.finish()
}
