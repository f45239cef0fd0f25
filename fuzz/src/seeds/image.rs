//! Whole images, a few kilobytes each, that between them have every structure.

use qcow2_format::bitmap::BitmapCluster;
use qcow2_format::header::{BitmapsExtension, CryptMethod, CryptoExtension, Extension, Version};
use qcow2_format::{BitmapEntry, Geometry, HostOffset, L1Entry, L2Entry, Snapshot};

use super::draft::Draft;
use super::{header, tables};
use crate::Seed;

/// Whole images. The target takes eight more bytes: how much longer the file is, and a host offset to ask about.
pub(crate) fn check_image() -> Vec<Seed> {
    let settings = [0, 0, 0, 0, 0, 0, 2, 0];
    let seed =
        |(name, image): (String, Vec<u8>)| Seed::new(name, [image, settings.to_vec()].concat());
    images().into_iter().map(seed).collect()
}

/// The images with their names.
fn images() -> Vec<(String, Vec<u8>)> {
    let mut images = vec![
        ("v2".to_owned(), plain(Version::V2)),
        ("v3".to_owned(), plain(Version::V3)),
        ("compressed".to_owned(), compressed()),
        ("extended".to_owned(), extended()),
        ("backing".to_owned(), backing()),
        ("data-file".to_owned(), data_file()),
        ("snapshots".to_owned(), snapshots()),
        ("bitmaps".to_owned(), bitmaps()),
        ("luks".to_owned(), luks()),
    ];
    for refcount_order in 0..=6 {
        images.push((
            format!("refcount-order-{refcount_order}"),
            width(refcount_order),
        ));
    }
    images
}

/// Data, and in version 3 the two kinds of zero clusters.
fn plain(version: Version) -> Vec<u8> {
    let mut draft = Draft::small(version);
    let mut entries = vec![
        L2Entry::normal(draft.add_data(), true, 0),
        L2Entry::normal(draft.add_data(), true, 0),
    ];
    if version == Version::V3 {
        entries.push(L2Entry::zero(HostOffset::new(0), false));
        entries.push(L2Entry::zero(draft.add_data(), true));
    }
    draft.map(&entries);
    draft.finish()
}

/// Refcounts of another width.
fn width(refcount_order: u32) -> Vec<u8> {
    let geometry = Geometry::new(9, refcount_order, false).expect("within the format's limits");
    let mut draft = Draft::new(Version::V3, geometry, geometry.l2_coverage());
    let entry = L2Entry::normal(draft.add_data(), true, 0);
    draft.map(&[entry]);
    draft.finish()
}

/// Two compressed clusters that share a host cluster.
fn compressed() -> Vec<u8> {
    let mut draft = Draft::new(
        Version::V3,
        Geometry::new(12, 4, false).expect("within the format's limits"),
        64 << 10,
    );
    let geometry = draft.header.geometry;
    let first = draft.add_data();
    let second = HostOffset::new(first.get() + 700);
    draft.set_refcount(first, 2);
    let entry =
        |offset| L2Entry::compressed(geometry, offset, 600).expect("the descriptor holds it");
    draft.map(&[entry(first), entry(second)]);
    draft.finish()
}

/// Subclusters: allocated ones, zero ones, and a host cluster that none of them uses.
fn extended() -> Vec<u8> {
    let geometry = Geometry::new(14, 4, true).expect("within the format's limits");
    let mut draft = Draft::new(Version::V3, geometry, 1 << 20);
    let entries = [
        L2Entry::normal(draft.add_data(), true, 0x0000_ff00_0000_00ff),
        L2Entry::normal(draft.add_data(), true, 0),
        L2Entry::from_bits(0, 0xffff_ffff_0000_0000),
    ];
    draft.map(&entries);
    draft.finish()
}

