//! Images that show what there is.

use qcow2_format::bitmap::BitmapFlags;
use qcow2_format::header::{Extension, FeatureName, Version};
use qcow2_format::{Geometry, GuestCluster};
use qcow2_io::Storage;

use super::{Builder, SynthError, Zero, deflate, luks};

/// Name of the backing file that [`demo`] refers to; [`demo_base`] makes it.
pub const DEMO_BACKING_NAME: &str = "demo-base.qcow2";
/// Opens the images that have a LUKS area.
pub const DEMO_LUKS_PASSPHRASE: &str = luks::PASSPHRASE;

/// Three L2 tables with clusters of 64 KiB.
const DISK_BYTES: u64 = 3 << 29;
const CLUSTER: usize = 64 << 10;
/// First guest cluster of the third L2 table.
const THIRD_TABLE: u64 = 2 * 8192;

/// Writes a small image that has, once at least, every structure that standard L2 entries allow: data, zero clusters with and
/// without space, compressed clusters that share a host cluster, two snapshots with VM state and with tables
/// and data of their own, two bitmaps (one in use), a backing file with its format, feature names, and an extension nobody knows.
///
/// # Errors
///
/// The storage's.
pub fn demo(storage: &dyn Storage) -> Result<(), SynthError> {
    let mut image = Builder::new(Version::V3, Geometry::new(16, 4, false)?, DISK_BYTES);
    image.header.compatible.set_lazy_refcounts(true);
    image.header.backing_name = Some(DEMO_BACKING_NAME.into());
    image.header.extensions = vec![
        Extension::BackingFormat(b"qcow2".to_vec()),
        Extension::FeatureNames(FeatureName::known()),
        Extension::Unknown {
            kind: 0x6465_6d6f,
            data: b"kept by whoever doesn't know it".to_vec(),
        },
    ];
    for guest in 0..4 {
        image.data(GuestCluster::new(guest), &vec![0xd0; CLUSTER])?;
    }
    image.data(GuestCluster::new(THIRD_TABLE + 5), &vec![0xd1; CLUSTER])?;
    image.zero(GuestCluster::new(5), Zero::Plain)?;
    image.zero(GuestCluster::new(6), Zero::Allocated)?;
    for (guest, byte) in (8..11).zip([0xc0_u8, 0xc1, 0xc2]) {
        image.compressed(GuestCluster::new(guest), &compressible(byte))?;
    }
    image.snapshot("installed", &vec![0x57; CLUSTER + 1000])?;

    image.data(GuestCluster::new(1), &vec![0xd2; CLUSTER])?;
    image.compressed(GuestCluster::new(11), &compressible(0xc3))?;
    image.zero(GuestCluster::new(2), Zero::Plain)?;
    image.snapshot("updated", &[0x58; 700])?;

    image.data(GuestCluster::new(3), &vec![0xd3; CLUSTER])?;
    image.data(GuestCluster::new(12), &vec![0xd4; CLUSTER])?;
    // A bit for each cluster, and so fine a bitmap that it has clusters of ones, of zeros and of both.
    let tracked = BitmapFlags::new(false, true);
    image.bitmap(
        "nightly",
        16,
        tracked,
        &[0..4, THIRD_TABLE..THIRD_TABLE + 6],
    )?;
    let left_open = BitmapFlags::new(true, true);
    image.bitmap(
        "left-open",
        9,
        left_open,
        &[0..1 << 19, 1 << 19..(1 << 19) + 100],
    )?;
    image.finish(storage)
}

/// Writes the backing file of [`demo`].
///
/// # Errors
///
/// The storage's.
pub fn demo_base(storage: &dyn Storage) -> Result<(), SynthError> {
    let mut image = Builder::new(Version::V3, Geometry::new(16, 4, false)?, DISK_BYTES);
    for guest in [0, 7, THIRD_TABLE] {
        image.data(GuestCluster::new(guest), &vec![0xb0; CLUSTER])?;
    }
    image.finish(storage)
}

/// Writes a small image with extended L2 entries: clusters that are allocated as a whole, in part or not at all, zeros in
/// all ways, compressed clusters, a snapshot and a bitmap.
///
/// # Errors
///
/// The storage's.
pub fn demo_extended(storage: &dyn Storage) -> Result<(), SynthError> {
    let mut image = Builder::new(Version::V3, Geometry::new(16, 4, true)?, 1 << 29);
    let names = Extension::FeatureNames(FeatureName::known());
    image.header.extensions.push(names);
    let guest = GuestCluster::new;
    image.data(guest(0), &vec![0xe0; CLUSTER])?;
    // The first half allocated, then a quarter that reads as zero, then nothing.
    image.subclusters(guest(1), 0x00ff_0000_0000_ffff, &vec![0xe1; CLUSTER / 2])?;
    image.subclusters(guest(2), 0, &[])?;
    image.subclusters(guest(3), 0xffff_ffff_0000_0000, &[])?;
    image.zero(guest(4), Zero::Plain)?;
    image.zero(guest(5), Zero::Allocated)?;
    image.compressed(guest(6), &compressible(0xc4))?;
    image.compressed(guest(7), &compressible(0xc5))?;
    image.data(guest(4096), &vec![0xe2; CLUSTER])?;
    image.snapshot("before", &[])?;
    image.subclusters(guest(1), 0xffff_ffff, &vec![0xe3; CLUSTER])?;
    image.zero(guest(0), Zero::Plain)?;
    image.bitmap("changes", 16, BitmapFlags::new(false, true), &[0..2, 5..6])?;
    image.finish(storage)
}

/// Writes a small encrypted image, which [`DEMO_LUKS_PASSPHRASE`] opens. What its clusters hold was never encrypted and so
/// reads as noise.
///
/// # Errors
///
/// The storage's.
pub fn demo_luks(storage: &dyn Storage) -> Result<(), SynthError> {
    let mut image = Builder::new(Version::V3, Geometry::new(16, 4, false)?, 1 << 29);
    image.luks();
    let names = Extension::FeatureNames(FeatureName::known());
    image.header.extensions.push(names);
    image.data(GuestCluster::new(0), &vec![0xf0; CLUSTER])?;
    image.zero(GuestCluster::new(1), Zero::Plain)?;
    image.snapshot("sealed", &[0x59; 4000])?;
    image.data(GuestCluster::new(0), &vec![0xf1; CLUSTER])?;
    image.finish(storage)
}

/// A compressed cluster whose two halves differ: `byte` and its complement.
fn compressible(byte: u8) -> Vec<u8> {
    deflate(&[vec![byte; CLUSTER / 2], vec![!byte; CLUSTER / 2]].concat())
}
