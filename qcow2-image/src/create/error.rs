//! Why an image can't be created.

use qcow2_format::HeaderError;
use qcow2_io::StorageError;

use super::Preallocation;

/// What a caller may do about a [`CreateError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CreateErrorKind {
    /// Another value, or another combination of options, is needed.
    Invalid,
    /// The image would be beyond a limit of the format: less size, or larger clusters.
    TooLarge,
    /// The storage is too small, or failed.
    Storage,
}

/// A reason for which an image isn't created. Options are named as on the command line of `qemu-img create -o`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// There is no option of this name.
    #[error("there is no option '{option}' for new qcow2 images")]
    UnknownOption {
        /// The name.
        option: String,
    },
    /// The option is about something that this build doesn't have.
    #[error("{option} needs the feature `{feature}`, which this build doesn't have")]
    NeedsFeature {
        /// The option.
        option: String,
        /// The feature of this crate.
        feature: &'static str,
    },
    /// There are options or a secret for encryption, but no format.
    #[error("options or a secret for encryption need encrypt.format: luks or aes")]
    EncryptionFormatMissing,
    /// An image is to be encrypted without a secret.
    #[error("an encrypted image needs a secret")]
    SecretMissing,
    /// A secret that QEMU would refuse.
    #[error("the secret is no text: QEMU opens images only with UTF-8 without a NUL")]
    SecretNotText,
    /// Options of LUKS for the format that has none.
    #[error("encrypt.format=aes has no options: it is always AES-128-CBC")]
    NotForAes,
    /// Both the guest's data in clear text and not.
    #[error(
        "data_file_raw=on and encryption exclude each other: the data file would be no raw image"
    )]
    RawAndEncrypted,
    /// Options of LUKS that don't go together, or a storage that failed.
    #[cfg(feature = "encryption")]
    #[error("the LUKS area can't be made")]
    Luks(#[from] crate::luks::LuksError),
    /// A cipher refuses.
    #[cfg(feature = "encryption")]
    #[error(transparent)]
    Cipher(#[from] qcow2_io::cipher::CipherError),
    /// A value that is no size.
    #[error(
        "{option} is '{value}', expected a number of bytes below 2^64, perhaps with a suffix k, M, G, T, P or E"
    )]
    NotASize {
        /// Option.
        option: &'static str,
        /// Its value.
        value: String,
    },
    /// A value that is no number.
    #[error("{option} is '{value}', expected a number")]
    NotANumber {
        /// Option.
        option: &'static str,
        /// Its value.
        value: String,
    },
    /// A value that is none of those that the option knows.
    #[error("{option} is '{value}', allowed are {allowed}")]
    UnknownValue {
        /// Option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What there is to choose from.
        allowed: &'static str,
    },
    /// Nobody said how large the disk is.
    #[error("size is missing")]
    SizeMissing,
    /// More than the L1 table can map, or than offsets can express.
    #[error("size is {size}, at most {limit} bytes are possible with cluster_size={cluster_size}{}",
        if *.extended_l2 { " and extended_l2=on" } else { "" })]
    SizeTooLarge {
        /// Virtual size in bytes.
        size: u64,
        /// Bytes in a cluster.
        cluster_size: u64,
        /// Whether L2 entries are extended, which halves what a table maps.
        extended_l2: bool,
        /// Largest virtual size in bytes.
        limit: u64,
    },
    /// Clusters of an impossible size.
    #[error("cluster_size is {found}, allowed are powers of two from 512 to 2097152 bytes")]
    ClusterSize {
        /// The value in bytes.
        found: u64,
    },
    /// Clusters too small to be divided into 32 subclusters of a sector each.
    #[error("cluster_size is {found}, extended_l2=on needs 16384 bytes or more")]
    ExtendedClusterSize {
        /// The value in bytes.
        found: u64,
    },
    /// Refcounts of an impossible width.
    #[error("refcount_bits is {found}, allowed are 1, 2, 4, 8, 16, 32 and 64")]
    RefcountBits {
        /// The value in bits.
        found: u64,
    },
    /// Something that version 2 doesn't know.
    #[error("{option}={value} needs compat=1.1, it can't be had with compat=0.10")]
    NeedsVersion3 {
        /// Option.
        option: &'static str,
        /// Its value.
        value: String,
    },
    /// A backing file whose format would have to be guessed.
    #[error("backing_file needs backing_fmt, the format is not guessed")]
    BackingFormatMissing,
    /// The format of no file.
    #[error("backing_fmt needs backing_file")]
    BackingFileMissing,
    /// A name without a byte.
    #[error("{option} is empty")]
    NameEmpty {
        /// Option.
        option: &'static str,
    },
    /// A name that no reader would read to its end.
    #[error("{option} contains a zero byte")]
    NameWithZero {
        /// Option.
        option: &'static str,
    },
    /// A name longer than the format allows.
    #[error("{option} has {found} bytes, at most {limit} are allowed")]
    NameTooLong {
        /// Option.
        option: &'static str,
        /// Bytes of the name.
        found: u64,
        /// Largest number of bytes.
        limit: u64,
    },
    /// Names so long that header and names don't fit in one cluster.
    #[error("header and names need {needed} bytes, cluster_size is {available}")]
    HeaderSpace {
        /// Bytes of header, extensions and backing file name.
        needed: u64,
        /// Bytes in a cluster.
        available: u64,
    },
    /// Preallocated clusters would hide the backing file.
    #[error("preallocation={preallocation} with backing_file needs extended_l2=on")]
    PreallocatedOverlay {
        /// What was asked for.
        preallocation: Preallocation,
    },
    /// A promise about no file.
    #[error("data_file_raw=on needs data_file")]
    RawWithoutDataFile,
    /// The data file alone could not be the disk's content.
    #[error("data_file_raw=on can't be had with backing_file")]
    RawWithBackingFile,
    /// The options name a data file, the caller gave none.
    #[error("data_file is named, but no storage is given for it")]
    DataStorageMissing,
    /// The caller gave a data file that the options don't name.
    #[error("a storage is given for data_file, but data_file has no name")]
    DataFileNameMissing,
    /// The preallocated file would have more clusters than refcounts can be kept of.
    #[error(
        "preallocation={preallocation} needs a refcount table of more than {limit} bytes; larger clusters or fewer refcount_bits need less"
    )]
    RefcountTableTooLarge {
        /// How it should be preallocated.
        preallocation: Preallocation,
        /// Largest refcount table in bytes.
        limit: u64,
    },
    /// Preallocated clusters would lie beyond what an L2 entry can express.
    #[error("preallocation={preallocation} needs offsets of up to {end}, the limit is {limit}")]
    FileTooLarge {
        /// How it should be preallocated.
        preallocation: Preallocation,
        /// First byte behind the last cluster.
        end: u64,
        /// Where host offsets end.
        limit: u64,
    },
    /// A storage of fixed length that is too short.
    #[error("the {what} needs {needed} bytes, its storage keeps its length of {len}")]
    StorageTooSmall {
        /// The image or the data file.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes of the storage.
        len: u64,
    },
    /// The header can't be encoded.
    #[error("the header can't be written")]
    Header(#[from] HeaderError),
    /// The storage failed. What was in it is lost; what is in it now is no image.
    #[error("could not {action}")]
    Storage {
        /// What was about to be done.
        action: &'static str,
        /// Why it failed.
        source: StorageError,
    },
}

impl CreateError {
    /// What a caller may do about it.
    pub const fn kind(&self) -> CreateErrorKind {
        match self {
            Self::SizeTooLarge { .. }
            | Self::RefcountTableTooLarge { .. }
            | Self::FileTooLarge { .. } => CreateErrorKind::TooLarge,
            Self::StorageTooSmall { .. } | Self::Storage { .. } => CreateErrorKind::Storage,
            _ => CreateErrorKind::Invalid,
        }
    }

    /// Makes the storage's error one of ours, by what was about to be done.
    pub(crate) fn while_trying(action: &'static str) -> impl FnOnce(StorageError) -> Self {
        move |source| Self::Storage { action, source }
    }
}
