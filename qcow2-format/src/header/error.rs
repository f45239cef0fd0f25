//! What can be wrong with a header.

use alloc::vec::Vec;
use core::fmt;

use thiserror::Error;

use super::FeatureName;
use crate::{GeometryError, HostOffset};

/// A table that the header points at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeaderTable {
    /// The refcount table.
    Refcount,
    /// The snapshot table.
    Snapshots,
    /// The active L1 table.
    L1,
}

impl fmt::Display for HeaderTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refcount => "refcount table",
            Self::Snapshots => "snapshot table",
            Self::L1 => "L1 table",
        })
    }
}

/// What a caller may do about a [`HeaderError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeaderErrorKind {
    /// The file is of another format.
    NotQcow2,
    /// The image is newer than this library.
    Unsupported,
    /// A field breaks a rule of the format.
    Invalid,
    /// A field is beyond a limit that keeps memory and time bounded.
    TooLarge,
    /// The header to be written doesn't fit in the first cluster.
    NoSpace,
}

/// A fact about a header that can't be read or written.
///
/// `offset` in a variant is the byte position of an extension in the file.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file doesn't start with the magic bytes.
    #[error("the file starts with the bytes {:08x}, a qcow2 image with 514649fb", u32::from_be_bytes(*.found))]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// A version of the format that is unknown.
    #[error("version is {found}, known are 2 and 3")]
    Version {
        /// Value in the header.
        found: u32,
    },
    /// A field that no geometry can be made of.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// `header_length` out of range.
    #[error("header_length is {found}, allowed are {min} to {max}")]
    HeaderLength {
        /// Value in the header.
        found: u32,
        /// Bytes of the shortest header.
        min: u32,
        /// Bytes in a cluster.
        max: u64,
    },
    /// `header_length` is no multiple of 8. QEMU reads such an image.
    #[error("header_length is {found}, no multiple of 8")]
    HeaderLengthUnaligned {
        /// Value in the header.
        found: u32,
    },
    /// The backing file name starts behind the first cluster.
    #[error("backing_file_offset is {found:#x}, the first cluster ends at {limit:#x}")]
    BackingNameOffset {
        /// Value in the header.
        found: u64,
        /// Bytes in a cluster.
        limit: u64,
    },
    /// The backing file name starts inside the fixed header. QEMU reads such an image.
    #[error("backing_file_offset is {found:#x}, the header ends at {header_length:#x}")]
    BackingNameInHeader {
        /// Value in the header.
        found: u64,
        /// Bytes of the header.
        header_length: u32,
    },
    /// The backing file name is too long, or runs out of the first cluster.
    #[error("backing_file_size is {found}, there is room for {limit}")]
    BackingNameTooLong {
        /// Length in bytes.
        found: u64,
        /// Largest length at this place.
        limit: u64,
    },
    /// A backing file beside a raw external data file, which can't show what is in the backing file. QEMU reads such
    /// an image.
    #[error("there is a backing file name, but a raw external data file can't have a backing file")]
    BackingWithRawExternal,
    /// An unknown compression type.
    #[error("compression_type is {found}, known are 0 (zlib) and 1 (zstd)")]
    CompressionType {
        /// Value in the header.
        found: u8,
    },
    /// The compression type and its feature bit contradict each other.
    #[error("compression_type is {found}, but its incompatible feature bit is {bit}", bit = u8::from(*.bit))]
    CompressionBit {
        /// Value in the header.
        found: u8,
        /// Whether the feature bit is set.
        bit: bool,
    },
    /// Features that must not be ignored and are unknown.
    #[error("unknown incompatible features {bits:#x}{}", Names(.names))]
    UnknownIncompatible {
        /// The unknown bits.
        bits: u64,
        /// What the image itself calls them.
        names: Vec<FeatureName>,
    },
    /// The refcount table has no cluster.
    #[error("refcount_table_clusters is 0")]
    RefcountTableEmpty,
    /// A table beyond its limit.
    #[error("the {table} has {found} {}, at most {limit} are allowed", table_unit(*.table))]
    TableTooLarge {
        /// Which table.
        table: HeaderTable,
        /// Clusters of the refcount table, entries of the others.
        found: u32,
        /// Largest such number.
        limit: u32,
    },
    /// A table that doesn't start at a cluster.
    #[error("the {table} starts at {found}, no multiple of the cluster size {cluster_size:#x}")]
    TableUnaligned {
        /// Which table.
        table: HeaderTable,
        /// Its host offset.
        found: HostOffset,
        /// Bytes in a cluster.
        cluster_size: u64,
    },
    /// A table whose end is beyond 2^63.
    #[error("the {table} starts at {found} and has {len_bytes} bytes, beyond 2^63")]
    TableEnd {
        /// Which table.
        table: HeaderTable,
        /// Its host offset.
        found: HostOffset,
        /// Its length in bytes.
        len_bytes: u64,
    },
    /// A virtual size that no L1 table can map.
    #[error("the virtual size {found} needs {needed} L1 entries, at most {limit} can be")]
    VirtualSize {
        /// Value in the header.
        found: u64,
        /// L1 entries to map it.
        needed: u64,
        /// Largest number of L1 entries.
        limit: u64,
    },
    /// The L1 table doesn't map the whole disk.
    #[error("l1_size is {found}, the virtual size needs {needed}")]
    L1TooSmall {
        /// Entries in the table.
        found: u32,
        /// Entries that the virtual size needs.
        needed: u64,
    },
    /// An unknown encryption.
    #[error("crypt_method is {found}, known are 0 (none), 1 (AES) and 2 (LUKS)")]
    CryptMethod {
        /// Value in the header.
        found: u32,
    },
    /// The area of extensions ends inside the first 8 bytes of one.
    #[error("the extension at {offset:#x} has {available} bytes left, its type and length need 8")]
    ExtensionCut {
        /// Where it starts.
        offset: u64,
        /// Bytes left in the area.
        available: u64,
    },
    /// An extension longer than the area of extensions.
    #[error(
        "the extension {extension:#010x} at {offset:#x} has {found} bytes, {available} are left"
    )]
    ExtensionTooLong {
        /// Where it starts.
        offset: u64,
        /// Its type.
        extension: u32,
        /// Its length.
        found: u32,
        /// Bytes left in the area.
        available: u64,
    },
    /// An extension that should occur once and comes again. QEMU takes the last.
    #[error("the extension {extension:#010x} comes again at {offset:#x}")]
    ExtensionRepeated {
        /// Where it starts.
        offset: u64,
        /// Its type.
        extension: u32,
    },
    /// The backing format's name is too long.
    #[error("the backing format has {found} bytes, at most {limit} are allowed")]
    BackingFormatTooLong {
        /// Where the extension starts.
        offset: u64,
        /// Its length.
        found: u64,
        /// Largest length.
        limit: u64,
    },
    /// The encryption extension has another length than 16.
    #[error("the encryption extension has {found} bytes instead of 16")]
    CryptoLength {
        /// Where the extension starts.
        offset: u64,
        /// Its length.
        found: u32,
    },
    /// An encryption extension without LUKS.
    #[error("there is an encryption extension, but crypt_method is {crypt_method}")]
    CryptoUnexpected {
        /// Where the extension starts.
        offset: u64,
        /// Value in the header.
        crypt_method: u32,
    },
    /// The LUKS header doesn't start at a cluster.
    #[error("the LUKS header starts at {found}, no multiple of the cluster size {cluster_size:#x}")]
    CryptoUnaligned {
        /// Where the extension starts.
        offset: u64,
        /// Host offset of the LUKS header.
        found: HostOffset,
        /// Bytes in a cluster.
        cluster_size: u64,
    },
    /// LUKS without the extension that says where its header is.
    #[error("crypt_method is 2 (LUKS), but there is no encryption extension")]
    CryptoMissing,
    /// The bitmaps extension has another length than 24.
    #[error("the bitmaps extension has {found} bytes instead of 24")]
    BitmapsLength {
        /// Where the extension starts.
        offset: u64,
        /// Its length.
        found: u32,
    },
    /// The bitmaps extension's reserved field is not 0.
    #[error("the bitmaps extension's reserved field is {found:#x} instead of 0")]
    BitmapsReserved {
        /// Where the extension starts.
        offset: u64,
        /// Its value.
        found: u32,
    },
    /// No bitmap, or too many.
    #[error("the bitmaps extension counts {found} bitmaps, allowed are 1 to {limit}")]
    BitmapsCount {
        /// Where the extension starts.
        offset: u64,
        /// Its value.
        found: u32,
        /// Largest number.
        limit: u32,
    },
    /// The bitmap directory is too long.
    #[error("the bitmap directory has {found} bytes, at most {limit} are allowed")]
    BitmapsDirectoryTooLarge {
        /// Where the extension starts.
        offset: u64,
        /// Length of the directory.
        found: u64,
        /// Largest length.
        limit: u64,
    },
    /// The bitmap directory doesn't start at a cluster.
    #[error(
        "the bitmap directory starts at {found}, no multiple of the cluster size {cluster_size:#x}"
    )]
    BitmapsDirectoryUnaligned {
        /// Where the extension starts.
        offset: u64,
        /// Host offset of the directory.
        found: HostOffset,
        /// Bytes in a cluster.
        cluster_size: u64,
    },
    /// The feature bit of bitmaps is set, but there is no bitmaps extension. QEMU reads such an image.
    #[error("the autoclear feature bit for bitmaps is set, but there is no bitmaps extension")]
    BitmapsMissing,
    /// Raw external data without external data.
    #[error("the external data file is said to be raw, but there is no external data file")]
    RawExternalWithoutData,
    /// The header to be written is longer than a cluster.
    #[error("the header needs {needed} bytes, a cluster has {available}")]
    NoSpace {
        /// Bytes of header, extensions and backing file name.
        needed: u64,
        /// Bytes in a cluster.
        available: u64,
    },
    /// A header to be written says one thing in two fields, and differently.
    #[error("{field} is {found}, the rest of the header needs {expected}")]
    Contradiction {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// The value that would agree.
        expected: u64,
    },
}

