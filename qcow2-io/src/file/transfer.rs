//! Whole transfers made of the system's partial ones.
//!
//! The usual case is one system call: partial transfers, signals and the end of the file are looked at only when the call
//! moved less than asked.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};

use rustix::io::{Errno, Result, pread, preadv, pwrite, pwritev, retry_on_intr};

/// The most one call moves: what Linux moves at most, rounded down to a large alignment.
pub(super) const MAX: usize = 0x7fff_0000;

/// The most buffers one call takes.
pub(super) const MAX_BUFS: usize = 1024;

pub(super) fn read(file: &File, buf: &mut [u8], offset: u64) -> Result<()> {
    let mut rest = buf;
    let mut position = offset;
    while !rest.is_empty() {
        let limit = rest.len().min(MAX);
        let part = rest.get_mut(..limit).unwrap_or_default();
        let done = retry_on_intr(|| pread(file, &mut *part, position))?;
        if done == 0 {
            rest.fill(0);
            return Ok(());
        }
        rest = rest.get_mut(done..).unwrap_or_default();
        position = position.saturating_add(done as u64);
    }
    Ok(())
}

pub(super) fn write(file: &File, buf: &[u8], offset: u64) -> Result<()> {
    let mut rest = buf;
    let mut position = offset;
    while !rest.is_empty() {
        let part = rest.get(..rest.len().min(MAX)).unwrap_or_default();
        let done = retry_on_intr(|| pwrite(file, part, position))?;
        if done == 0 {
            return Err(Errno::IO);
        }
        rest = rest.get(done..).unwrap_or_default();
        position = position.saturating_add(done as u64);
    }
    Ok(())
}

pub(super) fn read_vectored(file: &File, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
    let mut position = offset;
    for group in bufs.chunks_mut(MAX_BUFS) {
        let len: usize = group.iter().map(|buf| buf.len()).sum();
        if len == 0 {
            continue;
        }
        let done = if len <= MAX {
            retry_on_intr(|| preadv(file, group, position))?
        } else {
            0
        };
        if done < len {
            finish_read(file, group, position, done)?;
        }
        position = position.saturating_add(len as u64);
    }
    Ok(())
}

/// Reads what is left after the first `skip` bytes of a group, buffer by buffer.
fn finish_read(
    file: &File,
    group: &mut [IoSliceMut<'_>],
    offset: u64,
    mut skip: usize,
) -> Result<()> {
    let mut position = offset;
    for buf in group {
        let len = buf.len();
        let have = skip.min(len);
        skip -= have;
        if let Some(rest) = buf.get_mut(have..) {
            read(file, rest, position.saturating_add(have as u64))?;
        }
        position = position.saturating_add(len as u64);
    }
    Ok(())
}

pub(super) fn write_vectored(file: &File, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
    let mut position = offset;
    for group in bufs.chunks(MAX_BUFS) {
        let len: usize = group.iter().map(|buf| buf.len()).sum();
        if len == 0 {
            continue;
        }
        let done = if len <= MAX {
            retry_on_intr(|| pwritev(file, group, position))?
        } else {
            0
        };
        if done < len {
            finish_write(file, group, position, done)?;
        }
        position = position.saturating_add(len as u64);
    }
    Ok(())
}

fn finish_write(file: &File, group: &[IoSlice<'_>], offset: u64, mut skip: usize) -> Result<()> {
    let mut position = offset;
    for buf in group {
        let have = skip.min(buf.len());
        skip -= have;
        if let Some(rest) = buf.get(have..) {
            write(file, rest, position.saturating_add(have as u64))?;
        }
        position = position.saturating_add(buf.len() as u64);
    }
    Ok(())
}
