//! Copy on read: what comes from the backing chain is kept in the image.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use qcow2_image::map::map;
use qcow2_image::{Image, ImageError};
use qcow2_io::{Extent, Limits, Operation, Result, Storage, StorageErrorKind, ZeroFlags};

use super::storage_error;

/// An image that keeps what is read from below.
#[derive(Debug)]
pub(super) struct CopyOnRead {
    image: Arc<Image>,
    /// One copy at a time, so that nothing is written over a guest's write with what was there before.
    copying: Mutex<()>,
}

impl CopyOnRead {
    pub(super) fn new(image: Arc<Image>) -> Self {
        Self {
            image,
            copying: Mutex::new(()),
        }
    }

    /// Stores what the image does not have itself of a range.
    fn keep(&self, range: Range<u64>) -> Result<()> {
        let cluster = self.unit();
        let end = range.end.next_multiple_of(cluster).min(self.image.len()?);
        let range = range.start - range.start % cluster..end;
        let failed = |error: &ImageError| storage_error(Operation::Read, error);
        let _copying = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        let own = map(self.image.chain().above(1), range).map_err(|error| failed(&error))?;
        let mut missing = Vec::new();
        for row in own {
            let row = row.map_err(|error| failed(&error))?;
            if !row.present {
                missing.push(row.start..row.end());
            }
        }
        for part in missing {
            self.copy(part)?;
        }
        Ok(())
    }

    /// What is allocated as a whole: a cluster, or a subcluster where there are such; bytes.
    fn unit(&self) -> u64 {
        let geometry = self.image.geometry();
        if geometry.extended_l2() {
            geometry.cluster_size() / 32
        } else {
            geometry.cluster_size()
        }
    }

    fn copy(&self, range: Range<u64>) -> Result<()> {
        const PIECE: u64 = 1 << 20;
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(PIECE);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            self.image.read_at(&mut bytes, at)?;
            let over_something = self.image.header().backing_name.is_some();
            if over_something && bytes.iter().all(|byte| *byte == 0) {
                self.image.write_zeroes(at..at + len, ZeroFlags::NONE)?;
            } else {
                self.image.write_at(&bytes, at)?;
            }
            at += len;
        }
        Ok(())
    }
}

impl Storage for CopyOnRead {
    fn len(&self) -> Result<u64> {
        self.image.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let len: u64 = bufs.iter().map(|buf| buf.len() as u64).sum();
        if len > 0 {
            match self.keep(offset..offset.saturating_add(len)) {
                // What can't be kept can be read all the same.
                Err(error) if error.kind() == StorageErrorKind::ReadOnly => {}
                kept => kept?,
            }
        }
        self.image.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let _copying = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        self.image.write_vectored_at(bufs, offset)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let _copying = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        self.image.write_zeroes(range, flags)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        let _copying = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        self.image.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.image.flush()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.image.set_len(len)
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.image.extents(range, max)
    }

    fn limits(&self) -> Limits {
        self.image.limits()
    }
}
