//! A storage in memory that pays only for the pages written.

mod pages;

use std::io::{IoSlice, IoSliceMut};
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::extent::ExtentList;
use crate::storage::{check_end, check_range, total_len};
use crate::{
    Extent, ExtentKind, Limits, Operation, Result, Storage, StorageError, StorageErrorKind,
    ZeroFlags,
};

use self::pages::{PAGE, PAGE_BYTES, Pages};

/// Bytes in memory, sparse: 4 KiB pages come into being when they are written, and a page that was never written, or was
/// zeroed or discarded as a whole, is a hole. A length of terabytes costs nothing by itself; a lone page far from all others
/// costs some tables on the way to it, at most 50 KiB.
///
/// Overlapping requests are atomic page by page. Readers don't wait for each other, and write to nothing in common. A writer waits for those
/// who use the same 64 pages, the first of which starts at a multiple of 256 KiB, and for all who make the storage longer if it
/// does so, too. Nothing survives the process, so [`flush`](Storage::flush) has nothing to do.
///
/// # Locking
///
/// 64 pages have a lock, in parts of which a reader needs one, and changes of the length have another that is taken before. A write within the
/// length takes only the former, and looks at the length when it has it: a cut that comes first is seen, one that comes later
/// waits for the pages and clears them.
#[derive(Default)]
pub struct Memory {
    /// What a page holds past `len` is zero.
    pages: Pages,
    len: AtomicU64,
    /// Held while the length changes.
    resizing: Mutex<()>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory")
            .field("len", &self.length())
            .field("pages", &self.pages.held())
            .finish_non_exhaustive()
    }
}

impl Memory {
    /// An empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// A storage of `len` zero bytes, all of them a hole.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`](StorageErrorKind::OutOfRange) when `len` is beyond [`MAX_LEN`](crate::MAX_LEN).
    pub fn with_len(len: u64) -> Result<Self> {
        let memory = Self::new();
        memory.set_len(len)?;
        Ok(memory)
    }

    /// All bytes, holes filled with zeros.
    ///
    /// # Errors
    ///
    /// [`NoSpace`](StorageErrorKind::NoSpace) when the process can't have that much memory.
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let len = self.length();
        let no_space = || StorageError::new(Operation::Read, StorageErrorKind::NoSpace).at(0, len);
        let size = usize::try_from(len).map_err(|_| no_space())?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).map_err(|_| no_space())?;
        bytes.resize(size, 0);
        self.read_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// How many bytes of pages are held.
    pub fn allocated_bytes(&self) -> u64 {
        self.pages.held().saturating_mul(PAGE)
    }

    fn length(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Keeps the length as it is. The lock holds no data, so poison says nothing.
    fn resizing(&self) -> MutexGuard<'_, ()> {
        self.resizing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a write whose last byte lies before `end`. It asks of each page whether the bytes up to an offset may be
    /// written, and says whether all were.
    fn run_write(&self, end: u64, write: impl Fn(&dyn Fn(u64) -> bool) -> bool) {
        if end <= self.length() && write(&|end| end <= self.length()) {
            return;
        }
        // Longer than the storage, or it was cut in between: then all of it again, as if the cut had come before.
        let _length = self.resizing();
        write(&|_| true);
        self.len.fetch_max(end, Ordering::AcqRel);
    }
}

impl From<Vec<u8>> for Memory {
    fn from(bytes: Vec<u8>) -> Self {
        let memory = Self::new();
        memory.len.store(bytes.len() as u64, Ordering::Release);
        for (number, chunk) in (0..).zip(bytes.chunks(PAGE_BYTES)) {
            if chunk.iter().any(|byte| *byte != 0) {
                memory.pages.write(number * PAGE, chunk, |_| true);
            }
        }
        memory
    }
}

