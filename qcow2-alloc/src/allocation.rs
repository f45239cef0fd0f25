//! Clusters that were handed out and that nothing points at yet.

use qcow2_format::{HostCluster, HostOffset};

use crate::Allocator;

/// Consecutive clusters for a new owner. Dropped, they are free again; [kept](Self::keep), they are the caller's.
#[derive(Debug)]
#[must_use = "dropping it gives the clusters back"]
pub struct Allocation<'a> {
    allocator: &'a Allocator,
    first: HostCluster,
    count: u64,
    virgin_from: HostCluster,
    kept: bool,
}

impl<'a> Allocation<'a> {
    pub(crate) fn new(
        allocator: &'a Allocator,
        first: HostCluster,
        count: u64,
        virgin_from: HostCluster,
    ) -> Self {
        Self {
            allocator,
            first,
            count,
            virgin_from,
            kept: false,
        }
    }

    /// The first cluster.
    pub fn first(&self) -> HostCluster {
        self.first
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The first byte.
    pub fn offset(&self) -> HostOffset {
        HostOffset::new(self.first.get() << self.allocator.meta.geometry().cluster_bits())
    }

    /// The clusters from this one on lie behind all that the file ever held, so they read as zeros.
    pub fn virgin_from(&self) -> HostCluster {
        self.virgin_from
    }

    /// Makes the clusters the caller's for good.
    pub fn keep(mut self) {
        self.kept = true;
    }

    /// Keeps the first `count` clusters; the others are free again.
    pub fn keep_first(mut self, count: u64) {
        let count = count.min(self.count);
        self.kept = true;
        if let Some(rest) = self.first.checked_add(count)
            && count < self.count
        {
            self.allocator.free_now(rest, self.count - count);
        }
    }
}

impl Drop for Allocation<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.allocator.free_now(self.first, self.count);
        }
    }
}
