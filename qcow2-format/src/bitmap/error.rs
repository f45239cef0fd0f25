use thiserror::Error;

use crate::HostOffset;

/// A fact about a bitmap directory that breaks a rule.
///
/// An image with one of these, unless [said otherwise](Self::is_refused), can't be opened by QEMU at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// The directory ends inside an entry.
    #[error("the entry needs {needed} bytes, the directory has {available} left")]
    Truncated {
        /// Bytes the entry needs, as far as can be told.
        needed: u64,
        /// Bytes left in the directory.
        available: u64,
    },
    /// The directory ends before the last entry.
    #[error("the directory has {found} entries, the header counts {expected}")]
    TooFew {
        /// Entries in the directory.
        found: u32,
        /// Entries that the header counts.
        expected: u32,
    },
    /// The directory goes on after the last entry.
    #[error("the directory has {left} bytes behind its last entry")]
    TrailingBytes {
        /// Bytes behind the entries.
        left: u64,
    },
    /// The bitmap table lies nowhere.
    #[error("the bitmap table's offset is 0")]
    TableOffsetZero,
    /// The bitmap table doesn't start at a cluster.
    #[error(
        "the bitmap table starts at {found}, no multiple of the cluster size {cluster_size:#x}"
    )]
    TableUnaligned {
        /// Its host offset.
        found: HostOffset,
        /// Bytes in a cluster.
        cluster_size: u64,
    },
    /// The bitmap table has no entry.
    #[error("the bitmap table has no entry")]
    TableEmpty,
    /// The bitmap table has too many entries.
    #[error("the bitmap table has {found} entries, at most {limit} are allowed")]
    TableTooLarge {
        /// Its entries.
        found: u32,
        /// Largest number at this cluster size.
        limit: u32,
    },
    /// The bitmap table doesn't cover the disk, though the bitmap is said to be valid.
    #[error("the bitmap table has {found} entries, the disk needs {needed}")]
    TableTooShort {
        /// Its entries.
        found: u32,
        /// Entries to cover the disk.
        needed: u64,
    },
    /// The bitmap table covers more than the disk, though the bitmap is said to be valid.
    #[error("the bitmap table has {found} entries, the disk needs only {needed}")]
    TableTooLong {
        /// Its entries.
        found: u32,
        /// Entries to cover the disk.
        needed: u64,
    },
    /// Reserved flags are set.
    #[error("reserved flags {bits:#x} are set")]
    Flags {
        /// The reserved bits.
        bits: u32,
    },
    /// The flag for extra data that may be ignored, which QEMU doesn't know.
    #[error("the flag for compatible extra data is set")]
    ExtraDataFlag,
    /// An unknown type.
    #[error("the type is {found}, known is 1 (dirty tracking)")]
    Kind {
        /// The type.
        found: u8,
    },
    /// A granularity out of range.
    #[error("granularity_bits is {found}, allowed are {min} to {max}")]
    Granularity {
        /// Value in the entry.
        found: u8,
        /// Smallest value.
        min: u8,
        /// Largest value.
        max: u8,
    },
    /// A name that is too long.
    #[error("the name has {found} bytes, at most {limit} are allowed")]
    NameTooLong {
        /// Its length.
        found: u64,
        /// Largest length.
        limit: u64,
    },
    /// No name. QEMU reads such an image.
    #[error("the name is empty")]
    NameEmpty,
    /// Extra data, which nobody can interpret.
    #[error("there are {found} bytes of extra data")]
    ExtraData {
        /// Its length.
        found: u64,
    },
}

impl BitmapError {
    /// Whether QEMU refuses an image for this.
    pub const fn is_refused(&self) -> bool {
        !matches!(self, Self::NameEmpty)
    }
}
