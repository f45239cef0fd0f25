//! The ways to get a file.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};

use super::direct::Direct;
use super::lock::{self, Access};
use super::{File, FileIdentity};
use crate::{Operation, Result, Storage, StorageError, StorageErrorKind};

/// How other processes are kept out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum LockMode {
    /// The byte-range locks that QEMU takes: a writer excludes everyone, readers share.
    #[default]
    Qemu,
    /// None. The caller answers for what other processes do.
    None,
}

/// How to open a file; like [`std::fs::OpenOptions`], always for reading.
#[derive(Clone, Debug, Default)]
pub struct FileOptions {
    write: bool,
    create: bool,
    create_new: bool,
    truncate: bool,
    direct: bool,
    lock: LockMode,
    force_share: bool,
}

impl FileOptions {
    /// Read-only, buffered, locked as QEMU does, existing files only.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether to write, too.
    #[must_use]
    pub fn write(mut self, write: bool) -> Self {
        self.write = write;
        self
    }

    /// Whether to create the file when it is missing. Needs `write`.
    #[must_use]
    pub fn create(mut self, create: bool) -> Self {
        self.create = create;
        self
    }

    /// Whether to create the file and fail when it exists. Needs `write`.
    #[must_use]
    pub fn create_new(mut self, create_new: bool) -> Self {
        self.create_new = create_new;
        self
    }

    /// Whether to cut the file to nothing, after the lock was taken. Needs `write`.
    #[must_use]
    pub fn truncate(mut self, truncate: bool) -> Self {
        self.truncate = truncate;
        self
    }

    /// Whether to bypass the host's page cache (`O_DIRECT`). Requests need no alignment; aligned ones are faster (see
    /// [`Limits::alignment`](crate::Limits::alignment)). Opening fails with [`Unsupported`](StorageErrorKind::Unsupported) where the
    /// file system can't; there is no silent fallback.
    #[must_use]
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
        self
    }

    /// How other processes are kept out.
    #[must_use]
    pub fn lock(mut self, lock: LockMode) -> Self {
        self.lock = lock;
        self
    }

    /// Whether to read beside a writer in another process, whose changes then show at any moment. Excludes `write`.
    #[must_use]
    pub fn force_share(mut self, force_share: bool) -> Self {
        self.force_share = force_share;
        self
    }

    /// Opens `path`, a regular file or a block device.
    ///
    /// # Errors
    ///
    /// What the system reports; [`Invalid`](StorageErrorKind::Invalid) for directories, pipes and other things that are no disks,
    /// and for contradictory options; [`Locked`](StorageErrorKind::Locked) when another process uses the file in a way
    /// that excludes this one.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<File> {
        let path = path.as_ref();
        self.open_path(path).map_err(|error| error.in_path(path))
    }

    fn open_path(&self, path: &Path) -> Result<File> {
        self.check()?;
        let (fd, created) = self.open_or_create(path)?;
        let opened = self.set_up(fs::File::from(fd));
        match opened {
            Ok(mut file) => {
                file.path = Some(path.to_owned());
                if created {
                    file.new_in = Mutex::new(directory_of(path));
                }
                Ok(file)
            }
            Err(error) => {
                if created {
                    // Nobody asked for an empty file that can't be used. If it can't be removed either, the first error says more.
                    let _ = rustix::fs::unlink(path);
                }
                Err(error)
            }
        }
    }

    /// The descriptor, and whether the file is new.
    fn open_or_create(&self, path: &Path) -> Result<(OwnedFd, bool)> {
        // A pipe would block without NONBLOCK.
        let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        flags |= if self.write {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let mode = Mode::from_raw_mode(0o666);
        let open = |more| retry_on_intr(|| rustix::fs::open(path, flags | more, mode));
        let exclusive = OFlags::CREATE | OFlags::EXCL;
        if self.create_new {
            return open(exclusive).map(|fd| (fd, true)).map_err(open_error);
        }
        match open(OFlags::empty()) {
            Err(Errno::NOENT) if self.create => {}
            result => return result.map(|fd| (fd, false)).map_err(open_error),
        }
        match open(exclusive) {
            // Somebody else created it in between, or the name is a link to a file that is missing.
            Err(Errno::EXIST) => open(OFlags::CREATE)
                .map(|fd| (fd, false))
                .map_err(open_error),
            result => result.map(|fd| (fd, true)).map_err(open_error),
        }
    }

    /// Does what must be done before a file may be used: nothing of it is changed before the lock is held.
    fn set_up(&self, inner: fs::File) -> Result<File> {
        let mut file = File::classify(inner, self.write)?;
        let mut status = rustix::fs::fcntl_getfl(&file.inner).map_err(open_error)?;
        status.remove(OFlags::NONBLOCK);
        rustix::fs::fcntl_setfl(&file.inner, status).map_err(open_error)?;
        if self.lock == LockMode::Qemu {
            let access = match (self.write, self.force_share) {
                (true, _) => Access::Write,
                (false, false) => Access::Read,
                (false, true) => Access::ReadShared,
            };
            file.locked = true;
            lock::take(&file.inner, access)?;
        }
        if self.direct {
            rustix::fs::fcntl_setfl(&file.inner, status | OFlags::DIRECT).map_err(|errno| {
                let error = open_error(errno);
                if errno != Errno::INVAL {
                    return error;
                }
                error
                    .with_kind(StorageErrorKind::Unsupported)
                    .with_detail("the file system does no direct I/O")
            })?;
            file.direct = Some(Direct::discover(&file.inner, file.fixed_len.is_some())?);
        }
        if self.truncate && file.fixed_len.is_none() {
            file.set_len(0)?;
        }
        Ok(file)
    }

    fn check(&self) -> Result<()> {
        let invalid = |detail| {
            Err(StorageError::new(Operation::Open, StorageErrorKind::Invalid).with_detail(detail))
        };
        if self.force_share && self.write {
            return invalid("sharing with a writer is for readers only");
        }
        if !self.write && (self.create || self.create_new || self.truncate) {
            return invalid("creating and truncating need write access");
        }
        Ok(())
    }
}

