//! A host file or block device.
//!
//! `mod.rs` holds the type and its [`Storage`] methods, `open` the ways to get one, `lock` what keeps other processes out,
//! `transfer` whole reads and writes made of the system's partial ones, `direct` those around the page cache, `zero` what needs
//! no buffer, `batch` what a ring must know.

#[cfg(feature = "io-uring")]
mod batch;
mod direct;
mod lock;
mod open;
mod transfer;
mod zero;

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fd::OwnedFd;
use rustix::fs::{FileType, SeekFrom};
use rustix::io::{Errno, retry_on_intr};

use crate::extent::ExtentList;
use crate::storage::{check_end, check_range, total_len};
use crate::{
    Extent, ExtentKind, Limits, Operation, Result, Storage, StorageError, StorageErrorKind,
    ZeroFlags,
};

use self::direct::Direct;
pub use self::open::{FileOptions, LockMode};

/// A host file or block device as a storage.
///
/// Reads and writes are positional; the file's own position means nothing. A block device has a fixed length.
#[derive(Debug)]
pub struct File {
    inner: fs::File,
    path: Option<PathBuf>,
    /// Locks were taken, and are to be released.
    locked: bool,
    identity: FileIdentity,
    writable: bool,
    /// Length of a block device; `None` for a regular file, whose length changes.
    fixed_len: Option<u64>,
    /// What zeroing and punching take offsets and lengths in: whole pages of a block device, bytes of a regular file.
    unit: u64,
    /// How to go around the page cache, if that was asked for.
    direct: Option<Direct>,
    /// The directory in which the file was created, until a flush has made its name durable.
    new_in: Mutex<Option<OwnedFd>>,
    /// A flush has failed: the system may have dropped writes and won't report it again.
    lost_writes: AtomicBool,
    /// What is known of the quick ways to zeros.
    abilities: zero::Abilities,
}

/// Which file it is, whatever it is called: equal for two handles exactly when they reach the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    device: u64,
    /// `None` for a block device, which any number of nodes may name.
    inode: Option<u64>,
}

impl FileIdentity {
    /// Which file a path leads to, without opening it.
    ///
    /// # Errors
    ///
    /// When the path leads nowhere.
    pub fn of(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let stat = retry_on_intr(|| rustix::fs::stat(path))
            .map_err(|errno| StorageError::from_io(Operation::Open, errno).in_path(path))?;
        Ok(Self::from_stat(&stat))
    }

    fn from_stat(stat: &rustix::fs::Stat) -> Self {
        if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
            return Self {
                device: stat.st_rdev,
                inode: None,
            };
        }
        Self {
            device: stat.st_dev,
            inode: Some(stat.st_ino),
        }
    }
}

impl File {
    /// Opens an existing file for reading, with the default lock.
    ///
    /// # Errors
    ///
    /// As [`FileOptions::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        FileOptions::new().open(path)
    }

    /// Which file it is; for telling whether two names mean one file.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// The name it was opened by, if it was opened by name.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Adds the path to an error.
    fn name(&self, error: StorageError) -> StorageError {
        match &self.path {
            Some(path) => error.in_path(path),
            None => error,
        }
    }

    #[cold]
    fn fail(&self, operation: Operation, kind: StorageErrorKind) -> StorageError {
        self.name(StorageError::new(operation, kind))
    }

    #[cold]
    fn fail_io(&self, operation: Operation, errno: Errno) -> StorageError {
        self.name(StorageError::from_io(operation, errno))
    }

    fn check_writable(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(self
            .fail(operation, StorageErrorKind::ReadOnly)
            .at(offset, len)
            .with_detail("the file was opened read-only"))
    }

    /// Makes all bytes durable, or fails for good.
    fn sync(&self) -> Result<()> {
        if self.lost_writes.load(Ordering::Acquire) {
            return Err(self
                .fail(Operation::Flush, StorageErrorKind::Io)
                .with_detail("an earlier flush failed, so writes before it may be lost"));
        }
        if !self.writable {
            return Ok(());
        }
        retry_on_intr(|| rustix::fs::fdatasync(&self.inner)).map_err(|errno| {
            self.lost_writes.store(true, Ordering::Release);
            self.fail_io(Operation::Flush, errno)
        })
    }

    /// Makes the name of a new file durable: bytes that nobody finds are lost, too.
    fn flush_name(&self) -> Result<()> {
        let mut new_in = self.new_in.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(directory) = &*new_in {
            match retry_on_intr(|| rustix::fs::fsync(directory)) {
                // Some file systems know no sync of directories.
                Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => *new_in = None,
                Err(errno) => return Err(self.fail_io(Operation::Flush, errno)),
            }
        }
        Ok(())
    }

    fn seek(&self, to: SeekFrom) -> rustix::io::Result<u64> {
        retry_on_intr(|| rustix::fs::seek(&self.inner, to))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // Closing isn't enough: a process that another thread is just starting has copies of all descriptors until it runs
        // its own program, and would keep the locks that long.
        if self.locked {
            lock::release(&self.inner);
        }
    }
}

