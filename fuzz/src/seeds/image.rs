//! Whole images, a few kilobytes each, that between them have every structure.

use std::sync::Arc;

use qcow2_check::synth::{Builder, SynthError, Zero, deflate};
use qcow2_format::bitmap::BitmapFlags;
use qcow2_format::header::{CryptMethod, CryptoExtension, Extension, Version};
use qcow2_format::{Geometry, GuestCluster, HostOffset, L2Entry};
use qcow2_image::Image;
use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_io::{Memory, Storage};

use super::header;
use crate::Seed;

/// Whole images. The target takes eight more bytes: how much longer the file is, and a host offset to ask about.
pub(crate) fn check_image() -> Vec<Seed> {
    let settings = [0, 0, 0, 0, 0, 0, 2, 0];
    let seed =
        |(name, image): (String, Vec<u8>)| Seed::new(name, [image, settings.to_vec()].concat());
    let images = images().expect("within the format's limits");
    images.into_iter().map(seed).collect()
}

/// Bytes of an image that has something to repair in each of its first tables.
const DAMAGE: [(&str, usize, u8); 4] = [
    ("header", 27, 0x40),
    ("refcounts", 512 + 7, 1),
    ("l1", 40, 0x80),
    ("cut", usize::MAX, 0),
];

/// Settings of a repair that differ.
const SETTINGS: u8 = 24;

/// The same images, sound and damaged. The target takes two more bytes: how far the repair goes, with a key and sectors that can't be read or
/// without, and how much longer the file is.
pub(crate) fn repair() -> Vec<Seed> {
    let images = images().expect("within the format's limits");
    let mut seeds = Vec::new();
    for (number, (name, image)) in (0_u8..).zip(images) {
        let tail = [number % SETTINGS, 0];
        seeds.push(Seed::new(
            name.clone(),
            [image.clone(), tail.to_vec()].concat(),
        ));
        for (level, (damage, at, bits)) in (0_u8..).zip(DAMAGE) {
            let mut damaged = image.clone();
            match damaged.get_mut(at) {
                Some(byte) => *byte ^= bits,
                None => damaged.truncate(image.len() / 4 * 3),
            }
            damaged.extend([number.wrapping_mul(7).wrapping_add(level) % SETTINGS, 0]);
            seeds.push(Seed::new(format!("{name}-{damage}"), damaged));
        }
    }
    seeds
}

/// The same images, and some that the engine made, each with several tails of settings and requests.
pub(crate) fn image() -> Vec<Seed> {
    // Kind, border, its number, how far beside it, length, unit of the length.
    let requests: [[[u8; 6]; 8]; 3] = [
        [
            [1, 0, 0, 0, 200, 0],
            [1, 8, 1, 3, 2, 3],
            [5, 2, 1, 0, 1, 3],
            [9, 0, 0, 0, 0, 0],
            [1, 14, 2, 5, 255, 1],
            [7, 2, 0, 0, 2, 3],
            [0, 0, 0, 0, 8, 3],
            [11, 0, 0, 0, 255, 3],
        ],
        [
            [2, 13, 0, 4, 4, 0],
            [10, 3, 2, 0, 0, 0],
            [3, 2, 3, 0, 64, 1],
            [8, 2, 0, 0, 5, 3],
            [4, 10, 1, 2, 3, 2],
            [10, 2, 5, 0, 0, 0],
            [9, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 5, 3],
        ],
        [
            [6, 4, 3, 0, 7, 2],
            [1, 4, 5, 0, 9, 2],
            [5, 4, 5, 0, 3, 2],
            [7, 4, 1, 0, 30, 2],
            [9, 0, 0, 0, 0, 0],
            [1, 16, 1, 1, 100, 0],
            [1, 2, 0, 0, 1, 3],
            [11, 0, 0, 0, 9, 3],
        ],
    ];
    let settings: [[u8; 8]; 4] = [
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 48, 0, 80, 0, 0, 0],
        [9, 3, 8 | 64, 2, 7, 0, 0, 0],
        [0, 0, 2 | 4, 0, 9, 0, 0, 0],
    ];
    let mut images = images().expect("within the format's limits");
    images.extend(created());
    let mut seeds = Vec::new();
    for (index, (name, image)) in images.into_iter().enumerate() {
        for (number, requests) in requests.iter().enumerate() {
            let settings = settings.iter().cycle().nth(index + number);
            let tail = settings.into_iter().flatten().copied();
            let tail = tail.chain(requests.concat());
            let bytes = image.iter().copied().chain(tail).collect();
            seeds.push(Seed::new(format!("{name}-{number}"), bytes));
        }
    }
    seeds
}

