//! From a place of the disk to where its bytes come from.

use qcow2_cache::{PointerKind, Room};
use qcow2_format::{
    ClusterKind, CompressedExtent, EntryRules, GuestOffset, HostOffset, L1Entry, L2Entry,
};
use qcow2_io::Storage as _;

use crate::{Image, ImageError};

/// Where the bytes of a stretch of the disk come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// They are zeros. `true` if an entry says so; `false` if there is simply nothing.
    Zero(bool),
    /// They lie in the data file from here on.
    Data(HostOffset),
    /// From the backing file.
    Below,
    /// In a compressed cluster.
    Compressed(CompressedExtent),
}

impl Source {
    /// The same, `len` bytes further on.
    fn advanced(self, len: u64) -> Self {
        match self {
            Self::Data(offset) => Self::Data(HostOffset::new(offset.get().wrapping_add(len))),
            other => other,
        }
    }
}

/// What the quick way through the mapping needs of the geometry, worked out once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Entries of 8 bytes, and guest data in the image file as it is.
    plain: bool,
    l1_shift: u32,
    /// Takes a guest offset to the place of its entry in the table, in bytes, once masked.
    entry_shift: u32,
    table_mask: u64,
    cluster_mask: u64,
}

impl Shape {
    pub(crate) fn new(rules: EntryRules, encrypted: bool) -> Self {
        let geometry = rules.geometry;
        Self {
            plain: !geometry.extended_l2() && !rules.external_data && !encrypted,
            l1_shift: geometry.l2_bits() + geometry.cluster_bits(),
            entry_shift: geometry.cluster_bits() - 3,
            table_mask: geometry.cluster_size() - 8,
            cluster_mask: geometry.cluster_size() - 1,
        }
    }
}

/// A guest cluster's entry, and the L1 entry it was found by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) table: L1Entry,
    pub(crate) entry: L2Entry,
}

impl Image {
    pub(crate) fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// Byte within its cluster.
    #[inline]
    pub(crate) fn in_cluster(&self, guest: u64) -> u64 {
        guest & (self.geometry.cluster_size() - 1)
    }

    #[inline]
    pub(crate) fn l1_index(&self, guest: u64) -> u64 {
        guest >> (self.geometry.l2_bits() + self.geometry.cluster_bits())
    }

    /// Where in its L2 table the entry for `guest` lies; bytes.
    #[inline]
    pub(crate) fn in_table(&self, guest: u64) -> u64 {
        let index = (guest >> self.geometry.cluster_bits()) & (self.geometry.l2_entries() - 1);
        index * self.geometry.l2_entry_size()
    }

    /// The entry for the cluster that holds `guest`; an empty one where there is no table.
    #[inline]
    pub(crate) fn find(&self, guest: u64) -> Result<Found, ImageError> {
        let table = self.l1.get(self.l1_index(guest));
        let offset = table.l2_table();
        if offset.get() == 0 {
            return Ok(Found {
                table,
                entry: L2Entry::default(),
            });
        }
        if !self.geometry.is_cluster_aligned(offset) {
            return Err(self.unaligned_table(guest, offset));
        }
        let at = HostOffset::new(offset.get() + self.in_table(guest));
        let entry = match self.cached_entry(at) {
            Some(entry) => entry,
            None => self.load_entry(at)?,
        };
        Ok(Found { table, entry })
    }

    /// Where `len` bytes at `guest` lie, and whether they may be overwritten there, for what nearly all requests are: a part of
    /// one cluster whose table is in memory and whose entry has nothing special. `None` says nothing.
    #[expect(clippy::inline_always, reason = "as a call it costs a tenth of itself")]
    #[inline(always)]
    pub(crate) fn plain(&self, guest: u64, len: u64) -> Option<(HostOffset, bool)> {
        let shape = &self.shape;
        let in_cluster = guest & shape.cluster_mask;
        if !shape.plain || in_cluster + len > shape.cluster_mask + 1 {
            return None;
        }
        let table = self.l1.get(guest >> shape.l1_shift);
        let offset = table.l2_table();
        if offset.get() == 0 || offset.get() & shape.cluster_mask != 0 {
            return None;
        }
        let in_table = (guest >> shape.entry_shift) & shape.table_mask;
        let at = HostOffset::new(offset.get() + in_table);
        let entry = L2Entry::from_bits(self.meta.l2().get(at)?, 0);
        let cluster = entry.plain_data()?;
        if cluster.get() & shape.cluster_mask != 0 {
            return None;
        }
        let host = HostOffset::new(cluster.get() + in_cluster);
        Some((host, table.is_copied() && entry.is_copied()))
    }

