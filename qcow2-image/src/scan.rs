//! The mapping of one image alone, from front to back, many entries at a time.

use std::ops::Range;

use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, HostOffset};
use qcow2_io::Storage as _;

use crate::buffer::Pages;
use crate::chain::Local;
use crate::mapping::Found;
use crate::{Image, ImageError};

/// The most of a table that is read at once; bytes.
const PIECE_MAX: u64 = 256 << 10;
/// What an extended entry says when all of its cluster is data.
const ALL_ALLOCATED: u64 = 0xffff_ffff;

/// A stretch of the disk of which one thing is said, without a gap in the file; a compressed one is a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) range: Range<u64>,
    pub(crate) local: Local,
}

impl Stretch {
    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether `next`, which begins where this ends, goes on in the same way.
    fn goes_on(&self, next: &Self) -> bool {
        self.local.joins(self.len(), next.local)
    }
}

/// Goes through the mapping. Whoever has one has a pass, or nobody writes.
///
/// Tables are read in large pieces and past the cache, but for what the cache has, which may be newer.
pub(crate) struct Scan<'a> {
    image: &'a Image,
    at: u64,
    end: u64,
    pending: Option<Stretch>,
    /// A piece of a table, and where it lies.
    buffer: Pages,
    base: u64,
    /// Bytes of a table to read next.
    piece: u64,
    /// Entries that may still be looked at.
    budget: u64,
}

impl<'a> Scan<'a> {
    /// The mapping of a range that lies within the disk.
    pub(crate) fn new(image: &'a Image, range: Range<u64>) -> Self {
        Self {
            image,
            at: range.start,
            end: range.end,
            pending: None,
            buffer: Pages::default(),
            base: 0,
            piece: 0,
            budget: u64::MAX,
        }
    }

    /// Ends early, once so many entries have been looked at.
    pub(crate) fn limited(mut self, entries: u64) -> Self {
        self.budget = entries;
        self
    }

    /// The next stretch, as long as it can be; `None` behind the last.
    pub(crate) fn next(&mut self) -> Result<Option<Stretch>, ImageError> {
        while self.at < self.end && self.budget > 0 {
            let next = self.look()?;
            self.at = next.range.end;
            match &mut self.pending {
                Some(last) if last.goes_on(&next) => last.range.end = next.range.end,
                last => {
                    if let Some(whole) = last.replace(next) {
                        return Ok(Some(whole));
                    }
                }
            }
        }
        Ok(self.pending.take())
    }

    /// A stretch from where it is, at most to the end of the piece of the table.
    fn look(&mut self) -> Result<Stretch, ImageError> {
        let (image, guest) = (self.image, self.at);
        let table = image.l1.get(image.l1_index(guest));
        let place = table.l2_table();
        if place.get() == 0 {
            let run = image.unmapped(guest, self.end - guest);
            return Ok(Stretch {
                range: guest..guest + run,
                local: Local::Nothing(None),
            });
        }
        if !image.geometry.is_cluster_aligned(place) {
            return Err(image.unaligned_table(guest, place));
        }
        let at = place.get() + image.in_table(guest);
        self.load(at, place.get())?;
        let index = usize::try_from(at - self.base).unwrap_or(usize::MAX);
        let entries = L2Table::new(self.buffer.get(index..).unwrap_or_default(), image.geometry);
        let (size, in_cluster) = (image.cluster_size(), image.in_cluster(guest));
        let bytes = |entries: usize| (entries as u64).saturating_mul(size) - in_cluster;

        let empty = entries.empty_run(0);
        if empty > 0 {
            return Ok(self.stretch(bytes(empty), Local::Nothing(None)));
        }
        let entry = entries.get(0).unwrap_or_default();
        let is_whole = !image.geometry.extended_l2() || entry.bitmap() == ALL_ALLOCATED;
        if is_whole
            && let Some(host) = entry.plain_data()
            && image.geometry.is_cluster_aligned(host)
            && (!image.rules.external_data || host.get() == guest - in_cluster)
        {
            let run = entries.sequential_run(0, size).max(1);
            return Ok(self.stretch(bytes(run), Local::Data(host.get() + in_cluster)));
        }
        let kind = image.kind(guest, Found { table, entry })?;
        let further = |place: HostOffset| place.get() + in_cluster;
        if image.geometry.extended_l2() && !entry.is_compressed() {
            let place = match kind {
                ClusterKind::Normal(place) | ClusterKind::ZeroAllocated(place) => {
                    Some(further(place))
                }
                _ => None,
            };
            let sub = image.geometry.subcluster_size();
            let state = |number: u64| {
                let bit = 1_u32.checked_shl(u32::try_from(number).unwrap_or(u32::MAX));
                let bit = bit.unwrap_or_default();
                (
                    entry.allocated_subclusters() & bit != 0,
                    entry.zero_subclusters() & bit != 0,
                )
            };
            let first = in_cluster / sub;
            let mut end = first + 1;
            while end < 32 && state(end) == state(first) {
                end += 1;
            }
            let local = match (state(first), place) {
                ((true, _), Some(host)) => Local::Data(host),
                ((_, true), place) => Local::Zero(place),
                (_, place) => Local::Nothing(place),
            };
            return Ok(self.stretch(end * sub - in_cluster, local));
        }
        let local = match kind {
            ClusterKind::Normal(place) => Local::Data(further(place)),
            ClusterKind::ZeroAllocated(place) => Local::Zero(Some(further(place))),
            ClusterKind::ZeroPlain => Local::Zero(None),
            ClusterKind::Unallocated => Local::Nothing(None),
            ClusterKind::Compressed(extent) => Local::Packed(extent),
        };
        Ok(self.stretch(bytes(1), local))
    }

