//! Recording what changes.
//!
//! ```text
//!  write ──► set the bits ──► are they stored? ──yes──► data
//!                                  │ no
//!                                  └──► announce: the file gets whole pages of ones, durably ──► data
//!  flush, now and then, and close: the file gets the pages as they are
//! ```
//!
//! So the file has at each moment all bits that are due, and some more near those that were set lately. Nothing that is written
//! is ever missing in it, be it flushed or not: whoever recovers the bitmap after a crash can rely on that.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use qcow2_alloc::Allocation;
use qcow2_cache::{Kinds, MetadataError};
use qcow2_format::bitmap::BitmapCluster;
use qcow2_format::{BitmapTableEntry, HostOffset};

use super::directory::Known;
use super::tracker::{PAGE_BITS, PAGE_BYTES, Tracker, Words, by_page, words_of};
use super::walk::bytes_of;
use super::{PageKey, State};
use crate::{Image, ImageError};

/// Pages that were written as they are, for the commit that makes them durable.
pub(crate) struct Refined(Vec<(PageKey, u64, Words)>);

/// A table entry that is to be written once what it leads to is durable.
struct Link<'a> {
    place: HostOffset,
    entry: BitmapTableEntry,
    cluster: Option<Allocation<'a>>,
}

/// Pages that are about to be all ones in the file.
#[derive(Default)]
struct Announced<'a> {
    pages: Vec<(PageKey, Words)>,
    /// They are so already, but for the links.
    links: Vec<Link<'a>>,
    written: bool,
    /// Bitmaps that get new places later take no clusters now.
    anew: bool,
}

impl Image {
    /// Notes that `len` bytes of the disk at `offset` are about to change. The caller has a pass or has closed the gate, and holds
    /// no lock of a cluster.
    #[inline]
    pub(crate) fn record(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        if !self.bitmaps.trackers.is_recording() || len == 0 {
            return Ok(());
        }
        self.record_changes(offset, len)
    }

    fn record_changes(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        let mut all = true;
        for (_, tracker, granularity_bits) in self.bitmaps.trackers.iter() {
            let bits = bits_of(offset, len, granularity_bits);
            all &= tracker.has_all(&bits) || tracker.mark(bits);
        }
        if all {
            return Ok(());
        }
        self.announce(offset, len)
    }

    /// Sees to it that the file has the bits for a stretch of the disk.
    #[cold]
    fn announce(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        let mut state = self.bitmaps.lock();
        let state = &mut *state;
        let Some(directory) = &state.directory else {
            return Ok(());
        };
        let mut announced = Announced {
            anew: directory.anew,
            ..Announced::default()
        };
        for known in &directory.known {
            let Some(number) = known.tracker else {
                continue;
            };
            if let Some(tracker) = self.bitmaps.trackers.get(number) {
                let bits = bits_of(offset, len, known.entry.granularity_bits.into());
                self.announce_in(known, number, tracker, bits, &mut announced)?;
            }
        }
        let (pages, links) = (announced.pages, announced.links);
        if announced.written || !links.is_empty() {
            state.stamp += 1;
            state.fresh = false;
            for (key, _) in &pages {
                // From here on the file may have more than the page.
                state.armed.insert(*key, state.stamp);
            }
            self.store_links(links)?;
            self.meta.flush()?;
        }
        for ((number, page), words) in &pages {
            let tracker = self.bitmaps.trackers.get(*number);
            if let Some(page) = tracker.and_then(|tracker| tracker.page(*page)) {
                page.mark_stored(words);
            }
        }
        Ok(())
    }

