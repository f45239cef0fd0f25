//! Writing.

use std::io::IoSlice;
use std::ops::Range;

use qcow2_alloc::{Order, Reason};
use qcow2_cache::Step;
use qcow2_format::{ClusterKind, HostCluster, HostOffset, L2Entry};
use qcow2_io::Storage as _;

use crate::buffer::Buffer;
use crate::cuts::cut;
use crate::mapping::{Found, Source};
use crate::{Image, ImageError};

/// Clusters that are mapped under one hold of the locks.
const RUN_MAX: u64 = 256;

impl Image {
    /// Stores the buffers, `len` bytes in all, from `offset` on.
    pub(crate) fn write(
        &self,
        bufs: &[IoSlice<'_>],
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        self.check_range(offset, len)?;
        self.get_ready()?;
        if self.has_part_of_sector(offset, offset + len) {
            let _closed = self.gate.close();
            self.check_range(offset, len)?;
            self.record(offset, len)?;
            self.write_guest(bufs, offset, len)?;
        } else {
            let _pass = self.gate.enter();
            self.check_range(offset, len)?;
            self.record(offset, len)?;
            self.write_guest(bufs, offset, len)?;
        }
        self.tidy()
    }

    /// As [`write`](Self::write), for one buffer: most writes are one piece of one cluster that is there already.
    #[inline]
    pub(crate) fn write_one(&self, buf: &[u8], offset: u64) -> Result<(), ImageError> {
        let len = buf.len() as u64;
        if len > 0 && self.is_ready() {
            let _pass = self.gate.enter();
            if self.is_inside(offset, len)
                && self.meta.is_writable()
                && let Some((host, true)) = self.plain(offset, len)
            {
                self.meta.check_data(host, len)?;
                self.record(offset, len)?;
                return Ok(self.meta.storage().write_at(buf, host.get())?);
            }
        }
        self.write(&[IoSlice::new(buf)], offset, len)
    }

    /// Writes to the guest's view. The caller has a pass or has closed the gate, and the image is ready for writes. In an
    /// encrypted image, it has closed the gate unless it writes whole sectors.
    pub(crate) fn write_guest(
        &self,
        bufs: &[IoSlice<'_>],
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        if len > 0 && self.has_part_of_sector(offset, offset + len) {
            return self.write_whole_sectors(bufs, offset, len);
        }
        self.write_sectors(bufs, offset, len)
    }

    /// As [`write_guest`](Self::write_guest), for anything but parts of sectors of an encrypted image.
    pub(crate) fn write_sectors(
        &self,
        bufs: &[IoSlice<'_>],
        offset: u64,
        len: u64,
    ) -> Result<(), ImageError> {
        let mut done = 0;
        while done < len {
            let guest = offset + done;
            if let Some((host, run)) = self.in_place(guest, len - done)? {
                if run < len - done
                    && let Some(longer) = self.write_across(bufs, done, guest, len - done, run)?
                {
                    done += longer;
                    continue;
                }
                self.check_data(host, run)?;
                self.store_data(&cut(bufs, done, run), guest, host)?;
                done += run;
            } else {
                done += self.write_mapping(bufs, done, guest, len - done)?;
            }
        }
        Ok(())
    }

    /// Tests a write of guest data against the map of metadata.
    #[inline]
    pub(crate) fn check_data(&self, host: HostOffset, len: u64) -> Result<(), ImageError> {
        if self.rules.external_data {
            return Ok(());
        }
        Ok(self.meta.check_data(host, len)?)
    }

    /// Where the bytes from `guest` on can be overwritten, and how many of the next `len`; `None` if the mapping of the first has
    /// to change.
    #[inline]
    pub(crate) fn in_place(
        &self,
        guest: u64,
        len: u64,
    ) -> Result<Option<(HostOffset, u64)>, ImageError> {
        let Some((host, mut run)) = self.in_place_in_cluster(guest, len)? else {
            return Ok(None);
        };
        while run < len {
            match self.in_place_in_cluster(guest + run, len - run)? {
                Some((next, more)) if next.get() == host.get() + run => run += more,
                _ => break,
            }
        }
        Ok(Some((host, run)))
    }

    #[inline]
    fn in_place_in_cluster(
        &self,
        guest: u64,
        len: u64,
    ) -> Result<Option<(HostOffset, u64)>, ImageError> {
        let found = self.find(guest)?;
        let in_cluster = self.in_cluster(guest);
        let mut run = (self.cluster_size() - in_cluster).min(len);
        let ClusterKind::Normal(offset) = self.kind(guest, found)? else {
            return Ok(None);
        };
        if !self.is_own(found) {
            return Ok(None);
        }
        if self.geometry.extended_l2() {
            let allocated = found.entry.allocated_subclusters();
            let size = self.geometry.subcluster_size();
            let first = in_cluster / size;
            let mut end = first;
            while end < 32 && end * size < in_cluster + run && allocated & (1 << end) != 0 {
                end += 1;
            }
            if end == first {
                return Ok(None);
            }
            run = run.min(end * size - in_cluster);
        }
        Ok(Some((HostOffset::new(offset.get() + in_cluster), run)))
    }

    /// Overwrites a stretch of the file that clusters with data share with such as only read as zeros, in one go, and makes these
    /// data then; tells how much. `None` if what follows the `run` bytes that are data is not like that.
    fn write_across(
        &self,
        bufs: &[IoSlice<'_>],
        skip: u64,
        guest: u64,
        len: u64,
        run: u64,
    ) -> Result<Option<u64>, ImageError> {
        let size = self.cluster_size();
        if self.geometry.extended_l2()
            || self.rules.external_data
            || len - run < size
            || self.own_zeros(guest + run)?.is_none()
        {
            return Ok(None);
        }
        let bits = self.geometry.cluster_bits();
        let first = guest >> bits;
        let table_end = (guest / self.geometry.l2_coverage() + 1) * self.geometry.l2_coverage();
        let end = (guest + len).min(table_end).min((first + RUN_MAX) << bits);
        let _held = self.stripes.lock(first, (end - 1) >> bits);
        let Some((host, data)) = self.in_place(guest, end - guest)? else {
            return Ok(None);
        };
        let mut at = guest + data;
        while at < end {
            let here = HostOffset::new(host.get() + (at - guest));
            match self.in_place_in_cluster(at, end - at)? {
                Some((found, more)) if found == here => at += more,
                None if end - at >= size && self.own_zeros(at)? == Some(here) => at += size,
                _ => break,
            }
        }
        if at - guest <= data {
            return Ok(None);
        }
        self.check_data(host, at - guest)?;
        self.store_data(&cut(bufs, skip, at - guest), guest, host)?;
        let count = ((at - 1) >> bits) + 1 - first;
        self.change(first << bits, count, Reason::Replaced, |_, old| {
            match old.kind(self.rules) {
                ClusterKind::ZeroAllocated(offset) => Some(L2Entry::normal(offset, true, 0)),
                _ => None,
            }
        })
        .map_err(|(_, error)| error)?;
        Ok(Some(at - guest))
    }

    /// The place of a cluster that reads as zeros and has one of its own. `None` within a cluster.
    fn own_zeros(&self, guest: u64) -> Result<Option<HostOffset>, ImageError> {
        if self.in_cluster(guest) != 0 {
            return Ok(None);
        }
        let found = self.find(guest)?;
        Ok(match self.kind(guest, found)? {
            ClusterKind::ZeroAllocated(offset) if self.is_own(found) => Some(offset),
            _ => None,
        })
    }

    /// Writes what changes the mapping: some of the `len` bytes at `guest`, which lie `skip` bytes into the buffers; tells how
    /// many. None, if another request has changed it first.
    fn write_mapping(
        &self,
        bufs: &[IoSlice<'_>],
        skip: u64,
        guest: u64,
        len: u64,
    ) -> Result<u64, ImageError> {
        let bits = self.geometry.cluster_bits();
        let first = guest >> bits;
        // One table at a time, so that it is locked once.
        let table_end = (guest / self.geometry.l2_coverage() + 1) * self.geometry.l2_coverage();
        let end = (guest + len).min(table_end).min((first + RUN_MAX) << bits);
        let last = (end - 1) >> bits;
        let _held = self.stripes.lock(first, last);
        let found = self.find(guest)?;
        let kind = self.kind(guest, found)?;
        if self.in_place_in_cluster(guest, 1)?.is_some() {
            return Ok(0);
        }
        let piece = Piece { guest, end, skip };
        match kind {
            ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset)
                if self.is_own(found) =>
            {
                self.write_own(bufs, piece, found, offset)
            }
            _ if self.rules.external_data => {
                let offset = HostOffset::new(first << bits);
                self.write_own(bufs, piece, found, offset)
            }
            _ => self.write_new(bufs, piece),
        }
    }

    /// Writes into the cluster that the guest cluster has already: parts of it become data that were not.
    fn write_own(
        &self,
        bufs: &[IoSlice<'_>],
        piece: Piece,
        found: Found,
        offset: HostOffset,
    ) -> Result<u64, ImageError> {
        let cluster = piece.guest - self.in_cluster(piece.guest);
        let piece = Piece {
            end: piece.end.min(cluster + self.cluster_size()),
            ..piece
        };
        let allocated = found.entry.allocated_subclusters();
        let (from, to, covered) = if self.geometry.extended_l2() {
            // Only what is not data yet is filled up, to whole subclusters.
            let size = self.geometry.subcluster_size();
            let (first, last) = self.subclusters(piece);
            let is_data = |number: u64| allocated & (1 << number) != 0;
            let from = if is_data(first) {
                piece.guest
            } else {
                cluster + first * size
            };
            let to = if is_data(last) {
                piece.end
            } else {
                cluster + (last + 1) * size
            };
            (from, to, mask(first, last))
        } else {
            (cluster, cluster + self.cluster_size(), 0)
        };
        // A data file need not be longer than the disk, and perhaps can't be.
        let to = if self.rules.external_data {
            to.min(self.virtual_size()).max(piece.end)
        } else {
            to
        };
        self.prepare_table(piece.guest)?;
        let head = self.surroundings(from..piece.guest)?;
        let tail = self.surroundings(piece.end..to)?;
        self.write_around(
            bufs,
            piece,
            &head,
            &tail,
            HostOffset::new(offset.get() + (from - cluster)),
        )?;
        let bitmap = merged_bitmap(found.entry, covered | allocated);
        let entry = L2Entry::normal(
            offset,
            true,
            if self.geometry.extended_l2() {
                bitmap
            } else {
                0
            },
        );
        self.change(cluster, 1, Reason::Replaced, |_, _| Some(entry))
            .map_err(|(_, error)| error)?;
        Ok(piece.end - piece.guest)
    }

    /// Writes into new clusters.
    fn write_new(&self, bufs: &[IoSlice<'_>], piece: Piece) -> Result<u64, ImageError> {
        let bits = self.geometry.cluster_bits();
        let size = self.cluster_size();
        self.prepare_table(piece.guest)?;
        let first = piece.guest >> bits;
        let alloc = self.alloc()?;
        let clusters = self.run_of_new(first, (piece.end - 1) >> bits)?;
        let near = match alloc.order() {
            Order::Lowest => self.after_guest(first, false)?,
            // Requests go on where they are, and don't look further.
            Order::Forward if piece.skip > 0 => self.after_guest(first, true)?,
            Order::Forward => None,
        };
        let allocation = alloc.allocate(clusters, near)?;
        let count = allocation.count();
        let piece = Piece {
            end: piece.end.min((first + count) << bits),
            ..piece
        };

        let first_found = self.find(piece.guest)?;
        let last_cluster = (piece.end - 1) >> bits;
        let last_found = self.find(piece.end - 1)?;
        let (from, _) = self.cow_bounds(first_found, piece);
        let (_, to) = self.cow_bounds(last_found, piece);
        let virgin = |cluster: u64| {
            let host = allocation.first().get() + (cluster - first);
            host >= allocation.virgin_from().get()
        };
        let head = self.filling(from..piece.guest, virgin(first))?;
        let tail = self.filling(piece.end..to, virgin(last_cluster))?;
        let start = piece.guest - head.len() as u64 - (first << bits);
        let host = HostOffset::new(allocation.offset().get() + start);
        self.write_around(bufs, piece, &head, &tail, host)?;

        let base = allocation.offset().get();
        let linked = self.change(first << bits, count, Reason::Replaced, |number, old| {
            let cluster = (first + number) << bits;
            let offset = HostOffset::new(base + number * size);
            if !self.geometry.extended_l2() {
                return Some(L2Entry::normal(offset, true, 0));
            }
            let part_from = from.max(cluster);
            let part_to = to.min(cluster + size);
            let (first, last) = self.subclusters(Piece {
                guest: part_from,
                end: part_to,
                skip: 0,
            });
            let bitmap = if old.is_compressed() {
                u64::from(mask(0, 31))
            } else {
                merged_bitmap(old, mask(first, last))
            };
            Some(L2Entry::normal(offset, true, bitmap))
        });
        match linked {
            Ok(()) => allocation.keep(),
            Err((done, error)) => {
                allocation.keep_first(done);
                return Err(error);
            }
        }
        Ok(piece.end - piece.guest)
    }

    /// What a new cluster gets beside the guest's data: the guest's view of a range. Nothing if that is zeros and the cluster
    /// reads as zeros anyway.
    fn filling(&self, range: Range<u64>, virgin: bool) -> Result<Buffer, ImageError> {
        let len = range.end - range.start;
        // What is encrypted never reads as zeros by itself.
        let virgin = virgin && self.crypt.is_none();
        if len == 0 || (virgin && self.is_zero_here(range.clone())?) {
            return Ok(Buffer::EMPTY);
        }
        let bytes = self.surroundings(range)?;
        Ok(if virgin && is_zero(&bytes) {
            Buffer::EMPTY
        } else {
            bytes
        })
    }

    /// The guest's view of a range beside a write.
    fn surroundings(&self, range: Range<u64>) -> Result<Buffer, ImageError> {
        if range.is_empty() {
            return Ok(Buffer::EMPTY);
        }
        self.meta.before(Step::ReadCow)?;
        self.view(range.start, range.end - range.start)
    }

    /// Whether this image alone says that a range is zeros.
    fn is_zero_here(&self, range: Range<u64>) -> Result<bool, ImageError> {
        let (source, run) = self.source(range.start, range.end - range.start)?;
        Ok(matches!(source, Source::Zero(_)) && run == range.end - range.start)
    }

    /// How many of the clusters `first..=last` need new clusters.
    fn run_of_new(&self, first: u64, last: u64) -> Result<u64, ImageError> {
        let bits = self.geometry.cluster_bits();
        let mut count = 1;
        while first + count <= last {
            let guest = (first + count) << bits;
            let found = self.find(guest)?;
            let own = matches!(
                self.kind(guest, found)?,
                ClusterKind::Normal(_) | ClusterKind::ZeroAllocated(_)
            ) && self.is_own(found);
            if own {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// The cluster of the file behind that of the guest cluster before `first`: where what comes next should best lie. Of another L2
    /// table only if that is wanted.
    fn after_guest(&self, first: u64, far: bool) -> Result<Option<HostCluster>, ImageError> {
        let bits = self.geometry.cluster_bits();
        if let Some(before) = first.checked_sub(1)
            && (far || self.l1_index(before << bits) == self.l1_index(first << bits))
            && let ClusterKind::Normal(offset) = self.find(before << bits)?.entry.kind(self.rules)
        {
            return Ok(self.geometry.host_cluster(offset).checked_add(1));
        }
        Ok(None)
    }

    /// From where to where a new cluster has to be filled, for a write that begins or ends in it.
    fn cow_bounds(&self, found: Found, piece: Piece) -> (u64, u64) {
        let size = self.cluster_size();
        let first_cluster = piece.guest - self.in_cluster(piece.guest);
        let last_cluster = (piece.end - 1) & !(size - 1);
        if !self.geometry.extended_l2() || found.entry.is_compressed() {
            return (first_cluster, last_cluster + size);
        }
        let sub = self.geometry.subcluster_size();
        let mut from = piece.guest / sub * sub;
        let mut to = piece.end.div_ceil(sub) * sub;
        // What the old cluster has stays with the new one, and so does what lies between.
        let allocated = found.entry.allocated_subclusters();
        if allocated != 0 {
            from = from.min(first_cluster + u64::from(allocated.trailing_zeros()) * sub);
            to = to.max(last_cluster + u64::from(32 - allocated.leading_zeros()) * sub);
        }
        (from, to)
    }

    /// The subclusters, within their cluster, that hold the first and the last byte of a piece of one cluster.
    fn subclusters(&self, piece: Piece) -> (u64, u64) {
        let size = self.geometry.subcluster_size();
        (
            self.in_cluster(piece.guest) / size,
            self.in_cluster(piece.end - 1) / size,
        )
    }

    /// Writes a piece together with what comes before and after it.
    fn write_around(
        &self,
        bufs: &[IoSlice<'_>],
        piece: Piece,
        head: &[u8],
        tail: &[u8],
        host: HostOffset,
    ) -> Result<(), ImageError> {
        let len = piece.end - piece.guest;
        let mut parts = Vec::new();
        if !head.is_empty() {
            parts.push(IoSlice::new(head));
        }
        parts.extend(cut(bufs, piece.skip, len));
        if !tail.is_empty() {
            parts.push(IoSlice::new(tail));
        }
        if head.len() + tail.len() > 0 {
            self.meta.before(Step::WriteCow)?;
        }
        // Reading may have taken long, and another request may have found the image corrupt meanwhile.
        self.meta.check_writable()?;
        self.check_data(host, len + (head.len() + tail.len()) as u64)?;
        self.store_data(&parts, piece.guest - head.len() as u64, host)
    }
}

/// A part of a write: guest bytes, and where the buffers have them.
#[derive(Clone, Copy, Debug)]
struct Piece {
    guest: u64,
    end: u64,
    skip: u64,
}

/// Bits of the subclusters `first..=last`.
fn mask(first: u64, last: u64) -> u32 {
    (u32::MAX >> (31 - last.min(31))) & (u32::MAX << first.min(31))
}

/// The bitmap of an entry once the `covered` subclusters are data.
fn merged_bitmap(entry: L2Entry, covered: u32) -> u64 {
    let zero = entry.zero_subclusters() & !covered;
    u64::from(zero) << 32 | u64::from(covered)
}

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks
        .iter()
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_the_subclusters_named() {
        assert_eq!(mask(0, 31), u32::MAX);
        assert_eq!(mask(2, 10), 0x7fc);
        assert_eq!(mask(31, 31), 1 << 31);
        assert_eq!(mask(5, 5), 1 << 5);
    }

    #[test]
    fn data_takes_the_place_of_zeros() {
        let entry = L2Entry::from_bits(0, 0xff00_0000_0000_0000);
        assert_eq!(merged_bitmap(entry, 0x8000_0000), 0x7f00_0000_8000_0000);
    }
}
