//! A storage in memory that pays only for the pages written.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::extent::ExtentList;
use crate::storage::{check_end, check_range, total_len};
use crate::{
    Extent, ExtentKind, Limits, Operation, Result, Storage, StorageError, StorageErrorKind,
    ZeroFlags,
};

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;

/// Bytes in memory, sparse: 4 KiB pages come into being when they are written, and a page that was never written, or was
/// zeroed or discarded as a whole, is a hole. A length of terabytes costs nothing by itself.
///
/// Overlapping writes are atomic page by page. Nothing survives the process, so [`flush`](Storage::flush) has nothing to do.
#[derive(Default)]
pub struct Memory {
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    len: u64,
    /// Pages by their number. What a page holds past `len` is zero.
    pages: BTreeMap<u64, Page>,
}

type Page = RwLock<Box<[u8; PAGE_BYTES]>>;

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.read();
        f.debug_struct("Memory")
            .field("len", &state.len)
            .field("pages", &state.pages.len())
            .finish()
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
        let len = self.len()?;
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
        (self.read().pages.len() as u64).saturating_mul(PAGE)
    }

    // A panic inside a critical section can't leave a page half made, so poison says nothing here.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Vec<u8>> for Memory {
    fn from(bytes: Vec<u8>) -> Self {
        let mut state = State {
            len: bytes.len() as u64,
            pages: BTreeMap::new(),
        };
        for (number, chunk) in (0..).zip(bytes.chunks(PAGE_BYTES)) {
            if chunk.iter().any(|byte| *byte != 0) {
                fill(&mut state.page_mut(number)[..], 0, chunk);
            }
        }
        Self {
            state: RwLock::new(state),
        }
    }
}

