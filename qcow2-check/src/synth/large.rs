//! The metadata of large disks. Guest data is never written: its clusters stay holes.

use qcow2_format::geometry::MAX_L1_BYTES;
use qcow2_format::{Geometry, HostOffset, L1Entry, L2Entry, Snapshot, snapshot};
use qcow2_io::Storage;

use super::bulk::Bulk;
use super::{SynthError, count32, table_bytes};

/// Clusters of all images whose caller doesn't choose.
const CLUSTER_BITS: u32 = 16;
/// Refcounts of 16 bits, as everybody has them.
const REFCOUNT_ORDER: u32 = 4;
/// Compressed clusters of 64 KiB have this many bytes at least and less than that many.
const COMPRESSED_BYTES: std::ops::Range<u64> = 10 << 10..40 << 10;

/// Sizes that follow from a virtual size of whole L2 tables.
struct Shape {
    geometry: Geometry,
    virtual_size: u64,
    tables: u64,
    entries: u64,
}

impl Shape {
    fn new(virtual_size: u64, cluster_bits: u32, extended: bool) -> Result<Self, SynthError> {
        let geometry = Geometry::new(cluster_bits, REFCOUNT_ORDER, extended)?;
        let tables = geometry.l1_entries_for(virtual_size);
        if tables > MAX_L1_BYTES / 8 {
            return Err(SynthError::TooLarge {
                what: "the L1 table",
            });
        }
        Ok(Self {
            geometry,
            virtual_size: tables * geometry.l2_coverage(),
            tables,
            entries: geometry.l2_entries(),
        })
    }

    /// Clusters of an L1 table.
    fn l1_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.tables * 8)
    }

    /// Starts the image, with `front` clusters of metadata at the front.
    fn start<'a>(&self, storage: &'a dyn Storage, front: u64) -> Result<Bulk<'a>, SynthError> {
        Bulk::new(storage, self.geometry, self.virtual_size, front)
    }
}

/// The bytes of an L2 table.
fn l2_bytes(geometry: Geometry, entries: impl Iterator<Item = L2Entry>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(geometry.cluster_len());
    for entry in entries {
        bytes.extend(entry.word().to_be_bytes());
        if geometry.extended_l2() {
            bytes.extend(entry.bitmap().to_be_bytes());
        }
    }
    bytes
}

/// The bytes of an L1 table whose L2 tables have a single reference each.
fn l1_bytes(tables: impl Iterator<Item = HostOffset>) -> Vec<u8> {
    table_bytes(tables.map(|table| L1Entry::new(table, true).bits()))
}

/// Writes a disk as `qemu-img create -o preallocation=metadata` does: every guest cluster is allocated, each L2 table lies
/// before its data, in order. With `extended` entries no subcluster is in use yet.
///
/// The virtual size is rounded up to whole L2 tables, here and in the other functions.
///
/// # Errors
///
/// The storage's, a geometry the format doesn't allow, or a disk that is too large for it.
pub fn contiguous(
    storage: &dyn Storage,
    virtual_size: u64,
    cluster_bits: u32,
    extended: bool,
) -> Result<(), SynthError> {
    let shape = Shape::new(virtual_size, cluster_bits, extended)?;
    let mut bulk = shape.start(storage, shape.l1_clusters())?;
    let slots = shape.entries + 1;
    for table in 0..shape.tables {
        let data = table * slots + 1..(table + 1) * slots;
        let entries = data.map(|slot| L2Entry::normal(bulk.slot(slot), true, 0));
        let bytes = l2_bytes(shape.geometry, entries);
        bulk.write(bulk.slot(table * slots), &bytes)?;
    }
    bulk.count_slots(0..shape.tables * slots)?;
    let l1 = l1_bytes((0..shape.tables).map(|table| bulk.slot(table * slots)));
    bulk.write(bulk.front(0), &l1)?;
    bulk.finish(shape.tables, None)
}

