//! Handing out clusters and taking them back.

use std::sync::Arc;

use qcow2_cache::sync::{Mutex, MutexGuard, lock};
use qcow2_cache::{Kinds, Metadata, MetadataError, PointerKind, Purpose, Releases, Step};
use qcow2_format::geometry::HOST_OFFSET_LIMIT;
use qcow2_format::{Geometry, HostCluster, HostOffset, RefcountTableEntry};
use qcow2_io::Storage as _;

use crate::refcounts::{self, Place};
use crate::release::{PassDiscard, Queue, Reason, Release};
use crate::search::Order;
use crate::state::State;
use crate::{AllocError, Allocation};

/// Who owns which cluster of an image file.
///
/// Opening reads the refcount table and no block. Free space is learnt of as it is looked for.
#[derive(Debug)]
pub struct Allocator {
    pub(crate) meta: Arc<Metadata>,
    pub(crate) state: Mutex<State>,
    pass_discard: PassDiscard,
    pub(crate) order: Order,
    /// Pointers to these are gone from memory.
    scheduled: Queue,
    /// Pointers to these are gone from the disk; someone may still be reading or writing them.
    ripe: Queue,
}

impl Allocator {
    /// The allocator of an image. Reads the refcount table.
    ///
    /// # Errors
    ///
    /// What the storage reports.
    pub fn open(meta: Arc<Metadata>, pass_discard: PassDiscard) -> Result<Self, AllocError> {
        let (offset, clusters) = {
            let header = meta.header();
            (header.refcount_table_offset, header.refcount_table_clusters)
        };
        let geometry = meta.geometry();
        // The header's limits keep this below 8 MiB.
        let len = usize::try_from(u64::from(clusters) * geometry.cluster_size()).unwrap_or(0);
        let mut bytes = vec![0; len];
        meta.storage().read_at(&mut bytes, offset.get())?;
        let (entries, _) = bytes.as_chunks::<8>();
        let table = entries
            .iter()
            .map(|bytes| RefcountTableEntry::from_be_bytes(*bytes))
            .collect();
        let file_clusters = geometry.clusters_for(meta.storage().len()?);
        Ok(Self {
            state: Mutex::new(State::new(offset, table, file_clusters)),
            meta,
            pass_discard,
            order: Order::default(),
            scheduled: Queue::default(),
            ripe: Queue::default(),
        })
    }

    /// The same, with another order of clusters.
    #[must_use]
    pub fn ordered(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// Which free clusters are handed out.
    pub fn order(&self) -> Order {
        self.order
    }

    /// The reasons for which clusters are punched out of the file.
    pub fn pass_discard(&self) -> PassDiscard {
        self.pass_discard
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.meta.geometry()
    }

    /// Places of the refcount table and of all refcount blocks, for the overlap map.
    pub fn tables(&self) -> (HostOffset, u64, Vec<HostOffset>) {
        let state = lock(&self.state);
        let blocks = state.table.iter().map(|entry| entry.block());
        (
            state.table_offset,
            state.table.len() as u64 * 8,
            blocks.filter(|block| block.get() != 0).collect(),
        )
    }

    /// Hands out up to `want` consecutive clusters, at least one, with a refcount of 1. They are those from `near` on, if that
    /// is free.
    ///
    /// # Errors
    ///
    /// When the file can't grow, or metadata can't be read or written.
    ///
    /// # Durability
    ///
    /// The refcounts are in the cache; a commit brings them to the disk before any pointer.
    pub fn allocate(
        &self,
        want: u64,
        near: Option<HostCluster>,
    ) -> Result<Allocation<'_>, AllocError> {
        self.take(want.max(1), near, false, Purpose::Other)
    }

