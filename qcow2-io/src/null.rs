//! A storage that forgets.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::extent::ExtentList;
use crate::storage::{check_end, check_range, total_len};
use crate::{Extent, ExtentKind, Operation, Result, Storage, ZeroFlags};

/// Reads as zeros and swallows what is written; only its length is kept. For measuring what lies above a storage.
#[derive(Debug, Default)]
pub struct Null {
    len: AtomicU64,
}

impl Null {
    /// A storage of length 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// A storage of `len` bytes.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`](crate::StorageErrorKind::OutOfRange) when `len` is beyond [`MAX_LEN`](crate::MAX_LEN).
    pub fn with_len(len: u64) -> Result<Self> {
        check_end(Operation::SetLen, 0, len)?;
        Ok(Self {
            len: AtomicU64::new(len),
        })
    }
}

impl Storage for Null {
    fn len(&self) -> Result<u64> {
        Ok(self.len.load(Ordering::Acquire))
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        check_end(Operation::Read, offset, total_len(bufs))?;
        for buf in bufs {
            buf.fill(0);
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let len = total_len(bufs);
        let end = check_end(Operation::Write, offset, len)?;
        if len > 0 {
            self.len.fetch_max(end, Ordering::AcqRel);
        }
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>, _flags: ZeroFlags) -> Result<()> {
        if check_range(Operation::WriteZeroes, &range)? > 0 {
            self.len.fetch_max(range.end, Ordering::AcqRel);
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        check_range(Operation::Discard, &range).map(|_| ())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        check_end(Operation::SetLen, 0, len)?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        let len = check_range(Operation::Extents, &range)?;
        let mut list = ExtentList::new(max);
        list.push(range.start, len, ExtentKind::Hole);
        Ok(list.into_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_as_zeros_but_counts_for_the_length() {
        let null = Null::with_len(10).unwrap();
        null.write_at(&[7; 4], 100).unwrap();
        assert_eq!(null.len().unwrap(), 104);
        let mut buf = [1; 8];
        null.read_at(&mut buf, 98).unwrap();
        assert_eq!(buf, [0; 8]);
        assert_eq!(
            null.extents(0..104, 9).unwrap(),
            [Extent::new(0, 104, ExtentKind::Hole)]
        );
        assert!(Null::with_len(u64::MAX).is_err());
    }
}
