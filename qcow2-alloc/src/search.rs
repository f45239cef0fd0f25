//! Looking for free clusters.

use std::ops::Range;

use qcow2_format::HostCluster;
use qcow2_format::geometry::HOST_OFFSET_LIMIT;

use crate::refcounts::{self, Place};
use crate::state::State;
use crate::{AllocError, Allocator};

/// Refcount blocks that one request looks through for free space before it takes some at the end of the file. The next
/// request goes on where this one stopped.
const SEARCH_BLOCKS: usize = 16;

/// Which free clusters are handed out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The lowest, however few there are in one place: the file gets no longer than it has to.
    #[default]
    Lowest,
    /// As many in one place as are wanted, the lowest behind those that were handed out last. What was passed over is looked
    /// at again once something below has become free, or the image is opened anew. QEMU does so, and who expects its places needs
    /// the same.
    Forward,
}

impl Allocator {
    pub(crate) fn find(
        &self,
        state: &mut State,
        want: u64,
        near: Option<HostCluster>,
        whole: bool,
    ) -> Result<(u64, u64), AllocError> {
        if let Some(near) = near
            && !whole
            && self.in_reach(near.get()).is_ok()
            && self.refcount_at(state, near.get())? == 0
        {
            return self.run(state, near.get(), want);
        }
        let whole = whole || self.order == Order::Forward;
        let per_block = self.geometry().refcounts_per_block();
        let mut left = SEARCH_BLOCKS;
        let mut block = state.first_block;
        let mut only_full = true;
        while left > 0 && block < state.table.len() {
            let start = (block as u64).saturating_mul(per_block);
            let from = start + state.maybe_free_from(block);
            if start >= state.tail {
                break;
            }
            if from < start + per_block {
                left -= 1;
                match self.next_free(state, from, start + per_block)? {
                    Some(found) => {
                        state.set_maybe_free_from(block, found - start);
                        only_full = false;
                        let end = start + per_block;
                        if let Some(run) = self.run_below(state, found..end, want, whole)? {
                            return Ok(run);
                        }
                    }
                    None => state.set_maybe_free_from(block, per_block),
                }
            }
            block += 1;
            if only_full {
                state.first_block = block;
            }
        }
        // The end of the file, or the first gap behind it.
        let mut from = state.next;
        let mut passed = true;
        loop {
            self.in_reach(from)?;
            let (block, index) = State::locate(self.geometry(), from);
            let end = from - index + per_block;
            let Some(found) = self.next_free(state, from, end)? else {
                from = end;
                continue;
            };
            if std::mem::take(&mut passed) {
                state.next = found;
            }
            let run = self.run(state, found, want)?;
            if !whole || run.1 == want {
                return Ok(run);
            }
            debug_assert!(run.1 > 0, "block {block}");
            from = found + run.1;
        }
    }

    /// The clusters from the start of `within` on, which is free; or, if it must be all that are wanted, those of the first gap in there
    /// that is large enough. Only [`Order::Forward`] looks beyond the first gap.
    fn run_below(
        &self,
        state: &State,
        within: Range<u64>,
        want: u64,
        whole: bool,
    ) -> Result<Option<(u64, u64)>, AllocError> {
        let mut found = within.start;
        loop {
            let run = self.run(state, found, want)?;
            if !whole || run.1 == want {
                return Ok(Some(run));
            }
            let behind = found + run.1;
            if self.order != Order::Forward || behind >= within.end {
                return Ok(None);
            }
            match self.next_free(state, behind, within.end)? {
                Some(next) => found = next,
                None => return Ok(None),
            }
        }
    }

    pub(crate) fn in_reach(&self, cluster: u64) -> Result<(), AllocError> {
        if cluster >= HOST_OFFSET_LIMIT >> self.geometry().cluster_bits() {
            return Err(AllocError::FileTooLarge {
                limit: HOST_OFFSET_LIMIT,
            });
        }
        Ok(())
    }

    /// The first cluster in `from..end`, all of one block, whose refcount is 0.
    pub(crate) fn next_free(
        &self,
        state: &State,
        from: u64,
        end: u64,
    ) -> Result<Option<u64>, AllocError> {
        let geometry = self.geometry();
        let (block, _) = State::locate(geometry, from);
        let Some(offset) = self.block_at(state, block)? else {
            return Ok((from < end).then_some(from));
        };
        let per_word = 64 >> geometry.refcount_order();
        let mut cluster = from;
        while cluster < end {
            let (_, index) = State::locate(geometry, cluster);
            let place = Place::new(geometry, offset, index);
            let word = refcounts::word(&self.meta, place.word)?;
            if !refcounts::has_zero(geometry, word) {
                cluster += per_word - index % per_word;
                continue;
            }
            if place.get(word) == 0 {
                return Ok(Some(cluster));
            }
            cluster += 1;
        }
        Ok(None)
    }

    /// How far the clusters from `first` on, which is free, are free.
    fn run(&self, state: &State, first: u64, want: u64) -> Result<(u64, u64), AllocError> {
        let mut count = 1;
        while count < want
            && self.in_reach(first + count).is_ok()
            && self.refcount_at(state, first + count)? == 0
        {
            count += 1;
        }
        Ok((first, count))
    }
}
