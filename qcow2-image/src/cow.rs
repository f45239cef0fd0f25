//! Writes to what has no place of its own yet.

use std::io::IoSlice;
use std::ops::Range;

use qcow2_alloc::{Order, Reason};
use qcow2_cache::Step;
use qcow2_format::{ClusterKind, HostCluster, HostOffset, L2Entry};

use crate::buffer::{Buffer, is_zero};
use crate::cuts::cut;
use crate::mapping::{Found, Source};
use crate::{Image, ImageError};

impl Image {
    /// Writes into the cluster that the guest cluster has already: parts of it become data that were not.
    pub(crate) fn write_own(
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
    pub(crate) fn write_new(&self, bufs: &[IoSlice<'_>], piece: Piece) -> Result<u64, ImageError> {
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
pub(crate) struct Piece {
    pub(crate) guest: u64,
    pub(crate) end: u64,
    pub(crate) skip: u64,
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
