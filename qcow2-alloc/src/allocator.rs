//! Handing out clusters.

use std::sync::Arc;

use qcow2_cache::sync::{Mutex, MutexGuard, lock};
use qcow2_cache::{Kinds, Metadata, PointerKind, Purpose, Step};
use qcow2_format::geometry::HOST_OFFSET_LIMIT;
use qcow2_format::{Geometry, HostCluster, HostOffset, RefcountTableEntry};
use qcow2_io::Storage as _;

use crate::release::{PassDiscard, Queue};
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
    pub(crate) pass_discard: PassDiscard,
    pub(crate) order: Order,
    /// Pointers to these are gone from memory.
    pub(crate) scheduled: Queue,
    /// Pointers to these are gone from the disk; someone may still be reading or writing them.
    pub(crate) ripe: Queue,
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

    /// Where the refcount block numbered `index` lies, if there is one.
    ///
    /// # Errors
    ///
    /// When the entry of the refcount table makes no sense.
    pub fn block(&self, index: u64) -> Result<Option<HostOffset>, AllocError> {
        let state = lock(&self.state);
        self.block_at(&state, usize::try_from(index).unwrap_or(usize::MAX))
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
