//! Expected references: how often each host cluster is referenced, and whether its owners may share it.
//!
//! Nearly every cluster of an image is referenced exactly once, mostly in order. So a reference is a bit in a paged bitmap
//! that exists only where there are references, and only a page with clusters referenced several times has anything more.
//! Memory follows the references met, not what the image claims. Each worker fills a map of its own and they are merged
//! afterwards: counters shared between threads cost more than they give.

use std::collections::BTreeMap;

use counts::Counts;

mod counts;

/// Clusters in a page: as many as a cache line has bits.
pub(crate) const PAGE_CLUSTERS: u64 = 512;
const PAGE_WORDS: usize = 8;
const DIRECTORY_PAGES: usize = 512;
/// Bytes that references may take, however widely they are scattered.
const SCATTERED_BYTES: usize = 96 << 20;
/// Directories held in a plain array; those above (far references of hostile images) go to a tree.
const NEAR_DIRECTORIES: u64 = 1 << 16;

pub(crate) type Words = [u64; PAGE_WORDS];

/// References to 512 clusters.
#[derive(Debug)]
pub(crate) struct Page {
    /// Clusters with at least one reference.
    pub(crate) seen: Words,
    pub(crate) more: Option<Box<More>>,
}

/// What a page has besides when clusters are referenced more than once, or shared by compressed data.
#[derive(Debug)]
pub(crate) struct More {
    /// Clusters whose number of references stands in `counts`.
    pub(crate) multi: Words,
    /// Clusters that only compressed data refers to.
    pub(crate) packed: Words,
    /// Clusters with owners that may not share them.
    pub(crate) conflict: Words,
    counts: Counts,
}

impl Default for Page {
    fn default() -> Self {
        Self {
            seen: [0; PAGE_WORDS],
            more: None,
        }
    }
}

impl More {
    fn new() -> Box<Self> {
        Box::new(Self {
            multi: [0; PAGE_WORDS],
            packed: [0; PAGE_WORDS],
            conflict: [0; PAGE_WORDS],
            counts: Counts::default(),
        })
    }
}

/// Who may share a cluster with whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// The owner has the cluster for itself.
    Exclusive,
    /// Compressed data, which shares host clusters with other compressed data.
    Packed,
}

/// Expected references to host clusters.
#[derive(Debug, Default)]
pub(crate) struct RefMap {
    near: Vec<Option<Box<Directory>>>,
    far: BTreeMap<u64, Option<Box<Directory>>>,
    /// Bytes of memory taken, about.
    bytes: usize,
    /// References met, each counted once whatever its weight.
    references: u64,
}

#[derive(Debug)]
struct Directory {
    pages: Vec<Option<Box<Page>>>,
}

impl Default for Directory {
    fn default() -> Self {
        let mut pages = Vec::new();
        pages.resize_with(DIRECTORY_PAGES, || None);
        Self { pages }
    }
}

#[inline]
fn split(cluster: u64) -> (u64, usize) {
    let page = (cluster / PAGE_CLUSTERS) as usize % DIRECTORY_PAGES;
    (cluster / PAGE_CLUSTERS / DIRECTORY_PAGES as u64, page)
}

#[inline]
fn within(cluster: u64) -> usize {
    (cluster % PAGE_CLUSTERS) as usize
}

/// The bits `from..to` of a word; `to` is at most 64.
#[inline]
pub(crate) fn mask(from: u32, to: u32) -> u64 {
    if to <= from {
        return 0;
    }
    (u64::MAX >> (64 - (to - from))) << from
}

impl RefMap {
    #[inline]
    pub(crate) fn page(&self, number: u64) -> Option<&Page> {
        let (directory, page) = split(number.checked_mul(PAGE_CLUSTERS)?);
        let directory = if directory < NEAR_DIRECTORIES {
            self.near
                .get(usize::try_from(directory).ok()?)?
                .as_deref()?
        } else {
            self.far.get(&directory)?.as_deref()?
        };
        directory.pages.get(page)?.as_deref()
    }

