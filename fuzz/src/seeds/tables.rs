//! Refcount blocks, snapshot tables, bitmap directories and bitmap tables.

use qcow2_format::bitmap::{BitmapCluster, BitmapFlags, DIRTY_TRACKING};
use qcow2_format::snapshot::encode_table;
use qcow2_format::{BitmapEntry, BitmapTableEntry, Geometry, HostOffset, Snapshot, set_refcount};

use crate::Seed;

/// A block for each width. The target takes the width from the first byte and a value to look for from the second.
pub(crate) fn refcount_block() -> Vec<Seed> {
    let block = |order: u8| {
        let geometry = Geometry::new(9, order.into(), false).expect("within the format's limits");
        let mut bytes = vec![0; geometry.cluster_len()];
        for index in 0..64 {
            let refcount = (index as u64 % 4).min(geometry.refcount_max());
            set_refcount(&mut bytes, geometry, index, refcount).expect("64 refcounts fit");
        }
        Seed::new(format!("order-{order}"), [vec![order, 1], bytes].concat())
    };
    (0..=6).map(block).collect()
}

/// Tables of each kind. The target takes the number of entries from the first byte.
pub(crate) fn tables() -> Vec<Seed> {
    let old = Snapshot {
        extra_data: Vec::new(),
        ..snapshot(1)
    };
    let counted = |count: u8, table: Vec<u8>| [vec![count], table].concat();
    let entries = [
        BitmapCluster::AllZeros,
        BitmapCluster::AllOnes,
        BitmapCluster::Cluster(HostOffset::new(0x5000)),
    ];
    vec![
        Seed::new(
            "snapshots",
            counted(2, snapshot_table(&[snapshot(1), snapshot(2)])),
        ),
        Seed::new("old-snapshot", counted(1, snapshot_table(&[old]))),
        Seed::new(
            "bitmaps",
            counted(2, bitmap_directory(&[bitmap(0), bitmap(1)])),
        ),
        Seed::new("bitmap-table", counted(0, bitmap_table(&entries))),
    ]
}

/// A snapshot as QEMU writes them in version 3.
fn snapshot(id: u32) -> Snapshot {
    let disk_size: u64 = 64 * 512;
    Snapshot {
        l1_table_offset: HostOffset::new(0x4000),
        l1_entries: 1,
        id: id.to_string().into_bytes(),
        name: format!("snapshot {id}").into_bytes(),
        date_sec: 1_700_000_000,
        date_nsec: 500,
        vm_clock_nsec: 1,
        vm_state_size_32: 0,
        // 64-bit VM state size, disk size, instruction count.
        extra_data: [0, disk_size, u64::MAX].map(u64::to_be_bytes).concat(),
    }
}

fn snapshot_table(snapshots: &[Snapshot]) -> Vec<u8> {
    encode_table(snapshots).expect("within the format's limits")
}

/// A bitmap with a bit for each cluster of 512 bytes.
fn bitmap(index: u8) -> BitmapEntry {
    BitmapEntry {
        table_offset: HostOffset::new(0x4000),
        table_entries: 1,
        flags: BitmapFlags::new(false, true),
        kind: DIRTY_TRACKING,
        granularity_bits: 9,
        name: format!("bitmap {index}").into_bytes(),
        extra_data: Vec::new(),
    }
}

fn bitmap_directory(entries: &[BitmapEntry]) -> Vec<u8> {
    let encode = |entry: &BitmapEntry| entry.encode().expect("within the format's limits");
    entries.iter().flat_map(encode).collect()
}

fn bitmap_table(entries: &[BitmapCluster]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| BitmapTableEntry::new(*entry).to_be_bytes())
        .collect()
}
