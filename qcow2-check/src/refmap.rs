//! Expected references: how often each host cluster is referenced, and whether its owners may share it.
//!
//! Nearly every cluster of an image is referenced exactly once. So a reference is a bit; only a page of 512 clusters with
//! some that are referenced several times has anything more. The bits of the file's own clusters lie in one zeroed
//! allocation, of which the operating system provides what is touched: memory follows the references met, not what the
//! image claims, and setting a bit takes a single access to memory even where entries lead everywhere. Each worker fills a
//! map of its own and they are merged afterwards: counters shared between threads cost more than they give.

mod counts;
mod page;
mod scatter;

use std::collections::BTreeMap;

use page::{More, Slot};
pub(crate) use page::{PAGE_CLUSTERS, Page};

use page::{PAGE_WORDS, Words};
use scatter::Scatter;

/// Clusters whose bits lie in the flat array, at most. References to others are those of huge sparse files.
const FLAT_CLUSTERS_MAX: u64 = 1 << 30;
/// Pages in a unit of memory that the operating system provides: 4096 bytes of bits.
const UNIT_PAGES: usize = 64;
const UNIT_BYTES: usize = UNIT_PAGES * PAGE_WORDS * 8;
/// Bytes that references may take, however widely they are scattered.
const SCATTERED_BYTES: usize = 96 << 20;

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
    /// Clusters with at least one reference.
    seen: Vec<u64>,
    /// What pages have besides.
    more: Vec<Option<Box<More>>>,
    /// Units of `seen` that are in use.
    touched: Vec<bool>,
    /// Pages behind the flat array.
    far: BTreeMap<u64, Box<FarPage>>,
    /// Bytes of memory taken, about.
    bytes: usize,
    /// References met, each counted once whatever its weight.
    references: u64,
    conflicts: bool,
    /// References that are not in the map yet.
    scatter: Scatter,
}

#[derive(Debug, Default)]
struct FarPage {
    seen: Words,
    more: Option<Box<More>>,
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

/// Of word number `word`, the bits of the clusters `from..to`, all counted from the same origin.
#[inline]
fn run_mask(word: u64, from: u64, to: u64) -> u64 {
    let low = from.saturating_sub(word * 64).min(64) as u32;
    let high = to.saturating_sub(word * 64).min(64) as u32;
    mask(low, high)
}

#[expect(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "words, pages and units are indexed after a comparison with the length of the flat array"
)]
impl RefMap {
    /// An empty map for a file of `clusters` clusters.
    pub(crate) fn new(clusters: u64) -> Self {
        let pages = clusters.min(FLAT_CLUSTERS_MAX).div_ceil(PAGE_CLUSTERS) as usize;
        let units = pages.div_ceil(UNIT_PAGES);
        Self {
            seen: vec![0; units * UNIT_PAGES * PAGE_WORDS],
            more: vec![None; units * UNIT_PAGES],
            touched: vec![false; units],
            ..Self::default()
        }
    }

    /// An empty map for the same file.
    pub(crate) fn fresh(&self) -> Self {
        Self::new(self.flat_clusters())
    }

    #[inline]
    fn flat_clusters(&self) -> u64 {
        self.seen.len() as u64 * 64
    }

    #[inline]
    fn touch(&mut self, first_word: usize, last_word: usize) {
        let unit = |word: usize| word / PAGE_WORDS / UNIT_PAGES;
        for unit in unit(first_word)..=unit(last_word) {
            if !self.touched[unit] {
                self.touched[unit] = true;
                self.bytes += UNIT_BYTES;
            }
        }
    }

