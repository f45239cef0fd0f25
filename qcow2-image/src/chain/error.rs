//! Why work on a chain did not get done.

use qcow2_io::StorageError;
use thiserror::Error;

use crate::ImageError;

/// Work on a chain that failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChainError {
    /// An image can't be used for it, or its metadata can't be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// What is to be stored, or compared, can't be read.
    #[error("the {what} can't be read at offset {offset:#x} ({len} bytes)")]
    Read {
        /// Which disk.
        what: &'static str,
        /// First byte of the piece that was asked for.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Why.
        source: StorageError,
    },
    /// It can't be stored.
    #[error("the {what} can't be written at offset {offset:#x} ({len} bytes)")]
    Write {
        /// Which disk.
        what: &'static str,
        /// First byte of the piece that was to be written.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Why.
        source: Box<ImageError>,
    },
    /// All that was to go into the base is there, but what it came from keeps it, too.
    #[error("all is in the base, but the overlay can't be emptied")]
    Emptying(#[source] ImageError),
    /// The chain is not so deep.
    #[error("there is no layer {depth}: the chain has {layers}")]
    NoLayer {
        /// The layer that was asked for.
        depth: usize,
        /// Layers of the chain.
        layers: usize,
    },
    /// What is to be stored does not fit into the target.
    #[error("the disk has {source_len} bytes, the target only {target_len}")]
    TooSmall {
        /// Bytes of the disk.
        source_len: u64,
        /// Bytes of the target.
        target_len: u64,
    },
    /// The [monitor](crate::Monitor) has ended it.
    #[error("the work was cancelled")]
    Cancelled,
}
