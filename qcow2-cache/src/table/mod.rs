//! Slices of tables in memory.
//!
//! A slice is a piece of an L2 table or refcount block: a power of two of bytes at a place of the file that is a multiple
//! of that. The cache is a set-associative array of slots. A hit takes no lock: the reader finds the key, reads the word and then
//! looks whether the slot's version is still the same. All else, loading, changing and writing back, goes under the
//! lock of one set, and no such lock is held while the storage works.

mod buffer;
mod slot;

use std::fmt;

use qcow2_format::HostOffset;

use crate::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait, yield_now};
use buffer::Buffer;
use slot::{Flags, Slot};

/// No slice is at this number: offsets end below 2^56.
const EMPTY: u64 = u64::MAX;
/// Slots of a set, at least, where the cache is large enough.
const WAYS: usize = 8;
/// Guesses for each slot, at least, so that few slices share one.
const GUESSES: usize = 16;

/// Slices of one kind of table.
pub struct TableCache {
    slice_bits: u32,
    /// Words of a slice that differ by this from one to the next need not be looked at one by one; 0 if there are none such.
    distance: u64,
    set_mask: usize,
    ways: usize,
    /// By more bits of the hash than choose the set: the way of the slice that was loaded last. A reader looks there first.
    guesses: Box<[AtomicU8]>,
    guess_mask: usize,
    /// The number of the slice in each slot; the slots of a set are neighbours.
    keys: Box<[AtomicU64]>,
    slots: Box<[Slot]>,
    sets: Box<[Set]>,
    /// Slots that have become dirty since the list was last taken; some perhaps twice, some no longer.
    dirty: Mutex<Vec<usize>>,
    dirty_count: AtomicUsize,
}

/// The slots' states, and who waits for one to change.
struct Set {
    flags: Mutex<SetFlags>,
    changed: Condvar,
}

struct SetFlags {
    of: Vec<Flags>,
    /// Where the search for a victim goes on.
    hand: usize,
}

