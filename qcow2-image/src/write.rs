//! Writing.

use std::io::IoSlice;

use qcow2_alloc::Reason;
use qcow2_format::{ClusterKind, HostOffset, L2Entry};
use qcow2_io::Storage as _;

use crate::cow::Piece;
use crate::cuts::cut;
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
}
