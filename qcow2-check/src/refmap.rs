//! Expected references: how often each host cluster is referenced, and whether its owners may share it.
//!
//! Nearly every cluster of an image is referenced exactly once. So a reference is a bit; only a page of 512 clusters with
//! some that are referenced several times has anything more. The bits lie in chunks of 4 KiB that exist where there are
//! references: memory follows the references met, not what the image claims. Each worker fills a map of its own and they are
//! merged afterwards: counters shared between threads cost more than they give.

mod counts;
mod page;
mod scatter;

use std::collections::BTreeMap;

use page::{More, Slot};
pub(crate) use page::{PAGE_CLUSTERS, Page};

use page::{PAGE_WORDS, Words};
use scatter::Scatter;

/// Clusters whose chunks are found by index, at most. References to others are those of huge sparse files.
const NEAR_CLUSTERS_MAX: u64 = 1 << 30;
/// Clusters in a page, to index memory with.
const PAGE_LEN: usize = PAGE_WORDS * 64;
/// Pages in a chunk.
const CHUNK_PAGES: usize = 64;
const CHUNK_WORDS: usize = CHUNK_PAGES * PAGE_WORDS;
const CHUNK_CLUSTERS: u64 = PAGE_CLUSTERS * CHUNK_PAGES as u64;
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
    near: Vec<Option<Box<Chunk>>>,
    /// Pages behind the chunks.
    far: BTreeMap<u64, Box<FarPage>>,
    /// Bytes of memory taken, about.
    bytes: usize,
    /// References met, each counted once whatever its weight.
    references: u64,
    conflicts: bool,
    /// References that are not in the map yet.
    scatter: Scatter,
}

#[derive(Debug)]
struct Chunk {
    /// Clusters with at least one reference.
    seen: [u64; CHUNK_WORDS],
    /// What pages have besides: nothing, or a place for each page.
    more: Vec<Option<Box<More>>>,
}

#[derive(Debug, Default)]
struct FarPage {
    seen: Words,
    more: Vec<Option<Box<More>>>,
}

impl Default for Chunk {
    fn default() -> Self {
        Self {
            seen: [0; CHUNK_WORDS],
            more: Vec::new(),
        }
    }
}

impl Chunk {
    fn bytes(&self) -> usize {
        let more = self.more.iter().flatten().map(|more| more.bytes());
        size_of::<Self>() + self.more.len() * size_of::<usize>() + more.sum::<usize>()
    }
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

/// Which chunk a cluster is in, and where in it.
#[inline]
fn place(cluster: u64) -> (usize, usize) {
    let chunk = usize::try_from(cluster / CHUNK_CLUSTERS).unwrap_or(usize::MAX);
    (chunk, (cluster % CHUNK_CLUSTERS) as usize)
}

#[expect(
    clippy::indexing_slicing,
    reason = "places in a chunk and in a page are below their sizes"
)]
impl RefMap {
    /// An empty map for a file of `clusters` clusters.
    pub(crate) fn new(clusters: u64) -> Self {
        let chunks = clusters.min(NEAR_CLUSTERS_MAX).div_ceil(CHUNK_CLUSTERS);
        let mut near = Vec::new();
        near.resize_with(usize::try_from(chunks).unwrap_or(0), || None);
        Self {
            bytes: near.len() * size_of::<usize>(),
            near,
            ..Self::default()
        }
    }

    /// Takes out all references but those that are not in the map yet.
    pub(crate) fn take(&mut self) -> Self {
        let mut fresh = Self::new(self.near_clusters());
        std::mem::swap(&mut fresh.scatter, &mut self.scatter);
        std::mem::replace(self, fresh)
    }

    #[inline]
    fn near_clusters(&self) -> u64 {
        self.near.len() as u64 * CHUNK_CLUSTERS
    }

    /// The chunk at an index, if chunks go that far.
    #[inline]
    fn chunk_mut(&mut self, index: usize) -> Option<&mut Chunk> {
        let bytes = &mut self.bytes;
        let chunk = self.near.get_mut(index)?.get_or_insert_with(|| {
            *bytes += size_of::<Chunk>();
            Box::default()
        });
        Some(chunk)
    }

