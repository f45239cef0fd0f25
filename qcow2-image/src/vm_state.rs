//! The state of the machine that uses the disk: memory and devices, which a snapshot keeps beside what the disk holds.
//!
//! It lies behind the end of the disk, from the first L2 table on that the disk has no part of, and is mapped as the disk is. A
//! snapshot takes it over.

use std::io::{IoSlice, IoSliceMut};

use qcow2_format::GuestOffset;
use qcow2_format::geometry::MAX_L1_BYTES;

use crate::{Image, ImageError};

impl Image {
    /// Where the state lies in the address space of the disk; bytes.
    pub(crate) fn vm_state_start(&self) -> u64 {
        let entries = self.geometry.l1_entries_for(self.virtual_size());
        entries.saturating_mul(self.geometry.l2_coverage())
    }

    fn vm_state_range(&self, offset: u64, len: u64) -> Result<(u64, u64), ImageError> {
        let start = self.vm_state_start();
        let limit = (MAX_L1_BYTES / 8)
            .saturating_mul(self.geometry.l2_coverage())
            .min(1 << 62);
        let from = start.checked_add(offset);
        match from.and_then(|from| Some((from, from.checked_add(len)?))) {
            Some((from, end)) if end <= limit => Ok((from, end)),
            _ => Err(ImageError::OutOfRange {
                offset: GuestOffset::new(offset),
                len,
                size: limit.saturating_sub(start),
            }),
        }
    }

    /// Stores some of the machine's state, `offset` bytes into it. The next snapshot takes over as much of it as its
    /// [options](crate::SnapshotOptions::vm_state_size) say. Requests wait meanwhile, so it is best done in large pieces.
    ///
    /// # Errors
    ///
    /// A state that the tables can't hold ([`ImageError::OutOfRange`], with the size that they can); an external data file
    /// ([`ImageError::Unsupported`]), with which there are no snapshots; and what the storage reports.
    ///
    /// # Durability
    ///
    /// None until it is in a snapshot.
    pub fn write_vm_state(&self, buf: &[u8], offset: u64) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        self.check_snapshots_possible()?;
        self.get_ready()?;
        let closed = self.gate.close();
        let (from, end) = self.vm_state_range(offset, buf.len() as u64)?;
        let needed = end.div_ceil(self.geometry.l2_coverage());
        if needed > self.l1.len() {
            self.settle_closed()?;
            // A state grows bit by bit.
            let ahead = (self.l1.len() + self.l1.len() / 2).min(MAX_L1_BYTES / 8);
            self.grow_l1(needed.max(ahead))?;
        }
        self.write_guest(&[IoSlice::new(buf)], from, buf.len() as u64)?;
        drop(closed);
        self.tidy()
    }

    /// Reads some of the machine's state, `offset` bytes into it: that of the snapshot that was applied last or is open, or what has
    /// been written for the next. What nobody has written reads as zeros. How long the state of a snapshot is, its
    /// [entry](crate::SnapshotInfo::vm_state_size) says.
    ///
    /// # Errors
    ///
    /// As for reads of the disk.
    pub fn read_vm_state(&self, buf: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let _pass = self.gate.enter();
        let len = buf.len() as u64;
        let (from, _) = self.vm_state_range(offset, len)?;
        self.read_guest(&mut [IoSliceMut::new(buf)], from, len)
    }

    /// Refuses a state that is longer than there can be one.
    pub(crate) fn check_vm_state(&self, len: u64) -> Result<(), ImageError> {
        self.vm_state_range(0, len).map(drop)
    }

    /// Frees the state: a snapshot has it now, or it is of no use any more.
    pub(crate) fn drop_vm_state(&self) -> Result<(), ImageError> {
        let first = self.geometry.l1_entries_for(self.virtual_size());
        if (first..self.l1.len()).all(|index| self.l1.get(index).l2_table().get() == 0) {
            return Ok(());
        }
        self.settle_closed()?;
        self.drop_behind(self.virtual_size())
    }
}
