//! One slot: the words of a slice, and what readers need to see whether they are still the same.

use std::fmt;
use std::sync::OnceLock;

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// What may not be done with a slot, kept under its set's lock.
#[derive(Clone, Default)]
pub(super) struct Flags {
    /// Someone reads the slice with this number into it.
    pub(super) loading: Option<u64>,
    /// It has changes that no one has begun to write.
    pub(super) dirty: bool,
    /// Copies of it are on their way to the disk.
    pub(super) writing: u32,
}

impl Flags {
    /// Whether someone is at work on it, and will soon be done.
    pub(super) fn is_busy(&self) -> bool {
        self.loading.is_some() || self.writing > 0
    }

    /// Whether the slot may be given to another slice.
    pub(super) fn is_idle(&self) -> bool {
        self.loading.is_none() && !self.dirty && self.writing == 0
    }
}

/// On a cache line of its own: a hit looks at one.
#[repr(align(64))]
pub(super) struct Slot {
    /// Odd while the content changes as a whole or two words change together.
    pub(super) version: AtomicU64,
    touched: AtomicBool,
    /// The first word, if each of the others is the one before it plus a distance that the cache knows, else 0. This line of
    /// memory is looked at anyway; with its help the words, most of which are in no processor's cache, mostly are not.
    linear: AtomicU64,
    /// Whether the words hold the slice. Those of a linear one are not stored until one changes. Kept under the set's lock, or by
    /// who loads the slice.
    stored: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            touched: AtomicBool::new(false),
            linear: AtomicU64::new(0),
            stored: AtomicBool::new(false),
            words: OnceLock::new(),
        }
    }

    /// The words, of a slice that is not linear, or that is [stored](Self::store_linear).
    #[inline]
    pub(super) fn words(&self) -> Option<&[AtomicU64]> {
        self.words.get().map(|words| &**words)
    }

    /// The word numbered `index`, if the slice is linear.
    #[inline]
    pub(super) fn linear_word(&self, index: u64, distance: u64) -> Option<u64> {
        // In one order with the counters of requests in flight, as the words are.
        match self.linear.load(Ordering::SeqCst) {
            0 => None,
            first => Some(first.wrapping_add(index.wrapping_mul(distance))),
        }
    }

    /// A word is about to change.
    pub(super) fn bend(&self) {
        self.linear.store(0, Ordering::SeqCst);
    }

    /// Looks whether the slice is linear. No one may be changing it.
    pub(super) fn straighten(&self, distance: u64) {
        let words = self.words().unwrap_or_default();
        let first = words.first().map_or(0, |word| word.load(Ordering::Relaxed));
        let linear = distance != 0
            && words.iter().zip(0..).all(|(word, index)| {
                let expected = first.wrapping_add(distance.wrapping_mul(index));
                word.load(Ordering::Relaxed) == expected
            });
        self.linear
            .store(if linear { first } else { 0 }, Ordering::SeqCst);
    }

    #[inline]
    pub(super) fn touch(&self) {
        // A store where a load would do costs other threads their cache line.
        if !self.touched.load(Ordering::Relaxed) {
            self.touched.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn take_touched(&self) -> bool {
        self.touched.swap(false, Ordering::Relaxed)
    }

    pub(super) fn begin_change(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        // Whoever reads a word stored after this sees the odd version, too.
        fence(Ordering::Release);
    }

    pub(super) fn end_change(&self) {
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Takes in a slice of big-endian words.
    pub(super) fn fill(&self, bytes: &[u8], distance: u64) {
        let (chunks, _) = bytes.as_chunks::<8>();
        let linear = linear_start(chunks, distance);
        if linear.is_none() {
            let words = chunks.iter().map(|chunk| u64::from_be_bytes(*chunk));
            self.store(chunks.len(), words);
        }
        self.stored.store(linear.is_none(), Ordering::Relaxed);
        // Who sees that it is not linear sees the words.
        self.linear.store(linear.unwrap_or(0), Ordering::SeqCst);
    }

    /// Stores the `count` words of a linear slice, so that they can be changed. The set is locked.
    pub(super) fn store_linear(&self, count: usize, distance: u64) {
        if self.stored.load(Ordering::Relaxed) {
            return;
        }
        let first = self.linear.load(Ordering::Relaxed);
        let word = |index: u64| first.wrapping_add(distance.wrapping_mul(index));
        self.store(count, (0..).map(word));
        self.stored.store(true, Ordering::Relaxed);
    }

    fn store(&self, count: usize, values: impl Iterator<Item = u64>) {
        let words = self
            .words
            .get_or_init(|| (0..count).map(|_| AtomicU64::new(0)).collect());
        for (word, value) in words.iter().zip(values) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// The words of a slice that was changed, as bytes for the file.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let words = self.words().unwrap_or_default();
        let mut bytes = Vec::with_capacity(words.len() * 8);
        for word in words {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_be_bytes());
        }
        bytes
    }
}

/// The first word, where each of the others is the one before it plus `distance`.
fn linear_start(chunks: &[[u8; 8]], distance: u64) -> Option<u64> {
    let first = u64::from_be_bytes(*chunks.first()?);
    if distance == 0 || first == 0 {
        return None;
    }
    let mut expected = first;
    // In groups, which the compiler turns into few instructions, and which end the search soon where there is nothing to find.
    for group in chunks.chunks(16) {
        let differs = group.iter().fold(0, |differs, chunk| {
            let differs = differs | (u64::from_be_bytes(*chunk) ^ expected);
            expected = expected.wrapping_add(distance);
            differs
        });
        if differs != 0 {
            return None;
        }
    }
    Some(first)
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}