    /// Sets bits of one bitmap, and writes what the file lacks of them, but for entries of its table.
    fn announce_in<'a>(
        &'a self,
        known: &Known,
        number: usize,
        tracker: &Tracker,
        bits: Range<u64>,
        announced: &mut Announced<'a>,
    ) -> Result<(), ImageError> {
        let file = self.bits_of(known);
        let (total, per_cluster) = (self.bit_count(known), file.per_cluster());
        let bits = bits.start..bits.end.min(total);
        let mut at = bits.start;
        while at < bits.end {
            let cluster = at / per_cluster;
            let whole = cluster * per_cluster..total.min((cluster + 1) * per_cluster);
            let part = at..bits.end.min(whole.end);
            at = part.end;
            let entry = file.entries(cluster, 1)?.first().copied();
            let kind = file.judged(cluster, entry.unwrap_or_default())?;
            let mut lacking = Vec::new();
            for bits in by_page(part.clone()) {
                let page = bits.start / PAGE_BITS;
                self.load_page(known, tracker, page, kind)?;
                if !tracker.mark(bits) {
                    lacking.push(page);
                }
            }
            if lacking.is_empty() {
                continue;
            }
            let spared = announced.anew && known.is_consistent();
            if spared && kind == BitmapCluster::AllZeros {
                // The whole cluster is announced, for ones take no place.
                lacking = self.load_empty(known, tracker, cluster)?;
            }
            let pages = lacking.iter().map(|page| (*page, full_page(*page, total)));
            let pages: Vec<(u64, Words)> = pages.collect();
            let place = known.entry.table_offset.get() + cluster * 8;
            let mut link = |entry, cluster| {
                announced.links.push(Link {
                    place: HostOffset::new(place),
                    entry: BitmapTableEntry::new(entry),
                    cluster,
                });
            };
            match kind {
                BitmapCluster::Cluster(offset) => {
                    self.write_pages(offset, &pages)?;
                    announced.written = true;
                }
                // All pages are set then, so the file has no more than those.
                BitmapCluster::AllZeros if spared || part == whole => {
                    link(BitmapCluster::AllOnes, None);
                }
                BitmapCluster::AllZeros => {
                    let cluster = self.new_data(&pages)?;
                    let kind = BitmapCluster::Cluster(cluster.offset());
                    link(kind, Some(cluster));
                }
                BitmapCluster::AllOnes => {}
            }
            let keyed = pages.into_iter();
            announced
                .pages
                .extend(keyed.map(|(page, words)| ((number, page), words)));
        }
        Ok(())
    }

    /// Writes pages, in order, to their places in the cluster of data at `offset`.
    fn write_pages(&self, offset: HostOffset, pages: &[(u64, Words)]) -> Result<(), ImageError> {
        for run in pages.chunk_by(|(a, _), (b, _)| a + 1 == *b) {
            let Some((first, _)) = run.first() else {
                continue;
            };
            let in_cluster = self.in_cluster(first * PAGE_BYTES);
            let bytes: Vec<u8> = run.iter().flat_map(|(_, words)| bytes_of(words)).collect();
            let place = HostOffset::new(offset.get() + in_cluster);
            self.meta.write(Kinds::BITMAP_DATA, place, &bytes)?;
        }
        Ok(())
    }

    /// A new cluster of data with some pages; the others are clear.
    pub(super) fn new_data(&self, pages: &[(u64, Words)]) -> Result<Allocation<'_>, ImageError> {
        let mut bytes = vec![0; self.geometry.cluster_len()];
        for (number, words) in pages {
            let start = usize::try_from(self.in_cluster(number * PAGE_BYTES)).unwrap_or(0);
            let page = bytes_of(words);
            if let Some(place) = bytes.get_mut(start..start + page.len()) {
                place.copy_from_slice(&page);
            }
        }
        let cluster = self.alloc()?.allocate(1, None)?;
        self.meta
            .write(Kinds::BITMAP_DATA, cluster.offset(), &bytes)?;
        Ok(cluster)
    }

    /// Writes entries of tables, after what they lead to is durable; they are not yet.
    fn store_links(&self, links: Vec<Link<'_>>) -> Result<(), ImageError> {
        if links.iter().any(|link| link.cluster.is_some()) {
            self.make_durable()?;
        }
        for link in links {
            if let Some(cluster) = link.cluster {
                let map = self.meta.overlap();
                map.add(cluster.offset(), self.cluster_size(), Kinds::BITMAP_DATA)
                    .map_err(MetadataError::from)?;
                // Also if the entry can't be written, for it may be there all the same.
                cluster.keep();
            }
            self.meta
                .write(Kinds::BITMAP_TABLE, link.place, &link.entry.to_be_bytes())?;
        }
        Ok(())
    }

    /// Makes all that was written durable, and all refcounts, also where those are lazy.
    pub(super) fn make_durable(&self) -> Result<(), ImageError> {
        self.meta.commit(self.alloc()?)?;
        self.meta.write_refcounts()?;
        Ok(self.meta.flush()?)
    }

    /// Writes pages as they are, if it is time for that: what the file has beyond what is set is lost precision in a crash. The caller
    /// commits, then [finishes](Self::finish_refining).
    pub(crate) fn begin_refining(&self) -> Result<Option<Refined>, ImageError> {
        if !self.bitmaps.trackers.is_recording() || !self.meta.is_writable() {
            return Ok(None);
        }
        let mut state = self.bitmaps.lock();
        let now = Instant::now();
        let due = match state.refined {
            // The first time it is due after one interval.
            None => self.bitmaps.interval.is_zero(),
            Some(last) => now.duration_since(last) >= self.bitmaps.interval,
        };
        if due || state.refined.is_none() {
            state.refined = Some(now);
        }
        let anew = state.directory.as_ref().is_some_and(|all| all.anew);
        if !due || anew || state.armed.is_empty() {
            return Ok(None);
        }
        let state = &*state;
        let mut refined = Vec::with_capacity(state.armed.len());
        self.store_pages(state, &state.armed, |key, stamp, page| {
            let words = page.narrow();
            refined.push((key, stamp, words));
            words
        })?;
        Ok(Some(Refined(refined)))
    }

    /// What [`begin_refining`](Self::begin_refining) has written is durable.
    pub(crate) fn finish_refining(&self, refined: Option<Refined>) {
        let Some(Refined(pages)) = refined else {
            return;
        };
        let mut state = self.bitmaps.lock();
        for ((number, page), stamp, words) in pages {
            // Unless it was announced again meanwhile, or forgotten.
            if state.armed.get(&(number, page)) != Some(&stamp) {
                continue;
            }
            state.armed.remove(&(number, page));
            let tracker = self.bitmaps.trackers.get(number);
            if let Some(page) = tracker.and_then(|tracker| tracker.page(page)) {
                page.mark_stored(&words);
            }
        }
    }

    /// Writes some pages as `words` tells, in order.
    fn store_pages(
        &self,
        state: &State,
        pages: &BTreeMap<PageKey, u64>,
        mut words: impl FnMut(PageKey, u64, &super::tracker::Page) -> Words,
    ) -> Result<(), ImageError> {
        let Some(directory) = &state.directory else {
            return Ok(());
        };
        for known in &directory.known {
            let Some(number) = known.tracker else {
                continue;
            };
            let Some(tracker) = self.bitmaps.trackers.get(number) else {
                continue;
            };
            let file = self.bits_of(known);
            let pages_per_cluster = file.per_cluster() / PAGE_BITS;
            let own = pages.range((number, 0)..=(number, u64::MAX));
            let own: Vec<(u64, u64)> = own.map(|((_, page), stamp)| (*page, *stamp)).collect();
            for same in
                own.chunk_by(|(a, _), (b, _)| a / pages_per_cluster == b / pages_per_cluster)
            {
                let Some((first, _)) = same.first() else {
                    continue;
                };
                let cluster = first / pages_per_cluster;
                let entry = file.entries(cluster, 1)?.first().copied();
                let kind = file.judged(cluster, entry.unwrap_or_default())?;
                let mut found = Vec::with_capacity(same.len());
                for (page, stamp) in same {
                    if let Some(there) = tracker.page(*page) {
                        found.push((*page, words((number, *page), *stamp, there)));
                    }
                }
                // Where the file has no cluster it has what the bits are, or the bits never became due.
                if let BitmapCluster::Cluster(offset) = kind {
                    self.write_pages(offset, &found)?;
                }
            }
        }
        Ok(())
    }

    /// Brings the file to what the trackers have: that of one bitmap, or all. No request is in flight. The pages are forgotten then.
    pub(super) fn settle_bitmaps(
        &self,
        state: &mut State,
        only: Option<usize>,
    ) -> Result<(), ImageError> {
        self.place_recorded(state, only)?;
        let wanted = |key: &PageKey| only.is_none_or(|only| only == key.0);
        let pages: BTreeMap<PageKey, u64> = state
            .armed
            .iter()
            .filter(|(key, _)| wanted(key))
            .map(|(key, stamp)| (*key, *stamp))
            .collect();
        if !pages.is_empty() {
            self.store_pages(state, &pages, |_, _, page| page.words())?;
            self.meta.flush()?;
        }
        self.forget_pages(state, only);
        Ok(())
    }

    /// Forgets the pages of one bitmap, or all. No request is in flight.
    pub(super) fn forget_pages(&self, state: &mut State, only: Option<usize>) {
        state
            .armed
            .retain(|key, _| only.is_some_and(|only| only != key.0));
        for (number, tracker, _) in self.bitmaps.trackers.iter() {
            if only.is_none_or(|only| only == number) {
                tracker.wipe();
            }
        }
    }

    /// Bits of a bitmap.
    pub(super) fn bit_count(&self, known: &Known) -> u64 {
        let size = self.meta.header().virtual_size();
        size.div_ceil(1 << known.entry.granularity_bits)
    }
}

/// The bits for a stretch of the disk.
pub(super) fn bits_of(offset: u64, len: u64, granularity_bits: u32) -> Range<u64> {
    let last = offset.saturating_add(len - 1);
    offset >> granularity_bits..(last >> granularity_bits) + 1
}

/// All bits of a page, as far as the bitmap goes.
pub(super) fn full_page(page: u64, total: u64) -> Words {
    let start = page * PAGE_BITS;
    words_of(start..total.clamp(start, start + PAGE_BITS))
}
