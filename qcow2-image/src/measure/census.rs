//! A storage that only notes which clusters are written.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use qcow2_io::{Extent, ExtentKind, Result, Storage, ZeroFlags};

/// Clusters in one chunk.
const CHUNK: u64 = 4096;

/// A disk of zeros, where writes leave no more than a mark. A bit for each cluster in chunks that were written to.
#[derive(Debug)]
pub(super) struct Census {
    len: u64,
    cluster_bits: u32,
    marks: Mutex<BTreeMap<u64, Box<[u64; 64]>>>,
}

impl Census {
    pub(super) fn new(len: u64, cluster_bits: u32) -> Self {
        Self {
            len,
            cluster_bits,
            marks: Mutex::default(),
        }
    }

    fn marks(&self) -> MutexGuard<'_, BTreeMap<u64, Box<[u64; 64]>>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = offset >> self.cluster_bits;
        let last = (offset + (len - 1)) >> self.cluster_bits;
        let mut marks = self.marks();
        for cluster in first..=last {
            let chunk = marks
                .entry(cluster / CHUNK)
                .or_insert_with(|| Box::new([0; 64]));
            let index = usize::try_from(cluster % CHUNK / 64).unwrap_or_default();
            if let Some(word) = chunk.get_mut(index) {
                *word |= 1 << (cluster % 64);
            }
        }
    }

    /// Tells the bytes of all clusters that were written, from front to back.
    pub(super) fn for_each(&self, mut tell: impl FnMut(Range<u64>)) {
        for (number, chunk) in self.marks().iter() {
            for (word, index) in chunk.iter().zip(0..) {
                let mut rest = *word;
                while rest != 0 {
                    let cluster = number * CHUNK + index * 64 + u64::from(rest.trailing_zeros());
                    rest &= rest - 1;
                    tell(cluster << self.cluster_bits..(cluster + 1) << self.cluster_bits);
                }
            }
        }
    }
}

impl Storage for Census {
    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], _offset: u64) -> Result<()> {
        for buf in bufs {
            buf.fill(0);
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.mark(offset, bufs.iter().map(|buf| buf.len() as u64).sum());
        Ok(())
    }

    fn write_zeroes(&self, _range: Range<u64>, _flags: ZeroFlags) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _range: Range<u64>) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Ok(())
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        if range.is_empty() || max == 0 {
            return Ok(Vec::new());
        }
        let hole = Extent::new(range.start, range.end - range.start, ExtentKind::Hole);
        Ok(vec![hole])
    }
}