    #[inline]
    fn page_mut(&mut self, cluster: u64) -> &mut Page {
        let (number, page) = split(cluster);
        #[expect(clippy::cast_possible_truncation, reason = "only used below 65536")]
        let index = number as usize;
        let known = index < self.near.len();
        #[expect(clippy::indexing_slicing, reason = "compared just before")]
        let slot = if known {
            &mut self.near[index]
        } else if number < NEAR_DIRECTORIES {
            self.bytes += (index + 1 - self.near.len()) * size_of::<usize>();
            self.near.resize_with(index + 1, || None);
            &mut self.near[index]
        } else {
            self.far.entry(number).or_default()
        };
        let directory = slot.get_or_insert_with(|| {
            self.bytes += DIRECTORY_PAGES * size_of::<usize>();
            Box::default()
        });
        #[expect(
            clippy::indexing_slicing,
            reason = "split() keeps it below the fixed length"
        )]
        directory.pages[page].get_or_insert_with(|| {
            self.bytes += size_of::<Page>() + 16;
            Box::default()
        })
    }

    /// Bytes of memory taken, about.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the references are scattered so widely that they take far more memory than a sound image's.
    pub(crate) fn is_scattered(&self) -> bool {
        let sane = usize::try_from(self.references / 4).unwrap_or(usize::MAX);
        self.bytes > SCATTERED_BYTES.saturating_add(sane)
    }

    /// Numbers of all pages that exist, ascending.
    pub(crate) fn page_numbers(&self) -> impl Iterator<Item = u64> + '_ {
        let near = (0_u64..)
            .zip(&self.near)
            .filter_map(|(d, dir)| Some((d, dir.as_deref()?)));
        let far = self
            .far
            .iter()
            .filter_map(|(d, dir)| Some((*d, dir.as_deref()?)));
        near.chain(far).flat_map(|(d, dir)| {
            (0_u64..)
                .zip(&dir.pages)
                .filter(|(_, page)| page.is_some())
                .map(move |(p, _)| d * DIRECTORY_PAGES as u64 + p)
        })
    }

    /// The first page at or after `number` that exists.
    pub(crate) fn next_page(&self, number: u64) -> Option<u64> {
        let mut directory = number / DIRECTORY_PAGES as u64;
        let mut first = number % DIRECTORY_PAGES as u64;
        while directory < NEAR_DIRECTORIES {
            let Some(slot) = self.near.get(usize::try_from(directory).ok()?) else {
                break;
            };
            if let Some(found) = slot.as_deref().and_then(|d| d.next(first)) {
                return Some(directory * DIRECTORY_PAGES as u64 + found);
            }
            directory += 1;
            first = 0;
        }
        let start = number / DIRECTORY_PAGES as u64;
        for (&directory, pages) in self.far.range(start.max(NEAR_DIRECTORIES)..) {
            let first = if directory == start {
                number % DIRECTORY_PAGES as u64
            } else {
                0
            };
            if let Some(found) = pages.as_deref().and_then(|pages| pages.next(first)) {
                return Some(directory * DIRECTORY_PAGES as u64 + found);
            }
        }
        None
    }

    /// Adds `weight` references to a cluster.
    #[inline]
    pub(crate) fn add(&mut self, cluster: u64, weight: u64, sharing: Sharing) {
        self.references += 1;
        let page = self.page_mut(cluster);
        let at = within(cluster);
        let bit = 1_u64 << (at % 64);
        #[expect(clippy::indexing_slicing, reason = "a position in a page")]
        let seen = &mut page.seen[at / 64];
        if *seen & bit == 0 && weight == 1 && sharing == Sharing::Exclusive {
            *seen |= bit;
            return;
        }
        page.add_slowly(at, weight, sharing);
    }

    /// Marks a cluster as seen. Tells whether it was not before.
    pub(crate) fn insert(&mut self, cluster: u64) -> bool {
        self.references += 1;
        let page = self.page_mut(cluster);
        let at = within(cluster);
        #[expect(clippy::indexing_slicing, reason = "a position in a page")]
        let seen = &mut page.seen[at / 64];
        let bit = 1_u64 << (at % 64);
        let new = *seen & bit == 0;
        *seen |= bit;
        new
    }

    /// Adds `weight` references to each of `count` clusters from `first` on, for one exclusive owner each.
    #[inline]
    pub(crate) fn add_run(&mut self, first: u64, count: u64, weight: u64) {
        self.references = self.references.saturating_add(count);
        let mut cluster = first;
        let end = first.saturating_add(count);
        while cluster < end {
            let stop = end.min((cluster / PAGE_CLUSTERS + 1) * PAGE_CLUSTERS);
            let page = self.page_mut(cluster);
            let from = within(cluster);
            #[expect(clippy::cast_possible_truncation, reason = "within a page")]
            let to = from + (stop - cluster) as usize;
            page.add_run(from, to, weight);
            cluster = stop;
        }
    }

    /// The cluster behind the last one with a reference.
    pub(crate) fn end(&self) -> u64 {
        let Some(number) = self.last_page() else {
            return 0;
        };
        let words = self.page(number).map_or([0; PAGE_WORDS], |page| page.seen);
        let last = (0_u64..).zip(words).filter(|(_, word)| *word != 0).last();
        let base = number * PAGE_CLUSTERS;
        last.map_or(base, |(word, bits)| {
            base + word * 64 + 64 - u64::from(bits.leading_zeros())
        })
    }

    fn last_page(&self) -> Option<u64> {
        let far = self
            .far
            .iter()
            .next_back()
            .and_then(|(d, dir)| Some((*d, dir.as_deref()?)));
        let near = || {
            let position = self.near.iter().rposition(Option::is_some)?;
            Some((position as u64, self.near.get(position)?.as_deref()?))
        };
        let (number, directory) = far.or_else(near)?;
        let page = directory.pages.iter().rposition(Option::is_some)?;
        Some(number * DIRECTORY_PAGES as u64 + page as u64)
    }

    /// Marks those of the 64 clusters from `base` on (a multiple of 64) whose bits are set.
    pub(crate) fn insert_word(&mut self, base: u64, bits: u64) {
        if bits != 0 {
            let page = self.page_mut(base);
            #[expect(clippy::indexing_slicing, reason = "a position in a page")]
            let seen = &mut page.seen[within(base) / 64];
            *seen |= bits;
        }
    }

    /// Which of the 64 clusters from `base` on (a multiple of 64) have references.
    #[inline]
    pub(crate) fn word(&self, base: u64) -> u64 {
        let page = self.page(base / PAGE_CLUSTERS);
        page.and_then(|page| page.seen.get(within(base) / 64))
            .copied()
            .unwrap_or(0)
    }

    /// How many references a cluster has.
    pub(crate) fn weight(&self, cluster: u64) -> u64 {
        self.page(cluster / PAGE_CLUSTERS)
            .map_or(0, |page| page.weight(within(cluster)))
    }

    /// Whether a cluster has an owner.
    pub(crate) fn is_seen(&self, cluster: u64) -> bool {
        self.weight(cluster) > 0
    }

    /// Takes the references of another map in.
    pub(crate) fn merge(&mut self, other: Self) {
        let near = (0_u64..)
            .zip(other.near)
            .filter_map(|(d, dir)| Some((d, dir?)));
        let far = other.far.into_iter().filter_map(|(d, dir)| Some((d, dir?)));
        self.references = self.references.saturating_add(other.references);
        for (number, directory) in near.chain(far) {
            let base = number * DIRECTORY_PAGES as u64;
            for (page_number, page) in (base..).zip(directory.pages) {
                if let Some(page) = page {
                    self.page_mut(page_number * PAGE_CLUSTERS).merge(*page);
                }
            }
        }
    }

    /// Clusters with owners that may not share them, ascending.
    pub(crate) fn conflicts(&self) -> impl Iterator<Item = u64> + '_ {
        self.page_numbers().flat_map(move |number| {
            let more = self.page(number).and_then(|page| page.more.as_ref());
            let conflict = more.into_iter().flat_map(|more| more.conflict);
            (0_u64..)
                .zip(conflict)
                .flat_map(move |(word, bits)| set_bits(number * PAGE_CLUSTERS + word * 64, bits))
        })
    }
}

