use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{Storage, ZeroFlags};

use crate::rig::Rig;

const CLUSTER: u64 = 4096;
const LEN: usize = CLUSTER as usize;

fn rig() -> Rig {
    let create = CreateOptions::new(64 * CLUSTER).cluster_size(CLUSTER);
    Rig::new(&create, Image::options())
}

/// Repeats `round`; the file must not get longer for ever.
fn assert_bounded(rig: &Rig, mut round: impl FnMut(u64)) {
    for number in 0..200 {
        round(number);
    }
    let settled = rig.memory().len().unwrap();
    for number in 200..500 {
        round(number);
    }
    let len = rig.memory().len().unwrap();
    assert!(len <= settled, "grew from {settled} to {len}");
    // Room for each cluster of the disk and the metadata, and for one that is being replaced.
    assert!(len <= (64 + 16) * CLUSTER, "{len}");
}

#[test]
fn writing_flushing_and_discarding_for_ever_needs_no_more_space() {
    let rig = rig();
    assert_bounded(&rig, |number| {
        let offset = number % 8 * CLUSTER;
        rig.write(offset, 1, LEN);
        rig.flush();
        rig.image.discard(offset..offset + CLUSTER).unwrap();
        rig.flush();
    });
    rig.finish();
}

#[test]
fn flushing_only_between_discard_and_write_needs_no_more_space() {
    let rig = rig();
    assert_bounded(&rig, |number| {
        let offset = number % 8 * CLUSTER;
        rig.image.discard(offset..offset + CLUSTER).unwrap();
        rig.flush();
        rig.write(offset, 1, LEN);
    });
    rig.finish();
}

#[test]
fn replacing_clusters_for_ever_needs_no_more_space() {
    let rig = rig();
    assert_bounded(&rig, |number| {
        let offset = number % 8 * CLUSTER;
        let flags = ZeroFlags::MAY_UNMAP;
        rig.image
            .write_zeroes(offset..offset + CLUSTER, flags)
            .unwrap();
        rig.write(offset + 512, 7, 512);
        rig.flush();
    });
    rig.finish();
}

#[test]
fn without_any_flush_the_image_sees_to_it_by_itself() {
    let create = CreateOptions::new(64 * 512).cluster_size(512);
    let rig = Rig::new(&create, Image::options());
    for number in 0..20_000_u64 {
        let offset = number % 64 * 512;
        rig.write(offset, 1, 512);
        rig.image.discard(offset..offset + 512).unwrap();
    }
    // At most 4096 clusters wait at a time, and those they were replaced by.
    let len = rig.memory().len().unwrap();
    assert!(len < 3 * 4096 * 512, "{len}");
    rig.finish();
}

#[test]
fn readers_that_never_stop_don_t_keep_clusters_from_being_used_again() {
    let rig = rig();
    rig.write(40 * CLUSTER, 9, LEN);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut reads = 0_u64;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(rig.read(40 * CLUSTER, LEN), [9; LEN]);
                reads += 1;
            }
            reads
        });
        for number in 0..400 {
            let offset = number % 8 * CLUSTER;
            rig.write(offset, 1, LEN);
            rig.image.discard(offset..offset + CLUSTER).unwrap();
            rig.flush();
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 0);
    });
    let len = rig.memory().len().unwrap();
    assert!(len <= 100 * CLUSTER, "{len}");
    rig.finish();
}

#[test]
fn refcount_tables_and_l1_tables_grow_with_the_disk() {
    // The narrowest: a refcount block describes 64 clusters, and an L1 table of one cluster maps 2 MiB.
    let create = CreateOptions::new(1 << 20)
        .cluster_size(512)
        .refcount_bits(64);
    let rig = Rig::new(&create, Image::options());
    let size = 200 << 20;
    rig.image.set_len(size).unwrap();
    let places: Vec<u64> = (0..100).map(|number| number * (size / 100)).collect();
    for (number, place) in places.iter().enumerate() {
        rig.write(*place, number as u8 + 1, 100 * 512);
        if number % 10 == 0 {
            rig.flush();
        }
    }
    // Ten thousand clusters need more than the 64 refcount blocks that the first table lists.
    assert!(rig.image.header().refcount_table_clusters > 1);
    for (number, place) in places.iter().enumerate() {
        assert!(rig.read(*place, 100 * 512) == vec![number as u8 + 1; 100 * 512]);
    }
    rig.finish();
}