/// The directory that holds `path`, to be synced later; `None` when it may be written to but not read.
fn directory_of(path: &Path) -> Option<OwnedFd> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::CLOEXEC | OFlags::DIRECTORY | OFlags::RDONLY;
    retry_on_intr(|| rustix::fs::open(parent, flags, Mode::empty())).ok()
}

fn open_error(errno: Errno) -> StorageError {
    StorageError::from_io(Operation::Open, errno)
}

impl File {
    /// Takes over an open file: a descriptor passed in, a temporary file. It is not locked, and is written to if it was opened
    /// so; a file opened with `O_DIRECT` is used that way.
    ///
    /// # Errors
    ///
    /// [`Invalid`](StorageErrorKind::Invalid) for what is no disk, was opened for appending (positions would mean nothing)
    /// or can't be read.
    pub fn from_std(file: fs::File) -> Result<Self> {
        let status = rustix::fs::fcntl_getfl(&file).map_err(open_error)?;
        let invalid = |detail| {
            Err(StorageError::new(Operation::Open, StorageErrorKind::Invalid).with_detail(detail))
        };
        if status.contains(OFlags::APPEND) {
            return invalid("a file opened for appending ignores positions");
        }
        match status & OFlags::RWMODE {
            OFlags::RDWR | OFlags::RDONLY => {}
            _ => return invalid("the file was not opened for reading"),
        }
        let mut file = Self::classify(file, status.contains(OFlags::RDWR))?;
        if status.contains(OFlags::DIRECT) {
            file.direct = Some(Direct::discover(&file.inner, file.fixed_len.is_some())?);
        }
        Ok(file)
    }

    /// Finds out what was opened and refuses what is no disk.
    fn classify(inner: fs::File, writable: bool) -> Result<Self> {
        let stat = rustix::fs::fstat(&inner).map_err(open_error)?;
        let no_disk = |what: &'static str| {
            Err(StorageError::new(Operation::Open, StorageErrorKind::Invalid).with_detail(what))
        };
        let (mut fixed_len, mut unit) = (None, 1);
        let identity = FileIdentity::from_stat(&stat);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::BlockDevice => {
                let end = retry_on_intr(|| rustix::fs::seek(&inner, SeekFrom::End(0)));
                fixed_len = Some(end.map_err(open_error)?);
                // Whole pages, too: parts of cached pages would be zeroed even where the device then refuses.
                let block = u64::from(rustix::fs::ioctl_blksszget(&inner).map_err(open_error)?);
                unit = block.max(rustix::param::page_size() as u64);
            }
            FileType::Directory => return no_disk("it is a directory"),
            FileType::Fifo => return no_disk("it is a pipe"),
            FileType::Socket => return no_disk("it is a socket"),
            FileType::CharacterDevice => return no_disk("it is a character device"),
            _ => return no_disk("it is neither a regular file nor a block device"),
        }
        Ok(Self {
            inner,
            path: None,
            locked: false,
            identity,
            writable,
            fixed_len,
            unit,
            direct: None,
            new_in: Mutex::new(None),
            lost_writes: AtomicBool::new(false),
            abilities: super::zero::Abilities::default(),
        })
    }
}