/// Writes an empty disk, and `clusters` clusters with a refcount of 1 that nothing refers to.
///
/// # Errors
///
/// As [`contiguous`].
pub fn leaked(storage: &dyn Storage, clusters: u64, cluster_bits: u32) -> Result<(), SynthError> {
    let shape = Shape::new(1, cluster_bits, false)?;
    let mut bulk = shape.start(storage, shape.l1_clusters())?;
    bulk.count_slots(0..clusters)?;
    bulk.finish(shape.tables, None)
}

/// Writes a disk all of whose guest clusters are allocated, in random order: behind the L2 tables comes data, and any data
/// cluster may be any guest cluster's.
///
/// Takes 4 bytes of memory per guest cluster. Equal seeds give equal images.
///
/// # Errors
///
/// As [`contiguous`].
pub fn random_order(storage: &dyn Storage, virtual_size: u64, seed: u64) -> Result<(), SynthError> {
    let shape = Shape::new(virtual_size, CLUSTER_BITS, false)?;
    let mut bulk = shape.start(storage, shape.l1_clusters())?;
    let mut places: Vec<u32> = (0..count32(shape.tables * shape.entries, "the disk")?).collect();
    shuffle(&mut places, seed);
    let entries = usize::try_from(shape.entries).unwrap_or(usize::MAX);
    for (table, places) in (0..).zip(places.chunks(entries)) {
        let place = |place: &u32| bulk.slot(shape.tables + u64::from(*place));
        let entries = places.iter().map(|p| L2Entry::normal(place(p), true, 0));
        let bytes = l2_bytes(shape.geometry, entries);
        bulk.write(bulk.slot(table), &bytes)?;
    }
    bulk.count_slots(0..shape.tables * (1 + shape.entries))?;
    let l1 = l1_bytes((0..shape.tables).map(|table| bulk.slot(table)));
    bulk.write(bulk.front(0), &l1)?;
    bulk.finish(shape.tables, None)
}

/// Writes a disk with every guest cluster compressed to 10 to 40 KiB of its 64, packed byte by byte. The compressed data are
/// holes, too, and so can't be decompressed.
///
/// # Errors
///
/// As [`contiguous`].
pub fn compressed(storage: &dyn Storage, virtual_size: u64) -> Result<(), SynthError> {
    let shape = Shape::new(virtual_size, CLUSTER_BITS, false)?;
    let mut bulk = shape.start(storage, shape.l1_clusters())?;
    let mut random = Random(1);
    let mut tables = Vec::new();
    let mut next = 0; // slot
    for _ in 0..shape.tables {
        let table = bulk.slot(next);
        bulk.count_slots(next..next + 1)?;
        next += 1;
        tables.push(table);
        let mut entries = Vec::new();
        // Bytes left in the cluster that was begun last.
        let mut at = 0;
        let mut room = 0;
        for _ in 0..shape.entries {
            let len = random.within(COMPRESSED_BYTES);
            if len > room {
                let cluster = bulk.slot(next).get();
                if at + room != cluster {
                    // Something else lies behind: begin anew.
                    at = cluster;
                    room = 0;
                }
                room += shape.geometry.cluster_size();
                next += 1;
            }
            let (first, last) = (at, at + len - 1);
            let cluster_bits = shape.geometry.cluster_bits();
            for cluster in first >> cluster_bits..=last >> cluster_bits {
                bulk.count(cluster)?;
            }
            let entry = L2Entry::compressed(shape.geometry, HostOffset::new(at), len);
            entries.push(entry.ok_or(SynthError::TooLarge { what: "the file" })?);
            at += len;
            room -= len;
        }
        bulk.write(table, &l2_bytes(shape.geometry, entries.into_iter()))?;
    }
    let l1 = l1_bytes(tables.iter().copied());
    bulk.write(bulk.front(0), &l1)?;
    bulk.finish(shape.tables, None)
}

