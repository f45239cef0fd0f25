//! Small programs of a few threads under a scheduler that tries many orders. A failure prints what replays it.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test --test shuttle`; with `QCOW2_SHUTTLE=n`, n times as many orders.
#![cfg(shuttle)]
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "what goes wrong in a test may end it, and helpers are part of the tests"
)]

/// How the schedules are chosen.
mod explore;
/// An image with nothing but the structures that every image has.
#[path = "../it/image.rs"]
mod image;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex as StdMutex};

use qcow2_alloc::{Allocator, Reason};
use qcow2_cache::Metadata;
use qcow2_format::{Geometry, HostCluster};
use qcow2_io::{Memory, Storage as _};
use shuttle::thread;

use crate::explore::explore;
use crate::image::{FIRST_CLUSTERS, empty_image, open, settle};

struct World {
    meta: Arc<Metadata>,
    alloc: Allocator,
    /// Clusters that someone owns. Nothing switches threads while it is held.
    owned: StdMutex<BTreeSet<u64>>,
}

impl World {
    fn new() -> Arc<Self> {
        // Blocks for 64 clusters, so that new ones have to be made.
        let geometry = Geometry::new(9, 6, false).unwrap();
        let (storage, header): (Memory, _) = empty_image(geometry);
        let (meta, alloc) = open(Arc::new(storage), header, 2);
        Arc::new(Self {
            meta,
            alloc,
            owned: StdMutex::default(),
        })
    }

    fn take(&self, want: u64, near: Option<u64>) -> (u64, u64) {
        let near = near.map(HostCluster::new);
        let allocation = self.alloc.allocate(want, near).unwrap();
        let (first, count) = (allocation.first().get(), allocation.count());
        assert!(first >= FIRST_CLUSTERS && (1..=want).contains(&count));
        for cluster in first..first + count {
            let new = self.owned.lock().unwrap().insert(cluster);
            assert!(new, "cluster {cluster} was handed out twice");
        }
        allocation.keep();
        (first, count)
    }

    fn give_back(&self, (first, count): (u64, u64)) {
        for cluster in first..first + count {
            assert!(self.owned.lock().unwrap().remove(&cluster));
        }
        self.alloc
            .release(HostCluster::new(first), count, Reason::Request);
    }

    fn taking_and_giving(self: &Arc<Self>, wants: [u64; 3]) -> thread::JoinHandle<()> {
        let world = self.clone();
        thread::spawn(move || {
            let mut last: Option<(u64, u64)> = None;
            for want in wants {
                let near = last.map(|(first, count)| first + count);
                let run = world.take(want, near);
                // One that nobody wants after all.
                drop(world.alloc.allocate(2, None).unwrap());
                if let Some(run) = last.replace(run) {
                    world.give_back(run);
                }
            }
        })
    }

    /// Exactly what is owned has a refcount.
    fn compare(&self) {
        settle(&self.meta, &self.alloc);
        settle(&self.meta, &self.alloc);
        let (_, _, blocks) = self.alloc.tables();
        let bits = self.meta.geometry().cluster_bits();
        let blocks: BTreeSet<u64> = blocks.iter().map(|block| block.get() >> bits).collect();
        let owned = self.owned.lock().unwrap().clone();
        for cluster in FIRST_CLUSTERS..self.alloc.file_clusters() + 2 {
            let expected = owned.contains(&cluster) || blocks.contains(&cluster);
            let found = self.alloc.refcount(HostCluster::new(cluster)).unwrap();
            assert_eq!(found, u64::from(expected), "cluster {cluster}");
        }
    }
}

#[test]
fn no_cluster_is_handed_out_twice() {
    explore(1000, || {
        let world = World::new();
        let one = world.taking_and_giving([3, 1, 2]);
        let two = world.taking_and_giving([1, 4, 1]);
        for _ in 0..3 {
            settle(&world.meta, &world.alloc);
        }
        one.join().unwrap();
        two.join().unwrap();
        world.compare();
    });
}

#[test]
fn blocks_are_made_while_others_allocate_and_commit() {
    explore(400, || {
        let world = World::new();
        // The first block is nearly full.
        world.take(56, None);
        let one = world.taking_and_giving([3, 5, 2]);
        let two = world.taking_and_giving([6, 1, 3]);
        settle(&world.meta, &world.alloc);
        one.join().unwrap();
        two.join().unwrap();
        world.compare();
    });
}

#[test]
fn nobody_writes_to_where_a_table_was() {
    explore(1000, || {
        let world = World::new();
        let old = world.alloc.tables().0;
        // The table's next entry is made, and is to be written where the table is.
        world.take(56, None);
        world.take(10, None);
        let other = {
            let world = world.clone();
            thread::spawn(move || world.meta.commit(&world.alloc).unwrap())
        };
        // More than one cluster of entries reaches.
        world.take(3, Some(64 * 64 + 7));
        assert_ne!(world.alloc.tables().0, old);
        // The first free cluster is that of the old table.
        let mine = world.alloc.allocate(1, None).unwrap();
        assert_eq!(mine.first().get(), old.get() >> 9);
        let storage = world.meta.storage();
        storage.write_at(&[0xa5; 512], old.get()).unwrap();
        other.join().unwrap();
        let mut bytes = [0; 512];
        storage.read_at(&mut bytes, old.get()).unwrap();
        assert_eq!(bytes, [0xa5; 512]);
        world.owned.lock().unwrap().insert(mine.first().get());
        mine.keep();
    });
}

#[test]
fn a_put_back_batch_is_not_lost() {
    explore(1000, || {
        let world = World::new();
        let run = world.take(4, None);
        world.give_back(run);
        let other = {
            let world = world.clone();
            thread::spawn(move || {
                world.meta.commit(&world.alloc).unwrap();
                // Someone is in flight, so it has to wait.
                let batch = world.alloc.take_ripe();
                world.alloc.keep_ripe(batch);
            })
        };
        settle(&world.meta, &world.alloc);
        other.join().unwrap();
        settle(&world.meta, &world.alloc);
        assert_eq!(world.alloc.waiting(), 0);
        world.compare();
    });
}
