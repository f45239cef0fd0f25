//! Zeros and discards: changing what clusters are mapped to without writing guest data.

use std::io::IoSlice;
use std::ops::Range;

use qcow2_alloc::Reason;
use qcow2_format::{HostOffset, L2Entry};
use qcow2_io::{Storage as _, ZeroFlags};

use crate::mapping::Source;
use crate::{Image, ImageError};

/// Zeros are written in pieces of this many bytes where they have to be written.
const PIECE: u64 = 1 << 20;
/// A zero bit for each subcluster.
pub(crate) const ALL_ZERO: u64 = 0xffff_ffff_0000_0000;

/// What is to become of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It reads as zeros and keeps its place.
    Zero,
    /// It reads as zeros, and its place is free.
    ZeroAndUnmap,
    /// The guest has no use for it.
    Discard,
    /// As if it had never been written.
    Forget,
}

impl Image {
    /// Makes a range read as zeros.
    pub(crate) fn zero(&self, range: Range<u64>, flags: ZeroFlags) -> Result<(), ImageError> {
        self.check_range(range.start, range.end - range.start)?;
        if range.is_empty() {
            return Ok(());
        }
        self.get_ready()?;
        if self.has_part_of_sector(range.start, range.end) {
            let _closed = self.gate.close();
            self.check_range(range.start, range.end - range.start)?;
            self.record(range.start, range.end - range.start)?;
            self.zero_guest(range, self.virtual_size(), flags)?;
        } else {
            let _pass = self.gate.enter();
            self.check_range(range.start, range.end - range.start)?;
            self.record(range.start, range.end - range.start)?;
            self.zero_guest(range, self.virtual_size(), flags)?;
        }
        self.tidy()
    }

