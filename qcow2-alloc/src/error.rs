//! Why clusters can't be had or given back.

use qcow2_cache::MetadataError;
use qcow2_format::HostCluster;
use thiserror::Error;

/// A failed operation of the allocator. Nothing was changed, unless the storage failed in the middle; then at most space is
/// lost.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AllocError {
    /// Metadata can't be read or written, or is corrupt.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// A refcount can't get larger than its width allows.
    #[error("the refcount of cluster {cluster} is {value}, the largest that its {bits} bits hold")]
    RefcountOverflow {
        /// The cluster.
        cluster: HostCluster,
        /// Its refcount.
        value: u64,
        /// Bits in a refcount.
        bits: u32,
    },
    /// A cluster was to be taken that is in use.
    #[error("cluster {cluster} was to be taken, but its refcount is {value}")]
    InUse {
        /// The cluster.
        cluster: HostCluster,
        /// Its refcount.
        value: u64,
    },
    /// No host offset that an entry can hold is left.
    #[error(
        "the image file would grow beyond {limit} bytes, the largest offset that the format can express"
    )]
    FileTooLarge {
        /// First byte that can't be used.
        limit: u64,
    },
    /// The refcount table can't get larger.
    #[error("the refcount table would need {needed} bytes, the format allows {limit}")]
    RefcountTableTooLarge {
        /// Bytes that would be needed.
        needed: u64,
        /// Bytes allowed.
        limit: u64,
    },
}

impl From<qcow2_io::StorageError> for AllocError {
    fn from(error: qcow2_io::StorageError) -> Self {
        Self::Metadata(error.into())
    }
}

impl From<qcow2_cache::TooMuchMetadata> for AllocError {
    fn from(error: qcow2_cache::TooMuchMetadata) -> Self {
        Self::Metadata(error.into())
    }
}