    #[inline]
    fn cached_entry(&self, at: HostOffset) -> Option<L2Entry> {
        if self.geometry.extended_l2() {
            let (word, bitmap) = self.meta.l2().get_pair(at)?;
            Some(L2Entry::from_bits(word, bitmap))
        } else {
            Some(L2Entry::from_bits(self.meta.l2().get(at)?, 0))
        }
    }

    #[cold]
    pub(crate) fn load_entry(&self, at: HostOffset) -> Result<L2Entry, ImageError> {
        loop {
            if self.meta.load_l2(at)? == Room::Full {
                if self.is_read_only() {
                    return self.read_entry(at);
                }
                // What is dirty must be written before it can make room; without the cache, a write under way could show
                // half of an entry.
                self.meta.commit(self.alloc()?)?;
            }
            if let Some(entry) = self.cached_entry(at) {
                return Ok(entry);
            }
        }
    }

    /// Reads an entry past the cache, all of which is being loaded by others.
    fn read_entry(&self, at: HostOffset) -> Result<L2Entry, ImageError> {
        let mut bytes = [0; 16];
        let (first, second) = bytes.split_at_mut(8);
        self.meta.storage().read_at(first, at.get())?;
        if self.geometry.extended_l2() {
            self.meta.storage().read_at(second, at.get() + 8)?;
        }
        let (words, _) = bytes.as_chunks::<8>();
        let word = |index: usize| words.get(index).map_or(0, |word| u64::from_be_bytes(*word));
        Ok(L2Entry::from_bits(word(0), word(1)))
    }

    #[cold]
    pub(crate) fn unaligned_table(&self, guest: u64, offset: HostOffset) -> ImageError {
        let index = self.l1_index(guest);
        let place = HostOffset::new(self.meta.header().l1_table_offset.get() + index * 8);
        self.meta
            .bad_pointer(PointerKind::L1, index, place, offset)
            .into()
    }

    /// The entry at fault, for a message.
    #[cold]
    fn corrupt_entry(&self, guest: u64, found: Found, detail: &str) -> ImageError {
        let place = HostOffset::new(found.table.l2_table().get() + self.in_table(guest));
        let guest = GuestOffset::new(guest & !(self.cluster_size() - 1));
        let detail = format!("for guest offset {guest}, {detail}");
        self.meta.corrupt("the L2 entry", place, detail).into()
    }