    /// A page to be changed.
    fn slot(&mut self, number: u64) -> Slot<'_> {
        let index = number as usize;
        if number < self.more.len() as u64 {
            self.touch(index * PAGE_WORDS, index * PAGE_WORDS);
            let (pages, _) = self.seen.as_chunks_mut::<PAGE_WORDS>();
            return Slot {
                seen: &mut pages[index],
                more: &mut self.more[index],
                bytes: &mut self.bytes,
                conflicts: &mut self.conflicts,
            };
        }
        let page = self.far.entry(number).or_insert_with(|| {
            self.bytes += size_of::<FarPage>() + 32;
            Box::default()
        });
        Slot {
            seen: &mut page.seen,
            more: &mut page.more,
            bytes: &mut self.bytes,
            conflicts: &mut self.conflicts,
        }
    }

    /// A page that may have references, or `None` where it surely has none.
    #[inline]
    pub(crate) fn page(&self, number: u64) -> Option<Page<'_>> {
        if number < self.more.len() as u64 {
            let index = number as usize;
            if !self.touched[index / UNIT_PAGES] {
                return None;
            }
            let (pages, _) = self.seen.as_chunks::<PAGE_WORDS>();
            return Some(Page {
                seen: &pages[index],
                more: self.more[index].as_deref(),
            });
        }
        let page = self.far.get(&number)?;
        Some(Page {
            seen: &page.seen,
            more: page.more.as_deref(),
        })
    }

    /// The first page at or after `number` that has references.
    pub(crate) fn next_page(&self, number: u64) -> Option<u64> {
        let mut index = usize::try_from(number).unwrap_or(usize::MAX);
        let (pages, _) = self.seen.as_chunks::<PAGE_WORDS>();
        while index < pages.len() {
            if !self.touched[index / UNIT_PAGES] {
                index = (index / UNIT_PAGES + 1) * UNIT_PAGES;
            } else if pages[index].iter().all(|word| *word == 0) {
                index += 1;
            } else {
                return Some(index as u64);
            }
        }
        self.far.range(number..).next().map(|(number, _)| *number)
    }

    /// Adds `weight` references to a cluster.
    #[inline]
    pub(crate) fn add(&mut self, cluster: u64, weight: u64, sharing: Sharing) {
        self.references += 1;
        if weight == 1 && sharing == Sharing::Exclusive && cluster < self.flat_clusters() {
            let word = (cluster / 64) as usize;
            let bit = 1 << (cluster % 64);
            self.touch(word, word);
            let seen = &mut self.seen[word];
            if *seen & bit == 0 {
                *seen |= bit;
                return;
            }
        }
        self.slot(cluster / PAGE_CLUSTERS)
            .add(within(cluster), weight, sharing);
    }

    /// Adds a reference of an exclusive owner to a cluster, the same as [`add`](Self::add) but not at once:
    /// [`settle`](Self::settle) comes before anything is asked of the map.
    #[inline]
    pub(crate) fn add_later(&mut self, cluster: u64) {
        let flat = self.flat_clusters();
        if cluster >= flat {
            self.add(cluster, 1, Sharing::Exclusive);
        } else if let Some(region) = self.scatter.push(cluster as u32, flat) {
            self.settle_region(region);
        }
    }

    /// Brings all references into the map.
    pub(crate) fn settle(&mut self) {
        for region in 0..self.scatter.regions() {
            self.settle_region(region);
        }
    }

    #[inline(never)]
    fn settle_region(&mut self, region: usize) {
        let mut scatter = std::mem::take(&mut self.scatter);
        for cluster in scatter.take(region) {
            self.add(u64::from(*cluster), 1, Sharing::Exclusive);
        }
        self.scatter = scatter;
    }

    /// Adds `weight` references to each of `count` clusters from `first` on, for one exclusive owner each.
    pub(crate) fn add_run(&mut self, first: u64, count: u64, weight: u64) {
        self.references = self.references.saturating_add(count);
        let end = first.saturating_add(count);
        if count == 0 {
            return;
        }
        if weight == 1 && end <= self.flat_clusters() {
            let words = first / 64..=(end - 1) / 64;
            let again = words.clone().fold(0, |again, word| {
                again | self.seen[word as usize] & run_mask(word, first, end)
            });
            if again == 0 {
                self.touch((first / 64) as usize, ((end - 1) / 64) as usize);
                for word in words {
                    self.seen[word as usize] |= run_mask(word, first, end);
                }
                return;
            }
        }
        let mut cluster = first;
        while cluster < end {
            let stop = end.min((cluster / PAGE_CLUSTERS + 1) * PAGE_CLUSTERS);
            let from = within(cluster);
            let to = from + (stop - cluster) as usize;
            self.slot(cluster / PAGE_CLUSTERS).add_run(from, to, weight);
            cluster = stop;
        }
    }

    /// Marks a cluster as seen. Tells whether it was not before.
    pub(crate) fn insert(&mut self, cluster: u64) -> bool {
        self.references += 1;
        let at = within(cluster);
        let slot = self.slot(cluster / PAGE_CLUSTERS);
        let bit = 1_u64 << (at % 64);
        let new = slot.seen[at / 64] & bit == 0;
        slot.seen[at / 64] |= bit;
        new
    }

    /// Marks those of the 64 clusters from `base` on (a multiple of 64) whose bits are set.
    pub(crate) fn insert_word(&mut self, base: u64, bits: u64) {
        if bits != 0 {
            self.slot(base / PAGE_CLUSTERS).seen[within(base) / 64] |= bits;
        }
    }

    /// Which of the 64 clusters from `base` on (a multiple of 64) have references.
    #[inline]
    pub(crate) fn word(&self, base: u64) -> u64 {
        self.page(base / PAGE_CLUSTERS)
            .map_or(0, |page| page.seen[within(base) / 64])
    }

    /// How many references a cluster has.
    pub(crate) fn weight(&self, cluster: u64) -> u64 {
        self.page(cluster / PAGE_CLUSTERS)
            .map_or(0, |page| page.weight(within(cluster)))
    }

    /// Whether a cluster has an owner.
    #[inline]
    pub(crate) fn is_seen(&self, cluster: u64) -> bool {
        self.word(cluster & !63) & (1 << (cluster % 64)) != 0
    }

    /// The cluster behind the last one with a reference.
    pub(crate) fn end(&self) -> u64 {
        let end = |base: u64, word: u64| base + 64 - u64::from(word.leading_zeros());
        if let Some((number, page)) = self.far.iter().next_back() {
            let last = page.seen.iter().rposition(|word| *word != 0);
            let base = number * PAGE_CLUSTERS;
            return last.map_or(base, |word| end(base + word as u64 * 64, page.seen[word]));
        }
        let Some(unit) = self.touched.iter().rposition(|touched| *touched) else {
            return 0;
        };
        let words = &self.seen[..(unit + 1) * UNIT_PAGES * PAGE_WORDS];
        let last = words.iter().rposition(|word| *word != 0);
        last.map_or(0, |word| end(word as u64 * 64, words[word]))
    }

    /// Takes the references of another map of the same file in.
    pub(crate) fn merge(&mut self, mut other: Self) {
        self.settle();
        other.settle();
        self.references = self.references.saturating_add(other.references);
        self.conflicts |= other.conflicts;
        let units = other
            .touched
            .iter()
            .enumerate()
            .filter(|(_, touched)| **touched);
        let units: Vec<usize> = units.map(|(unit, _)| unit).collect();
        for unit in units {
            for index in unit * UNIT_PAGES..(unit + 1) * UNIT_PAGES {
                let (pages, _) = other.seen.as_chunks::<PAGE_WORDS>();
                if pages[index] != [0; PAGE_WORDS] {
                    let more = other.more[index].take();
                    self.slot(index as u64).merge(&pages[index], more);
                }
            }
        }
        for (number, page) in other.far {
            self.slot(number).merge(&page.seen, page.more);
        }
    }

    /// Bytes of memory taken, about.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the references are scattered so widely that they take far more memory than a sound image's.
    pub(crate) fn is_scattered(&self) -> bool {
        let sane = usize::try_from(self.references / 4).unwrap_or(usize::MAX);
        self.bytes > SCATTERED_BYTES.saturating_add(sane)
    }

    /// Clusters with owners that may not share them, ascending.
    pub(crate) fn conflicts(&self) -> impl Iterator<Item = u64> + '_ {
        let mut next = if self.conflicts {
            self.next_page(0)
        } else {
            None
        };
        let pages = std::iter::from_fn(move || {
            let number = next?;
            next = self.next_page(number + 1);
            Some(number)
        });
        pages.flat_map(move |number| {
            let more = self.page(number).and_then(|page| page.more);
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

#[cfg(test)]
mod tests;