impl State {
    fn page_mut(&mut self, number: u64) -> &mut [u8; PAGE_BYTES] {
        self.pages
            .entry(number)
            .or_insert_with(|| RwLock::new(Box::new([0; PAGE_BYTES])))
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Zeroes a range: whole pages go, the edges of others are overwritten.
    fn clear(&mut self, range: Range<u64>) {
        let Range { start, end } = range;
        let touched: Vec<u64> = self
            .pages
            .range(start / PAGE..end.div_ceil(PAGE).max(start / PAGE))
            .map(|(number, _)| *number)
            .collect();
        for number in touched {
            let first = number.saturating_mul(PAGE);
            let from = start.max(first).saturating_sub(first);
            let to = end.saturating_sub(first).min(PAGE);
            if from == 0 && to == PAGE {
                self.pages.remove(&number);
            } else if let Some(bytes) = self.page_mut(number).get_mut(index(from)..index(to)) {
                bytes.fill(0);
            }
        }
    }
}

impl Storage for Memory {
    fn len(&self) -> Result<u64> {
        Ok(self.read().len)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        check_end(Operation::Read, offset, total_len(bufs))?;
        let state = self.read();
        let mut position = offset;
        for buf in bufs {
            for piece in pieces(position, buf) {
                match state.pages.get(&piece.page) {
                    // What lies past the end is zero in the page, and a hole elsewhere.
                    Some(page) => {
                        let page = page.read().unwrap_or_else(PoisonError::into_inner);
                        piece
                            .bytes
                            .copy_from_slice(sub(&page[..], piece.start, piece.bytes.len()));
                    }
                    None => piece.bytes.fill(0),
                }
            }
            position = position.saturating_add(buf.len() as u64);
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let len = total_len(bufs);
        let end = check_end(Operation::Write, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let pages = offset / PAGE..=end.saturating_sub(1) / PAGE;
        {
            let state = self.read();
            let present = || {
                let wanted = pages.end().saturating_sub(*pages.start()).saturating_add(1);
                state.pages.range(pages.clone()).count() as u64 == wanted
            };
            if end <= state.len && present() {
                for_each_piece(bufs, offset, |number, start, bytes| {
                    if let Some(page) = state.pages.get(&number) {
                        let mut page = page.write().unwrap_or_else(PoisonError::into_inner);
                        fill(&mut page[..], start, bytes);
                    }
                });
                return Ok(());
            }
        }
        let mut state = self.write();
        state.len = state.len.max(end);
        for_each_piece(bufs, offset, |number, start, bytes| {
            fill(&mut state.page_mut(number)[..], start, bytes);
        });
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>, _flags: ZeroFlags) -> Result<()> {
        if check_range(Operation::WriteZeroes, &range)? == 0 {
            return Ok(());
        }
        let mut state = self.write();
        state.len = state.len.max(range.end);
        state.clear(range);
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        if check_range(Operation::Discard, &range)? > 0 {
            self.write().clear(range);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        check_end(Operation::SetLen, 0, len)?;
        let mut state = self.write();
        let old = state.len;
        if len < old {
            // Up to the page border: nothing past the end may come back when it grows again.
            state.clear(len..old.next_multiple_of(PAGE));
        }
        state.len = len;
        Ok(())
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, &range)?;
        let Range { start, end } = range;
        let state = self.read();
        let mut list = ExtentList::new(max);
        let mut position = start;
        let data_end = end.min(state.len);
        for number in state
            .pages
            .range(start / PAGE..data_end.div_ceil(PAGE).max(start / PAGE))
            .map(|(number, _)| *number)
        {
            let first = number.saturating_mul(PAGE).max(start);
            let last = number.saturating_add(1).saturating_mul(PAGE).min(data_end);
            list.push(position, first.saturating_sub(position), ExtentKind::Hole);
            list.push(first, last.saturating_sub(first), ExtentKind::Data);
            position = last.max(position);
            if list.is_full() {
                break;
            }
        }
        list.push(position, end.saturating_sub(position), ExtentKind::Hole);
        Ok(list.into_vec())
    }

    fn limits(&self) -> Limits {
        Limits {
            optimal: PAGE,
            ..Limits::default()
        }
    }
}

/// A part of a buffer that lies within one page.
struct Piece<'a> {
    page: u64,
    start: usize,
    bytes: &'a mut [u8],
}

fn pieces(offset: u64, buf: &mut [u8]) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = buf;
    let mut position = offset;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let start = index(position % PAGE);
        let len = PAGE_BYTES.saturating_sub(start).min(rest.len());
        let (bytes, tail) = std::mem::take(&mut rest).split_at_mut_checked(len)?;
        let piece = Piece {
            page: position / PAGE,
            start,
            bytes,
        };
        rest = tail;
        position = position.saturating_add(len as u64);
        Some(piece)
    })
}

fn for_each_piece(bufs: &[IoSlice<'_>], offset: u64, mut each: impl FnMut(u64, usize, &[u8])) {
    let mut position = offset;
    for buf in bufs {
        let mut rest: &[u8] = buf;
        while !rest.is_empty() {
            let start = index(position % PAGE);
            let len = PAGE_BYTES.saturating_sub(start).min(rest.len());
            let (bytes, tail) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            each(position / PAGE, start, bytes);
            rest = tail;
            position = position.saturating_add(len as u64);
        }
    }
}

/// A number of bytes within a page.
fn index(within_page: u64) -> usize {
    usize::try_from(within_page).unwrap_or(PAGE_BYTES)
}

fn sub(page: &[u8], start: usize, len: usize) -> &[u8] {
    page.get(start..start.saturating_add(len))
        .expect("a piece lies within its page")
}

fn fill(page: &mut [u8], start: usize, bytes: &[u8]) {
    page.get_mut(start..start.saturating_add(bytes.len()))
        .expect("a piece lies within its page")
        .copy_from_slice(bytes);
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
    fn bytes_go_in_and_come_out() {
        let bytes: Vec<u8> = (0..=255).cycle().take(10_001).collect();
        assert_eq!(Memory::from(bytes.clone()).to_vec().unwrap(), bytes);
        let huge = Memory::with_len(crate::MAX_LEN).unwrap();
        assert_eq!(huge.to_vec().unwrap_err().kind(), StorageErrorKind::NoSpace);
    }
}
