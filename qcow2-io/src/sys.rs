//! The one system call that has no safe wrapper in our dependencies: byte-range locks of the open file description (OFD).
#![expect(
    unsafe_code,
    reason = "fcntl with a lock structure; the only unsafe code but for io_uring"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Takes a shared lock on one byte without waiting. It lasts until the open file description is closed, and is not affected
/// by other descriptors of the process on the same file.
pub(crate) fn lock_shared(file: &File, byte: u32) -> io::Result<()> {
    let mut lock = bytes(libc::F_RDLCK, byte, 1);
    fcntl_lock(file, libc::F_OFD_SETLK, &mut lock)
}

/// Whether somebody else's lock stands against an exclusive lock on one byte.
pub(crate) fn is_locked_by_others(file: &File, byte: u32) -> io::Result<bool> {
    let mut lock = bytes(libc::F_WRLCK, byte, 1);
    fcntl_lock(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Gives up all locks on `len` bytes, also those that a copy of the descriptor in another process would keep.
pub(crate) fn unlock(file: &File, first: u32, len: u32) -> io::Result<()> {
    let mut lock = bytes(libc::F_UNLCK, first, len);
    fcntl_lock(file, libc::F_OFD_SETLK, &mut lock)
}

fn bytes(kind: i32, first: u32, len: u32) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).expect("the kinds of locks are small numbers"),
        l_whence: i16::try_from(libc::SEEK_SET).expect("the origins of seeks are small numbers"),
        l_start: first.into(),
        l_len: len.into(),
        // Must be 0 for locks of the open file description.
        l_pid: 0,
    }
}

fn fcntl_lock(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: all callers pass F_OFD_SETLK or F_OFD_GETLK, whose third argument is a pointer to a `struct flock` that the
        // kernel reads and, for GETLK, writes. `lock` is such a structure, exclusively borrowed and so valid for both during the
        // call; the kernel keeps no pointer to it. `file` is borrowed too, so the descriptor is open.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
        if result != -1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
