//! Clusters on their way back: scheduled, then ripe, then free.

use qcow2_cache::sync::atomic::{AtomicU64, Ordering};
use qcow2_cache::sync::{Mutex, lock};
use qcow2_format::HostCluster;

/// Why clusters are given back, which decides whether the host gets their space back, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// They were overwritten by a copy elsewhere: never passed down, for they are used again soon.
    Replaced,
    /// The guest discarded them.
    Request,
    /// A snapshot went.
    Snapshot,
    /// The image was cut: always passed down.
    Cut,
    /// Tables that moved, and all else.
    Other,
}

/// For which reasons released clusters are punched out of the image file. The default is QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassDiscard {
    /// Guest discards.
    pub request: bool,
    /// Snapshots deleted or applied.
    pub snapshot: bool,
    /// The rest.
    pub other: bool,
}

impl Default for PassDiscard {
    fn default() -> Self {
        Self {
            request: true,
            snapshot: true,
            other: false,
        }
    }
}

impl PassDiscard {
    pub(crate) fn passes(self, reason: Reason) -> bool {
        match reason {
            Reason::Replaced => false,
            Reason::Cut => true,
            Reason::Request => self.request,
            Reason::Snapshot => self.snapshot,
            Reason::Other => self.other,
        }
    }
}

/// Consecutive clusters that each lose one reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) reason: Reason,
}

/// Releases in the order in which they came, neighbours joined.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    runs: Mutex<Vec<Release>>,
    clusters: AtomicU64,
}

impl Queue {
    pub(crate) fn push(&self, first: HostCluster, count: u64, reason: Reason) {
        let mut runs = lock(&self.runs);
        match runs.last_mut() {
            Some(last) if last.reason == reason && last.first + last.count == first.get() => {
                last.count += count;
            }
            _ => runs.push(Release {
                first: first.get(),
                count,
                reason,
            }),
        }
        self.clusters.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn take(&self) -> Vec<Release> {
        let mut runs = lock(&self.runs);
        self.clusters.store(0, Ordering::Relaxed);
        std::mem::take(&mut *runs)
    }

    /// Puts older releases before those that came since.
    pub(crate) fn put_back(&self, mut older: Vec<Release>) {
        let mut runs = lock(&self.runs);
        let count = older.iter().map(|release| release.count).sum();
        self.clusters.fetch_add(count, Ordering::Relaxed);
        older.append(&mut runs);
        *runs = older;
    }

    pub(crate) fn clusters(&self) -> u64 {
        self.clusters.load(Ordering::Relaxed)
    }
}
