use std::sync::Arc;

use qcow2_alloc::{AllocError, Reason};
use qcow2_cache::MetadataError;
use qcow2_format::{Geometry, HostCluster};
use qcow2_io::{Fault, Faulty, Memory, Operation};

use crate::image::{empty_image, open, settle};
use crate::model::Model;

const MANY: u64 = 1000;

fn geometry(order: u32) -> Geometry {
    Geometry::new(9, order, false).unwrap()
}

#[test]
fn a_refcount_that_is_full_is_an_error_that_changes_nothing() {
    for order in 0..=6 {
        let geometry = geometry(order);
        let (storage, header) = empty_image(geometry);
        let (meta, alloc) = open(Arc::new(storage), header, 2);
        let allocation = alloc.allocate_contiguous(3).unwrap();
        let first = allocation.first();
        allocation.keep();
        let clusters = [0, 1, 2].map(|number| HostCluster::new(first.get() + number));
        let max = geometry.refcount_max();
        alloc.set_refcount(clusters[1], max).unwrap();
        let before = clusters.map(|cluster| alloc.refcount(cluster).unwrap());
        let error = alloc.add_references(first, 3).unwrap_err();
        let AllocError::RefcountOverflow {
            cluster,
            value,
            bits,
        } = error
        else {
            panic!("{error}");
        };
        // With one bit the first is full already.
        let full = usize::from(order > 0);
        assert_eq!((cluster, value, bits), (clusters[full], max, 1 << order));
        let after = clusters.map(|cluster| alloc.refcount(cluster).unwrap());
        assert_eq!(before, after);
        if order < 6 {
            alloc.set_refcount(clusters[0], max + 1).unwrap_err();
        }
        assert!(!meta.is_poisoned());
    }
}

#[test]
fn releasing_what_is_free_marks_the_image_as_corrupt() {
    let (storage, header) = empty_image(geometry(4));
    let (meta, alloc) = open(Arc::new(storage), header, 2);
    alloc.release(HostCluster::new(9), 1, Reason::Request);
    meta.commit(&alloc).unwrap();
    let error = alloc.reclaim(alloc.take_ripe()).unwrap_err();
    let corrupt = matches!(error, AllocError::Metadata(MetadataError::Corrupt { .. }));
    assert!(corrupt, "{error}");
    assert!(meta.is_poisoned() && meta.header().incompatible.corrupt());
    alloc.allocate(1, None).unwrap_err();
}

#[test]
fn metadata_without_a_refcount_is_not_handed_out() {
    let (storage, header) = empty_image(geometry(4));
    let (meta, alloc) = open(Arc::new(storage), header, 2);
    // The L1 table's.
    alloc.set_refcount(HostCluster::new(3), 0).unwrap();
    let error = alloc.allocate(1, None).unwrap_err();
    assert!(error.to_string().contains("cluster 3"), "{error}");
    assert!(meta.is_poisoned());
}

/// Allocates across several new blocks and tables while one operation fails; then goes on. Tells whether it failed.
fn play(operation: Operation, nth: u64, after_effect: bool) -> bool {
    let (storage, header) = empty_image(geometry(6));
    let storage = Arc::new(Faulty::<Memory>::new(storage));
    let (meta, alloc) = open(storage.clone(), header, 2);
    let mut fault = Fault::on(operation).nth(nth);
    if after_effect {
        fault = fault.after_effect();
    }
    storage.add(fault);
    let mut model = Model::default();
    let mut taken = 0;
    let mut errors = 0;
    while taken < 9000 {
        match alloc.allocate(90, None) {
            Ok(allocation) => {
                model.take(allocation.first().get(), allocation.count());
                taken += allocation.count();
                allocation.keep();
            }
            Err(error) => {
                errors += 1;
                assert!(errors < 3, "{error}");
            }
        }
        if taken % 3000 < 90 && meta.commit(&alloc).is_err() {
            errors += 1;
        }
    }
    assert!(!meta.is_poisoned(), "{operation:?} {nth}");
    let struck = storage.struck() > 0;
    storage.clear();
    settle(&meta, &alloc);
    settle(&meta, &alloc);
    let leaks = model.compare(&meta, &alloc);
    assert_eq!(leaks, 0, "{operation:?} {nth} {after_effect}");
    struck
}

#[test]
fn no_single_fault_loses_a_cluster_or_hands_one_out_twice() {
    use Operation::{Read, Write, WriteZeroes};
    let mut met = 0;
    for operation in [Read, Write, WriteZeroes] {
        for after_effect in [false, true] {
            // All of the first, then some.
            let mut nth = 1;
            while nth < MANY && play(operation, nth, after_effect) {
                met += 1;
                nth += 1 + nth / 4;
            }
        }
    }
    assert!(met > 45, "only {met} faults were met");
}

#[test]
fn after_a_failed_flush_nothing_more_is_written() {
    let (storage, header) = empty_image(geometry(4));
    let storage = Arc::new(Faulty::<Memory>::new(storage));
    let (meta, alloc) = open(storage.clone(), header, 2);
    alloc.allocate(3, None).unwrap().keep();
    storage.add(Fault::on(Operation::Flush));
    meta.commit(&alloc).unwrap_err();
    // What of the writes before is there nobody knows, so nothing may rest on them. The image itself may be all right.
    assert!(meta.is_poisoned() && !meta.header().incompatible.corrupt());
    let written = storage.count(Operation::Write);
    alloc.allocate(1, None).unwrap_err();
    for _ in 0..2 {
        let error = meta.commit(&alloc).unwrap_err();
        assert!(matches!(error, MetadataError::Poisoned), "{error}");
    }
    assert_eq!(storage.count(Operation::Write), written);
}
