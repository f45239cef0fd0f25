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

pub(super) struct Slot {
    /// Odd while the content changes as a whole or two words change together.
    pub(super) version: AtomicU64,
    touched: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            touched: AtomicBool::new(false),
            words: OnceLock::new(),
        }
    }

    #[inline]
    pub(super) fn words(&self) -> Option<&[AtomicU64]> {
        self.words.get().map(|words| &**words)
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

    /// Stores bytes as big-endian words.
    pub(super) fn fill(&self, bytes: &[u8]) {
        let (chunks, _) = bytes.as_chunks::<8>();
        let words = self
            .words
            .get_or_init(|| chunks.iter().map(|_| AtomicU64::new(0)).collect());
        for (word, chunk) in words.iter().zip(chunks) {
            word.store(u64::from_be_bytes(*chunk), Ordering::Relaxed);
        }
    }

    /// The words as bytes for the file.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let words = self.words().unwrap_or_default();
        let mut bytes = Vec::with_capacity(words.len() * 8);
        for word in words {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_be_bytes());
        }
        bytes
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}
