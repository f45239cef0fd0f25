//! Bits of a bitmap that records, in memory.
//!
//! A page is what one sector of the bitmap's data holds. It has the bits twice: those that are *set*, and those of which it is
//! known that the file has them set, or more, durably: *stored*. A write to the disk first sets its bits, then looks whether
//! they are stored; only if not, it has to wait for the file.
//!
//! Nothing here takes a lock. A page is made when it is first needed and stays, since someone may be looking at it; pages are
//! few, for they follow what is written to.

use std::ops::Range;
use std::sync::OnceLock;

use qcow2_cache::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Bits of a page.
pub(super) const PAGE_BITS: u64 = 4096;
/// Bytes that they take in the file.
pub(super) const PAGE_BYTES: u64 = PAGE_BITS / 8;
/// Words of a page.
pub(super) const PAGE_WORDS: usize = 64;

/// The bits of a page, the first one least significant.
pub(super) type Words = [u64; PAGE_WORDS];

/// A bitmap has at most 2^20 pages: 6 bits of their number choose a branch, 6 a leaf, 8 a page.
const BRANCHES: usize = 64;
const LEAVES: usize = 64;
const PAGES: usize = 256;

type Leaf = Box<[OnceLock<Box<Page>>]>;
type Branch = Box<[OnceLock<Leaf>]>;

/// What one sector of a bitmap's data holds.
pub(super) struct Page {
    set: [AtomicU64; PAGE_WORDS],
    stored: [AtomicU64; PAGE_WORDS],
    /// What the file has is among the bits that are set.
    loaded: AtomicBool,
}

impl Page {
    fn new() -> Self {
        Self {
            set: std::array::from_fn(|_| AtomicU64::new(0)),
            stored: std::array::from_fn(|_| AtomicU64::new(0)),
            loaded: AtomicBool::new(false),
        }
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.loaded.load(Ordering::Acquire)
    }

    /// The bits that are set.
    pub(super) fn words(&self) -> Words {
        std::array::from_fn(|index| {
            let word = self.set.get(index);
            word.map_or(0, |word| word.load(Ordering::SeqCst))
        })
    }

    /// Takes what the file has durably.
    pub(super) fn load(&self, words: &Words) {
        self.add(words);
        self.mark_stored(words);
        self.loaded.store(true, Ordering::Release);
    }

    /// Sets bits.
    pub(super) fn add(&self, words: &Words) {
        for (word, bits) in self.set.iter().zip(words) {
            word.fetch_or(*bits, Ordering::SeqCst);
        }
    }

    /// Notes that the file has these bits set, durably.
    pub(super) fn mark_stored(&self, words: &Words) {
        for (word, bits) in self.stored.iter().zip(words) {
            word.fetch_or(*bits, Ordering::SeqCst);
        }
    }