impl HeaderError {
    /// What a caller may do about it.
    pub const fn kind(&self) -> HeaderErrorKind {
        match self {
            Self::Magic { .. } => HeaderErrorKind::NotQcow2,
            Self::Version { .. }
            | Self::CompressionType { .. }
            | Self::UnknownIncompatible { .. } => HeaderErrorKind::Unsupported,
            Self::TableTooLarge { .. } | Self::VirtualSize { .. } => HeaderErrorKind::TooLarge,
            Self::NoSpace { .. } => HeaderErrorKind::NoSpace,
            _ => HeaderErrorKind::Invalid,
        }
    }

    /// Whether [`Header::decode`](super::Header::decode) (and QEMU at open) refuses an image for this. The others only
    /// break a rule of the format.
    pub const fn is_refused(&self) -> bool {
        !matches!(
            self,
            Self::HeaderLengthUnaligned { .. }
                | Self::BackingNameInHeader { .. }
                | Self::BackingWithRawExternal
                | Self::ExtensionRepeated { .. }
                | Self::BitmapsMissing
        )
    }

    /// Name of the field that is wrong, as the format calls it.
    pub const fn field(&self) -> &'static str {
        match self {
            Self::Magic { .. } => "magic",
            Self::Version { .. } => "version",
            Self::Geometry(GeometryError::RefcountOrder { .. }) => "refcount_order",
            Self::Geometry(_) => "cluster_bits",
            Self::HeaderLength { .. } | Self::HeaderLengthUnaligned { .. } => "header_length",
            Self::BackingNameOffset { .. }
            | Self::BackingNameInHeader { .. }
            | Self::BackingWithRawExternal => "backing_file_offset",
            Self::BackingNameTooLong { .. } => "backing_file_size",
            Self::CompressionType { .. } | Self::CompressionBit { .. } => "compression_type",
            Self::UnknownIncompatible { .. } => "incompatible_features",
            Self::RefcountTableEmpty
            | Self::TableTooLarge {
                table: HeaderTable::Refcount,
                ..
            } => "refcount_table_clusters",
            Self::TableTooLarge {
                table: HeaderTable::Snapshots,
                ..
            } => "nb_snapshots",
            Self::TableTooLarge {
                table: HeaderTable::L1,
                ..
            }
            | Self::L1TooSmall { .. } => "l1_size",
            Self::TableUnaligned { table, .. } | Self::TableEnd { table, .. } => match table {
                HeaderTable::Refcount => "refcount_table_offset",
                HeaderTable::Snapshots => "snapshots_offset",
                HeaderTable::L1 => "l1_table_offset",
            },
            Self::VirtualSize { .. } => "size",
            Self::CryptMethod { .. } | Self::CryptoMissing => "crypt_method",
            Self::ExtensionCut { .. }
            | Self::ExtensionTooLong { .. }
            | Self::ExtensionRepeated { .. } => "header extensions",
            Self::BackingFormatTooLong { .. } => "backing format extension",
            Self::CryptoLength { .. }
            | Self::CryptoUnexpected { .. }
            | Self::CryptoUnaligned { .. } => "encryption extension",
            Self::BitmapsLength { .. }
            | Self::BitmapsReserved { .. }
            | Self::BitmapsCount { .. }
            | Self::BitmapsDirectoryTooLarge { .. }
            | Self::BitmapsDirectoryUnaligned { .. } => "bitmaps extension",
            Self::BitmapsMissing | Self::RawExternalWithoutData => "autoclear_features",
            Self::NoSpace { .. } => "header",
            Self::Contradiction { field, .. } => field,
        }
    }

    /// Byte offset in the file of the field or extension that is wrong; 0 for the header as a whole.
    pub const fn offset(&self) -> u64 {
        match self {
            Self::ExtensionCut { offset, .. }
            | Self::ExtensionTooLong { offset, .. }
            | Self::ExtensionRepeated { offset, .. }
            | Self::BackingFormatTooLong { offset, .. }
            | Self::CryptoLength { offset, .. }
            | Self::CryptoUnexpected { offset, .. }
            | Self::CryptoUnaligned { offset, .. }
            | Self::BitmapsLength { offset, .. }
            | Self::BitmapsReserved { offset, .. }
            | Self::BitmapsCount { offset, .. }
            | Self::BitmapsDirectoryTooLarge { offset, .. }
            | Self::BitmapsDirectoryUnaligned { offset, .. } => *offset,
            Self::Magic { .. } | Self::NoSpace { .. } | Self::Contradiction { .. } => 0,
            Self::Version { .. } => 4,
            Self::BackingNameOffset { .. }
            | Self::BackingNameInHeader { .. }
            | Self::BackingWithRawExternal => 8,
            Self::BackingNameTooLong { .. } => 16,
            Self::Geometry(GeometryError::RefcountOrder { .. }) => 96,
            Self::Geometry(_) => 20,
            Self::VirtualSize { .. } => 24,
            Self::CryptMethod { .. } | Self::CryptoMissing => 32,
            Self::L1TooSmall { .. } => 36,
            Self::TableTooLarge { table, .. } => match table {
                HeaderTable::Refcount => 56,
                HeaderTable::Snapshots => 60,
                HeaderTable::L1 => 36,
            },
            Self::TableUnaligned { table, .. } | Self::TableEnd { table, .. } => match table {
                HeaderTable::Refcount => 48,
                HeaderTable::Snapshots => 64,
                HeaderTable::L1 => 40,
            },
            Self::RefcountTableEmpty => 56,
            Self::UnknownIncompatible { .. } => 72,
            Self::BitmapsMissing | Self::RawExternalWithoutData => 88,
            Self::HeaderLength { .. } | Self::HeaderLengthUnaligned { .. } => 100,
            Self::CompressionType { .. } | Self::CompressionBit { .. } => 104,
        }
    }
}

const fn table_unit(table: HeaderTable) -> &'static str {
    match table {
        HeaderTable::Refcount => "clusters",
        HeaderTable::Snapshots | HeaderTable::L1 => "entries",
    }
}

/// The names of features behind a message, or nothing.
struct Names<'a>(&'a [FeatureName]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = ": ";
        for name in self.0 {
            write!(f, "{before}{}", name.name().escape_ascii())?;
            before = ", ";
        }
        Ok(())
    }
}
