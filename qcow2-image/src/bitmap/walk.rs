//! From a bitmap's data to runs of bits that are set.

use std::cell::Cell;
use std::ops::Range;

use qcow2_format::bitmap::BitmapCluster;
use qcow2_format::{BitmapEntry, BitmapTableEntry, Geometry, HostOffset};
use qcow2_io::Storage;

use super::directory::unusable;
use super::tracker::{PAGE_BITS, PAGE_BYTES, PAGE_WORDS, Tracker, Words, by_page, masks};
use crate::ImageError;

/// Entries of a table that are read at once.
const TABLE_PIECE: u64 = 8 << 10;
/// Pages of data that are read at once, if a cluster has as many.
const DATA_PIECE: u64 = 128;

/// The bits of one bitmap: what the file has or, where a tracker has the page, what that has.
pub(super) struct Bits<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) geometry: Geometry,
    pub(super) entry: &'a BitmapEntry,
    pub(super) tracker: Option<&'a Tracker>,
    /// Clusters of data that may still be read: sound bitmaps have no more than the file.
    pub(super) budget: Option<&'a Cell<u64>>,
}

/// Where bits go. `false` stops the walk.
pub(super) trait Sink {
    /// Takes bits that are all set.
    fn run(&mut self, bits: Range<u64>) -> bool;

    /// Takes the bits of one page that lie in `within`.
    fn page(&mut self, words: &Words, within: Range<u64>) -> bool {
        let page = within.start / PAGE_BITS * PAGE_BITS;
        let end = within.end;
        let mut open: Option<u64> = None;
        for (index, mask) in masks(within) {
            let bits = words.get(index).map_or(0, |word| word & mask);
            let first = page + index as u64 * 64;
            let mut at = 0;
            while at < 64 {
                let rest = bits >> at;
                if let Some(start) = open {
                    at += rest.trailing_ones().min(64 - at);
                    if at < 64 {
                        open = None;
                        if !self.run(start..first + u64::from(at)) {
                            return false;
                        }
                    }
                } else if rest == 0 {
                    break;
                } else {
                    at += rest.trailing_zeros();
                    open = Some(first + u64::from(at));
                }
            }
        }
        open.is_none_or(|start| self.run(start..end))
    }
}

/// Counts bits.
#[derive(Default)]
pub(super) struct Count(pub(super) u64);

impl Sink for Count {
    fn run(&mut self, bits: Range<u64>) -> bool {
        self.0 += bits.end - bits.start;
        true
    }

    fn page(&mut self, words: &Words, within: Range<u64>) -> bool {
        for (index, mask) in masks(within) {
            let bits = words.get(index).map_or(0, |word| word & mask);
            self.0 += u64::from(bits.count_ones());
        }
        true
    }
}

/// Collects runs, neighbours joined.
pub(super) struct Runs {
    pub(super) runs: Vec<Range<u64>>,
    max: usize,
}

impl Runs {
    pub(super) fn new(max: usize) -> Self {
        Self {
            runs: Vec::new(),
            max,
        }
    }
}

impl Sink for Runs {
    fn run(&mut self, bits: Range<u64>) -> bool {
        let full = self.runs.len() >= self.max;
        match self.runs.last_mut() {
            Some(last) if last.end == bits.start => last.end = bits.end,
            _ if full => return false,
            _ => self.runs.push(bits),
        }
        true
    }
}

