//! Direct I/O: around the host's page cache, in whole blocks and from aligned memory.
//!
//! A request that is aligned goes straight to the system. Any other goes through an aligned buffer; a write whose edges lie
//! inside blocks reads these blocks first and writes them back whole. While it does, no other write of this file may run, or
//! its bytes in such a block would be undone: a gate lets all aligned writes pass together and an unaligned one alone.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::ops::{Deref, DerefMut};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::{Errno, pread, preadv, pwrite, pwritev, retry_on_intr};

use super::transfer;
use crate::{MAX_LEN, Operation, Result, StorageError, StorageErrorKind};

/// The longest part of a request that goes through one buffer.
const CHUNK: u64 = 1 << 20;

/// Assumed where the system doesn't tell: enough for every usual disk and page.
const SAFE_BLOCK: usize = 4096;

/// What the file wants, and the gate for its writers.
#[derive(Debug)]
pub(super) struct Direct {
    /// Memory addresses are multiples of this; a power of two.
    memory: usize,
    /// Offsets and lengths are multiples of this; bytes, a power of two.
    block: u64,
    gate: RwLock<()>,
}

impl Direct {
    /// Finds out what the file wants, which is open with `O_DIRECT`.
    pub(super) fn discover(file: &fs::File, is_device: bool) -> Result<Self> {
        let statx = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        if let Ok(statx) = statx
            && statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        {
            let (memory, block) = (statx.stx_dio_mem_align, statx.stx_dio_offset_align);
            if memory.is_power_of_two() && block.is_power_of_two() {
                return Ok(Self::new(
                    usize::try_from(memory).unwrap_or(SAFE_BLOCK),
                    block.into(),
                ));
            }
            return Err(unsupported());
        }
        if is_device && let Ok(sector) = rustix::fs::ioctl_blksszget(file) {
            let sector = usize::try_from(sector)
                .unwrap_or(SAFE_BLOCK)
                .next_power_of_two();
            return Ok(Self::new(sector, sector as u64));
        }
        for block in [512, SAFE_BLOCK, 16 * SAFE_BLOCK] {
            let mut buffer = Aligned::new(block, block);
            match retry_on_intr(|| pread(file, &mut *buffer, block as u64)) {
                // Too short a file to say anything.
                Ok(0) => return Ok(Self::new(SAFE_BLOCK, SAFE_BLOCK as u64)),
                Ok(_) => return Ok(Self::new(block, block as u64)),
                Err(Errno::INVAL) => {}
                Err(errno) => return Err(StorageError::from_io(Operation::Open, errno)),
            }
        }
        Err(unsupported())
    }

    fn new(memory: usize, block: u64) -> Self {
        Self {
            memory,
            block,
            gate: RwLock::new(()),
        }
    }

    pub(super) fn block(&self) -> u64 {
        self.block
    }