impl Storage for File {
    fn len(&self) -> Result<u64> {
        if let Some(len) = self.fixed_len {
            return Ok(len);
        }
        // An unaligned direct write makes the file too long for a moment.
        let _gate = self.direct.as_ref().map(Direct::together);
        direct::file_len(&self.inner).map_err(|errno| self.fail_io(Operation::Len, errno))
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let len = total_len(bufs);
        check_end(Operation::Read, offset, len).map_err(|error| self.name(error))?;
        let result = match &self.direct {
            None => transfer::read_vectored(&self.inner, bufs, offset),
            Some(direct) => direct.read(&self.inner, bufs, offset, len),
        };
        result.map_err(|errno| self.fail_io(Operation::Read, errno).at(offset, len))
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        let len = total_len(bufs);
        check_end(Operation::Write, offset, len).map_err(|error| self.name(error))?;
        self.check_writable(Operation::Write, offset, len)?;
        let result = match &self.direct {
            None => transfer::write_vectored(&self.inner, bufs, offset),
            Some(direct) => {
                let is_device = self.fixed_len.is_some();
                direct.write(&self.inner, is_device, bufs, offset, len)
            }
        };
        result.map_err(|errno| self.fail_io(Operation::Write, errno).at(offset, len))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.direct.is_some() {
            return self.read_vectored_at(&mut [IoSliceMut::new(buf)], offset);
        }
        let len = buf.len() as u64;
        check_end(Operation::Read, offset, len).map_err(|error| self.name(error))?;
        transfer::read(&self.inner, buf, offset)
            .map_err(|errno| self.fail_io(Operation::Read, errno).at(offset, len))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if self.direct.is_some() {
            return self.write_vectored_at(&[IoSlice::new(buf)], offset);
        }
        let len = buf.len() as u64;
        check_end(Operation::Write, offset, len).map_err(|error| self.name(error))?;
        self.check_writable(Operation::Write, offset, len)?;
        transfer::write(&self.inner, buf, offset)
            .map_err(|errno| self.fail_io(Operation::Write, errno).at(offset, len))
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let len = check_range(Operation::WriteZeroes, &range).map_err(|error| self.name(error))?;
        self.check_writable(Operation::WriteZeroes, range.start, len)?;
        if len == 0 {
            return Ok(());
        }
        self.zero(&range, flags)
            .map_err(|error| error.at(range.start, len))
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        let len = check_range(Operation::Discard, &range).map_err(|error| self.name(error))?;
        self.check_writable(Operation::Discard, range.start, len)?;
        if len == 0 {
            return Ok(());
        }
        self.punch(&range)
            .map_err(|error| error.at(range.start, len))
    }

    fn flush(&self) -> Result<()> {
        self.sync()?;
        self.flush_name()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        check_end(Operation::SetLen, 0, len).map_err(|error| self.name(error))?;
        self.check_writable(Operation::SetLen, 0, len)?;
        if let Some(fixed) = self.fixed_len {
            if fixed == len {
                return Ok(());
            }
            return Err(self
                .fail(Operation::SetLen, StorageErrorKind::Unsupported)
                .at(0, len)
                .with_detail(format!("a block device keeps its length of {fixed} bytes")));
        }
        let _gate = self.direct.as_ref().map(Direct::together);
        retry_on_intr(|| rustix::fs::ftruncate(&self.inner, len))
            .map_err(|errno| self.fail_io(Operation::SetLen, errno).at(0, len))
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, &range).map_err(|error| self.name(error))?;
        let Range { start, end } = range;
        let fail = |errno| {
            self.fail_io(Operation::Extents, errno)
                .at(start, end - start)
        };
        let data_end = end.min(self.len()?);
        let mut list = ExtentList::new(max);
        let mut position = start;
        while position < data_end && !list.is_full() {
            let data = match self.seek(SeekFrom::Data(position)) {
                Ok(data) => data.clamp(position, data_end),
                // Nothing but a hole up to the end.
                Err(Errno::NXIO) => data_end,
                // The file system can't tell.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => position,
                Err(errno) => return Err(fail(errno)),
            };
            list.push(position, data - position, ExtentKind::Hole);
            let hole = match self.seek(SeekFrom::Hole(data)) {
                // Another process may have cut the file in between; then the loop must still get on.
                Ok(hole) if hole > data => hole.min(data_end),
                Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => data_end,
                Err(errno) => return Err(fail(errno)),
            };
            list.push(data, hole - data, ExtentKind::Data);
            position = hole;
        }
        let rest = position.max(start);
        list.push(rest, end - rest, ExtentKind::Hole);
        Ok(list.into_vec())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        let found = rustix::fs::fstat(&self.inner);
        let found = found.map_err(|errno| self.fail_io(Operation::Len, errno))?;
        // Counted in blocks of 512 bytes, whatever the file system has.
        Ok(u64::try_from(found.st_blocks)
            .ok()
            .and_then(|blocks| blocks.checked_mul(512)))
    }

    fn limits(&self) -> Limits {
        let alignment = self.direct.as_ref().map_or(1, Direct::block);
        Limits {
            alignment,
            max_transfer: transfer::MAX as u64,
            ..Limits::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_failed_flush_no_other_succeeds() {
        let file = File::from_std(tempfile::tempfile().unwrap()).unwrap();
        file.flush().unwrap();
        // What a failed fdatasync leaves behind; making one fail takes a broken disk.
        file.lost_writes.store(true, Ordering::Release);
        let error = file.flush().unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::Io);
        assert!(error.to_string().contains("earlier flush"), "{error}");
    }
}
