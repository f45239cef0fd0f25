//! Why an image can't be opened or used.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use qcow2_alloc::AllocError;
use qcow2_cache::MetadataError;
use qcow2_check::chain::Unresolved;
use qcow2_format::header::CryptMethod;
use qcow2_format::{GuestOffset, HeaderError, HostOffset, SnapshotError};
use qcow2_io::codec::CodecError;
use qcow2_io::{Operation, StorageError, StorageErrorKind};
use thiserror::Error;

/// A failed operation on an image.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The storage of the image, its data file or its backing file failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Metadata can't be read or written, or is corrupt.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// No cluster can be had.
    #[error(transparent)]
    Alloc(#[from] AllocError),
    /// The header can't be used.
    #[error("the header is refused")]
    Header(#[from] HeaderError),
    /// The image is marked as corrupt, and was to be opened for writing.
    #[error("the image is marked as corrupt; it can be opened read-only, or repaired")]
    MarkedCorrupt,
    /// Guest data is encrypted, and this build has no ciphers.
    #[error("the image is encrypted ({method}), which needs the feature `encryption`")]
    Encrypted {
        /// How.
        method: CryptMethod,
    },
    /// Guest data is encrypted, and no secret was given.
    #[error("the image is encrypted ({method}) and needs a secret")]
    SecretMissing {
        /// How.
        method: CryptMethod,
    },
    /// A secret was given for an image that is not encrypted.
    #[error("a secret was given, but the image is not encrypted")]
    NeedlessSecret,
    /// The encrypted image can't be unlocked.
    #[cfg(feature = "encryption")]
    #[error("the encrypted image can't be unlocked")]
    Luks(#[from] crate::luks::LuksError),
    /// A cipher refuses.
    #[cfg(feature = "encryption")]
    #[error(transparent)]
    Cipher(#[from] qcow2_io::cipher::CipherError),
    /// A name in the image leads nowhere.
    #[error("the {what} can't be opened")]
    Reference {
        /// What is named: backing file or data file.
        what: &'static str,
        /// Why.
        source: Unresolved,
    },
    /// A file that the image names can't be opened.
    #[error("the {what} {path:?} can't be opened")]
    Referenced {
        /// What is named: backing file or data file.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: Box<ImageError>,
    },
    /// A file that an image names is a layer of the chain already.
    #[error("it is part of the chain already")]
    InChain,
    /// The chain has too many layers.
    #[error("the chain has more than {max} layers")]
    Deep {
        /// Layers allowed.
        max: usize,
    },
    /// The backing file's format is none of those known.
    #[error("the backing file has the unknown format {format:?}")]
    BackingFormat {
        /// Its name, what is not UTF-8 replaced.
        format: String,
    },
    /// The image keeps guest data in a file of its own, and does not name it.
    #[error("the image keeps its data in another file but does not name it; it must be given")]
    NoDataFile,
    /// A data file was given for an image that has none.
    #[error("a data file was given, but the image has none")]
    NeedlessDataFile,
    /// The image has no such snapshot.
    #[error("there is no snapshot '{key}'")]
    NoSnapshot {
        /// Id or name, what is not printable escaped.
        key: String,
    },
    /// The image has no such bitmap.
    #[error("there is no bitmap '{name}'")]
    NoBitmap {
        /// Its name, what is not printable escaped.
        name: String,
    },
    /// The bitmap can't be used for this.
    #[error("the bitmap '{name}' can't be used: {why}")]
    BitmapUnusable {
        /// Its name, what is not printable escaped.
        name: String,
        /// Why.
        why: String,
    },
    /// At the end bitmaps did not get the new places that they were to get. All stay in use, so whoever opens the image next takes them
    /// for inconsistent.
    #[error("the bitmaps can't be stored{}", of_bitmap(name.as_deref()))]
    BitmapsLost {
        /// The one that could not be written, what is not printable escaped; `None` if it was their directory.
        name: Option<String>,
        /// Why.
        source: Box<ImageError>,
    },
    /// The snapshot table can't be used.
    #[error("the snapshot table is refused")]
    Snapshots(#[from] SnapshotError),
    /// The snapshot table can't be read on from an entry.
    #[error("entry {entry} of the snapshot table's {count} is refused")]
    SnapshotEntry {
        /// Which one, counted from 0. It and those behind it are not known.
        entry: u64,
        /// How many the header counts.
        count: u64,
        /// Why.
        source: SnapshotError,
    },
    /// No L1 table of a snapshot can be as long as this one, or where it is.
    #[error("the L1 table of a snapshot, {entries} entries at {offset}, is refused: {problem}")]
    SnapshotL1 {
        /// Where it would lie in the file.
        offset: HostOffset,
        /// How many entries it would have.
        entries: u32,
        /// Why not.
        problem: SnapshotL1Problem,
    },
    /// Something points at a cluster that has no refcount, for there is no block that would hold it.
    #[error("something points at the cluster at {offset}, which no refcount block counts")]
    Uncounted {
        /// First byte of the cluster in the file.
        offset: HostOffset,
        /// Whether a refcount table can be so long that there could be a block.
        can_be_counted: bool,
    },
    /// The refcounts of an image that was not closed can't be put right, since more than those is wrong.
    #[error("the image was not closed, and its refcounts can't be recovered: {detail}")]
    Unrecoverable {
        /// What else is wrong.
        detail: String,
    },
    /// Compressed data can't be read.
    #[error("the compressed cluster at guest offset {guest} can't be read")]
    Compressed {
        /// First byte of the cluster.
        guest: GuestOffset,
        /// Why.
        source: CodecError,
    },
    /// A cluster can't be compressed.
    #[error("the cluster at guest offset {guest} can't be compressed")]
    Compress {
        /// First byte of the cluster.
        guest: GuestOffset,
        /// Why.
        source: CodecError,
    },
    /// A request for whole clusters has parts of some.
    #[error("{len} bytes at {offset} are not whole clusters of {unit} bytes")]
    Unaligned {
        /// First byte.
        offset: GuestOffset,
        /// Bytes.
        len: u64,
        /// Bytes of a cluster.
        unit: u64,
    },
    /// The request reaches beyond the end of the disk.
    #[error("a request of {len} bytes at {offset} reaches beyond the disk's {size} bytes")]
    OutOfRange {
        /// First byte.
        offset: GuestOffset,
        /// Bytes.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// The operation is not possible with this image, or was switched off.
    #[error("{what}")]
    Unsupported {
        /// What is not possible, and why.
        what: &'static str,
    },
    /// A value that an option does not take.
    #[error("{option} can't be {value}: {why}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What was asked for.
        value: String,
        /// What is allowed.
        why: String,
    },
    /// The image has so many snapshots or tables of them that not even their list can be kept.
    #[error("{what} at {offset} is refused: {detail}")]
    Refused {
        /// Which structure.
        what: &'static str,
        /// Where it lies in the file.
        offset: HostOffset,
        /// Why.
        detail: String,
    },
}

/// What is wrong with the L1 table of a snapshot, by what the snapshot table says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SnapshotL1Problem {
    /// It has more bytes than any L1 table may have.
    #[error("it is too large")]
    TooLarge,
    /// It does not start at a cluster, or ends behind all that can be addressed.
    #[error("it can't lie there")]
    Place,
}

impl ImageError {
    /// Why it failed, coarse.
    pub fn kind(&self) -> StorageErrorKind {
        match self {
            Self::Storage(error)
            | Self::Metadata(MetadataError::Storage(error))
            | Self::Alloc(AllocError::Metadata(MetadataError::Storage(error))) => error.kind(),
            Self::Metadata(error) | Self::Alloc(AllocError::Metadata(error)) => match error {
                MetadataError::ReadOnly => StorageErrorKind::ReadOnly,
                _ => StorageErrorKind::Io,
            },
            Self::Alloc(
                AllocError::FileTooLarge { .. } | AllocError::RefcountTableTooLarge { .. },
            )
            | Self::OutOfRange { .. }
            | Self::SnapshotL1 {
                problem: SnapshotL1Problem::TooLarge,
                ..
            }
            | Self::Snapshots(_)
            | Self::SnapshotEntry {
                source: SnapshotError::ExtraDataTooLong { .. } | SnapshotError::TableTooLarge { .. },
                ..
            }
            | Self::Uncounted {
                can_be_counted: false,
                ..
            } => StorageErrorKind::OutOfRange,
            Self::Alloc(_) | Self::Compressed { .. } | Self::Compress { .. } => {
                StorageErrorKind::Io
            }
            Self::Unsupported { .. } | Self::Encrypted { .. } => StorageErrorKind::Unsupported,
            Self::Referenced { source, .. } | Self::BitmapsLost { source, .. } => source.kind(),
            _ => StorageErrorKind::Invalid,
        }
    }

    /// The same as an error of a storage, for a request at a place of the virtual disk.
    #[cold]
    pub(crate) fn into_storage_error(
        self,
        operation: Operation,
        offset: u64,
        len: u64,
    ) -> StorageError {
        match self {
            Self::Storage(error)
            | Self::Metadata(MetadataError::Storage(error))
            | Self::Alloc(AllocError::Metadata(MetadataError::Storage(error))) => error,
            // Callers may want to tell it from others.
            Self::Metadata(MetadataError::Poisoned)
            | Self::Alloc(AllocError::Metadata(MetadataError::Poisoned)) => {
                let (kind, detail) = (self.kind(), self.to_string());
                StorageError::from_io(operation, io::Error::other(self))
                    .with_kind(kind)
                    .at(offset, len)
                    .with_detail(detail)
            }
            Self::SnapshotL1 { .. } => {
                let kind = self.kind();
                StorageError::from_io(operation, io::Error::other(self))
                    .with_kind(kind)
                    .at(offset, len)
            }
            error => {
                let mut detail = error.to_string();
                let mut source = error.source();
                while let Some(cause) = source {
                    detail.push_str(": ");
                    detail.push_str(&cause.to_string());
                    source = cause.source();
                }
                StorageError::new(operation, error.kind())
                    .at(offset, len)
                    .with_detail(detail)
            }
        }
    }
}

/// The end of a sentence that names a bitmap.
fn of_bitmap(name: Option<&str>) -> String {
    name.map_or_else(String::new, |name| format!(": '{name}'"))
}
