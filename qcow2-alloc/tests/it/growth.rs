use std::sync::Arc;

use qcow2_alloc::AllocError;
use qcow2_format::{Geometry, HostCluster};
use qcow2_io::{Fault, Faulty, Operation, Storage};

use crate::image::{empty_image, open, settle};
use crate::model::{Model, compare_on_disk};

/// The smallest clusters and the widest refcounts: a block describes 64 clusters, a cluster of the table 64 blocks.
fn narrow() -> Geometry {
    Geometry::new(9, 6, false).unwrap()
}

#[test]
fn blocks_and_tables_grow_as_the_file_does() {
    let (storage, header) = empty_image(narrow());
    let storage = Arc::new(storage);
    let (meta, alloc) = open(storage.clone(), header, 4);
    let mut model = Model::default();
    let mut places = vec![alloc.tables().0];
    for round in 0..400 {
        let allocation = alloc.allocate(100, None).unwrap();
        model.take(allocation.first().get(), allocation.count());
        allocation.keep();
        let place = alloc.tables().0;
        if places.last() != Some(&place) {
            places.push(place);
        }
        if round % 50 == 0 {
            settle(&meta, &alloc);
        }
    }
    assert!(places.len() >= 4, "the table was at {places:?} only");
    settle(&meta, &alloc);
    settle(&meta, &alloc);
    assert_eq!(model.compare(&meta, &alloc), 0);
    assert_eq!(meta.header().refcount_table_offset, *places.last().unwrap());
    compare_on_disk(&model, &storage);
}

#[test]
fn a_table_moves_far_in_one_step() {
    let (storage, header) = empty_image(narrow());
    let storage = Arc::new(storage);
    let (meta, alloc) = open(storage.clone(), header, 4);
    let mut model = Model::default();
    // A hole of a million clusters before it. The block that is made for it may take the very place.
    let near = HostCluster::new(1_000_000);
    let allocation = alloc.allocate(70, Some(near)).unwrap();
    model.take(allocation.first().get(), allocation.count());
    allocation.keep();
    settle(&meta, &alloc);
    settle(&meta, &alloc);
    let (_, len, blocks) = alloc.tables();
    assert!(
        len >= 1_000_000 / 64 * 8 && blocks.len() < 20,
        "{len}, {}",
        blocks.len()
    );
    assert_eq!(model.compare(&meta, &alloc), 0);
    compare_on_disk(&model, &storage);
}

#[test]
fn runs_longer_than_what_a_block_describes_are_found() {
    let (storage, header) = empty_image(narrow());
    let storage = Arc::new(storage);
    let (meta, alloc) = open(storage.clone(), header, 4);
    let mut model = Model::default();
    for count in [64, 65, 200, 63, 1000] {
        let allocation = alloc.allocate_contiguous(count).unwrap();
        assert_eq!(allocation.count(), count);
        model.take(allocation.first().get(), count);
        allocation.keep();
        // Something in the way of the next.
        let allocation = alloc.allocate(1, None).unwrap();
        model.take(allocation.first().get(), 1);
        allocation.keep();
    }
    // No more than the clusters and their blocks take.
    assert!(alloc.file_clusters() < 2000, "{}", alloc.file_clusters());
    settle(&meta, &alloc);
    settle(&meta, &alloc);
    assert_eq!(model.compare(&meta, &alloc), 0);
    compare_on_disk(&model, &storage);
}

#[test]
fn a_table_of_more_than_8_mib_is_an_error_that_changes_nothing() {
    let (storage, header) = empty_image(narrow());
    let storage = Arc::new(storage);
    let (meta, alloc) = open(storage.clone(), header, 4);
    let near = Some(HostCluster::new(64 << 20));
    let error = alloc.allocate(1, near).unwrap_err();
    let limit = 8 << 20;
    assert!(
        matches!(error, AllocError::RefcountTableTooLarge { needed, limit: found } if needed > limit && found == limit),
        "{error}"
    );
    assert!(!meta.is_poisoned());
    let mut model = Model::default();
    let allocation = alloc.allocate(5, None).unwrap();
    model.take(allocation.first().get(), allocation.count());
    allocation.keep();
    settle(&meta, &alloc);
    assert_eq!(model.compare(&meta, &alloc), 0);
    assert!(storage.len().unwrap() < 1 << 20);
}

#[test]
fn opening_reads_the_table_and_no_block() {
    let (storage, header) = empty_image(narrow());
    let storage = Arc::new(Faulty::new(storage));
    // Each read of the block would fail.
    storage.add(Fault::on(Operation::Read).within(1024..1536).forever());
    let (_, alloc) = open(storage.clone(), header, 4);
    assert_eq!(storage.count(Operation::Read), 1);
    assert_eq!(alloc.tables().2.len(), 1);
    alloc.allocate(1, None).unwrap_err();
    storage.clear();
    alloc.allocate(1, None).unwrap().keep();
}

#[test]
fn what_a_table_leaves_is_handed_out_at_once_and_no_hole_stays() {
    let (storage, header) = empty_image(narrow());
    let storage = Arc::new(storage);
    let (meta, alloc) = open(storage.clone(), header, 4);
    let (old, len, _) = alloc.tables();
    let mut model = Model::default();
    let mut taken = 0;
    while alloc.tables().0 == old {
        let allocation = alloc.allocate(50, None).unwrap();
        model.take(allocation.first().get(), allocation.count());
        taken += allocation.count();
        allocation.keep();
    }
    // Whoever reads the file finds the new table, and no commit was needed for that.
    let mut cluster = vec![0; 512];
    storage.read_at(&mut cluster, 0).unwrap();
    let header = qcow2_format::Header::decode(&cluster).unwrap();
    assert_eq!(header.refcount_table_offset, alloc.tables().0);
    let place = |offset: qcow2_format::HostOffset| offset.get() >> 9;
    let was_taken = model.taken_in(place(old), len.div_ceil(512));
    for cluster in place(old)..place(old) + len.div_ceil(512) {
        let count = alloc.refcount(HostCluster::new(cluster)).unwrap();
        assert_eq!(count, u64::from(was_taken.contains(&cluster)));
    }
    // The rest of what the new structures left before themselves is taken before the file grows.
    let end = alloc.file_clusters();
    let (_, len, blocks) = alloc.tables();
    let structures = 2 + len.div_ceil(512) + blocks.len() as u64;
    let holes = end - structures - taken;
    let mut left = holes.saturating_sub(1);
    while left > 0 {
        let allocation = alloc.allocate(left.min(50), None).unwrap();
        model.take(allocation.first().get(), allocation.count());
        left -= allocation.count();
        allocation.keep();
    }
    assert!(
        alloc.file_clusters() <= end,
        "{} {end}",
        alloc.file_clusters()
    );
    settle(&meta, &alloc);
    assert_eq!(model.compare(&meta, &alloc), 0);
    compare_on_disk(&model, &storage);
}
