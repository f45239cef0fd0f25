//! The header: everything in the first cluster.

mod decode;
mod encode;
mod error;
pub mod extension;
mod feature;

use alloc::vec::Vec;

pub use decode::{MAX_BACKING_NAME_LEN, MAX_SNAPSHOTS};
pub use error::{HeaderError, HeaderErrorKind, HeaderTable};
pub use extension::{BitmapsExtension, CryptoExtension, Extension, FeatureName};
pub use feature::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, CryptMethod, IncompatibleFeatures,
    Version,
};

use crate::{EntryRules, Geometry, HostOffset};

/// What the first cluster of an image says.
///
/// The fields are those of the file; what they point at may lie anywhere. A header that [`decode`](Self::decode) gave
/// holds all limits; one that [`decode_for_check`](Self::decode_for_check) gave may break those that its list names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of the format.
    pub version: Version,
    /// Cluster size, refcount width and L2 entry size.
    pub geometry: Geometry,
    /// Virtual size in bytes, exactly as in the file; see [`virtual_size`](Self::virtual_size).
    pub virtual_size_raw: u64,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// Active L1 table; cluster-aligned, 0 only where it has no entry.
    pub l1_table_offset: HostOffset,
    /// Entries in the active L1 table; perhaps more than the virtual size needs.
    pub l1_entries: u32,
    /// Refcount table; cluster-aligned.
    pub refcount_table_offset: HostOffset,
    /// Clusters that the refcount table fills.
    pub refcount_table_clusters: u32,
    /// Entries in the snapshot table.
    pub snapshot_count: u32,
    /// Snapshot table; cluster-aligned, without meaning where there is no snapshot.
    pub snapshot_table_offset: HostOffset,
    /// Features without which the image can't be read.
    pub incompatible: IncompatibleFeatures,
    /// Features that may be ignored.
    pub compatible: CompatibleFeatures,
    /// Features that a writer must know or clear.
    pub autoclear: AutoclearFeatures,
    /// Bytes before the extensions: 72 in version 2, at least 104 in version 3.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// Bytes 105 to 111 as far as the header goes: zeros in any image of today.
    pub padding: [u8; 7],
    /// Bytes 112 up to `header_length`, to be kept.
    pub unknown_fields: Vec<u8>,
    /// Name of the backing file, never empty. Any bytes: an image's author chose them.
    pub backing_name: Option<Vec<u8>>,
    /// The extensions in the order of the file, without the end marker.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// Virtual size in bytes as a guest sees it: whole sectors of 512 bytes.
    pub const fn virtual_size(&self) -> u64 {
        self.virtual_size_raw & !511
    }

    /// What the meaning of this image's L2 entries depends on.
    pub fn entry_rules(&self) -> EntryRules {
        EntryRules {
            geometry: self.geometry,
            external_data: self.incompatible.external_data(),
            version2: self.version == Version::V2,
        }
    }

    /// Format name of the backing file. Of several extensions of a kind the last one counts, here and below.
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.last(|extension| match extension {
            Extension::BackingFormat(name) => Some(name.as_slice()),
            _ => None,
        })
    }

    /// Name of the external data file, whether or not there is one.
    pub fn data_file_name(&self) -> Option<&[u8]> {
        self.last(|extension| match extension {
            Extension::DataFileName(name) => Some(name.as_slice()),
            _ => None,
        })
    }

    /// Place of the bitmap directory. It is valid only if the [feature bit](AutoclearFeatures::bitmaps) is set.
    pub fn bitmaps(&self) -> Option<&BitmapsExtension> {
        self.last(|extension| match extension {
            Extension::Bitmaps(bitmaps) => Some(bitmaps),
            _ => None,
        })
    }

    /// Place of the LUKS header.
    pub fn crypto(&self) -> Option<&CryptoExtension> {
        self.last(|extension| match extension {
            Extension::Crypto(crypto) => Some(crypto),
            _ => None,
        })
    }

    /// What the image calls feature bits; empty where it doesn't tell.
    pub fn feature_names(&self) -> &[FeatureName] {
        self.last(|extension| match extension {
            Extension::FeatureNames(names) => Some(names.as_slice()),
            _ => None,
        })
        .unwrap_or_default()
    }

    fn last<'a, T>(&'a self, pick: impl Fn(&'a Extension) -> Option<T>) -> Option<T> {
        self.extensions.iter().rev().find_map(pick)
    }
}

#[cfg(test)]
mod tests;