/// Empty disks of many kinds.
fn created() -> Vec<(String, Vec<u8>)> {
    let disk = || CreateOptions::new(100 << 10).cluster_size(512);
    let data: Arc<dyn Storage> = Arc::new(Memory::new());
    let with_data = disk().data_file("data").data_file_storage(data);
    let kinds = [
        ("new-v2", disk().version(Version::V2)),
        ("new-lazy", disk().lazy_refcounts(true).refcount_bits(1)),
        ("new-extended", disk().cluster_size(16384).extended_l2(true)),
        (
            "new-preallocated",
            disk().preallocation(Preallocation::Metadata),
        ),
        ("new-data", with_data.clone()),
        ("new-raw-data", with_data.data_file_raw(true)),
    ];
    let made = kinds.into_iter().map(|(name, options)| {
        let memory = Memory::new();
        Image::create(&memory, &options).expect("options that go together");
        let bytes = memory.to_vec().expect("a small image");
        (name.to_owned(), bytes)
    });
    made.collect()
}

/// The images with their names.
fn images() -> Result<Vec<(String, Vec<u8>)>, SynthError> {
    let mut images = vec![
        ("v2".to_owned(), plain(Version::V2)?),
        ("v3".to_owned(), plain(Version::V3)?),
        ("compressed".to_owned(), compressed()?),
        ("extended".to_owned(), extended()?),
        ("backing".to_owned(), backing()?),
        ("data-file".to_owned(), data_file()?),
        ("snapshots".to_owned(), snapshots()?),
        ("bitmaps".to_owned(), bitmaps()?),
        ("luks".to_owned(), luks()?),
    ];
    for refcount_order in 0..=6 {
        images.push((
            format!("refcount-order-{refcount_order}"),
            width(refcount_order)?,
        ));
    }
    Ok(images)
}

/// An image with clusters of 512 bytes, for a disk that one L2 table maps.
fn small(version: Version, refcount_order: u32) -> Result<Builder, SynthError> {
    let geometry = Geometry::new(9, refcount_order, false)?;
    Ok(Builder::new(version, geometry, geometry.l2_coverage()))
}

fn written(image: Builder) -> Result<Vec<u8>, SynthError> {
    let memory = Memory::new();
    image.finish(&memory)?;
    Ok(memory.to_vec()?)
}

/// Data, and in version 3 the two kinds of zero clusters.
fn plain(version: Version) -> Result<Vec<u8>, SynthError> {
    let mut image = small(version, 4)?;
    image.data(GuestCluster::new(0), &[0xda])?;
    image.data(GuestCluster::new(1), &[0xda])?;
    if version == Version::V3 {
        image.zero(GuestCluster::new(2), Zero::Plain)?;
        image.zero(GuestCluster::new(3), Zero::Allocated)?;
    }
    written(image)
}

/// Refcounts of another width.
fn width(refcount_order: u32) -> Result<Vec<u8>, SynthError> {
    let mut image = small(Version::V3, refcount_order)?;
    image.data(GuestCluster::new(0), &[0xda])?;
    written(image)
}

/// Two compressed clusters that share a host cluster, the second of which goes on in the next one.
fn compressed() -> Result<Vec<u8>, SynthError> {
    let mut image = small(Version::V3, 4)?;
    let content: Vec<u8> = (0..=255).chain([0xcc; 256]).collect();
    let payload = deflate(&content);
    image.compressed(GuestCluster::new(0), &payload)?;
    image.compressed(GuestCluster::new(1), &payload)?;
    written(image)
}

