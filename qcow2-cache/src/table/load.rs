//! Slices come into the cache.

use qcow2_format::HostOffset;

use super::buffer::Buffer;
use super::slot::{Flags, Slot};
use super::{EMPTY, Room, Set, SetFlags, TableCache};
use crate::sync::atomic::Ordering;
use crate::sync::{lock, wait};

impl TableCache {
    /// Makes the slice that holds `at` resident; `load` reads its bytes from the offset it is given.
    ///
    /// # Errors
    ///
    /// What `load` gives; the slice is not here then.
    ///
    /// # Locking
    ///
    /// None is held while `load` works. Whoever else wants the slice waits for it.
    pub fn ensure<E>(
        &self,
        at: HostOffset,
        load: impl FnOnce(HostOffset, &mut [u8]) -> Result<(), E>,
    ) -> Result<Room, E> {
        let key = self.key(at);
        let set_index = self.set_of(key);
        let Some(set) = self.sets.get(set_index) else {
            return Ok(Room::Full);
        };
        let first = self.slot_range(set_index).start;
        let mut flags = lock(&set.flags);
        let way = loop {
            if self.way_of(set_index, key).is_some() {
                return Ok(Room::Resident);
            }
            if flags.of.iter().any(|flags| flags.loading == Some(key)) {
                flags = wait(&set.changed, flags);
                continue;
            }
            if let Some(way) = self.victim(set_index, &mut flags) {
                break way;
            }
            // What is being loaded or written makes room by itself.
            if !flags.of.iter().any(Flags::is_busy) {
                return Ok(Room::Full);
            }
            flags = wait(&set.changed, flags);
        };
        if let Some(flags) = flags.of.get_mut(way) {
            flags.loading = Some(key);
        }
        let (Some(slot), Some(cell)) = (self.slots.get(first + way), self.keys.get(first + way))
        else {
            return Ok(Room::Full);
        };
        slot.begin_change();
        cell.store(EMPTY, Ordering::Release);
        drop(flags);

        let mut buffer = Buffer::take(self.slice_bytes());
        // A panic in `load` must not leave the others waiting.
        let mut loading = Loading {
            cache: self,
            set,
            slot,
            way,
            done: false,
        };
        load(HostOffset::new(key << self.slice_bits), buffer.bytes())?;
        slot.fill(buffer.bytes(), self.distance);
        drop(buffer);
        loading.done = true;
        let mut flags = lock(&set.flags);
        if let Some(flags) = flags.of.get_mut(way) {
            flags.loading = None;
        }
        slot.touch();
        slot.end_change();
        cell.store(key, Ordering::Release);
        if let (Some(guess), Ok(way)) = (self.guess(key), u8::try_from(way)) {
            guess.store(way, Ordering::Relaxed);
        }
        drop(flags);
        set.changed.notify_all();
        Ok(Room::Resident)
    }

    /// A slot that may be given up: an empty one, or one that was not used since the hand last came by.
    fn victim(&self, set: usize, flags: &mut SetFlags) -> Option<usize> {
        let range = self.slot_range(set);
        let keys = self.keys.get(range.clone())?;
        let slots = self.slots.get(range)?;
        let free = |flags: &Flags| flags.is_idle();
        if let Some(way) = (0..self.ways).find(|way| {
            flags.of.get(*way).is_some_and(free)
                && keys
                    .get(*way)
                    .is_some_and(|key| key.load(Ordering::Relaxed) == EMPTY)
        }) {
            return Some(way);
        }
        for _ in 0..self.ways * 2 {
            let way = flags.hand;
            flags.hand = (flags.hand + 1) % self.ways;
            if flags.of.get(way).is_some_and(free) && !slots.get(way)?.take_touched() {
                return Some(way);
            }
        }
        // Others touch while the hand goes round; then any will do.
        (0..self.ways).find(|way| flags.of.get(*way).is_some_and(free))
    }
}

/// Ends a load that failed or panicked.
struct Loading<'a> {
    cache: &'a TableCache,
    set: &'a Set,
    slot: &'a Slot,
    way: usize,
    done: bool,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut flags = lock(&self.set.flags);
        if let Some(flags) = flags.of.get_mut(self.way) {
            flags.loading = None;
        }
        self.slot.end_change();
        drop(flags);
        self.set.changed.notify_all();
        debug_assert!(self.cache.ways > self.way);
    }
}