    /// What entries say of the next `len` bytes.
    fn stretch(&mut self, len: u64, local: Local) -> Stretch {
        let len = len.min(self.end - self.at);
        let entries = len.div_ceil(self.image.cluster_size());
        self.budget = self.budget.saturating_sub(entries);
        Stretch {
            range: self.at..self.at + len,
            local,
        }
    }

    /// Sees to it that the buffer has the entry at `at`, and as many more of its table as seem useful.
    fn load(&mut self, at: u64, table: u64) -> Result<(), ImageError> {
        if at >= self.base && at - self.base < self.buffer.len() as u64 {
            return Ok(());
        }
        let image = self.image;
        let slice = image.meta.l2().slice_bytes() as u64;
        let start = at / slice * slice;
        let entries_left = (self.end - self.at).div_ceil(image.cluster_size()) + 1;
        let wanted = (at - start) + entries_left.saturating_mul(image.geometry.l2_entry_size());
        let len = (table + image.cluster_size() - start)
            .min(wanted.next_multiple_of(slice))
            .min(self.piece.max(slice));
        self.piece = (len * 2).min(PIECE_MAX);
        self.base = start;
        self.buffer.resize(usize::try_from(len).unwrap_or_default());
        let slice = image.meta.l2().slice_bytes();
        // A pair of words may be read half written past the cache.
        let by_cache =
            len == slice as u64 || (image.geometry.extended_l2() && !image.is_read_only());
        let mut missing: Option<Range<usize>> = None;
        let mut from = 0;
        while from < self.buffer.len() {
            let range = from..from + slice;
            from = range.end;
            if self.copy(range.clone(), by_cache)? {
                self.read(missing.take())?;
                continue;
            }
            missing = Some(missing.map_or(range.start, |missing| missing.start)..range.end);
        }
        self.read(missing)
    }

    /// Fills a slice of the buffer from the cache; `false` if it is not there and need not be.
    fn copy(&mut self, range: Range<usize>, load: bool) -> Result<bool, ImageError> {
        let place = HostOffset::new(self.base + range.start as u64);
        loop {
            let bytes = self.buffer.get_mut(range.clone()).unwrap_or_default();
            if self.image.meta.l2().copy(place, bytes) {
                return Ok(true);
            }
            if !load {
                return Ok(false);
            }
            self.image.load_entry(place)?;
            let bytes = self.buffer.get_mut(range.clone()).unwrap_or_default();
            if !self.image.meta.l2().copy(place, bytes) && self.image.is_read_only() {
                return Ok(false);
            }
        }
    }

    /// Fills a part of the buffer from the file.
    fn read(&mut self, range: Option<Range<usize>>) -> Result<(), ImageError> {
        if let Some(range) = range {
            let place = self.base + range.start as u64;
            let bytes = self.buffer.get_mut(range).unwrap_or_default();
            self.image.meta.storage().read_at(bytes, place)?;
        }
        Ok(())
    }
}