/// The clusters whose bits are set in the word for the 64 from `base` on.
fn set_bits(base: u64, mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        (word != 0).then(|| {
            let bit = u64::from(word.trailing_zeros());
            word &= word - 1;
            base + bit
        })
    })
}

impl Directory {
    fn next(&self, first: u64) -> Option<u64> {
        let first = usize::try_from(first).ok()?;
        let found = self.pages.get(first..)?.iter().position(Option::is_some)?;
        u64::try_from(first + found).ok()
    }
}

#[expect(
    clippy::indexing_slicing,
    reason = "positions in a page are below 512, its words 8"
)]
impl Page {
    /// How many references the cluster at `at` has.
    #[inline]
    pub(crate) fn weight(&self, at: usize) -> u64 {
        let bit = 1_u64 << (at % 64);
        if self.seen[at / 64] & bit == 0 {
            return 0;
        }
        match &self.more {
            Some(more) if more.multi[at / 64] & bit != 0 => more.counts.get(at),
            _ => 1,
        }
    }

    /// Of the 64 clusters of word `word`: which have references, and which have their number in the counts.
    #[inline]
    pub(crate) fn word(&self, word: usize) -> (u64, u64) {
        (
            self.seen[word],
            self.more.as_ref().map_or(0, |more| more.multi[word]),
        )
    }