    /// A page to be changed.
    fn slot(&mut self, number: u64) -> Slot<'_> {
        let (index, at) = place(number.saturating_mul(PAGE_CLUSTERS));
        let Self {
            near,
            far,
            bytes,
            conflicts,
            ..
        } = self;
        let (seen, more, index, places) = if let Some(chunk) = near.get_mut(index) {
            let chunk = chunk.get_or_insert_with(|| {
                *bytes += size_of::<Chunk>();
                Box::default()
            });
            let page = at / PAGE_LEN;
            let (pages, _) = chunk.seen.as_chunks_mut::<PAGE_WORDS>();
            (&mut pages[page], &mut chunk.more, page, CHUNK_PAGES)
        } else {
            let page = far.entry(number).or_insert_with(|| {
                *bytes += size_of::<FarPage>() + 32;
                Box::default()
            });
            (&mut page.seen, &mut page.more, 0, 1)
        };
        Slot {
            seen,
            more,
            places,
            index,
            bytes,
            conflicts,
        }
    }

    /// A page that may have references, or `None` where it surely has none.
    #[inline]
    pub(crate) fn page(&self, number: u64) -> Option<Page<'_>> {
        let (index, at) = place(number.saturating_mul(PAGE_CLUSTERS));
        if let Some(chunk) = self.near.get(index) {
            let chunk = chunk.as_deref()?;
            let page = at / PAGE_LEN;
            let (pages, _) = chunk.seen.as_chunks::<PAGE_WORDS>();
            return Some(Page {
                seen: &pages[page],
                more: chunk.more.get(page).and_then(Option::as_deref),
            });
        }
        let page = self.far.get(&number)?;
        Some(Page {
            seen: &page.seen,
            more: page.more.first().and_then(Option::as_deref),
        })
    }

    /// The first page at or after `number`, and before `end`, that has references.
    pub(crate) fn next_page(&self, number: u64, end: u64) -> Option<u64> {
        if number >= end {
            return None;
        }
        let (first, at) = place(number.saturating_mul(PAGE_CLUSTERS));
        let (last, _) = place((end - 1).saturating_mul(PAGE_CLUSTERS));
        let mut skip = at / PAGE_LEN;
        let chunks = self.near.iter().enumerate().skip(first);
        for (index, chunk) in chunks.take_while(|(index, _)| *index <= last) {
            if let Some(chunk) = chunk {
                let (pages, _) = chunk.seen.as_chunks::<PAGE_WORDS>();
                let mut used = pages.iter().skip(skip).map(|page| *page != [0; PAGE_WORDS]);
                if let Some(found) = used.position(|used| used) {
                    let found = (index * CHUNK_PAGES + skip + found) as u64;
                    return (found < end).then_some(found);
                }
            }
            skip = 0;
        }
        self.far
            .range(number..end)
            .next()
            .map(|(number, _)| *number)
    }

    /// Adds `weight` references to a cluster.
    #[inline]
    pub(crate) fn add(&mut self, cluster: u64, weight: u64, sharing: Sharing) {
        self.references += 1;
        let (index, at) = place(cluster);
        if weight == 1
            && sharing == Sharing::Exclusive
            && let Some(chunk) = self.chunk_mut(index)
        {
            let bit = 1 << (at % 64);
            let seen = &mut chunk.seen[at / 64];
            if *seen & bit == 0 {
                *seen |= bit;
                return;
            }
        }
        self.slot(cluster / PAGE_CLUSTERS)
            .add(within(cluster), weight, sharing);
    }

    /// Adds `weight` references of compressed data to a cluster.
    #[inline]
    pub(crate) fn add_packed(&mut self, cluster: u64, weight: u64) {
        self.references += 1;
        self.slot(cluster / PAGE_CLUSTERS)
            .add_packed(within(cluster), weight);
    }

    /// Adds a reference of an exclusive owner to a cluster, the same as [`add`](Self::add) but not at once:
    /// such a map may be asked nothing, only [merged](Self::merge) into another.
    #[inline]
    pub(crate) fn add_later(&mut self, cluster: u64) {
        let near = self.near_clusters();
        match u32::try_from(cluster) {
            Ok(cluster) if u64::from(cluster) < near => {
                if let Some(region) = self.scatter.push(cluster, near) {
                    self.settle_region(region);
                }
            }
            _ => self.add(cluster, 1, Sharing::Exclusive),
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
        let mut cluster = first;
        while cluster < end {
            let stop = end.min((cluster / CHUNK_CLUSTERS + 1) * CHUNK_CLUSTERS);
            if weight != 1 || !self.add_new_run(cluster, stop) {
                self.add_run_by_page(cluster, stop, weight);
            }
            cluster = stop;
        }
    }

    /// Adds one reference to each of the clusters `first..end`, which lie in one chunk, if none of them has any.
    #[inline]
    fn add_new_run(&mut self, first: u64, end: u64) -> bool {
        let (index, at) = place(first);
        let Some(chunk) = self.chunk_mut(index) else {
            return false;
        };
        let (from, to) = (at as u64, at as u64 + (end - first));
        let words = at / 64..=place(end - 1).1 / 64;
        let seen = &mut chunk.seen[words.clone()];
        let masks = |word: usize| run_mask(word as u64, from, to);
        let used = seen
            .iter()
            .zip(words.clone())
            .fold(0, |used, (s, word)| used | s & masks(word));
        if used != 0 {
            return false;
        }
        for (seen, word) in seen.iter_mut().zip(words) {
            *seen |= masks(word);
        }
        true
    }

    fn add_run_by_page(&mut self, first: u64, end: u64, weight: u64) {
        let mut cluster = first;
        while cluster < end {
            let stop = end.min((cluster / PAGE_CLUSTERS + 1) * PAGE_CLUSTERS);
            let from = within(cluster);
            let to = within(stop - 1) + 1;
            self.slot(cluster / PAGE_CLUSTERS).add_run(from, to, weight);
            cluster = stop;
        }
    }

    /// Takes the only reference from each of `count` clusters from `first` on.
    pub(crate) fn remove_run(&mut self, first: u64, count: u64) {
        for cluster in first..first.saturating_add(count) {
            let at = within(cluster);
            self.slot(cluster / PAGE_CLUSTERS).seen[at / 64] &= !(1 << (at % 64));
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
        let end = |base: u64, words: &[u64]| {
            let last = words.iter().rposition(|word| *word != 0)?;
            Some(base + last as u64 * 64 + 64 - u64::from(words[last].leading_zeros()))
        };
        let mut far = self.far.iter().rev();
        let far = far.find_map(|(number, page)| end(number * PAGE_CLUSTERS, &page.seen));
        let near = || {
            let mut chunks = self.near.iter().enumerate().rev();
            chunks.find_map(|(index, chunk)| {
                end(index as u64 * CHUNK_CLUSTERS, &chunk.as_deref()?.seen)
            })
        };
        far.or_else(near).unwrap_or(0)
    }

    /// Takes the references of another map of the same file in.
    pub(crate) fn merge(&mut self, mut other: Self) {
        // What is not in the other map yet comes straight into this one: there it could take memory for each reference.
        for region in 0..other.scatter.regions() {
            for cluster in other.scatter.take(region) {
                self.add(u64::from(*cluster), 1, Sharing::Exclusive);
            }
        }
        self.references = self.references.saturating_add(other.references);
        self.conflicts |= other.conflicts;
        for (index, chunk) in other.near.into_iter().enumerate() {
            let Some(mut chunk) = chunk else {
                continue;
            };
            if let Some(mine @ None) = self.near.get_mut(index) {
                self.bytes += chunk.bytes();
                *mine = Some(chunk);
                continue;
            }
            let (pages, _) = chunk.seen.as_chunks::<PAGE_WORDS>();
            for (page, seen) in pages.iter().enumerate() {
                if *seen != [0; PAGE_WORDS] {
                    let more = chunk.more.get_mut(page).and_then(Option::take);
                    self.slot((index * CHUNK_PAGES + page) as u64)
                        .merge(seen, more);
                }
            }
        }
        for (number, mut page) in other.far {
            let more = page.more.pop().flatten();
            self.slot(number).merge(&page.seen, more);
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

    /// Whether a cluster has one owner, and compressed data besides.
    pub(crate) fn is_mixed(&self, cluster: u64) -> bool {
        self.page(cluster / PAGE_CLUSTERS)
            .is_some_and(|page| page.is_mixed(within(cluster)))
    }

    /// Clusters with several owners, or with one and [compressed data besides](Self::is_mixed), ascending.
    pub(crate) fn conflicts(&self) -> impl Iterator<Item = u64> + '_ {
        let mut next = if self.conflicts {
            self.next_page(0, u64::MAX)
        } else {
            None
        };
        let pages = std::iter::from_fn(move || {
            let number = next?;
            next = self.next_page(number + 1, u64::MAX);
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
