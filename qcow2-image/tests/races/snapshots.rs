use std::sync::Arc;

use qcow2_check::synth;
use qcow2_format::header::Version;
use qcow2_format::{Geometry, GuestCluster, Snapshot};
use qcow2_image::Image;
use qcow2_image::testing::Random;
use qcow2_io::{Memory, Storage, ZeroFlags};

use crate::rig::{Rig, assert_sound};

const CLUSTER: u64 = 65536;

/// L1 table and size of each snapshot in an image file.
fn snapshots(file: &[u8]) -> Vec<(u64, u32)> {
    let count = u32::from_be_bytes(file[60..64].try_into().unwrap());
    let mut at = u64::from_be_bytes(file[64..72].try_into().unwrap()) as usize;
    let mut found = Vec::new();
    for _ in 0..count {
        let (snapshot, len) = Snapshot::decode(&file[at..]).unwrap();
        found.push((snapshot.l1_table_offset.get(), snapshot.l1_entries));
        at += len.next_multiple_of(8);
    }
    found
}

/// What the snapshot with this L1 table holds in some guest clusters: the file is opened as if that were the active one.
fn view(
    file: &[u8],
    (l1, entries): (u64, u32),
    base: &Arc<dyn Storage>,
    clusters: &[u64],
) -> Vec<Vec<u8>> {
    let memory = Memory::from(file.to_vec());
    memory.write_at(&entries.to_be_bytes(), 36).unwrap();
    memory.write_at(&l1.to_be_bytes(), 40).unwrap();
    memory.write_at(&[0; 4], 60).unwrap();
    let options = Image::options().read_only(true).backing(base.clone());
    let image = options.open(Arc::new(memory)).unwrap();
    let read = |cluster: &u64| {
        let mut bytes = vec![0xa5; CLUSTER as usize];
        image.read_at(&mut bytes, cluster * CLUSTER).unwrap();
        bytes
    };
    clusters.iter().map(read).collect()
}

/// Random writes, zeros and discards around all that the image holds; its snapshots stay what they are.
fn assert_untouched(file: Vec<u8>, base: &Arc<dyn Storage>, clusters: &[u64], seed: u64) {
    let tables = snapshots(&file);
    assert!(!tables.is_empty());
    let views = |file: &[u8]| -> Vec<_> {
        let view = |table: &(u64, u32)| view(file, *table, base, clusters);
        tables.iter().map(view).collect()
    };
    let before = views(&file);
    let options = Image::options().backing(base.clone());
    let rig = Rig::over(Memory::from(file), options);
    let mut model: Vec<Vec<u8>> = clusters
        .iter()
        .map(|cluster| rig.read(cluster * CLUSTER, CLUSTER as usize))
        .collect();
    let mut random = Random::new(seed);
    for round in 0..120 {
        let index = random.below(clusters.len() as u64) as usize;
        let from = random.below(128) * 512;
        let to = from + (random.below((CLUSTER - from) / 512) + 1) * 512;
        let (from, to) = if random.one_in(3) {
            (0, CLUSTER)
        } else {
            (from, to)
        };
        let start = clusters[index] * CLUSTER;
        let range = start + from..start + to;
        let part = &mut model[index][from as usize..to as usize];
        match random.below(4) {
            0 => {
                rig.image.discard(range).unwrap();
                part.fill(0);
            }
            1 => {
                let flags = random.pick(&[ZeroFlags::NONE, ZeroFlags::MAY_UNMAP]);
                rig.image.write_zeroes(range, flags).unwrap();
                part.fill(0);
            }
            _ => {
                let byte = 100 + round;
                rig.write(range.start, byte, part.len());
                part.fill(byte);
            }
        }
        if random.one_in(4) {
            rig.flush();
        }
        if round % 40 == 20 {
            rig.flush();
            assert!(
                views(&rig.memory().to_vec().unwrap()) == before,
                "round {round}"
            );
        }
    }
    for (cluster, expected) in clusters.iter().zip(&model) {
        let found = rig.read(cluster * CLUSTER, CLUSTER as usize);
        assert!(found == *expected, "cluster {cluster}");
    }
    // Clusters have become the active disk's own, so something did have to move away from the snapshots.
    let len_before = tables.iter().map(|(offset, _)| *offset).max().unwrap();
    assert!(rig.memory().len().unwrap() > len_before);
    let after = rig.finish_with_leaks();
    assert_eq!(snapshots(&after), tables);
    assert!(views(&after) == before);
}

#[test]
fn guest_writes_leave_snapshots_alone() {
    let base = Memory::new();
    synth::demo_base(&base).unwrap();
    let options = Image::options().read_only(true);
    let base: Arc<dyn Storage> = Arc::new(options.open(Arc::new(base)).unwrap());
    let memory = Memory::new();
    synth::demo(&memory).unwrap();
    let clusters: Vec<u64> = (0..14).chain(16_383..16_390).collect();
    for seed in 0..4 {
        assert_untouched(memory.to_vec().unwrap(), &base, &clusters, seed);
    }
}

#[test]
fn guest_writes_leave_snapshots_alone_with_subclusters() {
    let base: Arc<dyn Storage> = Arc::new(Memory::from(vec![0xbb; 20 * CLUSTER as usize]));
    let memory = Memory::new();
    synth::demo_extended(&memory).unwrap();
    let clusters: Vec<u64> = (0..10).chain(4095..4098).collect();
    for seed in 10..14 {
        assert_untouched(memory.to_vec().unwrap(), &base, &clusters, seed);
    }
}

#[test]
fn many_snapshots_that_share_clusters_stay_what_they_are() {
    let base: Arc<dyn Storage> = Arc::new(Memory::new());
    for extended in [false, true] {
        let geometry = Geometry::new(16, 4, extended).unwrap();
        let mut image = synth::Builder::new(Version::V3, geometry, 1 << 20);
        for number in 0..6 {
            for cluster in number..8 {
                let data = vec![0x10 + number as u8; CLUSTER as usize];
                image.data(GuestCluster::new(cluster), &data).unwrap();
            }
            image.snapshot(&format!("number {number}"), &[]).unwrap();
        }
        let memory = Memory::new();
        image.finish(&memory).unwrap();
        assert_sound(&memory);
        let clusters: Vec<u64> = (0..10).collect();
        for seed in 20..23 {
            assert_untouched(memory.to_vec().unwrap(), &base, &clusters, seed);
        }
    }
}