    /// Makes a range read as zeros, on a disk that is `size` bytes long. The caller has a pass or has closed the gate; the
    /// latter for parts of sectors of an encrypted image.
    pub(crate) fn zero_guest(
        &self,
        range: Range<u64>,
        size: u64,
        flags: ZeroFlags,
    ) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        let quick_only = flags.contains(ZeroFlags::NO_FALLBACK);
        if self.raw_data && self.crypt.is_some() {
            return self.zero_data(range, quick_only);
        }
        if self.raw_data {
            // The data file is the disk; the mapping is what it is.
            return self.zero_raw(range, flags);
        }
        if self.is_version2() && self.backing.is_some() {
            return self.zero_data(range, quick_only);
        }
        let unit = self.geometry.subcluster_size();
        let start = range.start.next_multiple_of(unit);
        // What ends with the disk ends with a cluster.
        let end = if range.end >= size {
            range.end.next_multiple_of(unit)
        } else {
            range.end / unit * unit
        };
        let units = start..end.max(start);
        let edges = if start < end {
            [range.start..start, end.min(range.end)..range.end]
        } else {
            // Within one unit, or the edges of two.
            let edge = (range.end / unit * unit).max(range.start);
            [range.start..edge, edge..range.end]
        };
        let edges = edges.into_iter().filter(|edge| !edge.is_empty());
        if quick_only && !self.is_quick(edges.clone(), &units, size)? {
            return Err(not_quick());
        }
        for edge in edges {
            self.zero_edge(edge, size, quick_only)?;
        }
        let fate = if flags.contains(ZeroFlags::MAY_UNMAP) && self.discard {
            Fate::ZeroAndUnmap
        } else {
            Fate::Zero
        };
        self.zero_units(units, fate, quick_only)
    }

    /// Whether no zeros have to be written: asked before the first change, so that a refusal leaves all as it was.
    fn is_quick(
        &self,
        edges: impl Iterator<Item = Range<u64>>,
        units: &Range<u64>,
        size: u64,
    ) -> Result<bool, ImageError> {
        for edge in edges {
            if self.unit_of_zeros(&edge, size)?.is_none() {
                return Ok(false);
            }
        }
        // Subclusters of a cluster that is compressed can't be told apart.
        for border in [units.start, units.end] {
            let inside = !units.is_empty() && self.in_cluster(border) != 0;
            if inside && self.find(border)?.entry.is_compressed() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The unit that a part of it lies in, if all the rest of it reads as zeros and nothing of it is stored.
    fn unit_of_zeros(
        &self,
        part: &Range<u64>,
        size: u64,
    ) -> Result<Option<Range<u64>>, ImageError> {
        let unit = self.geometry.subcluster_size();
        let start = part.start / unit * unit;
        let end = (start + unit).min(size).max(part.end);
        if !self.reads_as_zeros(start..part.start)? || !self.reads_as_zeros(part.end..end)? {
            return Ok(None);
        }
        let (source, _) = self.source(part.start, 1)?;
        let free = matches!(source, Source::Zero(_) | Source::Below);
        Ok(free.then_some(start..start + unit))
    }

    fn is_version2(&self) -> bool {
        self.rules.version2
    }

    /// Zeroes a part of a unit: the whole unit becomes zero if the rest of it is, else zeros are written.
    fn zero_edge(&self, part: Range<u64>, size: u64, quick_only: bool) -> Result<(), ImageError> {
        {
            let cluster = part.start >> self.geometry.cluster_bits();
            let _held = self.stripes.lock(cluster, cluster);
            if let Some(unit) = self.unit_of_zeros(&part, size)? {
                return self.zero_units_held(unit, Fate::Zero);
            }
        }
        self.zero_data(part, quick_only)
    }

    /// Whether a range is known to read as zeros without a look at its data.
    fn reads_as_zeros(&self, range: Range<u64>) -> Result<bool, ImageError> {
        let mut at = range.start;
        while at < range.end {
            let (source, run) = self.source(at, range.end - at)?;
            match source {
                Source::Zero(_) => {}
                Source::Below => {
                    if !self.below_reads_as_zeros(at..at + run)? {
                        return Ok(false);
                    }
                }
                Source::Data(_) | Source::Compressed(_) => return Ok(false),
            }
            at += run;
        }
        Ok(true)
    }

    fn below_reads_as_zeros(&self, range: Range<u64>) -> Result<bool, ImageError> {
        let Some(backing) = &self.backing else {
            return Ok(true);
        };
        let found = backing.extents(range.clone(), 2)?;
        Ok(found.iter().all(|extent| extent.kind.reads_as_zeros())
            && found.last().is_some_and(|last| last.end() >= range.end))
    }

    /// Writes zeros as data.
    fn zero_data(&self, range: Range<u64>, quick_only: bool) -> Result<(), ImageError> {
        if quick_only {
            return Err(not_quick());
        }
        let zeros = vec![0; usize::try_from(PIECE.min(range.end - range.start)).unwrap_or(0)];
        let mut at = range.start;
        while at < range.end {
            let piece = (range.end - at).min(PIECE);
            let bytes = zeros
                .get(..usize::try_from(piece).unwrap_or(0))
                .unwrap_or_default();
            self.write_guest(&[IoSlice::new(bytes)], at, piece)?;
            at += piece;
        }
        Ok(())
    }

    /// Zeroes in the raw data file.
    fn zero_raw(&self, range: Range<u64>, flags: ZeroFlags) -> Result<(), ImageError> {
        let flags = if self.discard || !flags.contains(ZeroFlags::MAY_UNMAP) {
            flags
        } else if flags.contains(ZeroFlags::NO_FALLBACK) {
            ZeroFlags::NO_FALLBACK
        } else {
            ZeroFlags::NONE
        };
        Ok(self.meta.data().write_zeroes(range, flags)?)
    }

    /// Zeroes whole units.
    fn zero_units(
        &self,
        range: Range<u64>,
        fate: Fate,
        quick_only: bool,
    ) -> Result<(), ImageError> {
        for part in self.by_table(range) {
            if self.is_unmapped_for_good(&part, fate) {
                continue;
            }
            let bits = self.geometry.cluster_bits();
            let held = self
                .stripes
                .lock(part.start >> bits, (part.end - 1) >> bits);
            match self.zero_units_held(part.clone(), fate) {
                Err(ImageError::Unsupported { .. }) => {
                    drop(held);
                    self.zero_data(part, quick_only)?;
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Whether a piece has no table and needs none: seen without a lock, so that emptiness of any size costs next to nothing.
    fn is_unmapped_for_good(&self, part: &Range<u64>, fate: Fate) -> bool {
        self.l1.get(self.l1_index(part.start)).l2_table().get() == 0
            && self.after(L2Entry::default(), fate).is_none()
    }

    /// Pieces of a range that one L2 table maps each. A piece that begins or ends within a cluster stays within that cluster.
    fn by_table(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let coverage = self.geometry.l2_coverage();
        let cluster = self.cluster_size();
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let start = at;
            let mut end = (at / coverage + 1) * coverage;
            end = end.min(range.end);
            if !start.is_multiple_of(cluster) {
                end = end.min(start.next_multiple_of(cluster));
            } else if !end.is_multiple_of(cluster) && end - start > cluster {
                end = end / cluster * cluster;
            }
            at = end;
            Some(start..end)
        })
    }

    /// Changes entries so that whole units of one table read as zeros. The caller holds the stripes.
    fn zero_units_held(&self, range: Range<u64>, fate: Fate) -> Result<(), ImageError> {
        let size = self.cluster_size();
        if range.start.is_multiple_of(size) && range.end.is_multiple_of(size) {
            return self.change_clusters(range, fate);
        }
        // Some subclusters of one cluster.
        let guest = range.start;
        let found = self.find(guest)?;
        self.kind(guest, found)?;
        if found.entry.is_compressed() {
            return Err(ImageError::Unsupported {
                what: "a part of a compressed cluster has no entry of its own",
            });
        }
        let sub = self.geometry.subcluster_size();
        let first = self.in_cluster(guest) / sub;
        let last = self.in_cluster(range.end - 1) / sub;
        let bits = (first..=last).fold(0_u64, |bits, number| bits | 1 << number);
        let bitmap = (found.entry.bitmap() & !bits) | bits << 32;
        if bitmap == found.entry.bitmap() {
            return Ok(());
        }
        let entry = L2Entry::from_bits(found.entry.word(), bitmap);
        self.change(
            guest - self.in_cluster(guest),
            1,
            Reason::Request,
            |_, _| Some(entry),
        )
        .map_err(|(_, error)| error)
    }

    /// Changes the entries of whole clusters of one table.
    fn change_clusters(&self, range: Range<u64>, fate: Fate) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        let count = (range.end - range.start) >> bits;
        let reason = if fate == Fate::Forget {
            Reason::Cut
        } else {
            Reason::Request
        };
        // Nothing to do where there is nothing, and no table shall be made for that.
        let none_yet = self.l1.get(self.l1_index(range.start)).l2_table().get() == 0;
        if none_yet && self.after(L2Entry::default(), fate).is_none() {
            return Ok(());
        }
        let mut any = none_yet;
        for number in 0..count {
            let guest = range.start + (number << bits);
            let found = self.find(guest)?;
            self.kind(guest, found)?;
            any = any || self.after(found.entry, fate).is_some();
        }
        if !any {
            return Ok(());
        }
        let mut emptied: Vec<(u64, u64)> = Vec::new();
        let changed = self.change(range.start, count, reason, |_, entry| {
            let after = self.after(entry, fate)?;
            if let Some(place) = self.emptied(entry, fate) {
                match emptied.last_mut() {
                    Some((start, len)) if *start + *len == place.get() => {
                        *len += self.cluster_size();
                    }
                    _ => emptied.push((place.get(), self.cluster_size())),
                }
            }
            Some(after)
        });
        // A cluster that keeps its place is punched now or never: the guest may write to it as soon as this returns.
        for (start, len) in emptied {
            let _ = self.meta.data().discard(start..start + len);
        }
        changed.map_err(|(_, error)| error)
    }

    /// The entry that takes the place of `entry`; `None` to leave it.
    fn after(&self, entry: L2Entry, fate: Fate) -> Option<L2Entry> {
        let extended = self.geometry.extended_l2();
        let has_place = !entry.is_compressed() && self.keeps_place(entry);
        let zero = |word: u64| {
            if extended {
                L2Entry::from_bits(word & !1, ALL_ZERO)
            } else {
                L2Entry::from_bits(word | 1, 0)
            }
        };
        let empty = entry.is_empty()
            || (!entry.is_compressed()
                && !has_place
                && entry.bitmap() == 0
                && !self.is_zero_plain(entry));
        let after = match fate {
            Fate::Forget => L2Entry::default(),
            _ if self.is_version2() => L2Entry::default(),
            // Without a backing file, what is not there reads as zeros already. Zeros that were written are noted all the
            // same, as QEMU does: they show in the map, and stay if the image gets a backing file later.
            Fate::Discard if empty && self.backing.is_none() => return None,
            Fate::Zero if has_place => zero(entry.word()),
            Fate::ZeroAndUnmap | Fate::Discard if has_place && self.discard_no_unref => {
                zero(entry.word())
            }
            _ => zero(0),
        };
        (after != entry).then_some(after)
    }

    fn is_zero_plain(&self, entry: L2Entry) -> bool {
        matches!(entry.kind(self.rules), qcow2_format::ClusterKind::ZeroPlain)
    }

    fn keeps_place(&self, entry: L2Entry) -> bool {
        matches!(
            entry.kind(self.rules),
            qcow2_format::ClusterKind::Normal(_) | qcow2_format::ClusterKind::ZeroAllocated(_)
        )
    }

    /// Where data lies that no one needs any more, in a place that stays with the cluster.
    fn emptied(&self, entry: L2Entry, fate: Fate) -> Option<HostOffset> {
        if matches!(fate, Fate::Zero | Fate::Forget) || entry.is_compressed() {
            return None;
        }
        let own = entry.is_copied() && self.pass_request;
        // Who still reads there, or does after a crash, by the old entry, would decipher the hole.
        if self.crypt.is_some() {
            return None;
        }
        if !own || !(self.rules.external_data || self.discard_no_unref) {
            return None;
        }
        match entry.kind(self.rules) {
            qcow2_format::ClusterKind::Normal(offset)
            | qcow2_format::ClusterKind::ZeroAllocated(offset) => Some(offset),
            _ => None,
        }
    }

    /// Discards a range: whole clusters are given up, and the rest reads as zeros, too.
    pub(crate) fn discard_all(&self, range: Range<u64>) -> Result<(), ImageError> {
        let size = self.virtual_size();
        let range = range.start.min(size)..range.end.min(size);
        if range.is_empty() {
            return Ok(());
        }
        self.check_discard()?;
        let (start, end) = self.whole_clusters(&range, size);
        if start >= end {
            return self.zero(range, ZeroFlags::MAY_UNMAP);
        }
        self.discard_whole(start..end.min(size))?;
        if range.start < start {
            self.zero(range.start..start, ZeroFlags::MAY_UNMAP)?;
        }
        if end < range.end {
            self.zero(end..range.end, ZeroFlags::MAY_UNMAP)?;
        }
        Ok(())
    }

    fn check_discard(&self) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        if !self.discard {
            return Err(ImageError::Unsupported {
                what: "discards are switched off",
            });
        }
        if self.is_version2() && self.backing.is_some() {
            return Err(ImageError::Unsupported {
                what: "an image of version 2 with a backing file can't discard: the old data would show again",
            });
        }
        Ok(())
    }

    /// The clusters that lie wholly in a range; what ends with the disk ends with a cluster.
    fn whole_clusters(&self, range: &Range<u64>, size: u64) -> (u64, u64) {
        let cluster = self.cluster_size();
        let end = if range.end >= size {
            size.next_multiple_of(cluster)
        } else {
            range.end / cluster * cluster
        };
        (range.start.next_multiple_of(cluster), end)
    }

    /// Discards the clusters that lie wholly in a range, and leaves the rest as it is: what QEMU makes of a guest's
    /// discard. What is behind the end of the disk is ignored.
    ///
    /// # Errors
    ///
    /// [`ImageError::Unsupported`] where discards are switched off or version 2 has a backing file, and what the storage
    /// reports.
    pub fn discard_whole(&self, range: Range<u64>) -> Result<(), ImageError> {
        self.check_discard()?;
        self.get_ready()?;
        {
            let _pass = self.gate.enter();
            let size = self.virtual_size();
            let range = range.start.min(size)..range.end.min(size);
            let (start, end) = self.whole_clusters(&range, size);
            if start >= end {
                return Ok(());
            }
            self.record(start, end.min(size) - start)?;
            if self.raw_data && self.crypt.is_some() {
                self.zero_data(start..end.min(size), false)?;
            } else if self.raw_data {
                // The data file must hold zeros where the disk reads as zeros.
                self.meta
                    .data()
                    .write_zeroes(start..end.min(size), ZeroFlags::MAY_UNMAP)?;
            } else {
                self.drop_clusters(start..end, Fate::Discard)?;
            }
        }
        self.tidy()
    }

    fn drop_clusters(&self, range: Range<u64>, fate: Fate) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        for part in self.by_table(range) {
            if self.is_unmapped_for_good(&part, fate) {
                continue;
            }
            let _held = self
                .stripes
                .lock(part.start >> bits, (part.end - 1) >> bits);
            self.change_clusters(part, fate)?;
        }
        Ok(())
    }

    /// Makes clusters as if they had never been written. The caller has closed the gate.
    pub(crate) fn forget_clusters(&self, range: Range<u64>) -> Result<(), ImageError> {
        self.drop_clusters(range, Fate::Forget)
    }
}

fn not_quick() -> ImageError {
    ImageError::Unsupported {
        what: "part of the range can't be zeroed without writing zeros",
    }
}
