//! Bytes in memory that many storages start from, each with changes of its own.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use qcow2_io::{MAX_LEN, Operation, Result, Storage, StorageError, StorageErrorKind, ZeroFlags};

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;

/// A storage whose first content is shared. Making one costs nothing; what is written to it stays its own.
#[derive(Debug)]
pub struct Overlay {
    base: Arc<Vec<u8>>,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    len: u64,
    /// Bytes of `base` that still count: not those that were cut off.
    base_len: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE_BYTES]>>,
}

impl Overlay {
    /// A storage that holds what `base` does.
    pub fn new(base: Arc<Vec<u8>>) -> Self {
        let len = base.len() as u64;
        Self {
            base,
            state: RwLock::new(State {
                len,
                base_len: len,
                pages: BTreeMap::new(),
            }),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the page would hold without changes.
    fn below(&self, number: u64, base_len: u64) -> &[u8] {
        let end = base_len.min(self.base.len() as u64);
        let start = number.saturating_mul(PAGE).min(end);
        let stop = start.saturating_add(PAGE).min(end);
        &self.base[start as usize..stop as usize]
    }

    fn put(&self, offset: u64, len: u64, mut bytes: impl FnMut(&mut [u8], usize)) {
        let mut state = self.write();
        state.len = state.len.max(offset + len);
        let mut done = 0;
        while done < len {
            let position = offset + done;
            let number = position / PAGE;
            let start = (position % PAGE) as usize;
            let count = (PAGE_BYTES - start).min((len - done) as usize);
            let base_len = state.base_len;
            let page = state.pages.entry(number).or_insert_with(|| {
                let mut page = Box::new([0; PAGE_BYTES]);
                let below = self.below(number, base_len);
                page[..below.len()].copy_from_slice(below);
                page
            });
            bytes(&mut page[start..start + count], done as usize);
            done += count as u64;
        }
    }

    fn get(&self, offset: u64, buf: &mut [u8]) {
        let state = self.read();
        let mut done = 0;
        while done < buf.len() {
            let position = offset + done as u64;
            let number = position / PAGE;
            let start = (position % PAGE) as usize;
            let count = (PAGE_BYTES - start).min(buf.len() - done);
            let part = &mut buf[done..done + count];
            if let Some(page) = state.pages.get(&number) {
                part.copy_from_slice(&page[start..start + count]);
            } else {
                let below = self.below(number, state.base_len);
                let from = start.min(below.len());
                let there = (below.len() - from).min(count);
                part[..there].copy_from_slice(&below[from..from + there]);
                part[there..].fill(0);
            }
            done += count;
        }
    }
}

fn check(operation: Operation, offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_LEN => Ok(()),
        _ => Err(StorageError::new(operation, StorageErrorKind::OutOfRange).at(offset, len)),
    }
}

fn range_len(operation: Operation, range: &Range<u64>) -> Result<u64> {
    let Some(len) = range.end.checked_sub(range.start) else {
        return Err(StorageError::new(operation, StorageErrorKind::Invalid).at(range.start, 0));
    };
    check(operation, range.start, len)?;
    Ok(len)
}

impl Storage for Overlay {
    fn len(&self) -> Result<u64> {
        Ok(self.read().len)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let total = bufs.iter().map(|buf| buf.len() as u64).sum();
        check(Operation::Read, offset, total)?;
        let mut position = offset;
        for buf in bufs {
            self.get(position, buf);
            position += buf.len() as u64;
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let total = bufs.iter().map(|buf| buf.len() as u64).sum();
        check(Operation::Write, offset, total)?;
        let mut position = offset;
        for buf in bufs.iter().filter(|buf| !buf.is_empty()) {
            self.put(position, buf.len() as u64, |part, done| {
                part.copy_from_slice(&buf[done..done + part.len()]);
            });
            position += buf.len() as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>, _flags: ZeroFlags) -> Result<()> {
        let len = range_len(Operation::WriteZeroes, &range)?;
        if len > 0 {
            self.put(range.start, len, |part, _| part.fill(0));
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        range_len(Operation::Discard, &range)?;
        let end = range.end.min(self.read().len);
        if range.start < end {
            self.put(range.start, end - range.start, |part, _| part.fill(0));
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        check(Operation::SetLen, 0, len)?;
        let mut state = self.write();
        if len < state.len {
            state.base_len = state.base_len.min(len);
            state.pages.split_off(&len.div_ceil(PAGE));
            if let Some(page) = state.pages.get_mut(&(len / PAGE)) {
                page[(len % PAGE) as usize..].fill(0);
            }
        }
        state.len = len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_is_a_storage() {
        qcow2_io::conformance::run(|| Box::new(Overlay::new(Arc::default())));
    }

    #[test]
    fn what_was_cut_off_does_not_come_back() {
        let overlay = Overlay::new(Arc::new(vec![7; 10_000]));
        overlay.write_at(&[8; 100], 9000).unwrap();
        overlay.set_len(5000).unwrap();
        overlay.set_len(10_000).unwrap();
        let mut bytes = vec![1; 10_000];
        overlay.read_at(&mut bytes, 0).unwrap();
        assert!(bytes[..5000].iter().all(|byte| *byte == 7));
        assert!(bytes[5000..].iter().all(|byte| *byte == 0));
    }
}
