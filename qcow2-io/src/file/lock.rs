//! The byte-range locks by which QEMU and this crate keep out of each other's way.
//!
//! Each permission `p` has two bytes. A shared lock on byte `100 + p` says "I use p", one on `200 + p` says "I don't let others
//! use p". Everyone takes the locks first and then looks whether a lock of somebody else contradicts: so of two that come at once,
//! at least one sees the other.

use std::fs::File;
use std::io;

use rustix::io::Errno;

use crate::{Operation, Result, StorageError, StorageErrorKind, sys};

const USED: u32 = 100;
const UNSHARED: u32 = 200;

#[derive(Clone, Copy)]
enum Permission {
    ConsistentRead = 0,
    Write = 1,
    Resize = 3,
}

impl Permission {
    const fn byte(self, base: u32) -> u32 {
        base + self as u32
    }

    fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::Resize => "resize",
        }
    }
}

/// What an opener does with a file, and lets others do.
#[derive(Clone, Copy)]
pub(super) enum Access {
    /// Reads and writes; others do neither.
    Write,
    /// Reads; others may read, too.
    Read,
    /// Reads, whatever others do.
    ReadShared,
}

impl Access {
    fn used(self) -> &'static [Permission] {
        match self {
            Self::Write => &[
                Permission::ConsistentRead,
                Permission::Write,
                Permission::Resize,
            ],
            Self::Read | Self::ReadShared => &[Permission::ConsistentRead],
        }
    }

    fn unshared(self) -> &'static [Permission] {
        match self {
            Self::Write | Self::Read => &[Permission::Write, Permission::Resize],
            Self::ReadShared => &[],
        }
    }
}

/// Takes the locks for `access`; they last until [`release`], or until nobody has the open file any more.
///
/// On an error some may be held still: the caller releases them.
pub(super) fn take(file: &File, access: Access) -> Result<()> {
    for permission in access.used() {
        lock(file, permission.byte(USED), *permission)?;
    }
    for permission in access.unshared() {
        lock(file, permission.byte(UNSHARED), *permission)?;
    }
    for permission in access.used() {
        if is_locked(file, permission.byte(UNSHARED))? {
            return Err(locked(format!(
                "another process uses the image and does not share \"{}\"",
                permission.name()
            )));
        }
    }
    for permission in access.unshared() {
        if is_locked(file, permission.byte(USED))? {
            return Err(locked(format!(
                "another process uses the image and holds \"{}\"",
                permission.name()
            )));
        }
    }
    Ok(())
}

/// Gives up what [`take`] took.
pub(super) fn release(file: &File) {
    // Where this fails, closing the file does it.
    let _ = sys::unlock(file, USED, 2 * (UNSHARED - USED));
}

fn lock(file: &File, byte: u32, permission: Permission) -> Result<()> {
    sys::lock_shared(file, byte).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::AGAIN | Errno::ACCESS) => locked(format!(
            "another process has locked the image exclusively (\"{}\")",
            permission.name()
        )),
        _ => no_locks(error),
    })
}

fn is_locked(file: &File, byte: u32) -> Result<bool> {
    sys::is_locked_by_others(file, byte).map_err(no_locks)
}

fn locked(detail: String) -> StorageError {
    StorageError::new(Operation::Lock, StorageErrorKind::Locked).with_detail(detail)
}

fn no_locks(error: io::Error) -> StorageError {
    StorageError::from_io(Operation::Lock, error)
        .with_detail("the file system refuses byte-range locks")
}