    /// As [`allocate`](Self::allocate), of one cluster for something that is told of where it can't be had.
    ///
    /// # Errors
    ///
    /// As [`allocate`](Self::allocate).
    pub fn allocate_for(
        &self,
        purpose: Purpose,
        near: Option<HostCluster>,
    ) -> Result<Allocation<'_>, AllocError> {
        self.take(1, near, false, purpose)
    }

    /// Hands out `count` consecutive clusters.
    ///
    /// # Errors
    ///
    /// As [`allocate`](Self::allocate).
    pub fn allocate_contiguous(&self, count: u64) -> Result<Allocation<'_>, AllocError> {
        self.take(count.max(1), None, true, Purpose::Other)
    }

    fn take(
        &self,
        want: u64,
        near: Option<HostCluster>,
        whole: bool,
        purpose: Purpose,
    ) -> Result<Allocation<'_>, AllocError> {
        self.meta.check_writable()?;
        self.meta.before(Step::Allocate)?;
        let mut state = lock(&self.state);
        self.validate(&mut state)?;
        let (first, count) = loop {
            let (first, count) = self.find(&mut state, want, near, whole)?;
            if self.make_blocks(&mut state, first, count)? {
                break (first, count);
            }
            // The new table may lie where the clusters were to be.
        };
        self.check_unused(first, count, purpose)?;
        self.raise(&mut state, first, count)?;
        let virgin_from = state.virgin.max(first);
        state.note_taken(self.geometry(), first, count);
        // What goes on at a place of its own is not a search.
        if self.order == Order::Forward && near.map(HostCluster::get) != Some(first) {
            state.pass_over(self.geometry(), first + count);
        }
        Ok(Allocation::new(
            self,
            HostCluster::new(first),
            count,
            HostCluster::new(virgin_from),
        ))
    }

    /// Refuses a table that points at one block twice: no search would end in time.
    fn validate(&self, state: &mut State) -> Result<(), AllocError> {
        if state.validated {
            return Ok(());
        }
        let mut blocks: Vec<(u64, usize)> = state
            .table
            .iter()
            .enumerate()
            .map(|(index, entry)| (entry.block().get(), index))
            .filter(|(offset, _)| *offset != 0)
            .collect();
        blocks.sort_unstable();
        for pair in blocks.windows(2) {
            if let [(a, first), (b, second)] = pair
                && a == b
            {
                let place = HostOffset::new(state.table_offset.get() + *second as u64 * 8);
                let detail = format!("its block at {a:#x} is that of entry {first}, too");
                return Err(self
                    .meta
                    .corrupt("refcount table entry", place, detail)
                    .into());
            }
        }
        state.validated = true;
        Ok(())
    }

    /// Refcount 0 is no proof: what is known to be metadata is not handed out, whatever its refcount says.
    pub(crate) fn check_unused(
        &self,
        first: u64,
        count: u64,
        purpose: Purpose,
    ) -> Result<(), AllocError> {
        for number in first..first + count {
            let cluster = HostCluster::new(number);
            if let Some(what) = self.metadata_in(cluster) {
                return Err(self.meta.in_use(cluster, what, purpose).into());
            }
        }
        Ok(())
    }

    /// What is known to lie in a cluster, beside data.
    pub(crate) fn metadata_in(&self, cluster: HostCluster) -> Option<Kinds> {
        if cluster.get() == 0 {
            return Some(Kinds::MAIN_HEADER);
        }
        let kinds = self.meta.overlap().kinds(cluster);
        (!kinds.is_empty()).then_some(kinds)
    }

    /// Refuses to free what is known to be metadata, whatever its refcount says.
    ///
    /// # Errors
    ///
    /// The image is marked as corrupt then.
    pub fn check_unowned(&self, first: HostCluster, count: u64) -> Result<(), AllocError> {
        let found = match self.metadata_in(first) {
            Some(what) => Some((first, what)),
            None => self.meta.overlap().first_within(first, count),
        };
        let Some((cluster, what)) = found else {
            return Ok(());
        };
        let offset = HostOffset::new(cluster.get() << self.geometry().cluster_bits());
        let detail = format!("the cluster was to be freed, but holds {what}");
        Err(self.meta.corrupt("a cluster", offset, detail).into())
    }

    /// The block numbered `block`, if there is one.
    pub(crate) fn block_at(
        &self,
        state: &State,
        block: usize,
    ) -> Result<Option<HostOffset>, AllocError> {
        let Some(offset) = state.block(block) else {
            return Ok(None);
        };
        let reserved = state
            .table
            .get(block)
            .map_or(0, |entry| entry.reserved_bits());
        if !self.geometry().is_cluster_aligned(offset)
            || reserved != 0
            || offset.get() >= HOST_OFFSET_LIMIT
        {
            let place = HostOffset::new(state.table_offset.get() + block as u64 * 8);
            let index = block as u64;
            return Err(self
                .meta
                .bad_pointer(PointerKind::RefcountTable, index, place, offset)
                .into());
        }
        Ok(Some(offset))
    }

    pub(crate) fn refcount_at(&self, state: &State, cluster: u64) -> Result<u64, AllocError> {
        let (block, index) = State::locate(self.geometry(), cluster);
        let Some(offset) = self.block_at(state, block)? else {
            return Ok(0);
        };
        let place = Place::new(self.geometry(), offset, index);
        Ok(place.get(refcounts::word(&self.meta, place.word)?))
    }

    /// Stores a refcount whose block exists.
    pub(crate) fn store(&self, state: &State, cluster: u64, value: u64) -> Result<(), AllocError> {
        let (block, index) = State::locate(self.geometry(), cluster);
        if let Some(offset) = self.block_at(state, block)? {
            let place = Place::new(self.geometry(), offset, index);
            refcounts::store(&self.meta, place, value)?;
        }
        Ok(())
    }

    /// Raises the refcounts of clusters whose blocks exist, all or none.
    pub(crate) fn raise(
        &self,
        state: &mut State,
        first: u64,
        count: u64,
    ) -> Result<(), AllocError> {
        let max = self.geometry().refcount_max();
        for number in first..first + count {
            let raised = self.refcount_at(state, number).and_then(|value| {
                if value >= max {
                    return Err(AllocError::RefcountOverflow {
                        cluster: HostCluster::new(number),
                        value,
                        bits: self.geometry().refcount_bits(),
                    });
                }
                self.store(state, number, value + 1)
            });
            if let Err(error) = raised {
                for number in first..number {
                    // The blocks are in the cache or can't be read; in the latter case space is lost, not more.
                    let _ = self.lower(state, number);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes one reference from a cluster.
    pub(crate) fn lower(&self, state: &mut State, number: u64) -> Result<(), AllocError> {
        let value = self.refcount_at(state, number)?;
        let Some(lowered) = value.checked_sub(1) else {
            let offset = HostOffset::new(number << self.geometry().cluster_bits());
            let detail = "it is 0 although something pointed at the cluster";
            return Err(self
                .meta
                .corrupt("the refcount of the cluster", offset, detail)
                .into());
        };
        if lowered == 0 {
            self.check_unowned(HostCluster::new(number), 1)?;
        }
        self.meta.before(Step::Free)?;
        self.store(state, number, lowered)?;
        if lowered == 0 {
            state.note_free(self.geometry(), number);
        }
        Ok(())
    }

    /// The refcount of a cluster.
    ///
    /// # Errors
    ///
    /// When its block can't be read.
    pub fn refcount(&self, cluster: HostCluster) -> Result<u64, AllocError> {
        let state = lock(&self.state);
        self.refcount_at(&state, cluster.get())
    }

    /// Gives each of `count` clusters one more reference.
    ///
    /// # Errors
    ///
    /// When one is full ([`AllocError::RefcountOverflow`]) or a block can't be read or made; none is changed then.
    pub fn add_references(&self, first: HostCluster, count: u64) -> Result<(), AllocError> {
        self.meta.check_writable()?;
        let mut state = lock(&self.state);
        self.make_blocks_of_used(&mut state, first.get(), count)?;
        self.raise(&mut state, first.get(), count)
    }

    /// Sees to it that blocks for clusters exist that may be in use: no block may be put there.
    fn make_blocks_of_used(
        &self,
        state: &mut State,
        first: u64,
        count: u64,
    ) -> Result<(), AllocError> {
        let end = first.saturating_add(count);
        let (first_block, _) = State::locate(self.geometry(), first);
        let (last_block, _) = State::locate(self.geometry(), end.saturating_sub(1));
        if (first_block..=last_block).any(|block| state.block(block).is_none()) {
            self.cover_below(state, end)?;
        }
        Ok(())
    }

    /// Sets a refcount to what a check has found it should be; makes the block if need be.
    ///
    /// # Errors
    ///
    /// When the value doesn't fit, or a block can't be read or made.
    pub fn set_refcount(&self, cluster: HostCluster, value: u64) -> Result<(), AllocError> {
        self.meta.check_writable()?;
        if value > self.geometry().refcount_max() {
            return Err(AllocError::RefcountOverflow {
                cluster,
                value: self.geometry().refcount_max(),
                bits: self.geometry().refcount_bits(),
            });
        }
        let mut state = lock(&self.state);
        if value > 0 {
            self.make_blocks_of_used(&mut state, cluster.get(), 1)?;
        }
        if value < self.refcount_at(&state, cluster.get())? {
            self.meta.before(Step::Free)?;
        }
        self.store(&state, cluster.get(), value)?;
        if value == 0 {
            state.note_free(self.geometry(), cluster.get());
        } else {
            state.note_taken(self.geometry(), cluster.get(), 1);
        }
        Ok(())
    }

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

    /// Where the refcount block numbered `index` lies, if there is one.
    ///
    /// # Errors
    ///
    /// When the entry of the refcount table makes no sense.
    pub fn block(&self, index: u64) -> Result<Option<HostOffset>, AllocError> {
        let state = lock(&self.state);
        self.block_at(&state, usize::try_from(index).unwrap_or(usize::MAX))
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

    /// The file has been cut to `clusters` clusters: what is behind is as if never written.
    pub fn file_was_cut(&self, clusters: u64) {
        let mut state = lock(&self.state);
        state.virgin = clusters;
        state.tail = state.tail.min(clusters);
        state.next = state.next.min(clusters);
        state.first_block = 0;
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
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
