//! Whole images, written without QEMU: for demonstrations, tests, benchmarks and seeds of fuzz targets.
//!
//! [`Builder`] makes small images of any structure. [`demo`], [`demo_extended`] and [`demo_luks`] use it to show all there
//! is. [`contiguous`], [`snapshots`], [`compressed`] and [`random_order`] write the metadata of large disks and leave
//! the guest's data as holes. Every image is sound; who wants damage does it afterwards.

mod builder;
mod bulk;
mod deflate;
mod demo;
mod large;
mod luks;

use qcow2_format::bitmap::BitmapError;
use qcow2_format::geometry::GeometryError;
use qcow2_format::header::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, CryptMethod, IncompatibleFeatures,
    Version,
};
use qcow2_format::raw;
use qcow2_format::snapshot::SnapshotError;
use qcow2_format::{Geometry, Header, HeaderError, HostOffset};
use qcow2_io::StorageError;
use thiserror::Error;

pub use builder::{Builder, Zero};
pub use deflate::deflate;
pub use demo::{
    DEMO_BACKING_NAME, DEMO_LUKS_PASSPHRASE, demo, demo_base, demo_extended, demo_luks,
};
pub use large::{compressed, contiguous, leaked, random_order, snapshots};

/// Why an image could not be written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SynthError {
    /// The storage failed.
    #[error("the image could not be written")]
    Storage(#[from] StorageError),
    /// No geometry has these numbers.
    #[error("no image has this geometry")]
    Geometry(#[from] GeometryError),
    /// The header can't say what it should.
    #[error("the header could not be made")]
    Header(#[from] HeaderError),
    /// The snapshot table can't say what it should.
    #[error("the snapshot table could not be made")]
    Snapshot(#[from] SnapshotError),
    /// The bitmap directory can't say what it should.
    #[error("the bitmap directory could not be made")]
    Bitmap(#[from] BitmapError),
    /// Something is larger than the format, or this simple writer, allows.
    #[error("{what} is too large for the image")]
    TooLarge {
        /// What it is.
        what: &'static str,
    },
    /// Version 2 has no such thing.
    #[error("version 2 has no {what}")]
    NotInVersion2 {
        /// What it has not.
        what: &'static str,
    },
}

/// A header that points at nothing yet.
fn header(version: Version, geometry: Geometry, virtual_size: u64) -> Header {
    let mut incompatible = IncompatibleFeatures::default();
    incompatible.set_extended_l2(geometry.extended_l2());
    Header {
        version,
        geometry,
        virtual_size_raw: virtual_size,
        crypt_method: CryptMethod::None,
        l1_table_offset: HostOffset::new(0),
        l1_entries: 0,
        refcount_table_offset: HostOffset::new(0),
        refcount_table_clusters: 0,
        snapshot_count: 0,
        snapshot_table_offset: HostOffset::new(0),
        incompatible,
        compatible: CompatibleFeatures::default(),
        autoclear: AutoclearFeatures::default(),
        header_length: match version {
            Version::V2 => raw::Header::V2_LEN,
            Version::V3 => raw::Header::LEN,
        },
        compression_type: CompressionType::Zlib,
        padding: [0; 7],
        unknown_fields: Vec::new(),
        backing_name: None,
        extensions: Vec::new(),
    }
}

/// `n` as the format's 32-bit count of `what`.
fn count32(n: u64, what: &'static str) -> Result<u32, SynthError> {
    u32::try_from(n).map_err(|_| SynthError::TooLarge { what })
}

/// The bytes of a table of 64-bit entries.
fn table_bytes(entries: impl IntoIterator<Item = u64>) -> Vec<u8> {
    entries.into_iter().flat_map(u64::to_be_bytes).collect()
}

#[cfg(test)]
mod tests;