    /// Gives up what the file has beyond the bits that are set, and tells the latter. A write that sets a bit later than these
    /// were read looks later still whether it is stored, and finds that it is not.
    pub(super) fn narrow(&self) -> Words {
        for (set, stored) in self.set.iter().zip(&self.stored) {
            stored.fetch_and(set.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        self.words()
    }

    fn wipe(&self) {
        self.loaded.store(false, Ordering::Release);
        for word in self.set.iter().chain(&self.stored) {
            word.store(0, Ordering::SeqCst);
        }
    }
}

/// What a bitmap has recorded.
pub(super) struct Tracker {
    /// Base-2 logarithm of the bytes that a bit stands for; 0 in a tracker that is not in use.
    granularity_bits: AtomicU32,
    branches: OnceLock<Box<[OnceLock<Branch>]>>,
}

impl Tracker {
    fn new() -> Self {
        Self {
            granularity_bits: AtomicU32::new(0),
            branches: OnceLock::new(),
        }
    }

    /// `None` if it records nothing.
    #[inline]
    pub(super) fn granularity_bits(&self) -> Option<u32> {
        let bits = self.granularity_bits.load(Ordering::Relaxed);
        (bits != 0).then_some(bits)
    }

    pub(super) fn page(&self, number: u64) -> Option<&Page> {
        let (branch, leaf, page) = split(number);
        let branches = self.branches.get()?;
        let leaf = branches.get(branch)?.get()?.get(leaf)?.get()?;
        leaf.get(page)?.get().map(|page| &**page)
    }

    /// The page, made if need be; `None` only beyond what a bitmap can have.
    pub(super) fn make_page(&self, number: u64) -> Option<&Page> {
        let (branch, leaf, page) = split(number);
        let branches = self.branches.get_or_init(|| cells(BRANCHES));
        let branch = branches.get(branch)?.get_or_init(|| cells(LEAVES));
        let leaf = branch.get(leaf)?.get_or_init(|| cells(PAGES));
        Some(leaf.get(page)?.get_or_init(|| Box::new(Page::new())))
    }

    /// The bits of a page that is loaded.
    pub(super) fn loaded(&self, number: u64) -> Option<Words> {
        let page = self.page(number)?;
        page.is_loaded().then(|| page.words())
    }

    /// Whether bits are set and stored; looked at only if they are in one word.
    #[inline]
    pub(super) fn has_all(&self, bits: &Range<u64>) -> bool {
        let last = bits.end.wrapping_sub(1);
        if bits.start / 64 != last / 64 {
            return false;
        }
        let Some(page) = self.page(last / PAGE_BITS) else {
            return false;
        };
        let index = usize::try_from(last / 64 % (PAGE_BITS / 64)).unwrap_or(0);
        let mask = (u64::MAX << (bits.start % 64)) & (u64::MAX >> (63 - last % 64));
        let has = |words: &[AtomicU64; PAGE_WORDS]| {
            let word = words.get(index);
            word.is_some_and(|word| word.load(Ordering::SeqCst) & mask == mask)
        };
        // In this order: see `narrow`.
        has(&page.set) && has(&page.stored)
    }

    /// Sets bits as far as they have pages. Tells whether all are set and stored.
    pub(super) fn mark(&self, bits: Range<u64>) -> bool {
        let mut all = true;
        for part in by_page(bits) {
            let Some(page) = self.page(part.start / PAGE_BITS) else {
                all = false;
                continue;
            };
            for (index, mask) in masks(part) {
                let (Some(set), Some(stored)) = (page.set.get(index), page.stored.get(index))
                else {
                    continue;
                };
                if set.load(Ordering::SeqCst) & mask != mask {
                    set.fetch_or(mask, Ordering::SeqCst);
                }
                // After the bits are set: see `narrow`.
                all &= stored.load(Ordering::SeqCst) & mask == mask;
            }
        }
        all
    }

    /// Forgets all bits; what the file has counts then. No request is in flight.
    pub(super) fn wipe(&self) {
        let branches = self.branches.get().into_iter().flatten();
        let leaves = branches.filter_map(OnceLock::get).flatten();
        let pages = leaves.filter_map(OnceLock::get).flatten();
        for page in pages.filter_map(OnceLock::get) {
            page.wipe();
        }
    }
}

fn cells<T>(count: usize) -> Box<[OnceLock<T>]> {
    (0..count).map(|_| OnceLock::new()).collect()
}

fn split(page: u64) -> (usize, usize, usize) {
    let number = usize::try_from(page).unwrap_or(usize::MAX);
    let branch = number / (LEAVES * PAGES);
    (branch, number / PAGES % LEAVES, number % PAGES)
}

/// The parts of a range of bits that lie in one page each.
pub(super) fn by_page(bits: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = bits.start;
    std::iter::from_fn(move || {
        (at < bits.end).then(|| {
            let start = at;
            at = bits.end.min((start / PAGE_BITS + 1) * PAGE_BITS);
            start..at
        })
    })
}

/// The words of a page in which bits of it lie, and which bits of each. The bits are numbered from the start of the bitmap.
pub(super) fn masks(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let start = bits.start % PAGE_BITS;
    let end = start + (bits.end - bits.start);
    (start / 64..end.div_ceil(64)).map(move |word| {
        let from = start.saturating_sub(word * 64).min(63);
        let to = (end - word * 64).min(64);
        let mask = (u64::MAX << from) & (u64::MAX >> (64 - to));
        (usize::try_from(word).unwrap_or(0), mask)
    })
}

/// Bits of a page, numbered from the start of the bitmap, as words.
pub(super) fn words_of(bits: Range<u64>) -> Words {
    let mut words = [0; PAGE_WORDS];
    for (index, mask) in masks(bits) {
        if let Some(word) = words.get_mut(index) {
            *word |= mask;
        }
    }
    words
}

/// All trackers of an image. One that is given up is used again.
pub(super) struct Trackers {
    /// Those in use.
    recording: AtomicUsize,
    /// One past the last that was ever in use.
    end: AtomicUsize,
    /// Each twice as long as the one before.
    chunks: [OnceLock<Box<[Tracker]>>; 17],
}

impl Trackers {
    pub(super) fn new() -> Self {
        Self {
            recording: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            chunks: [const { OnceLock::new() }; 17],
        }
    }

    #[inline]
    pub(super) fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed) != 0
    }

    pub(super) fn get(&self, number: usize) -> Option<&Tracker> {
        let (chunk, index) = place(number);
        self.chunks.get(chunk)?.get()?.get(index)
    }

