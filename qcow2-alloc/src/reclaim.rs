//! Clusters become free again: scheduled, ripe once a commit has made the end of all pointers durable, and reclaimed once no request in flight
//! can know one.

use qcow2_cache::sync::lock;
use qcow2_cache::{MetadataError, Releases};
use qcow2_format::{HostCluster, HostOffset};
use qcow2_io::Storage as _;

use crate::release::{Reason, Release};
use crate::{AllocError, Allocator};

impl Allocator {
    /// Gives clusters back at once: nothing on disk or in memory ever pointed at them.
    pub(crate) fn free_now(&self, first: HostCluster, count: u64) {
        let mut state = lock(&self.state);
        for number in first.get()..first.get() + count {
            // What can't be lowered is lost space.
            let _ = self.lower(&mut state, number);
        }
    }

    /// Schedules one reference to each of `count` clusters for release. Nothing in memory points at them any more; that
    /// the disk doesn't either is for a commit to see to.
    pub fn release(&self, first: HostCluster, count: u64, reason: Reason) {
        if count > 0 {
            self.scheduled.push(first, count, reason);
        }
    }

    /// Clusters that were released and are not free yet.
    pub fn waiting(&self) -> u64 {
        self.scheduled.clusters() + self.ripe.clusters()
    }

    /// Whether some clusters only wait for requests in flight.
    pub fn has_ripe(&self) -> bool {
        self.ripe.clusters() > 0
    }

    /// Takes the releases that are durable. Once no request that began before this call is in flight,
    /// [`reclaim`](Self::reclaim) makes the clusters free; until then, they can be [put back](Self::keep_ripe).
    pub fn take_ripe(&self) -> Vec<Release> {
        self.ripe.take()
    }

    /// Puts back what [`take_ripe`](Self::take_ripe) gave.
    pub fn keep_ripe(&self, batch: Vec<Release>) {
        self.ripe.put_back(batch);
    }

    /// Lowers the refcounts of released clusters. Those that nothing owns any more are punched out of the file, if that is
    /// wanted, and then can be handed out.
    ///
    /// # Errors
    ///
    /// When a refcount can't be read or is 0 already. The rest of the batch is done all the same.
    pub fn reclaim(&self, batch: Vec<Release>) -> Result<(), AllocError> {
        let mut result = Ok(());
        let mut to_punch: Vec<(u64, u64)> = Vec::new();
        let mut state = lock(&self.state);
        for release in batch {
            let punch = self.pass_discard.passes(release.reason);
            for number in release.first..release.first + release.count {
                let done = match self.refcount_at(&state, number) {
                    // Its refcount keeps it from being handed out until the hole is punched.
                    Ok(1) if punch => {
                        match to_punch.last_mut() {
                            Some((first, count)) if *first + *count == number => *count += 1,
                            _ => to_punch.push((number, 1)),
                        }
                        Ok(())
                    }
                    Ok(_) => self.lower(&mut state, number),
                    Err(error) => Err(error),
                };
                result = result.and(done);
            }
        }
        if to_punch.is_empty() {
            return result;
        }
        drop(state);
        let bits = self.geometry().cluster_bits();
        for (first, count) in &to_punch {
            let kinds = (*first..first + count).find(|number| {
                !self
                    .meta
                    .overlap()
                    .kinds(HostCluster::new(*number))
                    .is_empty()
            });
            if kinds.is_none() {
                // The host keeps the space then; the image doesn't care.
                let _ = self
                    .meta
                    .storage()
                    .discard(first << bits..(first + count) << bits);
            }
        }
        let mut state = lock(&self.state);
        for (first, count) in to_punch {
            for number in first..first + count {
                let done = self.lower(&mut state, number);
                result = result.and(done);
            }
        }
        result
    }

    /// Forgets all releases that are under way: every refcount is about to be set to what it should be without them.
    pub fn forget_releases(&self) {
        self.scheduled.take();
        self.ripe.take();
    }

    /// The refcounts of `count` clusters have become 0 in the file, past this allocator: they can be handed out.
    pub fn freed(&self, first: HostCluster, count: u64) {
        let mut state = lock(&self.state);
        let (mut at, end) = (first.get(), first.get().saturating_add(count));
        let per_block = self.geometry().refcounts_per_block();
        while at < end {
            state.note_free(self.geometry(), at);
            at = (at / per_block + 1) * per_block;
        }
    }

    /// Whether clusters released for this reason are to be punched out of the file.
    pub fn passes(&self, reason: Reason) -> bool {
        self.pass_discard.passes(reason)
    }
}

impl Releases for Allocator {
    type Batch = Vec<Release>;

    fn take(&self) -> Self::Batch {
        self.scheduled.take()
    }

    fn apply(&self, batch: Self::Batch) -> Result<(), MetadataError> {
        if !self.meta.rules().release_after_pointer {
            return self.reclaim(batch).map_err(|error| match error {
                AllocError::Metadata(error) => error,
                other => MetadataError::Corrupt {
                    what: "a refcount",
                    offset: HostOffset::new(0),
                    detail: other.to_string(),
                },
            });
        }
        for release in batch {
            self.ripe.push(
                HostCluster::new(release.first),
                release.count,
                release.reason,
            );
        }
        Ok(())
    }

    fn put_back(&self, batch: Self::Batch) {
        self.scheduled.put_back(batch);
    }
}
