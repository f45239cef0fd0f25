//! An image whose L1 table can't be read in all places: it opens, and what is mapped there can't be read.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

use qcow2_format::HostOffset;
use qcow2_format::L1Entry;
use qcow2_io::{
    Extent, Limits, Operation, Result, Storage, StorageError, StorageErrorKind, ZeroFlags,
};

use crate::audit::facts;

const SECTOR: u64 = 512;
const SECTOR_LEN: usize = 512;

/// A storage for reading. Entries of the L1 table that can't be read lead to where nothing can be read either, instead of nowhere: that would
/// be zeros.
#[derive(Debug)]
pub(super) struct Torn {
    storage: Arc<dyn Storage>,
    /// Where the L1 table is, in whole sectors.
    l1: Range<u64>,
    /// Behind all that is in the file.
    nowhere: u64,
}

impl Torn {
    pub(super) fn new(storage: Arc<dyn Storage>) -> Self {
        let mut l1 = 0..0;
        let mut nowhere = u64::MAX;
        if let (Some(header), Ok(len)) = (facts::header(&*storage), storage.len()) {
            let start = header.l1_table_offset.get();
            let bytes = u64::from(header.l1_entries) * 8;
            l1 = start..start.saturating_add(bytes).next_multiple_of(SECTOR);
            nowhere = len.next_multiple_of(header.geometry.cluster_size());
        }
        Self {
            storage,
            l1,
            nowhere,
        }
    }

    /// Reads sector by sector, with entries that lead nowhere where that fails in the L1 table.
    fn read_torn(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let entry = L1Entry::new(HostOffset::new(self.nowhere), true).to_be_bytes();
        let mut at = offset;
        // Pieces end where sectors do.
        let head = usize::try_from(offset.next_multiple_of(SECTOR) - offset).unwrap_or(0);
        let (head, rest) = buf.split_at_mut(head.min(buf.len()));
        let pieces = std::iter::once(head).chain(rest.chunks_mut(SECTOR_LEN));
        for piece in pieces.filter(|piece| !piece.is_empty()) {
            let read = self.storage.read_at(piece, at);
            if read.is_err() && self.l1.contains(&at) && at.is_multiple_of(8) {
                for (to, byte) in piece.iter_mut().zip(entry.iter().cycle()) {
                    *to = *byte;
                }
            } else {
                read?;
            }
            at += piece.len() as u64;
        }
        Ok(())
    }
}

fn refused(operation: Operation) -> StorageError {
    StorageError::new(operation, StorageErrorKind::ReadOnly)
}

impl Storage for Torn {
    fn len(&self) -> Result<u64> {
        self.storage.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let len: u64 = bufs.iter().map(|buf| buf.len() as u64).sum();
        let end = offset.saturating_add(len);
        if offset >= self.nowhere && len > 0 {
            let error = StorageError::new(Operation::Read, StorageErrorKind::Io);
            return Err(error.at(offset, len));
        }
        let read = self.storage.read_vectored_at(bufs, offset);
        if read.is_ok() || end <= self.l1.start || offset >= self.l1.end {
            return read;
        }
        let mut at = offset;
        for buf in bufs {
            self.read_torn(buf, at)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn write_vectored_at(&self, _bufs: &[IoSlice<'_>], _offset: u64) -> Result<()> {
        Err(refused(Operation::Write))
    }

    fn write_zeroes(&self, _range: Range<u64>, _flags: ZeroFlags) -> Result<()> {
        Err(refused(Operation::WriteZeroes))
    }

    fn discard(&self, _range: Range<u64>) -> Result<()> {
        Err(refused(Operation::Discard))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Err(refused(Operation::SetLen))
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.storage.extents(range, max)
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }
}