    /// Those in use, with their numbers and granularities.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Tracker, u32)> {
        let end = self.end.load(Ordering::Acquire);
        (0..end).filter_map(|number| {
            let tracker = self.get(number)?;
            Some((number, tracker, tracker.granularity_bits()?))
        })
    }

    /// Takes one into use; `None` if there are more than an image can have bitmaps. No request is in flight, nor is another
    /// thread here or in [`release`](Self::release).
    pub(super) fn take(&self, granularity_bits: u32) -> Option<usize> {
        let end = self.end.load(Ordering::Acquire);
        let free = (0..end).find(|number| {
            let tracker = self.get(*number);
            tracker.is_some_and(|tracker| tracker.granularity_bits().is_none())
        });
        let number = free.unwrap_or(end);
        let (chunk, index) = place(number);
        let chunk_len = 1_usize.checked_shl(u32::try_from(chunk).ok()?)?;
        let trackers = self
            .chunks
            .get(chunk)?
            .get_or_init(|| (0..chunk_len).map(|_| Tracker::new()).collect());
        let tracker = trackers.get(index)?;
        tracker
            .granularity_bits
            .store(granularity_bits, Ordering::Release);
        self.end.store(end.max(number + 1), Ordering::Release);
        self.recording.fetch_add(1, Ordering::AcqRel);
        Some(number)
    }

    /// Gives one up, and forgets what it has. No request is in flight.
    pub(super) fn release(&self, number: usize) {
        if let Some(tracker) = self.get(number)
            && tracker.granularity_bits.swap(0, Ordering::AcqRel) != 0
        {
            tracker.wipe();
            self.recording.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn place(number: usize) -> (usize, usize) {
    let chunk = (number + 1).ilog2();
    let start = 1_usize << chunk;
    (usize::try_from(chunk).unwrap_or(0), number + 1 - start)
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_exactly_the_bits_asked_for() {
        let all = |bits: Range<u64>| -> Vec<u64> {
            let mut found = Vec::new();
            for part in by_page(bits) {
                let page = part.start / PAGE_BITS * PAGE_BITS;
                for (index, mask) in masks(part) {
                    let bits = (0..64).filter(|bit| mask >> bit & 1 == 1);
                    found.extend(bits.map(|bit| page + index as u64 * 64 + bit));
                }
            }
            found
        };
        for range in [0..1, 63..65, 5..5, 64..128, 4000..4200, 4095..12289] {
            assert_eq!(all(range.clone()), range.collect::<Vec<_>>());
        }
    }

    #[test]
    fn bits_are_set_at_once_and_stored_only_when_the_file_has_them() {
        let trackers = Trackers::new();
        assert!(!trackers.is_recording());
        let number = trackers.take(16).unwrap();
        let tracker = trackers.get(number).unwrap();
        assert!(!tracker.mark(10..20), "there is no page");
        let page = tracker.make_page(0).unwrap();
        page.load(&words_of(12..14));
        assert!(tracker.has_all(&(12..14)) && tracker.mark(12..14));
        assert!(!tracker.has_all(&(11..14)) && !tracker.has_all(&(12..15)));
        assert!(!tracker.has_all(&(12..70)) && !tracker.has_all(&(5000..5001)));
        assert!(!tracker.mark(10..20));
        assert_eq!(page.words(), words_of(10..20));
        page.mark_stored(&[u64::MAX; PAGE_WORDS]);
        assert!(tracker.mark(30..31));
        assert_eq!(page.narrow()[0], words_of(10..20)[0] | 1 << 30);
        assert!(tracker.mark(10..20) && tracker.mark(30..31));
        assert!(!tracker.mark(31..32));
        tracker.wipe();
        assert!(tracker.loaded(0).is_none() && !tracker.mark(12..13));
    }

    #[test]
    fn trackers_are_used_again() {
        let trackers = Trackers::new();
        let numbers: Vec<usize> = (0..40).map(|_| trackers.take(9).unwrap()).collect();
        assert_eq!(numbers, (0..40).collect::<Vec<_>>());
        trackers.release(7);
        trackers.release(7);
        assert_eq!(trackers.iter().count(), 39);
        assert_eq!(trackers.take(10), Some(7));
        assert_eq!(trackers.take(10), Some(40));
        for number in 0..41 {
            trackers.release(number);
        }
        assert!(!trackers.is_recording());
    }

    #[test]
    fn every_page_that_a_bitmap_can_have_has_a_place() {
        let trackers = Trackers::new();
        let number = trackers.take(9).unwrap();
        let tracker = trackers.get(number).unwrap();
        for page in [0, 255, 256, 16383, 16384, (1 << 20) - 1] {
            assert!(tracker.page(page).is_none());
            tracker.make_page(page).unwrap().load(&words_of(0..1));
            assert_eq!(tracker.loaded(page), Some(words_of(0..1)));
        }
        assert!(tracker.make_page(1 << 20).is_none());
    }
}
