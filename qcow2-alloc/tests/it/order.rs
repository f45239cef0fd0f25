use std::sync::Arc;

use qcow2_alloc::{Allocator, Order, Reason};
use qcow2_format::{Geometry, HostCluster};

use crate::image::{FIRST_CLUSTERS, empty_image, open, settle};

/// Takes clusters for good; tells the first and how many there are.
fn take(alloc: &Allocator, want: u64) -> (u64, u64) {
    let allocation = alloc.allocate(want, None).unwrap();
    let taken = (allocation.first().get(), allocation.count());
    allocation.keep();
    taken
}

#[test]
fn the_lowest_clusters_are_taken_or_as_many_as_are_wanted_further_on() {
    let geometry = Geometry::new(16, 4, false).unwrap();
    for order in [Order::Lowest, Order::Forward] {
        let (storage, header) = empty_image(geometry);
        let (meta, alloc) = open(Arc::new(storage), header, 4);
        let alloc = alloc.ordered(order);
        assert_eq!(alloc.order(), order);
        let start = FIRST_CLUSTERS;
        assert_eq!(take(&alloc, 20), (start, 20));
        // Gaps of one cluster, and of three.
        for (first, count) in [(start + 2, 1), (start + 10, 3)] {
            alloc.release(HostCluster::new(first), count, Reason::Other);
        }
        settle(&meta, &alloc);
        let taken = [2, 1, 4, 1].map(|want| take(&alloc, want));
        let expected = match order {
            Order::Lowest => [(2, 1), (10, 1), (11, 2), (20, 1)],
            // The gap of one is passed over, and so is what is left behind.
            Order::Forward => [(10, 2), (12, 1), (20, 4), (24, 1)],
        };
        let expected = expected.map(|(first, count)| (start + first, count));
        assert_eq!(taken, expected, "{order:?}");
        // What was passed over is found again once something below is free.
        alloc.release(HostCluster::new(start), 1, Reason::Other);
        settle(&meta, &alloc);
        assert_eq!(take(&alloc, 1), (start, 1));
        let next = match order {
            Order::Lowest => 21,
            Order::Forward => 2,
        };
        assert_eq!(take(&alloc, 1), (start + next, 1));
    }
}
