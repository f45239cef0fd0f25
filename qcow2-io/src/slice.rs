//! A window on another storage.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use crate::storage::{check_end, check_range, total_len};
use crate::{
    Extent, ExtentKind, Limits, Operation, Result, Storage, StorageError, StorageErrorKind,
    ZeroFlags,
};

/// `len` bytes of another storage from an offset on, as a storage of fixed length.
///
/// Its offset 0 is the window's first byte. What the storage below doesn't reach yet reads as zeros; a write there grows
/// the storage below, never the window. Errors from below speak of offsets below.
#[derive(Debug)]
pub struct Slice<S> {
    storage: S,
    offset: u64,
    len: u64,
}

impl<S: Storage> Slice<S> {
    /// The window of `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`](StorageErrorKind::OutOfRange) when it ends beyond [`MAX_LEN`](crate::MAX_LEN).
    pub fn new(storage: S, offset: u64, len: u64) -> Result<Self> {
        check_end(Operation::Open, offset, len)?;
        Ok(Self {
            storage,
            offset,
            len,
        })
    }

    /// The storage below.
    pub fn get_ref(&self) -> &S {
        &self.storage
    }

    /// Gives the storage below back.
    pub fn into_inner(self) -> S {
        self.storage
    }

    /// Where a write lies below; an error when it leaves the window.
    fn map(&self, operation: Operation, offset: u64, len: u64) -> Result<u64> {
        if check_end(operation, offset, len)? > self.len && len > 0 {
            // As a device says it at its end.
            return Err(StorageError::new(operation, StorageErrorKind::NoSpace)
                .at(offset, len)
                .with_detail(format!("the window ends at {:#x}", self.len)));
        }
        // An empty request may lie anywhere, and goes nowhere.
        Ok(self.offset.saturating_add(offset.min(self.len)))
    }

    /// The part of a range that lies in the window, as offsets below.
    fn clip(&self, range: &Range<u64>) -> Range<u64> {
        let below = |offset: u64| self.offset.saturating_add(offset.min(self.len));
        below(range.start)..below(range.end)
    }
}

impl<S: Storage> Storage for Slice<S> {
    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let len = total_len(bufs);
        let end = check_end(Operation::Read, offset, len)?;
        if end <= self.len {
            return self
                .storage
                .read_vectored_at(bufs, self.offset.saturating_add(offset));
        }
        // Bytes behind the window belong to somebody else: they are never read, and look like zeros.
        let mut inside = self.len.saturating_sub(offset);
        let mut parts = Vec::with_capacity(bufs.len());
        for buf in bufs {
            let take = usize::try_from(inside).unwrap_or(usize::MAX).min(buf.len());
            let (part, rest) = buf.split_at_mut(take);
            rest.fill(0);
            inside = inside.saturating_sub(take as u64);
            parts.push(IoSliceMut::new(part));
        }
        self.storage
            .read_vectored_at(&mut parts, self.clip(&(offset..end)).start)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let below = self.map(Operation::Write, offset, total_len(bufs))?;
        self.storage.write_vectored_at(bufs, below)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if check_end(Operation::Read, offset, buf.len() as u64)? <= self.len {
            return self
                .storage
                .read_at(buf, self.offset.saturating_add(offset));
        }
        self.read_vectored_at(&mut [IoSliceMut::new(buf)], offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let below = self.map(Operation::Write, offset, buf.len() as u64)?;
        self.storage.write_at(buf, below)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let len = check_range(Operation::WriteZeroes, &range)?;
        let start = self.map(Operation::WriteZeroes, range.start, len)?;
        self.storage
            .write_zeroes(start..start.saturating_add(len), flags)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        check_range(Operation::Discard, &range)?;
        self.storage.discard(self.clip(&range))
    }

    fn flush(&self) -> Result<()> {
        self.storage.flush()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if len == self.len {
            return Ok(());
        }
        Err(
            StorageError::new(Operation::SetLen, StorageErrorKind::Unsupported)
                .at(0, len)
                .with_detail(format!("a window keeps its length of {} bytes", self.len)),
        )
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, &range)?;
        if range.is_empty() || max == 0 {
            return Ok(Vec::new());
        }
        let inside = self.clip(&range);
        if inside.is_empty() {
            let len = range.end.saturating_sub(range.start);
            return Ok(vec![Extent::new(range.start, len, ExtentKind::Hole)]);
        }
        let mut extents = self.storage.extents(inside, max)?;
        for extent in &mut extents {
            extent.offset = extent.offset.saturating_sub(self.offset);
        }
        Ok(extents)
    }

    fn limits(&self) -> Limits {
        let limits = self.storage.limits();
        // A window that starts between two blocks has no offset that is aligned below.
        let alignment = if self.offset.is_multiple_of(limits.alignment) {
            limits.alignment
        } else {
            1
        };
        Limits {
            alignment,
            ..limits
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    #[test]
    fn bytes_outside_the_window_are_neither_seen_nor_changed() {
        let memory = Memory::from(vec![9; 100]);
        let slice = Slice::new(&memory, 10, 20).unwrap();
        slice.write_at(&[1; 20], 0).unwrap();
        let mut buf = [7; 40];
        slice.read_at(&mut buf, 0).unwrap();
        assert_eq!(buf[..20], [1; 20]);
        assert_eq!(buf[20..], [0; 20]);
        slice.read_at(&mut buf, 30).unwrap();
        assert_eq!(buf, [0; 40]);
        slice.discard(10..1000).unwrap();

        let bytes = memory.to_vec().unwrap();
        assert_eq!(bytes[..10], [9; 10]);
        assert_eq!(bytes[10..20], [1; 10]);
        assert_eq!(bytes[20..30], [0; 10]);
        assert_eq!(bytes[30..], [9; 70]);
    }

    #[test]
    fn growing_beyond_the_window_is_refused() {
        let slice = Slice::new(Memory::new(), 0, 20).unwrap();
        assert_eq!(
            slice.write_at(&[1; 2], 19).unwrap_err().kind(),
            StorageErrorKind::NoSpace
        );
        assert_eq!(
            slice
                .write_zeroes(10..21, ZeroFlags::NONE)
                .unwrap_err()
                .kind(),
            StorageErrorKind::NoSpace
        );
        assert_eq!(
            slice.set_len(21).unwrap_err().kind(),
            StorageErrorKind::Unsupported
        );
        assert_eq!(slice.get_ref().len().unwrap(), 0);
        assert!(Slice::new(Memory::new(), u64::MAX, 1).is_err());
    }

    #[test]
    fn extents_speak_of_the_window() {
        let memory = Memory::new();
        memory.write_at(&[1; 4096], 8192).unwrap();
        let slice = Slice::new(&memory, 4096, 3 * 4096).unwrap();
        let extents = slice.extents(0..20000, 10).unwrap();
        assert_eq!(
            extents,
            [
                Extent::new(0, 4096, ExtentKind::Hole),
                Extent::new(4096, 4096, ExtentKind::Data),
                Extent::new(8192, 4096, ExtentKind::Hole),
            ]
        );
        assert_eq!(
            slice.extents(12288..20000, 10).unwrap(),
            [Extent::new(12288, 7712, ExtentKind::Hole)]
        );
    }
}