/// A backing file with its format.
fn backing() -> Vec<u8> {
    let mut draft = Draft::small(Version::V3);
    draft.header.backing_name = Some(b"../base.qcow2".to_vec());
    draft
        .header
        .extensions
        .push(Extension::BackingFormat(b"qcow2".to_vec()));
    draft.map(&[]);
    draft.finish()
}

/// Guest data in another file, at its guest offset.
fn data_file() -> Vec<u8> {
    let mut draft = Draft::small(Version::V3);
    draft.header.incompatible.set_external_data(true);
    draft
        .header
        .extensions
        .push(Extension::DataFileName(b"data.raw".to_vec()));
    draft.map(&[
        L2Entry::normal(HostOffset::new(0), true, 0),
        L2Entry::normal(HostOffset::new(512), true, 0),
    ]);
    draft.finish()
}

/// A snapshot that shares its L2 table with the disk, and one that has a table and a cluster of its own.
fn snapshots() -> Vec<u8> {
    let mut draft = Draft::small(Version::V3);
    let kept = draft.add_data();
    let own = draft.add_data();
    draft.set_refcount(kept, 3);
    let shared_table = draft.add_l2(&[L2Entry::normal(kept, false, 0)]);
    draft.set_refcount(shared_table, 2);
    let own_table = draft.add_l2(&[
        L2Entry::normal(kept, false, 0),
        L2Entry::normal(own, true, 0),
    ]);
    let entry = |id, table: HostOffset, draft: &mut Draft| {
        let l1_table_offset = draft.add_l1(&[L1Entry::new(table, false)]);
        Snapshot {
            l1_table_offset,
            ..tables::snapshot(id)
        }
    };
    let table = [
        entry(1, shared_table, &mut draft),
        entry(2, own_table, &mut draft),
    ];
    draft.header.snapshot_count = 2;
    draft.header.snapshot_table_offset = draft.add(&tables::snapshot_table(&table));
    draft.header.l1_table_offset = draft.add_l1(&[L1Entry::new(shared_table, false)]);
    draft.header.l1_entries = 1;
    draft.finish()
}

/// A bitmap with a cluster of bits, and one whose only cluster is all ones.
fn bitmaps() -> Vec<u8> {
    let mut draft = Draft::small(Version::V3);
    let bits = draft.add(&[0x0f]);
    let clusters = [BitmapCluster::Cluster(bits), BitmapCluster::AllOnes];
    let directory: Vec<_> = (0..)
        .zip(clusters)
        .map(|(index, cluster)| BitmapEntry {
            table_offset: draft.add(&tables::bitmap_table(&[cluster])),
            ..tables::bitmap(index)
        })
        .collect();
    let directory = tables::bitmap_directory(&directory);
    draft.header.autoclear.set_bitmaps(true);
    let extension = BitmapsExtension {
        count: 2,
        directory_len_bytes: directory.len() as u64,
        directory_offset: draft.add(&directory),
    };
    draft.header.extensions.push(Extension::Bitmaps(extension));
    draft.map(&[]);
    draft.finish()
}

/// An encryption area that is cut short behind its header: with its key material it would be too long to mutate.
fn luks() -> Vec<u8> {
    let mut draft = Draft::small(Version::V3);
    let mut area = header::luks_header("cbc-essiv:sha256", 16, 1);
    area.resize(4096, 0);
    let crypto = CryptoExtension {
        offset: draft.add(&area),
        len_bytes: area.len() as u64,
    };
    draft.header.crypt_method = CryptMethod::Luks;
    draft.header.extensions.push(Extension::Crypto(crypto));
    let entry = L2Entry::normal(draft.add_data(), true, 0);
    draft.map(&[entry]);
    draft.finish()
}

#[cfg(test)]
mod tests {
    use qcow2_check::{Options, Verdict, audit};
    use qcow2_io::Memory;

    use super::*;

    #[test]
    fn the_images_are_sound_but_for_the_one_that_is_cut_short() {
        for (name, bytes) in images() {
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
