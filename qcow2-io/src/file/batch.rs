//! What a ring must know of a file.

use std::fs;
use std::io::IoSliceMut;
use std::ops::Deref;
use std::sync::RwLockReadGuard;

use rustix::io::{ReadWriteFlags, preadv2};

use super::direct::Direct;
use super::{File, transfer};
use crate::Request;
use crate::storage::{MAX_LEN, total_len};

impl File {
    /// Whether this is a transfer that one system call on the plain descriptor may carry out, without looking at anything
    /// else first, and that may take its time. For writes, [`together`](Self::together) must be held.
    pub(crate) fn takes_from_ring(&self, request: &Request<'_>) -> bool {
        match request {
            Request::Read { buf, offset } => self.fits(&[&**buf], *offset),
            Request::ReadVectored { bufs, offset } => self.fits(bufs, *offset),
            // The page cache takes one write of a file after the other; a ring would have to leave them to another thread.
            _ if self.direct.is_none() || !self.writable => false,
            Request::Write { buf, offset } => self.fits(&[*buf], *offset),
            Request::WriteVectored { bufs, offset } => self.fits(bufs, *offset),
            Request::WriteZeroes { .. } | Request::Discard { .. } => false,
        }
    }

    fn fits<T: Deref<Target = [u8]>>(&self, bufs: &[T], offset: u64) -> bool {
        let len = total_len(bufs);
        len > 0
            && len <= transfer::MAX as u64
            && bufs.len() <= transfer::MAX_BUFS
            && offset.checked_add(len).is_some_and(|end| end <= MAX_LEN)
            && self
                .direct
                .as_ref()
                .is_none_or(|direct| direct.fits(bufs, offset))
    }

    /// Reads what needs no waiting for, from the page cache. `false` when that isn't all that was asked for, or can't be told.
    pub(crate) fn read_now(&self, request: &mut Request<'_>) -> bool {
        let read = |bufs: &mut [IoSliceMut<'_>], offset| {
            let len = total_len(bufs);
            let done = preadv2(&self.inner, bufs, offset, ReadWriteFlags::NOWAIT);
            done.is_ok_and(|done| done as u64 == len)
        };
        match request {
            _ if !self.takes_from_ring(request) || self.direct.is_some() => false,
            Request::Read { buf, offset } => read(&mut [IoSliceMut::new(buf)], *offset),
            Request::ReadVectored { bufs, offset } => read(bufs, *offset),
            _ => false,
        }
    }

    /// Whether the file system keeps its files in memory, so that there is nothing to wait for.
    pub(crate) fn is_in_memory(&self) -> bool {
        const TMPFS: u64 = 0x0102_1994;
        const RAMFS: u64 = 0x8584_58f6;
        rustix::fs::fstatfs(&self.inner)
            .ok()
            .and_then(|found| u64::try_from(found.f_type).ok())
            .is_some_and(|kind| [TMPFS, RAMFS].contains(&kind))
    }

    /// Keeps unaligned direct writes out, which change whole blocks.
    pub(crate) fn together(&self) -> Option<RwLockReadGuard<'_, ()>> {
        self.direct.as_ref().map(Direct::together)
    }

    /// The file of the standard library.
    pub(crate) fn as_std(&self) -> &fs::File {
        &self.inner
    }
}