impl Bits<'_> {
    /// Bits that one cluster of data holds.
    pub(super) fn per_cluster(&self) -> u64 {
        self.geometry.cluster_size() * 8
    }

    /// Shows the bits to a sink, in order.
    pub(super) fn walk(&self, bits: Range<u64>, sink: &mut dyn Sink) -> Result<(), ImageError> {
        let per_cluster = self.per_cluster();
        let mut table = Vec::new();
        let mut table_from = 0;
        let mut at = bits.start;
        while at < bits.end {
            let number = at / per_cluster;
            let end = bits.end.min((number + 1) * per_cluster);
            let left = u64::from(self.entry.table_entries).saturating_sub(number);
            if left == 0 {
                break;
            }
            if number < table_from || number - table_from >= table.len() as u64 {
                let last = (bits.end - 1) / per_cluster;
                let count = TABLE_PIECE.min(left).min(last - number + 1);
                table = self.entries(number, count)?;
                table_from = number;
            }
            let entry = usize::try_from(number - table_from).ok();
            let entry = entry.and_then(|index| table.get(index).copied());
            let entry = entry.unwrap_or_default();
            if !self.walk_cluster(self.judged(number, entry)?, at..end, sink)? {
                break;
            }
            at = end;
        }
        Ok(())
    }

    /// Entries of the table as they are in the file.
    pub(super) fn entries(
        &self,
        first: u64,
        count: u64,
    ) -> Result<Vec<BitmapTableEntry>, ImageError> {
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or(0)];
        let at = self.entry.table_offset.get() + first * 8;
        self.storage.read_at(&mut bytes, at)?;
        let entries = bytes.as_chunks::<8>().0.iter();
        Ok(entries
            .map(|bytes| BitmapTableEntry::from_be_bytes(*bytes))
            .collect())
    }

    /// What a table entry stands for, proven.
    pub(super) fn judged(
        &self,
        number: u64,
        entry: BitmapTableEntry,
    ) -> Result<BitmapCluster, ImageError> {
        let refuse = |why: &str| {
            let name = &self.entry.name;
            unusable(name, format!("entry {number} of its table {why}"))
        };
        if entry.reserved_bits() != 0 {
            return Err(refuse("has reserved bits set"));
        }
        if let BitmapCluster::Cluster(offset) = entry.kind() {
            if !self.geometry.is_cluster_aligned(offset) {
                return Err(refuse("points to where no cluster starts"));
            }
            if offset.get() >= self.storage.len()? {
                return Err(refuse("points beyond the end of the file"));
            }
        }
        Ok(entry.kind())
    }

    /// The bits of one cluster of data.
    fn walk_cluster(
        &self,
        kind: BitmapCluster,
        bits: Range<u64>,
        sink: &mut dyn Sink,
    ) -> Result<bool, ImageError> {
        if self.tracker.is_none() {
            match kind {
                BitmapCluster::AllZeros => return Ok(true),
                BitmapCluster::AllOnes => return Ok(sink.run(bits)),
                BitmapCluster::Cluster(_) => {}
            }
        }
        if let (Some(budget), BitmapCluster::Cluster(_)) = (self.budget, kind) {
            let left = budget.get().checked_sub(1).ok_or_else(|| {
                let why = "its data lies on other data, for the file does not hold as much";
                unusable(&self.entry.name, why)
            })?;
            budget.set(left);
        }
        let mut piece: Vec<Words> = Vec::new();
        let mut piece_from = 0;
        let end_page = bits.end.div_ceil(PAGE_BITS);
        for part in by_page(bits) {
            let page = part.start / PAGE_BITS;
            let tracked = self.tracker.and_then(|tracker| tracker.loaded(page));
            let words = match (tracked, kind) {
                (Some(words), _) => words,
                (None, BitmapCluster::AllZeros) => continue,
                (None, BitmapCluster::AllOnes) => [u64::MAX; PAGE_WORDS],
                (None, BitmapCluster::Cluster(offset)) => {
                    if page < piece_from || page - piece_from >= piece.len() as u64 {
                        let count = DATA_PIECE.min(end_page - page);
                        piece = self.read_pages(offset, page, count)?;
                        piece_from = page;
                    }
                    let index = usize::try_from(page - piece_from).ok();
                    let words = index.and_then(|index| piece.get(index).copied());
                    words.unwrap_or([0; PAGE_WORDS])
                }
            };
            if !sink.page(&words, part) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads pages that lie in the cluster of data at `offset`.
    pub(super) fn read_pages(
        &self,
        offset: HostOffset,
        first: u64,
        count: u64,
    ) -> Result<Vec<Words>, ImageError> {
        let in_cluster = first * PAGE_BYTES % self.geometry.cluster_size();
        let mut bytes = vec![0; usize::try_from(count * PAGE_BYTES).unwrap_or(0)];
        self.storage
            .read_at(&mut bytes, offset.get() + in_cluster)?;
        Ok(pages_of(&bytes))
    }
}

/// Bytes of data as pages.
#[expect(
    clippy::little_endian_bytes,
    reason = "the first bit of a bitmap is the least significant one of its first byte"
)]
pub(super) fn pages_of(bytes: &[u8]) -> Vec<Words> {
    let words: Vec<u64> = bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|bytes| u64::from_le_bytes(*bytes))
        .collect();
    words.as_chunks::<PAGE_WORDS>().0.to_vec()
}

/// A page as it lies in the file.
pub(super) fn bytes_of(words: &Words) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_across_words_and_pages_and_cut_to_what_was_asked_for() {
        let mut page = [0; PAGE_WORDS];
        page[0] = 0b0110;
        page[1] = 1 << 63;
        page[2] = u64::MAX;
        page[3] = 1;
        page[63] = 1 << 63;
        let mut runs = Runs::new(10);
        assert!(runs.page(&page, 2..4096));
        assert!(runs.page(&[u64::MAX; PAGE_WORDS], 4096..4200));
        assert_eq!(runs.runs, [2..3, 127..193, 4095..4200]);
        let mut count = Count::default();
        assert!(count.page(&page, 2..4096));
        assert_eq!(count.0, 1 + 66 + 1);
        let mut few = Runs::new(1);
        assert!(!few.page(&page, 0..4096));
        assert_eq!(few.runs.first(), Some(&(1..3)));
        assert_eq!(few.runs.len(), 1);
        assert_eq!(pages_of(&bytes_of(&page)), [page]);
    }
}
