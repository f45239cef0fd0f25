//! What a file that got shorter no longer needs of the refcount structures.

use std::collections::BTreeSet;

use qcow2_cache::Kinds;
use qcow2_format::{Geometry, HostOffset, RefcountBlock, RefcountTableEntry};
use qcow2_io::Storage as _;

use crate::state::State;
use crate::{AllocError, Allocator, Reason};

impl Allocator {
    /// Gives up refcount blocks that count nothing, but perhaps themselves: of those numbered in `among`, or of all but the first.
    /// They are gone with the next commit, and their clusters are released. Tells which blocks counted those: they are
    /// worth another call after the commit, for they may have nothing left to count.
    ///
    /// Nobody may allocate until the commit: in the file the table still points at what is given up. `None` if nothing was.
    ///
    /// # Errors
    ///
    /// When a block can't be read, or the cache not written.
    pub fn drop_idle_blocks(
        &self,
        among: Option<&BTreeSet<usize>>,
    ) -> Result<Option<BTreeSet<usize>>, AllocError> {
        self.meta.write_refcounts()?;
        let mut state = self.lock();
        let numbers: Vec<usize> = match among {
            Some(among) => among.iter().copied().filter(|block| *block > 0).collect(),
            None => (1..state.table.len()).collect(),
        };
        let mut bytes = vec![0; self.geometry().cluster_len()];
        // All that can fail comes first.
        let mut idle = Vec::new();
        for block in numbers.into_iter().rev() {
            let Some(place) = self.block_at(&state, block)? else {
                continue;
            };
            let (describes, index) = State::locate(self.geometry(), self.cluster_of(place));
            let own = (describes == block).then_some(index);
            if self.last_in_use(place, own, &mut bytes)?.is_none() {
                idle.push((block, place, describes));
            }
        }
        if idle.is_empty() {
            return Ok(None);
        }
        let mut counted_by = BTreeSet::new();
        let size = self.geometry().cluster_size();
        for (block, place, describes) in idle {
            if let Some(entry) = state.table.get_mut(block) {
                *entry = RefcountTableEntry::default();
            }
            self.meta.change_refcount_table(block as u64, 0);
            self.meta.refcounts().forget(place, size);
            self.meta
                .overlap()
                .remove(place, size, Kinds::REFCOUNT_BLOCK);
            state.set_maybe_free_from(block, 0);
            state.first_block = state.first_block.min(block);
            if describes != block {
                self.release(self.geometry().host_cluster(place), 1, Reason::Cut);
                counted_by.insert(describes);
            }
        }
        Ok(Some(counted_by))
    }

    /// One past the last cluster with a refcount above 0.
    ///
    /// # Errors
    ///
    /// When a block can't be read, or the cache not written.
    pub fn end(&self) -> Result<u64, AllocError> {
        self.meta.write_refcounts()?;
        let state = self.lock();
        let mut bytes = vec![0; self.geometry().cluster_len()];
        for block in (0..state.table.len()).rev() {
            let Some(place) = self.block_at(&state, block)? else {
                continue;
            };
            if let Some(index) = self.last_in_use(place, None, &mut bytes)? {
                return Ok(block as u64 * self.geometry().refcounts_per_block() + index + 1);
            }
        }
        Ok(0)
    }

    fn cluster_of(&self, place: HostOffset) -> u64 {
        self.geometry().host_cluster(place).get()
    }

    /// The highest index of a block in the file whose refcount is above 0, other than `except`. `bytes` is room for a block.
    fn last_in_use(
        &self,
        place: HostOffset,
        except: Option<u64>,
        bytes: &mut [u8],
    ) -> Result<Option<u64>, AllocError> {
        let geometry = self.geometry();
        self.meta
            .storage()
            .read_at(bytes, place.get())
            .map_err(qcow2_cache::MetadataError::from)?;
        let last = last_above_zero(bytes, geometry, geometry.refcounts_per_block());
        Ok(match last {
            Some(last) if except == Some(last) => last_above_zero(bytes, geometry, last),
            other => other,
        })
    }
}

/// The highest index below `end` whose refcount is above 0.
fn last_above_zero(bytes: &[u8], geometry: Geometry, end: u64) -> Option<u64> {
    let block = RefcountBlock::new(bytes, geometry);
    let in_use = |index: &u64| {
        let index = usize::try_from(*index).unwrap_or(usize::MAX);
        block.get(index).is_some_and(|count| count > 0)
    };
    // Most of it is zeros: whole words of them are passed over.
    let per_word = 64 >> geometry.refcount_order();
    let words = bytes.as_chunks::<8>().0;
    let mut end = end;
    while end > 0 {
        let word = (end - 1) / per_word;
        let start = word * per_word;
        let is_zero = words.get(usize::try_from(word).unwrap_or(usize::MAX)) == Some(&[0; 8]);
        if !is_zero && let Some(index) = (start..end).rev().find(in_use) {
            return Some(index);
        }
        end = start;
    }
    None
}

#[cfg(test)]
mod tests {
    use qcow2_format::set_refcount;

    use super::*;

    #[test]
    fn the_last_refcount_in_use_is_found_in_every_width() {
        for order in 0..=6 {
            let geometry = Geometry::new(9, order, false).unwrap();
            let all = geometry.refcounts_per_block();
            let mut bytes = vec![0; 512];
            assert_eq!(last_above_zero(&bytes, geometry, all), None);
            for index in [0, 5, 6, all - 1] {
                set_refcount(&mut bytes, geometry, usize::try_from(index).unwrap(), 1).unwrap();
                assert_eq!(last_above_zero(&bytes, geometry, all), Some(index));
            }
            assert_eq!(last_above_zero(&bytes, geometry, all - 1), Some(6));
            assert_eq!(last_above_zero(&bytes, geometry, 5), Some(0));
        }
    }
}
