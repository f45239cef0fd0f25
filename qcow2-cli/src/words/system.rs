//! Failures in the system's words.

use std::error::Error;
use std::io;
use std::time::{Duration, UNIX_EPOCH};

use chrono::{DateTime, Local};
use qcow2_image::{AllocError, ImageError, MetadataError};
use qcow2_io::{StorageError, StorageErrorKind};
use rustix::io::Errno;

/// The system's number for what failed: that of the system call below, or the one that comes closest.
pub fn errno(error: &(dyn Error + 'static)) -> Errno {
    let mut cause = Some(error);
    let mut kind = None;
    while let Some(error) = cause {
        if let Some(found) = error
            .downcast_ref::<io::Error>()
            .and_then(Errno::from_io_error)
        {
            return found;
        }
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        if is_shut(error) || inner.is_some_and(|inner| is_shut(inner)) {
            return Errno::NOMEDIUM;
        }
        let storage = error.downcast_ref::<StorageError>();
        if let Some(storage) = storage.or_else(|| within(error)) {
            kind.get_or_insert(storage.kind());
        }
        cause = error.source();
    }
    kind.map_or(Errno::IO, of_kind)
}

/// Whether an image takes nothing more, after what was told before: as if the disk had been taken out.
fn is_shut(error: &(dyn Error + 'static)) -> bool {
    matches!(
        error.downcast_ref(),
        Some(
            ImageError::Metadata(MetadataError::Poisoned)
                | ImageError::Alloc(AllocError::Metadata(MetadataError::Poisoned))
        )
    )
}

/// The failure of a storage that an image's error stands for, and so is not among its causes.
fn within<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a StorageError> {
    match error.downcast_ref()? {
        ImageError::Storage(error)
        | ImageError::Metadata(MetadataError::Storage(error))
        | ImageError::Alloc(AllocError::Metadata(MetadataError::Storage(error))) => Some(error),
        _ => None,
    }
}

/// The number that tells this kind of failure.
pub fn of_kind(kind: StorageErrorKind) -> Errno {
    match kind {
        StorageErrorKind::NotFound => Errno::NOENT,
        StorageErrorKind::AlreadyExists => Errno::EXIST,
        StorageErrorKind::PermissionDenied => Errno::PERM,
        StorageErrorKind::ReadOnly => Errno::ROFS,
        StorageErrorKind::Locked => Errno::AGAIN,
        StorageErrorKind::NoSpace => Errno::NOSPC,
        StorageErrorKind::OutOfRange => Errno::FBIG,
        StorageErrorKind::Unsupported => Errno::NOTSUP,
        StorageErrorKind::Invalid => Errno::INVAL,
        StorageErrorKind::Interrupted => Errno::INTR,
        _ => Errno::IO,
    }
}

/// What the system calls it: `No space left on device`.
pub fn text(errno: Errno) -> String {
    without_number(&io::Error::from(errno).to_string())
}

/// A text without the number of the system's error, which says nothing that the words before it don't.
pub fn without_number(text: &str) -> String {
    let Some((words, number)) = text.split_once(" (os error ") else {
        return text.to_owned();
    };
    let rest = number.split_once(')').map_or("", |(_, rest)| rest);
    format!("{words}{rest}")
}

/// What the system calls what failed.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    text(errno(error))
}

/// An error with its causes, in one sentence.
pub fn sentence(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// A time since 1970 on the clock of this place: `2026-01-31 23:59:59`.
pub fn local_time(since: Duration) -> String {
    match UNIX_EPOCH.checked_add(since) {
        Some(time) => DateTime::<Local>::from(time)
            .format("%Y-%m-%d %H:%M:%S")
            .to_string(),
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use qcow2_io::Operation;

    use super::*;

    #[test]
    fn what_a_storage_without_the_systems_number_says_shows_through_an_image() {
        let full = || StorageError::new(Operation::Write, StorageErrorKind::NoSpace);
        let error = ImageError::from(MetadataError::from(full()));
        assert_eq!(describe(&error), "No space left on device");
        let error = ImageError::from(AllocError::from(MetadataError::from(full())));
        assert_eq!(describe(&error), "No space left on device");
    }

    #[test]
    fn a_failure_is_told_in_the_systems_words() {
        let error = StorageError::from_io(Operation::Write, Errno::NOSPC);
        assert_eq!(describe(&error), "No space left on device");
        let error = StorageError::new(Operation::Write, StorageErrorKind::ReadOnly);
        assert_eq!(describe(&error), "Read-only file system");
    }
}
