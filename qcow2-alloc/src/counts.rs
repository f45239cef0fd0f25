//! How many references each cluster has.

use qcow2_cache::Step;
use qcow2_cache::sync::lock;
use qcow2_format::{HostCluster, HostOffset};

use crate::refcounts::{self, Place};
use crate::state::State;
use crate::{AllocError, Allocator};

impl Allocator {
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
}
