//! The driver `compress`: all that is written is compressed, in whole clusters.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use qcow2_image::Image;
use qcow2_io::codec::Level;
use qcow2_io::{Extent, Limits, Operation, Result, Storage, ZeroFlags};

use super::storage_error;

/// An image whose writes are compressed.
#[derive(Debug)]
pub(super) struct Compress {
    image: Arc<Image>,
    /// One write at a time: the rest of a cluster is read before it is written.
    writing: Mutex<()>,
}

impl Compress {
    pub(super) fn new(image: Arc<Image>) -> Self {
        Self {
            image,
            writing: Mutex::new(()),
        }
    }
}

impl Storage for Compress {
    fn len(&self) -> Result<u64> {
        self.image.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.image.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        let size = self.image.geometry().cluster_size();
        let end = offset + bytes.len() as u64;
        let disk_end = self.image.len()?;
        let mut at = offset;
        while at < end {
            let start = at - at % size;
            let stop = (start + size).min(disk_end).max(start + 1);
            let part_end = end.min(stop);
            let index = |place: u64| usize::try_from(place).unwrap_or(usize::MAX);
            let part = bytes
                .get(index(at - offset)..index(part_end - offset))
                .unwrap_or_default();
            let mut cluster = vec![0; index(stop - start)];
            if (at, part_end) != (start, stop) {
                self.image.read_at(&mut cluster, start)?;
            }
            if let Some(place) = cluster.get_mut(index(at - start)..index(part_end - start)) {
                place.copy_from_slice(part);
            }
            self.image
                .write_compressed(&cluster, start, Level::default())
                .map_err(|error| storage_error(Operation::Write, &error))?;
            at = part_end;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.image.write_zeroes(range, flags)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
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
        Limits {
            alignment: self.image.geometry().cluster_size(),
            ..self.image.limits()
        }
    }
}