/// Writes a disk with `count` internal snapshots (1 to 60) after each of which one cluster below every L2 table was
/// written: so every snapshot has all L2 tables to itself and shares nearly all data with all others.
///
/// # Errors
///
/// As [`contiguous`], or more snapshots than that.
pub fn snapshots(storage: &dyn Storage, virtual_size: u64, count: u32) -> Result<(), SynthError> {
    let shape = Shape::new(virtual_size, CLUSTER_BITS, false)?;
    if !(1..=60).contains(&count) {
        return Err(SynthError::TooLarge {
            what: "the number of snapshots",
        });
    }
    let count = u64::from(count);
    // The active L1 table, those of the snapshots, and the snapshot table.
    let l1_clusters = shape.l1_clusters();
    let mut bulk = shape.start(storage, l1_clusters * (count + 1) + 1)?;
    let first = shape.entries + 1; // slots of a table with its data, as first written
    let rewritten = Rewritten { count };

    // Tree 0 is that of the first snapshot, tree `count` the active one; tree k has all that was written after snapshots 1 to k.
    let behind = shape.tables * first;
    let table_slot = |tree: u64, table: u64| match tree {
        0 => table * first,
        _ => behind + ((tree - 1) * shape.tables + table) * 2,
    };
    for table in 0..shape.tables {
        for tree in 0..=count {
            let entries = (0..shape.entries).map(|index| {
                let (slot, references) = match rewritten.step(index) {
                    Some(step) if step < tree => (table_slot(step + 1, table) + 1, count - step),
                    Some(step) => (table * first + 1 + index, step + 1),
                    None => (table * first + 1 + index, count + 1),
                };
                L2Entry::normal(bulk.slot(slot), references == 1, 0)
            });
            let bytes = l2_bytes(shape.geometry, entries);
            bulk.write(bulk.slot(table_slot(tree, table)), &bytes)?;
        }
    }
    for table in 0..shape.tables {
        bulk.count(bulk.slot_cluster(table * first))?;
        for index in 0..shape.entries {
            let cluster = bulk.slot_cluster(table * first + 1 + index);
            let references = rewritten.step(index).unwrap_or(count) + 1;
            bulk.count_many(cluster, references)?;
        }
    }
    for step in 0..count {
        for table in 0..shape.tables {
            let slot = table_slot(step + 1, table);
            bulk.count(bulk.slot_cluster(slot))?;
            bulk.count_many(bulk.slot_cluster(slot + 1), count - step)?;
        }
    }

    let mut entries = Vec::new();
    for tree in 0..=count {
        let place = if tree == count {
            bulk.front(0)
        } else {
            bulk.front((tree + 1) * l1_clusters)
        };
        let l1 = l1_bytes((0..shape.tables).map(|table| bulk.slot(table_slot(tree, table))));
        bulk.write(place, &l1)?;
        if tree < count {
            entries.push(Snapshot {
                l1_table_offset: place,
                l1_entries: count32(shape.tables, "an L1 table")?,
                id: (tree + 1).to_string().into_bytes(),
                name: format!("snapshot-{}", tree + 1).into_bytes(),
                extra_data: table_bytes([0, shape.virtual_size, 0]),
                ..Snapshot::default()
            });
        }
    }
    let table_place = bulk.front((count + 1) * l1_clusters);
    bulk.write(table_place, &snapshot::encode_table(&entries)?)?;
    let snapshot_count = count32(count, "the snapshot table")?;
    bulk.finish(shape.tables, Some((snapshot_count, table_place)))
}

/// Which cluster of each L2 table is written after which snapshot.
struct Rewritten {
    count: u64,
}

impl Rewritten {
    /// Clusters between two that are written.
    const STRIDE: u64 = 101;

    /// The snapshot, counted from 0, after which the cluster at this index of any L2 table is written.
    fn step(&self, index: u64) -> Option<u64> {
        let step = index / Self::STRIDE;
        (index.is_multiple_of(Self::STRIDE) && step < self.count).then_some(step)
    }
}

/// A small generator of numbers that look random (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number in a range that is far smaller than 2^32.
    fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + (((self.next() >> 32) * (range.end - range.start)) >> 32)
    }
}

/// Brings the items into a random order.
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut random = Random(seed);
    for last in (1..items.len()).rev() {
        let other = random.within(0..last as u64 + 1);
        items.swap(last, usize::try_from(other).unwrap_or(last));
    }
}