    /// What the cluster is, its entry proven usable.
    #[inline]
    pub(crate) fn kind(&self, guest: u64, found: Found) -> Result<ClusterKind, ImageError> {
        let entry = found.entry;
        let kind = entry.kind(self.rules);
        match kind {
            ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset) => {
                if !self.geometry.is_cluster_aligned(offset) {
                    let detail = format!("{offset} does not start at a cluster");
                    return Err(self.corrupt_entry(guest, found, &detail));
                }
                if self.rules.external_data && offset.get() != guest - self.in_cluster(guest) {
                    let detail = format!("{offset} is another place in the data file");
                    return Err(self.corrupt_entry(guest, found, &detail));
                }
            }
            ClusterKind::Compressed(_) if self.rules.external_data => {
                let detail = "it is compressed, beside an external data file".to_owned();
                return Err(self.corrupt_entry(guest, found, &detail));
            }
            ClusterKind::Unallocated | ClusterKind::ZeroPlain | ClusterKind::Compressed(_) => {}
        }
        if self.rules.version2
            && matches!(kind, ClusterKind::ZeroPlain | ClusterKind::ZeroAllocated(_))
        {
            let detail = "it has a zero flag, which version 2 does not know".to_owned();
            return Err(self.corrupt_entry(guest, found, &detail));
        }
        if self.geometry.extended_l2() && !entry.is_compressed() {
            let allocated = entry.allocated_subclusters();
            let without_place = allocated != 0 && kind == ClusterKind::Unallocated;
            if allocated & entry.zero_subclusters() != 0 || without_place {
                let detail = format!("the bitmap {:#018x} contradicts itself", entry.bitmap());
                return Err(self.corrupt_entry(guest, found, &detail));
            }
        }
        Ok(kind)
    }

    /// Where the bytes from `guest` on come from, and how many of the next `len` come from there, at most to the end of
    /// the cluster.
    #[inline]
    fn source_in_cluster(&self, guest: u64, len: u64) -> Result<(Source, u64), ImageError> {
        let found = self.find(guest)?;
        let in_cluster = self.in_cluster(guest);
        let left = (self.cluster_size() - in_cluster).min(len);
        let kind = self.kind(guest, found)?;
        let nothing = if self.backing.is_some() {
            Source::Below
        } else {
            Source::Zero(false)
        };
        if self.geometry.extended_l2() && !found.entry.is_compressed() {
            return Ok(self.source_in_subclusters(found.entry, kind, in_cluster, left, nothing));
        }
        let source = match kind {
            ClusterKind::Normal(offset) => Source::Data(HostOffset::new(offset.get() + in_cluster)),
            ClusterKind::Unallocated => nothing,
            ClusterKind::ZeroPlain | ClusterKind::ZeroAllocated(_) => Source::Zero(true),
            ClusterKind::Compressed(extent) => Source::Compressed(extent),
        };
        Ok((source, left))
    }

    fn source_in_subclusters(
        &self,
        entry: L2Entry,
        kind: ClusterKind,
        in_cluster: u64,
        left: u64,
        nothing: Source,
    ) -> (Source, u64) {
        let size = self.geometry.subcluster_size();
        let first = in_cluster / size;
        let state = |number: u64| {
            let bit = 1_u32 << number;
            (
                entry.allocated_subclusters() & bit != 0,
                entry.zero_subclusters() & bit != 0,
            )
        };
        let wanted = state(first);
        let mut end = first + 1;
        while end < 32 && end * size < in_cluster + left && state(end) == wanted {
            end += 1;
        }
        let source = match (wanted, kind) {
            ((true, _), ClusterKind::Normal(offset)) => {
                Source::Data(HostOffset::new(offset.get() + in_cluster))
            }
            ((_, true), _) => Source::Zero(true),
            _ => nothing,
        };
        (source, (end * size - in_cluster).min(left))
    }

    /// Where the bytes from `guest` on come from, and how many of the next `len` (at least one) come from there on without
    /// a gap. A compressed run ends with its cluster.
    #[inline]
    pub(crate) fn source(&self, guest: u64, len: u64) -> Result<(Source, u64), ImageError> {
        let (source, mut run) = self.source_in_cluster(guest, len)?;
        if run == len || matches!(source, Source::Compressed(_)) {
            return Ok((source, run));
        }
        while run < len {
            let skipped = self.unmapped(guest + run, len - run);
            if skipped > 0 {
                let nothing = match self.backing {
                    Some(_) => Source::Below,
                    None => Source::Zero(false),
                };
                if source != nothing {
                    break;
                }
                run += skipped;
                continue;
            }
            let (next, more) = self.source_in_cluster(guest + run, len - run)?;
            if next != source.advanced(run) {
                break;
            }
            run += more;
        }
        Ok((source, run))
    }

    /// How many of the next `len` bytes have no L2 table.
    pub(crate) fn unmapped(&self, guest: u64, len: u64) -> u64 {
        let coverage = self.geometry.l2_coverage();
        let mut end = guest;
        while end < guest + len && self.l1.get(self.l1_index(end)).l2_table().get() == 0 {
            end = (end / coverage + 1) * coverage;
        }
        end.min(guest + len) - guest
    }
}
