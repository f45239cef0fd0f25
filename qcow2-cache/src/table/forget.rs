//! Slices leave the cache, or must.

use qcow2_format::HostOffset;

use super::slot::Slot;
use super::{EMPTY, TableCache};
use crate::sync::atomic::Ordering;
use crate::sync::{lock, wait};

impl TableCache {
    /// Forgets all slices in `len` bytes from `from` on, changes included: what they were part of is no more. Waits for
    /// those that are being loaded or written.
    pub fn forget(&self, from: HostOffset, len: u64) {
        let first = self.key(from);
        let last = (from.get().saturating_add(len.saturating_sub(1))) >> self.slice_bits;
        for key in first..=last {
            let set_index = self.set_of(key);
            let Some(set) = self.sets.get(set_index) else {
                continue;
            };
            let mut flags = lock(&set.flags);
            loop {
                if flags.of.iter().any(|flags| flags.loading == Some(key)) {
                    flags = wait(&set.changed, flags);
                    continue;
                }
                let Some(way) = self.way_of(set_index, key) else {
                    break;
                };
                if flags.of.get(way).is_some_and(|flags| flags.writing > 0) {
                    flags = wait(&set.changed, flags);
                    continue;
                }
                let index = self.slot_range(set_index).start + way;
                if let (Some(slot), Some(cell), Some(flags)) = (
                    self.slots.get(index),
                    self.keys.get(index),
                    flags.of.get_mut(way),
                ) {
                    slot.begin_change();
                    cell.store(EMPTY, Ordering::Release);
                    slot.end_change();
                    if flags.dirty {
                        flags.dirty = false;
                        self.dirty_count.fetch_sub(1, Ordering::Relaxed);
                    }
                }
                break;
            }
        }
    }

    /// Forgets the clean slices that no one used since this was last called, and gives their memory back.
    pub fn trim(&self) {
        self.give_up(|slot| !slot.take_touched());
    }

    /// Forgets all clean slices: what is on disk has changed, or is about to, past this cache.
    pub fn forget_clean(&self) {
        self.give_up(|_| true);
    }

    fn give_up(&self, unwanted: impl Fn(&Slot) -> bool) {
        for (set_index, set) in self.sets.iter().enumerate() {
            let mut flags = lock(&set.flags);
            for way in 0..self.ways {
                let index = self.slot_range(set_index).start + way;
                let (Some(slot), Some(cell), Some(flags)) = (
                    self.slots.get(index),
                    self.keys.get(index),
                    flags.of.get_mut(way),
                ) else {
                    continue;
                };
                if flags.is_idle() && cell.load(Ordering::Relaxed) != EMPTY && unwanted(slot) {
                    slot.begin_change();
                    cell.store(EMPTY, Ordering::Release);
                    slot.end_change();
                }
            }
        }
    }
}