    /// Whether every cluster is referenced exactly once.
    #[inline]
    pub(crate) fn is_all_ones(&self) -> bool {
        self.more
            .as_ref()
            .is_none_or(|more| more.multi.iter().all(|w| *w == 0))
            && self.seen.iter().fold(u64::MAX, |all, w| all & w) == u64::MAX
    }

    #[cold]
    #[inline(never)]
    fn add_slowly(&mut self, at: usize, weight: u64, sharing: Sharing) {
        let bit = 1_u64 << (at % 64);
        let word = at / 64;
        let before = self.weight(at);
        self.seen[word] |= bit;
        let more = self.more.get_or_insert_with(More::new);
        let packed = more.packed[word] & bit != 0;
        match sharing {
            Sharing::Packed if before == 0 => more.packed[word] |= bit,
            Sharing::Packed if packed => {}
            _ if before == 0 => {}
            _ => {
                more.conflict[word] |= bit;
                more.packed[word] &= !bit;
            }
        }
        let sum = before.saturating_add(weight);
        if sum > 1 {
            more.multi[word] |= bit;
            more.counts.set(at, sum);
        }
    }

    fn add_run(&mut self, from: usize, to: usize, weight: u64) {
        let first = from / 64;
        let last = (to - 1) / 64;
        if weight == 1 {
            let mut again = 0;
            for word in first..=last {
                let bits = run_mask(word, from, to);
                again |= self.seen[word] & bits;
            }
            if again == 0 {
                for word in first..=last {
                    self.seen[word] |= run_mask(word, from, to);
                }
                return;
            }
        } else if (first..=last).all(|word| self.seen[word] & run_mask(word, from, to) == 0) {
            let more = self.more.get_or_insert_with(More::new);
            for word in first..=last {
                self.seen[word] |= run_mask(word, from, to);
                more.multi[word] |= run_mask(word, from, to);
            }
            more.counts.set_run(from, to, weight);
            return;
        }
        for at in from..to {
            self.add_slowly(at, weight, Sharing::Exclusive);
        }
    }

    fn merge(&mut self, other: Self) {
        let untouched = self.more.is_none() && self.seen.iter().all(|w| *w == 0);
        if untouched {
            *self = other;
            return;
        }
        let plain = self.more.is_none()
            && other.more.is_none()
            && self.seen.iter().zip(&other.seen).all(|(a, b)| a & b == 0);
        if plain {
            for (a, b) in self.seen.iter_mut().zip(&other.seen) {
                *a |= b;
            }
            return;
        }
        let more = self.more.get_or_insert_with(More::new);
        for word in 0..PAGE_WORDS {
            let theirs = other.more.as_deref();
            let their_packed = theirs.map_or(0, |m| m.packed[word]);
            let their_multi = theirs.map_or(0, |m| m.multi[word]);
            let both = self.seen[word] & other.seen[word];
            // Where both have references, the sum is formed; else counts move over as they are.
            let mut counted = both | their_multi;
            while counted != 0 {
                let bit = counted & counted.wrapping_neg();
                counted &= counted - 1;
                let at = word * 64 + bit.trailing_zeros() as usize;
                let mine = if self.seen[word] & bit == 0 {
                    0
                } else if more.multi[word] & bit != 0 {
                    more.counts.get(at)
                } else {
                    1
                };
                more.counts.set(at, mine.saturating_add(other.weight(at)));
                more.multi[word] |= bit;
            }
            let clash = both & !(more.packed[word] & their_packed);
            more.conflict[word] |= clash | theirs.map_or(0, |m| m.conflict[word]);
            more.packed[word] = (more.packed[word] | their_packed) & !more.conflict[word];
            self.seen[word] |= other.seen[word];
        }
    }
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "bit numbers up to 64")]
fn run_mask(word: usize, from: usize, to: usize) -> u64 {
    let low = from.saturating_sub(word * 64).min(64) as u32;
    let high = to.saturating_sub(word * 64).min(64) as u32;
    mask(low, high)
}

#[cfg(test)]
mod tests;
