//! Changed slices go to the file.

use qcow2_format::HostOffset;

use super::{Set, TableCache};
use crate::sync::atomic::Ordering;
use crate::sync::lock;

/// A copy of a dirty slice, to be written.
#[derive(Debug)]
pub struct DirtySlice {
    /// Where it belongs.
    pub offset: HostOffset,
    /// Its bytes.
    pub bytes: Vec<u8>,
    slot: usize,
}

impl TableCache {
    /// Copies of all dirty slices, in the order of the file. They count as clean from now on, but stay until
    /// [`written`](Self::written) or [`not_written`](Self::not_written) says what became of them.
    pub fn take_dirty(&self) -> Vec<DirtySlice> {
        let list = std::mem::take(&mut *lock(&self.dirty));
        let mut copies = Vec::with_capacity(list.len());
        for index in list {
            let Some((set, way)) = self.place(index) else {
                continue;
            };
            let mut flags = lock(&set.flags);
            let (Some(flags), Some(slot), Some(key)) = (
                flags.of.get_mut(way),
                self.slots.get(index),
                self.keys.get(index),
            ) else {
                continue;
            };
            if !flags.dirty {
                continue;
            }
            flags.dirty = false;
            flags.writing += 1;
            self.dirty_count.fetch_sub(1, Ordering::Relaxed);
            copies.push(DirtySlice {
                offset: HostOffset::new(key.load(Ordering::Relaxed) << self.slice_bits),
                bytes: slot.bytes(),
                slot: index,
            });
            // A good moment: all words have just been read, and no one changes them.
            slot.straighten(self.distance);
        }
        copies.sort_unstable_by_key(|copy| copy.offset);
        copies
    }

    fn place(&self, index: usize) -> Option<(&Set, usize)> {
        Some((self.sets.get(index / self.ways)?, index % self.ways))
    }

    /// The copy is on disk (not necessarily durable): the slice may be evicted.
    pub fn written(&self, copy: &DirtySlice) {
        self.settle(copy, false);
    }

    /// The copy did not get to disk: the slice is dirty again.
    pub fn not_written(&self, copy: &DirtySlice) {
        self.settle(copy, true);
    }

    fn settle(&self, copy: &DirtySlice, again: bool) {
        let Some((set, way)) = self.place(copy.slot) else {
            return;
        };
        let mut flags = lock(&set.flags);
        if let Some(flags) = flags.of.get_mut(way) {
            flags.writing = flags.writing.saturating_sub(1);
        }
        if again {
            self.mark_dirty(&mut flags, way, copy.slot);
        }
        drop(flags);
        set.changed.notify_all();
    }
}
