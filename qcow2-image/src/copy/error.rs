//! Why a copy did not get done.

use qcow2_io::StorageError;
use thiserror::Error;

use crate::ImageError;

/// A copy that failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The source can't tell its length or where its data is, or can't be read.
    #[error("the source fails at offset {offset:#x} ({len} bytes)")]
    Source {
        /// First byte of the piece that was asked for.
        offset: u64,
        /// Its length in bytes; 0 if the request had no place.
        len: u64,
        /// Why.
        source: StorageError,
    },
    /// The target can't be written.
    #[error("the target fails at offset {offset:#x} ({len} bytes)")]
    Target {
        /// First byte of the disk, of the piece that was to be written.
        offset: u64,
        /// Its length in bytes; 0 if the request had no place.
        len: u64,
        /// Why.
        source: Box<ImageError>,
    },
    /// The source does not fit into the target.
    #[error("the source has {source_len} bytes, the target only {target_len}")]
    TooSmall {
        /// Bytes of the source.
        source_len: u64,
        /// Bytes of the target.
        target_len: u64,
    },
    /// Something that is no qcow2 image was to be compressed.
    #[error("only images hold compressed data")]
    NotAnImage,
    /// A size in the options is none that can be worked with.
    #[error("{option} can't be {value}: {why}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What was asked for.
        value: u64,
        /// What is allowed.
        why: &'static str,
    },
    /// A copy is to be taken up whose source was not as long.
    #[error("the checkpoint is of a copy of {found} bytes, not of {expected}")]
    Checkpoint {
        /// Bytes that were to be copied then.
        found: u64,
        /// Bytes that are to be copied now.
        expected: u64,
    },
    /// Options that contradict each other.
    #[error("{0} can't go together")]
    Options(&'static str),
    /// The [monitor](super::Monitor) has ended it.
    #[error("the copy was cancelled")]
    Cancelled,
}

impl CopyError {
    pub(super) fn source_at(offset: u64, len: u64, source: StorageError) -> Self {
        Self::Source {
            offset,
            len,
            source,
        }
    }

    pub(super) fn target_at(offset: u64, len: u64, source: impl Into<ImageError>) -> Self {
        Self::Target {
            offset,
            len,
            source: Box::new(source.into()),
        }
    }
}
