//! Slices of tables in memory.
//!
//! A slice is a piece of an L2 table or refcount block: a power of two of bytes at a place of the file that is a multiple
//! of that. The cache is a set-associative array of slots. A hit takes no lock: the reader finds the key, reads the word and then
//! looks whether the slot's version is still the same. All else, loading, changing and writing back, goes under the
//! lock of one set, and no such lock is held while the storage works.

mod buffer;
mod change;
mod forget;
mod load;
mod slot;
mod write_back;

use std::fmt;

use qcow2_format::HostOffset;

use crate::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};
use crate::sync::{Condvar, Mutex, yield_now};
pub use change::SliceWriter;
use slot::{Flags, Slot};
pub use write_back::DirtySlice;

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

    fn way_of(&self, set: usize, key: u64) -> Option<usize> {
        self.keys
            .get(self.slot_range(set))?
            .iter()
            .position(|found| found.load(Ordering::Acquire) == key)
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

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests;