impl Storage for Memory {
    fn len(&self) -> Result<u64> {
        Ok(self.length())
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        check_end(Operation::Read, offset, total_len(bufs))?;
        let mut position = offset;
        for buf in bufs {
            self.pages.read(position, buf);
            position = position.saturating_add(buf.len() as u64);
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let len = total_len(bufs);
        let end = check_end(Operation::Write, offset, len)?;
        if len > 0 {
            self.run_write(end, |may| {
                let mut position = offset;
                bufs.iter().all(|buf| {
                    let start = position;
                    position = position.saturating_add(buf.len() as u64);
                    self.pages.write(start, buf, may)
                })
            });
        }
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_end(Operation::Read, offset, buf.len() as u64)?;
        self.pages.read(offset, buf);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let end = check_end(Operation::Write, offset, buf.len() as u64)?;
        if !buf.is_empty() {
            self.run_write(end, |may| self.pages.write(offset, buf, may));
        }
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>, _flags: ZeroFlags) -> Result<()> {
        if check_range(Operation::WriteZeroes, &range)? == 0 {
            return Ok(());
        }
        if range.end <= self.length() {
            self.pages.clear(&range);
        }
        if range.end > self.length() {
            let _length = self.resizing();
            self.pages.clear(&range);
            self.len.fetch_max(range.end, Ordering::AcqRel);
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        if check_range(Operation::Discard, &range)? > 0 {
            self.pages.clear(&range);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        check_end(Operation::SetLen, 0, len)?;
        let _length = self.resizing();
        let old = self.len.swap(len, Ordering::AcqRel);
        if len < old {
            // Up to the page border: nothing past the end may come back when it grows again.
            self.pages.clear(&(len..old.next_multiple_of(PAGE)));
        }
        Ok(())
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, &range)?;
        let Range { start, end } = range;
        let mut list = ExtentList::new(max);
        let mut position = start;
        let data_end = end.min(self.length());
        let numbers = start / PAGE..data_end.div_ceil(PAGE);
        self.pages.visit_held(&numbers, |number| {
            let first = number.saturating_mul(PAGE).max(start);
            let last = number.saturating_add(1).saturating_mul(PAGE).min(data_end);
            list.push(position, first.saturating_sub(position), ExtentKind::Hole);
            list.push(first, last.saturating_sub(first), ExtentKind::Data);
            position = last.max(position);
            if list.is_full() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        list.push(position, end.saturating_sub(position), ExtentKind::Hole);
        Ok(list.into_vec())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(Some(self.allocated_bytes()))
    }

    fn limits(&self) -> Limits {
        Limits {
            optimal: PAGE,
            ..Limits::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terabytes_with_little_data_cost_little() {
        let memory = Memory::with_len(4 << 40).unwrap();
        memory.write_at(&[1; 10], (4 << 40) - 5000).unwrap();
        memory.write_at(&[2; 10], 1 << 40).unwrap();
        assert_eq!(memory.allocated_bytes(), 2 * PAGE);
        memory.write_zeroes(0..4 << 40, ZeroFlags::NONE).unwrap();
        assert_eq!(memory.allocated_bytes(), 0);
        assert_eq!(memory.len().unwrap(), 4 << 40);
    }

    #[test]
    fn the_last_addressable_byte_can_be_written() {
        let memory = Memory::new();
        memory.write_at(&[7], crate::MAX_LEN - 1).unwrap();
        assert_eq!(memory.len().unwrap(), crate::MAX_LEN);
        let extents = memory.extents(0..crate::MAX_LEN, 9).unwrap();
        assert_eq!(extents.last().unwrap().end(), crate::MAX_LEN);
        memory.set_len(1).unwrap();
        assert_eq!(memory.allocated_bytes(), 0);
    }

    #[test]
    fn extents_are_true_to_pages_and_joined() {
        let memory = Memory::from(vec![0; 5 * PAGE_BYTES]);
        assert_eq!(memory.allocated_bytes(), 0, "pages of zeros are holes");
        memory.write_at(&[1; 2 * PAGE_BYTES], PAGE).unwrap();
        let extents = memory.extents(100..6 * PAGE, 9).unwrap();
        assert_eq!(
            extents,
            [
                Extent::new(100, PAGE - 100, ExtentKind::Hole),
                Extent::new(PAGE, 2 * PAGE, ExtentKind::Data),
                Extent::new(3 * PAGE, 3 * PAGE, ExtentKind::Hole),
            ]
        );
        assert_eq!(memory.extents(100..6 * PAGE, 2).unwrap(), extents[..2]);
    }

    #[test]
    fn writers_beside_a_cut_leave_nothing_past_the_end() {
        let memory = Memory::new();
        for _ in 0..200 {
            memory.set_len(4 * PAGE).unwrap();
            std::thread::scope(|scope| {
                for lane in 0..2 {
                    let memory = &memory;
                    scope.spawn(move || {
                        for round in 0..4 {
                            let offset = (round * 2 + lane) * 1000;
                            memory.write_at(&[1; 900], offset).unwrap();
                        }
                    });
                }
                scope.spawn(|| memory.set_len(100).unwrap());
            });
            let len = memory.len().unwrap();
            assert!(len >= 100);
            // A write is there as a whole, or was cut as a whole.
            assert!(len == 100 || len % 1000 == 900, "{len}");
            memory.set_len(8 * PAGE).unwrap();
            let bytes = memory.to_vec().unwrap();
            let (_, behind) = bytes.split_at(usize::try_from(len).unwrap());
            assert!(behind.iter().all(|byte| *byte == 0));
            memory.discard(0..8 * PAGE).unwrap();
            assert_eq!(memory.allocated_bytes(), 0);
        }
    }

    #[test]
    fn bytes_go_in_and_come_out() {
        let bytes: Vec<u8> = (0..=255).cycle().take(10_001).collect();
        assert_eq!(Memory::from(bytes.clone()).to_vec().unwrap(), bytes);
        let huge = Memory::with_len(crate::MAX_LEN).unwrap();
        assert_eq!(huge.to_vec().unwrap_err().kind(), StorageErrorKind::NoSpace);
    }
}
