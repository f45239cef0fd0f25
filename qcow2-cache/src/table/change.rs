//! Words of a slice change.

use qcow2_format::HostOffset;

use super::slot::Slot;
use super::{SetFlags, TableCache};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{MutexGuard, lock};

impl TableCache {
    /// Changes words of the slice that holds `at`, which becomes dirty; `None` if it is not here.
    ///
    /// # Locking
    ///
    /// `change` runs under the lock of the slice's set and must not call the cache.
    pub fn update<T>(
        &self,
        at: HostOffset,
        change: impl FnOnce(&mut SliceWriter<'_>) -> T,
    ) -> Option<T> {
        let key = self.key(at);
        let set_index = self.set_of(key);
        let set = self.sets.get(set_index)?;
        let mut flags = lock(&set.flags);
        let way = self.way_of(set_index, key)?;
        let index = self.slot_range(set_index).start + way;
        let slot = self.slots.get(index)?;
        slot.store_linear(self.slice_bytes() / 8, self.distance);
        let mut writer = SliceWriter {
            slot,
            words: slot.words()?,
            changed: false,
        };
        let value = change(&mut writer);
        if writer.changed {
            self.mark_dirty(&mut flags, way, index);
        }
        slot.touch();
        Some(value)
    }

    pub(super) fn mark_dirty(
        &self,
        flags: &mut MutexGuard<'_, SetFlags>,
        way: usize,
        index: usize,
    ) {
        if let Some(flags) = flags.of.get_mut(way)
            && !flags.dirty
        {
            flags.dirty = true;
            self.dirty_count.fetch_add(1, Ordering::Relaxed);
            lock(&self.dirty).push(index);
        }
    }
}

/// Access to the words of a slice while its set is locked.
#[derive(Debug)]
pub struct SliceWriter<'a> {
    slot: &'a Slot,
    words: &'a [AtomicU64],
    changed: bool,
}

impl SliceWriter<'_> {
    /// The word numbered `index` in the slice.
    pub fn get(&self, index: usize) -> u64 {
        self.words
            .get(index)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Stores a word; readers see the old or the new one.
    pub fn set(&mut self, index: usize, value: u64) {
        if let Some(word) = self.words.get(index) {
            if !self.changed {
                self.slot.bend();
            }
            word.store(value, Ordering::SeqCst);
            self.changed = true;
        }
    }

    /// Stores two words; readers see both old or both new.
    pub fn set_pair(&mut self, index: usize, first: u64, second: u64) {
        self.slot.begin_change();
        self.set(index, first);
        self.set(index + 1, second);
        self.slot.end_change();
    }
}