    /// For what changes the file in a way the system serializes itself, and for looking at its length.
    pub(super) fn together(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a transfer can go straight to the system.
    pub(super) fn fits<T: Deref<Target = [u8]>>(&self, bufs: &[T], offset: u64) -> bool {
        let block = usize::try_from(self.block).unwrap_or(usize::MAX);
        offset.is_multiple_of(self.block)
            && bufs.iter().all(|buf| {
                buf.len().is_multiple_of(block) && buf.as_ptr().addr().is_multiple_of(self.memory)
            })
    }

    /// Fills the buffers, zeros past the end of the file; `len` is what they hold together.
    pub(super) fn read(
        &self,
        file: &fs::File,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
        len: u64,
    ) -> rustix::io::Result<()> {
        let mut done = 0;
        if bufs.len() <= transfer::MAX_BUFS
            && len <= transfer::MAX as u64
            && self.fits(bufs, offset)
        {
            done = retry_on_intr(|| preadv(file, bufs, offset))? as u64;
        }
        // What the system left over, be it for the end of the file, goes the slow way.
        while done < len {
            let position = offset.saturating_add(done);
            let span = self.span(position, offset.saturating_add(len));
            let mut buffer = Aligned::new(span.size, self.memory);
            self.read_blocks(file, &mut buffer, span.start)?;
            let part = buffer.get(span.head..span.tail).unwrap_or_default();
            scatter(bufs, done, part);
            done = done.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    /// Stores the buffers; `len` is what they hold together. A regular file has the exact length afterwards.
    pub(super) fn write(
        &self,
        file: &fs::File,
        is_device: bool,
        bufs: &[IoSlice<'_>],
        offset: u64,
        len: u64,
    ) -> rustix::io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let end = offset.saturating_add(len);
        if end.next_multiple_of(self.block) > MAX_LEN {
            return Err(Errno::FBIG);
        }
        if !offset.is_multiple_of(self.block) || !end.is_multiple_of(self.block) {
            let _gate = self.alone();
            let old_len = if is_device { u64::MAX } else { file_len(file)? };
            self.write_through_buffer(file, bufs, offset, 0, len)?;
            // The last block was written whole.
            let exact = old_len.max(end);
            if exact < end.next_multiple_of(self.block) {
                retry_on_intr(|| rustix::fs::ftruncate(file, exact))?;
            }
            return Ok(());
        }
        let _gate = self.together();
        let mut done = 0;
        if bufs.len() <= transfer::MAX_BUFS
            && len <= transfer::MAX as u64
            && self.fits(bufs, offset)
        {
            done = retry_on_intr(|| pwritev(file, bufs, offset))? as u64;
            // Whole blocks only: the part of one is written again.
            done = done.saturating_sub(done % self.block);
        }
        self.write_through_buffer(file, bufs, offset, done, len)
    }

    /// Writes what follows the first `done` bytes.
    fn write_through_buffer(
        &self,
        file: &fs::File,
        bufs: &[IoSlice<'_>],
        offset: u64,
        mut done: u64,
        len: u64,
    ) -> rustix::io::Result<()> {
        let block = usize::try_from(self.block).unwrap_or(usize::MAX);
        while done < len {
            let span = self.span(offset.saturating_add(done), offset.saturating_add(len));
            let mut buffer = Aligned::new(span.size, self.memory);
            let last = span.size.saturating_sub(block);
            if span.head > 0 {
                let first = buffer.get_mut(..block).unwrap_or_default();
                self.read_blocks(file, first, span.start)?;
            }
            // Not again if it is the block just read.
            if span.tail < span.size && (span.head == 0 || last > 0) {
                let position = span.start.saturating_add(last as u64);
                self.read_blocks(file, buffer.get_mut(last..).unwrap_or_default(), position)?;
            }
            let part = buffer.get_mut(span.head..span.tail).unwrap_or_default();
            gather(bufs, done, part);
            done = done.saturating_add(part.len() as u64);
            self.write_blocks(file, &buffer, span.start)?;
        }
        Ok(())
    }

    /// The blocks that hold the bytes from `position` to `end`, or the first of them if they are many.
    fn span(&self, position: u64, end: u64) -> Span {
        let start = position.saturating_sub(position % self.block);
        let stop = start.saturating_add(CHUNK.max(self.block)).min(end);
        let small = |len: u64| usize::try_from(len).expect("a chunk is far smaller than memory");
        Span {
            start,
            size: small(stop.next_multiple_of(self.block).saturating_sub(start)),
            head: small(position.saturating_sub(start)),
            tail: small(stop.saturating_sub(start)),
        }
    }

    /// Fills an aligned buffer from an aligned offset; zeros past the end of the file.
    fn read_blocks(
        &self,
        file: &fs::File,
        buffer: &mut [u8],
        offset: u64,
    ) -> rustix::io::Result<()> {
        if offset.saturating_add(buffer.len() as u64) > MAX_LEN {
            // The system refuses a block that ends beyond all files; no file has bytes there.
            buffer.fill(0);
            return Ok(());
        }
        let mut rest = buffer;
        let mut position = offset;
        while !rest.is_empty() {
            let done = retry_on_intr(|| pread(file, &mut *rest, position))?;
            rest = rest.get_mut(done..).unwrap_or_default();
            position = position.saturating_add(done as u64);
            // Only the end of the file cuts a block.
            if done == 0 || !position.is_multiple_of(self.block) {
                rest.fill(0);
                break;
            }
        }
        Ok(())
    }

    fn write_blocks(&self, file: &fs::File, buffer: &[u8], offset: u64) -> rustix::io::Result<()> {
        let mut rest = buffer;
        let mut position = offset;
        while !rest.is_empty() {
            let done = retry_on_intr(|| pwrite(file, rest, position))?;
            let whole = done.saturating_sub(done % usize::try_from(self.block).unwrap_or(1));
            if whole == 0 {
                return Err(Errno::IO);
            }
            rest = rest.get(whole..).unwrap_or_default();
            position = position.saturating_add(whole as u64);
        }
        Ok(())
    }
}

/// Whole blocks, and the part of them that is meant.
struct Span {
    /// Offset of the first block.
    start: u64,
    /// Bytes in all blocks.
    size: usize,
    /// Where the part begins, from `start`.
    head: usize,
    /// Where it ends.
    tail: usize,
}

fn unsupported() -> StorageError {
    StorageError::new(Operation::Open, StorageErrorKind::Unsupported)
        .with_detail("the file system does no direct I/O for this file")
}

pub(super) fn file_len(file: &fs::File) -> rustix::io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0))
}

/// Copies `part` to where the bytes from the `skip`th on lie in the buffers.
fn scatter(bufs: &mut [IoSliceMut<'_>], mut skip: u64, part: &[u8]) {
    let mut rest = part;
    for buf in bufs {
        let have = usize::try_from(skip).unwrap_or(usize::MAX).min(buf.len());
        skip = skip.saturating_sub(have as u64);
        let target = buf.get_mut(have..).unwrap_or_default();
        let (now, later) = rest.split_at(target.len().min(rest.len()));
        target
            .get_mut(..now.len())
            .unwrap_or_default()
            .copy_from_slice(now);
        rest = later;
        if rest.is_empty() {
            return;
        }
    }
}

/// Fills `part` with the bytes from the `skip`th on of the buffers.
fn gather(bufs: &[IoSlice<'_>], mut skip: u64, part: &mut [u8]) {
    let mut rest = part;
    for buf in bufs {
        let have = usize::try_from(skip).unwrap_or(usize::MAX).min(buf.len());
        skip = skip.saturating_sub(have as u64);
        let source = buf.get(have..).unwrap_or_default();
        let (now, later) = rest.split_at_mut(source.len().min(rest.len()));
        now.copy_from_slice(source.get(..now.len()).unwrap_or_default());
        rest = later;
        if rest.is_empty() {
            return;
        }
    }
}

/// Zeroed memory that starts at a multiple of a power of two: a vector with room to choose the start in.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize, align: usize) -> Self {
        let bytes = vec![0; len.saturating_add(align)];
        let address = bytes.as_ptr().addr();
        let start = address.next_multiple_of(align).saturating_sub(address);
        Self { bytes, start, len }
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes
            .get(self.start..self.start.saturating_add(self.len))
            .unwrap_or_default()
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes
            .get_mut(self.start..self.start.saturating_add(self.len))
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_memory_is_aligned_and_long_enough() {
        for align in [1, 512, 4096, 65536] {
            let mut buffer = Aligned::new(1000, align);
            assert_eq!(buffer.len(), 1000);
            assert!(buffer.as_ptr().addr().is_multiple_of(align));
            buffer.fill(1);
        }
    }

    #[test]
    fn a_span_covers_its_bytes_with_whole_blocks() {
        let direct = Direct::new(512, 512);
        let span = direct.span(1000, 1100);
        assert_eq!(
            (span.start, span.size, span.head, span.tail),
            (512, 1024, 488, 588)
        );
        let span = direct.span(1000, 1 << 30);
        assert_eq!((span.start, span.size, span.tail), (512, 1 << 20, 1 << 20));
    }
}
