//! The reference walk: every L1 and L2 table once, in parallel.
//!
//! The unit of work is a window of L1 indices. Within it the tables of all trees for one index are walked together: a
//! cluster may be shared only by trees that map it at the same place of the disk, so whatever may be shared legally meets
//! here, and is counted with its weight in one stroke. A cluster counted twice otherwise has two owners that may not share.

mod entries;
mod l1;
mod merged;
mod runs;
mod tables;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::image::Image;
use crate::refmap::RefMap;
use crate::report::{Collector, Counts};
use crate::units::Ordered;
use crate::{Code, Place, Run};

/// Bytes of memory that the reference maps of all workers together may take.
const WORKER_MAPS_BYTES: usize = 16 << 20;

pub(crate) use l1::{L1Scan, scan};
pub(crate) use tables::{Plan, Window};

/// An L2 table as one group of L1 entries refers to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TableRef {
    /// First byte of the table; not always aligned.
    pub(crate) offset: u64,
    /// References to it: L1 entries, weighted by their trees.
    pub(crate) weight: u64,
    /// Those of the references that are in the active tree.
    pub(crate) active_refs: u64,
    /// Whether the active tree has it.
    pub(crate) active: bool,
    /// The first snapshot that has it.
    pub(crate) snapshot: Option<u64>,
    /// The (first) L1 entry it hangs on.
    pub(crate) l1_index: u64,
    /// The active L1 entry has the COPIED flag.
    pub(crate) copied: bool,
}

/// What the walk gives.
#[derive(Debug)]
pub(crate) struct Walked {
    pub(crate) map: RefMap,
    pub(crate) tally: Tally,
    /// The references were scattered so absurdly that the walk was cut off.
    pub(crate) scattered: bool,
}

/// Sums of a part of the walk; they may be added in any order.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) counts: Counts,
    /// An active entry's COPIED flag does not fit the references met so far.
    pub(crate) copied_suspect: bool,
    /// Entries of inactive tables with a stale COPIED flag.
    pub(crate) stale_copied: u64,
    /// Active clusters mapped between the end of the disk and the VM state.
    pub(crate) beyond_disk: u64,
    /// Active clusters of VM state.
    pub(crate) vm_state: u64,
    /// Compressed clusters of an encrypted image.
    pub(crate) clear_text: u64,
}

impl Tally {
    fn absorb(&mut self, other: &Self) {
        let (a, b) = (&mut self.counts, &other.counts);
        a.check_errors = a.check_errors.saturating_add(b.check_errors);
        a.corruptions = a.corruptions.saturating_add(b.corruptions);
        a.allocated_clusters = a.allocated_clusters.saturating_add(b.allocated_clusters);
        a.fragmented_clusters = a.fragmented_clusters.saturating_add(b.fragmented_clusters);
        a.compressed_clusters = a.compressed_clusters.saturating_add(b.compressed_clusters);
        self.copied_suspect |= other.copied_suspect;
        self.stale_copied = self.stale_copied.saturating_add(other.stale_copied);
        self.beyond_disk = self.beyond_disk.saturating_add(other.beyond_disk);
        self.vm_state = self.vm_state.saturating_add(other.vm_state);
        self.clear_text = self.clear_text.saturating_add(other.clear_text);
    }
}

/// A worker's own state.
pub(crate) struct Worker<'a, 'i> {
    pub(crate) image: &'a Image<'i>,
    shared: &'a Shared,
    /// Bytes of memory that `map` may take before it is handed over.
    map_bytes_max: usize,
    pub(crate) map: RefMap,
    pub(crate) tally: Tally,
    /// Findings of the unit at hand.
    pub(crate) found: Collector,
    pub(crate) buffer: Vec<u8>,
    /// References to one host cluster by compressed data met one after the other.
    packed: (u64, u64),
}

impl<'a, 'i> Worker<'a, 'i> {
    fn new(image: &'a Image<'i>, shared: &'a Shared, limit: usize, threads: usize) -> Self {
        Self {
            image,
            shared,
            map_bytes_max: WORKER_MAPS_BYTES / threads.max(1),
            map: RefMap::new(image.file_clusters()),
            tally: Tally::default(),
            found: Collector::new(limit),
            buffer: Vec::new(),
            packed: (0, 0),
        }
    }

    /// Hands the references over if they take too much memory.
    #[inline]
    pub(super) fn bound_memory(&mut self) {
        if self.map.bytes() > self.map_bytes_max {
            self.shared.take_in(self.map.take());
        }
    }

    /// Records a finding that stands for `count` of its kind. Place and words are made only where they are kept.
    pub(crate) fn find(&mut self, code: Code, count: u64, tell: impl FnOnce() -> (Place, String)) {
        // Entries whose references are not counted have refcounts of their own.
        self.tally.copied_suspect |= code == Code::ReferencePastEnd;
        if code.counted_by_qemu() {
            let counts = &mut self.tally.counts;
            match code.severity() {
                crate::Severity::Error => {
                    counts.check_errors = counts.check_errors.saturating_add(count);
                }
                _ => counts.corruptions = counts.corruptions.saturating_add(count),
            }
        }
        self.found.add_with(code, count, tell);
    }
}

/// Walks all trees.
pub(crate) fn walk(image: &Image<'_>, scan: &L1Scan, run: &Run<'_>) -> Walked {
    let windows = Window::plan(image);
    let duplicates = tables::duplicate_units(scan);
    let window_units = scan.windows.len() as u64;
    let units = window_units.saturating_add(duplicates);
    let ordered = Ordered::new(run);
    let shared = Shared {
        map: Mutex::new(RefMap::new(image.file_clusters())),
        scattered: AtomicBool::new(false),
    };
    let workers = run.share_out(
        units,
        || Worker::new(image, &shared, run.limit(), run.threads()),
        |worker, unit| {
            if shared.is_scattered() {
                return;
            }
            if let Some(number) = scan.window(unit) {
                worker.walk_window(&windows, number, scan);
            } else {
                worker.walk_duplicates(scan, unit - window_units);
            }
            worker.flush_packed();
            ordered.deliver(unit, &mut worker.found);
            run.progress(image.reader.bytes_read());
        },
    );
    let parts = workers.into_iter().map(|worker| (worker.map, worker.tally));
    let parts: Vec<_> = parts.collect();
    let scattered = shared.is_scattered();
    let mut walked = Walked {
        map: shared.into_map(),
        tally: Tally::default(),
        scattered,
    };
    for (map, tally) in parts {
        if !walked.scattered {
            walked.map.merge(map);
            walked.scattered = walked.map.is_scattered();
        }
        walked.tally.absorb(&tally);
    }
    walked
}

/// Where workers put their references when these take too much memory.
#[derive(Debug)]
pub(crate) struct Shared {
    map: Mutex<RefMap>,
    scattered: AtomicBool,
}

impl Shared {
    /// Whether the references are scattered absurdly: then the walk ends.
    fn is_scattered(&self) -> bool {
        self.scattered.load(Ordering::Relaxed)
    }

    fn take_in(&self, map: RefMap) {
        if self.is_scattered() {
            return;
        }
        let mut shared = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        shared.merge(map);
        self.scattered
            .fetch_or(shared.is_scattered(), Ordering::Relaxed);
    }

    fn into_map(self) -> RefMap {
        self.map
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