/// Subclusters: allocated ones, zero ones, and a host cluster that none of them uses.
fn extended() -> Result<Vec<u8>, SynthError> {
    let mut image = Builder::new(Version::V3, Geometry::new(14, 4, true)?, 1 << 20);
    image.subclusters(GuestCluster::new(0), 0x0000_ff00_0000_00ff, &[0xda])?;
    image.subclusters(GuestCluster::new(1), 0, &[])?;
    image.zero(GuestCluster::new(2), Zero::Plain)?;
    written(image)
}

/// A backing file with its format.
fn backing() -> Result<Vec<u8>, SynthError> {
    let mut image = small(Version::V3, 4)?;
    image.header.backing_name = Some(b"../base.qcow2".to_vec());
    let format = Extension::BackingFormat(b"qcow2".to_vec());
    image.header.extensions.push(format);
    image.data(GuestCluster::new(0), &[0xda])?;
    written(image)
}

/// Guest data in another file, at its guest offset.
fn data_file() -> Result<Vec<u8>, SynthError> {
    let mut image = small(Version::V3, 4)?;
    image.header.incompatible.set_external_data(true);
    let name = Extension::DataFileName(b"data.raw".to_vec());
    image.header.extensions.push(name);
    image.zero(GuestCluster::new(0), Zero::Plain)?;
    let mut bytes = written(image)?;
    // The builder has data nowhere but in the image. Its first cluster behind the header is the L2 table.
    let entries = [0, 512].map(|offset| L2Entry::normal(HostOffset::new(offset), true, 0));
    let words = entries.iter().flat_map(|entry| entry.word().to_be_bytes());
    let table = bytes.iter_mut().skip(512);
    table.zip(words).for_each(|(to, from)| *to = from);
    Ok(bytes)
}

/// A snapshot that shares its L2 table with the disk, and one that has VM state, a table and a cluster of its own.
fn snapshots() -> Result<Vec<u8>, SynthError> {
    let mut image = small(Version::V3, 4)?;
    image.data(GuestCluster::new(0), &[0xda])?;
    image.data(GuestCluster::new(1), &[0xda])?;
    image.snapshot("own", b"state")?;
    image.data(GuestCluster::new(1), &[0xdb])?;
    image.snapshot("shared", &[])?;
    written(image)
}

/// A bitmap with a cluster of bits, and one whose only cluster is all ones.
fn bitmaps() -> Result<Vec<u8>, SynthError> {
    // As large a disk as a cluster of bits has granules for: only a full one can be said to be all ones.
    let granules = 512 * 8;
    let mut image = Builder::new(Version::V3, Geometry::new(9, 4, false)?, granules * 512);
    let flags = BitmapFlags::new(false, true);
    image.bitmap("some", 9, flags, &[0..4, 9..10])?;
    image.bitmap("all", 9, flags, &[0..100, 100..granules])?;
    written(image)
}

/// An encryption area that is cut short behind its header: with its key material it would be too long to mutate.
fn luks() -> Result<Vec<u8>, SynthError> {
    let mut image = small(Version::V3, 4)?;
    let mut area = header::luks_header("cbc-essiv:sha256", 16, 1);
    area.resize(4096, 0);
    let crypto = CryptoExtension {
        offset: image.place(&area),
        len_bytes: area.len() as u64,
    };
    image.header.crypt_method = CryptMethod::Luks;
    image.header.extensions.push(Extension::Crypto(crypto));
    image.data(GuestCluster::new(0), &[0xda])?;
    written(image)
}

#[cfg(test)]
mod tests {
    use qcow2_check::{Options, Verdict, audit};

    use super::*;

    #[test]
    fn the_images_are_sound_but_for_the_one_that_is_cut_short() {
        for (name, bytes) in images().unwrap() {
            let report = audit(&Memory::from(bytes), &Options::default());
            assert_eq!(
                report.verdict() == Verdict::Sound,
                name != "luks",
                "{name}: {:?}",
                report.findings
            );
        }
    }
}
