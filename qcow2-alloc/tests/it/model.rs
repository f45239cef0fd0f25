use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use qcow2_alloc::{AllocError, Allocator, Order, Reason};
use qcow2_cache::Metadata;
use qcow2_format::{Geometry, Header, HostCluster};
use qcow2_io::{Memory, Storage};

use crate::image::{FIRST_CLUSTERS, empty_image, open, settle};

/// What the refcounts should be; clusters of refcount structures are not among them.
#[derive(Default)]
pub(crate) struct Model {
    counts: BTreeMap<u64, u64>,
}

impl Model {
    /// Notes clusters that were handed out: nobody had them.
    pub(crate) fn take(&mut self, first: u64, count: u64) {
        for cluster in first..first + count {
            let before = self.counts.insert(cluster, 1);
            assert_eq!(before, None, "cluster {cluster} was handed out twice");
        }
    }

    /// Which clusters of a range were handed out.
    pub(crate) fn taken_in(&self, first: u64, count: u64) -> Vec<u64> {
        let taken = self.counts.range(first..first + count);
        taken.map(|(cluster, _)| *cluster).collect()
    }

    /// Notes one reference less to some clusters.
    fn drop_one(&mut self, first: u64, count: u64) {
        for cluster in first..first + count {
            let left = self.counts.get_mut(&cluster).unwrap();
            *left -= 1;
            if *left == 0 {
                self.counts.remove(&cluster);
            }
        }
    }

    /// Compares with what the allocator says; gives the number of clusters that are taken for nothing.
    pub(crate) fn compare(&self, meta: &Metadata, alloc: &Allocator) -> u64 {
        let geometry = meta.geometry();
        let bits = geometry.cluster_bits();
        let mut expected = self.counts.clone();
        let (table, len, blocks) = alloc.tables();
        let first = table.get() >> bits;
        let table = first..first + len.div_ceil(geometry.cluster_size());
        let blocks = blocks.into_iter().map(|block| block.get() >> bits);
        for cluster in table.chain(blocks).chain([0, 3]) {
            let before = expected.insert(cluster, 1);
            assert_eq!(
                before, None,
                "cluster {cluster} is metadata and something else"
            );
        }
        // The file may be shorter than what was taken and never written.
        let last = expected.keys().next_back().copied().unwrap_or(0);
        let mut leaks = 0;
        for cluster in 0..alloc.file_clusters().max(last) + 70 {
            let found = alloc.refcount(HostCluster::new(cluster)).unwrap();
            let expected = expected.remove(&cluster).unwrap_or(0);
            assert!(
                found >= expected,
                "cluster {cluster}: {found}, not {expected}"
            );
            leaks += found - expected;
        }
        leaks
    }
}

/// Opens what is on disk and compares that, too.
pub(crate) fn compare_on_disk(model: &Model, storage: &Arc<Memory>) {
    let mut cluster = vec![0; 512];
    storage.read_at(&mut cluster, 0).unwrap();
    let header = Header::decode(&cluster).unwrap();
    let (meta, alloc) = open(storage.clone(), header, 8);
    assert_eq!(model.compare(&meta, &alloc), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Take { want: u64, near: Option<usize> },
    TakeWhole { count: u64 },
    TakeAndDrop { want: u64 },
    TakeAndKeepSome { want: u64, kept: u64 },
    Refer { run: usize },
    Release { run: usize },
    Commit,
    Settle,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..30_u64, prop::option::of(0..20_usize))
            .prop_map(|(want, near)| Step::Take { want, near }),
        1 => (1..300_u64).prop_map(|count| Step::TakeWhole { count }),
        1 => (1..30_u64).prop_map(|want| Step::TakeAndDrop { want }),
        1 => (1..30_u64, 0..40_u64).prop_map(|(want, kept)| Step::TakeAndKeepSome { want, kept }),
        1 => (0..20_usize).prop_map(|run| Step::Refer { run }),
        5 => (0..20_usize).prop_map(|run| Step::Release { run }),
        1 => Just(Step::Commit),
        1 => Just(Step::Settle),
    ]
}

fn play(order: u32, steps: &[Step]) {
    for way in [Order::Lowest, Order::Forward] {
        play_in(way, order, steps);
    }
}

fn play_in(way: Order, order: u32, steps: &[Step]) {
    let geometry = Geometry::new(9, order, false).unwrap();
    let (storage, header) = empty_image(geometry);
    let storage = Arc::new(storage);
    let (meta, alloc) = open(storage.clone(), header, 2);
    let alloc = alloc.ordered(way);
    let mut model = Model::default();
    // References that someone has, each to a run of clusters.
    let mut runs: Vec<(u64, u64)> = Vec::new();
    // Those that were given back and count until they are reclaimed.
    let mut released: Vec<(u64, u64)> = Vec::new();
    for step in steps {
        match *step {
            Step::Take { want, near } => {
                let near = near.and_then(|number| runs.get(number));
                let near = near.map(|(first, count)| HostCluster::new(first + count));
                let allocation = alloc.allocate(want, near).unwrap();
                let run = (allocation.first().get(), allocation.count());
                assert!(run.0 >= FIRST_CLUSTERS && (1..=want).contains(&run.1));
                allocation.keep();
                model.take(run.0, run.1);
                runs.push(run);
            }
            Step::TakeWhole { count } => {
                let allocation = alloc.allocate_contiguous(count).unwrap();
                assert_eq!(allocation.count(), count);
                let first = allocation.first().get();
                allocation.keep();
                model.take(first, count);
                runs.push((first, count));
            }
            Step::TakeAndDrop { want } => drop(alloc.allocate(want, None).unwrap()),
            Step::TakeAndKeepSome { want, kept } => {
                let allocation = alloc.allocate(want, None).unwrap();
                let (first, kept) = (allocation.first().get(), kept.min(allocation.count()));
                allocation.keep_first(kept);
                model.take(first, kept);
                runs.extend((kept > 0).then_some((first, kept)));
            }
            Step::Refer { run } => {
                let Some(&(first, count)) = runs.get(run) else {
                    continue;
                };
                let max = geometry.refcount_max();
                let most = (first..first + count)
                    .map(|cluster| model.counts[&cluster])
                    .max();
                let result = alloc.add_references(HostCluster::new(first), count);
                if most < Some(max) {
                    result.unwrap();
                    for cluster in first..first + count {
                        *model.counts.get_mut(&cluster).unwrap() += 1;
                    }
                    runs.push((first, count));
                } else {
                    let full = matches!(result, Err(AllocError::RefcountOverflow { value, .. }) if value == max);
                    assert!(full);
                }
            }
            Step::Release { run } => {
                if run < runs.len() {
                    let (first, count) = runs.swap_remove(run);
                    alloc.release(HostCluster::new(first), count, Reason::Request);
                    released.push((first, count));
                }
            }
            Step::Commit => meta.commit(&alloc).unwrap(),
            Step::Settle => {
                settle(&meta, &alloc);
                for (first, count) in released.drain(..) {
                    model.drop_one(first, count);
                }
            }
        }
    }
    settle(&meta, &alloc);
    // Tables that moved are given back by the first, too.
    settle(&meta, &alloc);
    for (first, count) in released {
        model.drop_one(first, count);
    }
    assert_eq!((alloc.waiting(), meta.is_poisoned()), (0, false));
    assert_eq!(model.compare(&meta, &alloc), 0);
    compare_on_disk(&model, &storage);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn refcounts_are_those_of_a_plain_map(
        order in 0..=6_u32,
        steps in prop::collection::vec(step(), 1..120),
    ) {
        play(order, &steps);
    }
}
