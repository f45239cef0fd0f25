//! What can go wrong with metadata.

use std::fmt;

use qcow2_format::{HeaderError, HostCluster, HostOffset};
use qcow2_io::StorageError;
use thiserror::Error;

use crate::{Kinds, TooMuchMetadata};

/// A failed operation on metadata, or on guest data in the image file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A write would have hit metadata. The image is marked as corrupt and takes no more writes.
    #[error(
        "a write of {len} bytes at {offset} would overwrite {kinds} in cluster {cluster}; the image is corrupt and takes no more writes"
    )]
    Overlap {
        /// First byte of the write that was stopped.
        offset: HostOffset,
        /// Its length in bytes.
        len: u64,
        /// The cluster with metadata.
        cluster: HostCluster,
        /// What it holds.
        kinds: Kinds,
    },
    /// What was to be handed out holds metadata, although its refcount is 0. The image is marked as corrupt and takes no more writes.
    #[error(
        "the refcount of the cluster at {offset} is corrupt: it is 0, but {kinds} is in cluster {cluster}"
    )]
    InUse {
        /// Where the cluster lies in the file.
        offset: HostOffset,
        /// Its number.
        cluster: HostCluster,
        /// What it holds.
        kinds: Kinds,
        /// What it was to be for.
        wanted: Purpose,
    },
    /// An entry makes no sense. If the image is writable, it is marked as corrupt and takes no more writes.
    #[error("{what} at {offset} is corrupt: {detail}")]
    Corrupt {
        /// Which structure.
        what: &'static str,
        /// Where it lies in the file.
        offset: HostOffset,
        /// What is wrong with it.
        detail: String,
    },
    /// An entry of a table points at where what it should point at can't lie. If the image is writable, it is marked as corrupt and
    /// takes no more writes.
    #[error("{what} {index} at {offset} is corrupt: it points at {found}")]
    BadPointer {
        /// What kind of entry.
        what: PointerKind,
        /// Its index in the table.
        index: u64,
        /// Where the entry lies in the file.
        offset: HostOffset,
        /// What it points at.
        found: HostOffset,
    },
    /// The image has been found corrupt before, or a flush has failed and nobody knows what of the writes before it is there.
    #[error("the image takes no more writes, after what went wrong before")]
    Poisoned,
    /// The image is open for reading only.
    #[error("the image is open for reading only")]
    ReadOnly,
    /// The header can't be written.
    #[error("the header can't be written")]
    Header(#[from] HeaderError),
    /// Too much metadata to keep track of.
    #[error(transparent)]
    TooMuchMetadata(#[from] TooMuchMetadata),
    /// A flush that this one shared has failed.
    #[error("{0}")]
    Shared(String),
}

/// What a cluster is handed out for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Purpose {
    /// An L2 table.
    L2Table,
    /// A refcount block.
    RefcountBlock,
    /// Compressed data.
    Compressed,
    /// Anything else: data, or a table of another kind.
    Other,
}

/// An entry that points at a cluster of metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PointerKind {
    /// An entry of the refcount table, which points at a refcount block.
    RefcountTable,
    /// An entry of an L1 table, which points at an L2 table.
    L1,
}

impl fmt::Display for PointerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RefcountTable => "refcount table entry",
            Self::L1 => "L1 entry",
        })
    }
}

impl MetadataError {
    /// The same error for another who waited for the same thing.
    pub(crate) fn share(&self) -> Self {
        match self {
            Self::Poisoned => Self::Poisoned,
            Self::ReadOnly => Self::ReadOnly,
            Self::Storage(error) => {
                let mut copy = StorageError::new(error.operation(), error.kind());
                if let (Some(offset), len) = (error.offset(), error.len_bytes()) {
                    copy = copy.at(offset, len.unwrap_or(0));
                }
                if let Some(path) = error.path() {
                    copy = copy.in_path(path);
                }
                Self::Storage(copy)
            }
            other => Self::Shared(other.to_string()),
        }
    }
}