/// What became of a request to have a slice in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It is there.
    Resident,
    /// Every slot it may go to has changes that are not on disk.
    Full,
}

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
    /// A cache of slices of `slice_bytes` bytes, a power of two of at least 512, that holds `slices` of them, at least two.
    pub fn new(slice_bytes: usize, slices: usize) -> Self {
        let slice_bits = slice_bytes.max(512).next_power_of_two().trailing_zeros();
        let slices = slices.max(2);
        let sets = match slices / WAYS {
            0 => 1,
            n => n.next_power_of_two() >> usize::from(!n.is_power_of_two()),
        };
        let ways = slices / sets;
        let count = sets * ways;
        let guesses = (count * GUESSES).next_power_of_two();
        Self {
            slice_bits,
            distance: 0,
            set_mask: sets - 1,
            ways,
            guesses: (0..guesses).map(|_| AtomicU8::new(0)).collect(),
            guess_mask: guesses - 1,
            keys: (0..count).map(|_| AtomicU64::new(EMPTY)).collect(),
            slots: (0..count).map(|_| Slot::new()).collect(),
            sets: (0..sets)
                .map(|_| Set {
                    flags: Mutex::new(SetFlags {
                        of: vec![Flags::default(); ways],
                        hand: 0,
                    }),
                    changed: Condvar::new(),
                })
                .collect(),
            dirty: Mutex::default(),
            dirty_count: AtomicUsize::new(0),
        }
    }

    /// The same cache, which expects that words often grow by `distance` from one to the next: the entries of neighbours that lie
    /// one after the other.
    #[must_use]
    pub fn with_distance(mut self, distance: u64) -> Self {
        self.distance = distance;
        self
    }

    /// Bytes in a slice.
    pub fn slice_bytes(&self) -> usize {
        1 << self.slice_bits
    }

    /// Slices that fit.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Slices with changes that no one has begun to write.
    pub fn dirty_count(&self) -> usize {
        self.dirty_count.load(Ordering::Relaxed)
    }

    fn key(&self, at: HostOffset) -> u64 {
        at.get() >> self.slice_bits
    }

    fn word_index(&self, at: HostOffset) -> usize {
        let mask = (1_u64 << self.slice_bits) - 1;
        // Below the size of a slice, which is in memory.
        usize::try_from((at.get() & mask) / 8).unwrap_or(0)
    }

    fn set_of(&self, key: u64) -> usize {
        hash(key) & self.set_mask
    }

    #[inline]
    fn guess(&self, key: u64) -> Option<&AtomicU8> {
        self.guesses.get(hash(key) & self.guess_mask)
    }

    fn slot_range(&self, set: usize) -> std::ops::Range<usize> {
        set * self.ways..(set + 1) * self.ways
    }

    /// Reads what `read` wants from the slice's words; `None` if the slice is not here.
    #[inline]
    fn read<T>(&self, at: HostOffset, mut read: impl FnMut(&Slot) -> Option<T>) -> Option<T> {
        let key = self.key(at);
        let first = self.set_of(key) * self.ways;
        let mut index = first + usize::from(self.guess(key)?.load(Ordering::Relaxed));
        loop {
            let slot = self.slots.get(index)?;
            let version = slot.version.load(Ordering::Acquire);
            if self.keys.get(index)?.load(Ordering::Acquire) != key {
                index = first + self.search(first, key)?;
                continue;
            }
            if version & 1 == 0 {
                let value = read(slot)?;
                // The words were read before the version is looked at again.
                fence(Ordering::Acquire);
                if slot.version.load(Ordering::Relaxed) == version {
                    slot.touch();
                    return Some(value);
                }
            }
            yield_now();
        }
    }

    /// Which slot of the set that begins with slot `first` has a slice.
    #[inline(never)]
    fn search(&self, first: usize, key: u64) -> Option<usize> {
        let keys = self.keys.get(first..first + self.ways)?;
        // To the end whatever is found: a branch for each key would be mispredicted once in nearly each search.
        let way = (0..).zip(keys).fold(usize::MAX, |way, (number, found)| {
            if found.load(Ordering::Acquire) == key {
                number
            } else {
                way
            }
        });
        (way != usize::MAX).then_some(way)
    }

    /// The big-endian word at `at`, a multiple of 8, if it is here.
    #[inline]
    pub fn get(&self, at: HostOffset) -> Option<u64> {
        let index = self.word_index(at);
        // Part of one total order with the counters of requests in flight, hence SeqCst.
        self.read(at, |slot| {
            if let Some(word) = slot.linear_word(index as u64, self.distance) {
                return Some(word);
            }
            Some(slot.words()?.get(index)?.load(Ordering::SeqCst))
        })
    }

    /// The two words at `at`, as they were at one moment, if they are here.
    #[inline]
    pub fn get_pair(&self, at: HostOffset) -> Option<(u64, u64)> {
        let index = self.word_index(at);
        self.read(at, |slot| {
            let word = |index: usize| {
                if let Some(word) = slot.linear_word(index as u64, self.distance) {
                    return Some(word);
                }
                Some(slot.words()?.get(index)?.load(Ordering::SeqCst))
            };
            Some((word(index)?, word(index + 1)?))
        })
    }

    /// Copies the slice at `at`, a multiple of its size, as it lies in the file. `false` if it is not here, or `bytes` is no slice.
    ///
    /// Each word is of some moment during the call; of words that change together, all are of one.
    pub fn copy(&self, at: HostOffset, bytes: &mut [u8]) -> bool {
        if bytes.len() != self.slice_bytes() {
            return false;
        }
        let (chunks, _) = bytes.as_chunks_mut::<8>();
        self.read(at, |slot| {
            if let Some(first) = slot.linear_word(0, self.distance) {
                let mut word = first;
                for chunk in &mut *chunks {
                    *chunk = word.to_be_bytes();
                    word = word.wrapping_add(self.distance);
                }
                return Some(());
            }
            let words = slot.words()?;
            for (chunk, word) in chunks.iter_mut().zip(words) {
                *chunk = word.load(Ordering::SeqCst).to_be_bytes();
            }
            Some(())
        })
        .is_some()
    }

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

    fn way_of(&self, set: usize, key: u64) -> Option<usize> {
        self.keys
            .get(self.slot_range(set))?
            .iter()
            .position(|found| found.load(Ordering::Acquire) == key)
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

    fn mark_dirty(&self, flags: &mut MutexGuard<'_, SetFlags>, way: usize, index: usize) {
        if let Some(flags) = flags.of.get_mut(way)
            && !flags.dirty
        {
            flags.dirty = true;
            self.dirty_count.fetch_add(1, Ordering::Relaxed);
            lock(&self.dirty).push(index);
        }
    }

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

    /// Slices that are here.
    pub fn resident(&self) -> usize {
        self.keys
            .iter()
            .filter(|key| key.load(Ordering::Relaxed) != EMPTY)
            .count()
    }
}

#[inline]
fn hash(key: u64) -> usize {
    // Neighbours are used together, so they must not share a set; the multiplier spreads the rest.
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize
}

impl fmt::Debug for TableCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TableCache")
            .field("slice_bytes", &self.slice_bytes())
            .field("capacity", &self.capacity())
            .field("resident", &self.resident())
            .field("dirty", &self.dirty_count())
            .finish()
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

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests;
