//! What can go wrong with a storage, as facts: which operation, where, why.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// What storage operations give.
pub type Result<T> = std::result::Result<T, StorageError>;

/// The operations of a storage, as errors name them and [`Faulty`](crate::Faulty) selects them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// Opening or creating.
    Open,
    /// Taking or testing the locks that keep other processes out.
    Lock,
    /// Asking for the length.
    Len,
    /// Reading, plain or vectored.
    Read,
    /// Writing, plain or vectored.
    Write,
    /// Writing zeros without a buffer.
    WriteZeroes,
    /// Giving space back.
    Discard,
    /// Making earlier writes durable.
    Flush,
    /// Changing the length.
    SetLen,
    /// Asking where data and holes are.
    Extents,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Lock => "lock",
            Self::Len => "length query",
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write of zeros",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::SetLen => "change of length",
            Self::Extents => "extent query",
        })
    }
}

/// Why an operation failed, coarse and stable: for control flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StorageErrorKind {
    /// There is no such file.
    NotFound,
    /// The file to be created exists.
    AlreadyExists,
    /// The caller may not do that to the file.
    PermissionDenied,
    /// The storage, or the file system below, is read-only.
    ReadOnly,
    /// Another process uses the file in a way that excludes this use.
    Locked,
    /// No space, or no quota, is left.
    NoSpace,
    /// The request reaches beyond what the storage can address.
    OutOfRange,
    /// The backend can't do this.
    Unsupported,
    /// The request makes no sense: reversed range, contradictory options, not a file.
    Invalid,
    /// Interrupted by a signal, and not retried.
    Interrupted,
    /// The medium or the system failed.
    Io,
}

impl StorageErrorKind {
    fn phrase(self) -> &'static str {
        match self {
            Self::NotFound => "not found",
            Self::AlreadyExists => "already exists",
            Self::PermissionDenied => "permission denied",
            Self::ReadOnly => "the storage is read-only",
            Self::Locked => "in use by another process",
            Self::NoSpace => "no space left",
            Self::OutOfRange => "out of the addressable range",
            Self::Unsupported => "not supported",
            Self::Invalid => "invalid request",
            Self::Interrupted => "interrupted",
            Self::Io => "input/output error",
        }
    }

    fn of(error: &io::Error) -> Self {
        if let Some(errno) = Errno::from_io_error(error) {
            match errno {
                Errno::FBIG | Errno::OVERFLOW => return Self::OutOfRange,
                Errno::DQUOT => return Self::NoSpace,
                Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK => return Self::Unsupported,
                Errno::BADF => return Self::PermissionDenied,
                _ => {}
            }
        }
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::AlreadyExists => Self::AlreadyExists,
            io::ErrorKind::PermissionDenied => Self::PermissionDenied,
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            io::ErrorKind::FileTooLarge => Self::OutOfRange,
            io::ErrorKind::Unsupported => Self::Unsupported,
            io::ErrorKind::InvalidInput
            | io::ErrorKind::IsADirectory
            | io::ErrorKind::NotADirectory => Self::Invalid,
            io::ErrorKind::Interrupted => Self::Interrupted,
            _ => Self::Io,
        }
    }

    fn io_kind(self) -> io::ErrorKind {
        match self {
            Self::NotFound => io::ErrorKind::NotFound,
            Self::AlreadyExists => io::ErrorKind::AlreadyExists,
            Self::PermissionDenied => io::ErrorKind::PermissionDenied,
            Self::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
            Self::Locked => io::ErrorKind::ResourceBusy,
            Self::NoSpace => io::ErrorKind::StorageFull,
            Self::OutOfRange | Self::Invalid => io::ErrorKind::InvalidInput,
            Self::Unsupported => io::ErrorKind::Unsupported,
            Self::Interrupted => io::ErrorKind::Interrupted,
            Self::Io => io::ErrorKind::Other,
        }
    }
}

/// A failed storage operation.
///
/// One pointer wide, so that the `Ok` path of every request stays small.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct StorageError(Box<Failure>);

#[derive(Debug, thiserror::Error)]
struct Failure {
    kind: StorageErrorKind,
    operation: Operation,
    offset: Option<u64>,
    len: Option<u64>,
    path: Option<PathBuf>,
    detail: Option<Cow<'static, str>>,
    source: Option<io::Error>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.operation)?;
        match (self.operation, self.len, self.offset) {
            (Operation::SetLen, Some(len), _) => write!(f, " to {len} bytes")?,
            (_, Some(len), Some(offset)) => write!(f, " of {len} bytes at {offset:#x}")?,
            (_, None, Some(offset)) => write!(f, " at {offset:#x}")?,
            _ => {}
        }
        if let Some(path) = &self.path {
            write!(f, " in '{}'", path.display())?;
        }
        f.write_str(" failed")?;
        match (&self.detail, &self.source) {
            (Some(detail), _) => write!(f, ": {detail}"),
            (None, None) => write!(f, ": {}", self.kind.phrase()),
            (None, Some(_)) => Ok(()),
        }
    }
}

impl StorageError {
    /// A failure of `operation` for the reason `kind`.
    #[cold]
    pub fn new(operation: Operation, kind: StorageErrorKind) -> Self {
        Self(Box::new(Failure {
            kind,
            operation,
            offset: None,
            len: None,
            path: None,
            detail: None,
            source: None,
        }))
    }

    /// A failure of `operation` that the system reported; the kind follows from `source`.
    #[cold]
    pub fn from_io(operation: Operation, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let mut error = Self::new(operation, StorageErrorKind::of(&source));
        error.0.source = Some(source);
        error
    }

    /// The same error with the place: a byte offset and a length in bytes.
    #[must_use]
    pub fn at(mut self, offset: u64, len: u64) -> Self {
        self.0.offset = Some(offset);
        self.0.len = Some(len);
        self
    }

    /// The same error with the file it happened in.
    #[must_use]
    pub fn in_path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path = Some(path.as_ref().to_owned());
        self
    }

    /// The same error with a phrase that says more: lower case, no full stop.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// The same error under another kind, where the caller knows better than the system's number.
    #[must_use]
    pub fn with_kind(mut self, kind: StorageErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    /// Why it failed.
    pub fn kind(&self) -> StorageErrorKind {
        self.0.kind
    }

    /// Which operation failed.
    pub fn operation(&self) -> Operation {
        self.0.operation
    }

    /// Where the failed request started, in bytes, if it had a place.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// How long the failed request was, in bytes; for a change of length, the length asked for.
    pub fn len_bytes(&self) -> Option<u64> {
        self.0.len
    }

    /// The file the failure happened in, where the backend has one.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }
}

impl From<StorageError> for io::Error {
    fn from(error: StorageError) -> Self {
        Self::new(error.kind().io_kind(), error)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_message_names_operation_place_and_path_but_not_its_source() {
        let error = StorageError::from_io(Operation::Read, Errno::IO)
            .at(0x1000, 512)
            .in_path("/images/a.img");
        assert_eq!(
            error.to_string(),
            "read of 512 bytes at 0x1000 in '/images/a.img' failed"
        );
        assert_eq!(error.kind(), StorageErrorKind::Io);
        assert!(error.source().is_some());
    }

    #[test]
    fn a_message_without_source_says_why() {
        let error = StorageError::new(Operation::SetLen, StorageErrorKind::Unsupported).at(0, 42);
        assert_eq!(
            error.to_string(),
            "change of length to 42 bytes failed: not supported"
        );
        let error = error.with_detail("a block device can't be resized");
        assert_eq!(
            error.to_string(),
            "change of length to 42 bytes failed: a block device can't be resized"
        );
    }

    #[test]
    fn system_numbers_become_kinds() {
        let kind = |errno| StorageError::from_io(Operation::Write, errno).kind();
        assert_eq!(kind(Errno::NOSPC), StorageErrorKind::NoSpace);
        assert_eq!(kind(Errno::DQUOT), StorageErrorKind::NoSpace);
        assert_eq!(kind(Errno::ROFS), StorageErrorKind::ReadOnly);
        assert_eq!(kind(Errno::FBIG), StorageErrorKind::OutOfRange);
        assert_eq!(kind(Errno::ISDIR), StorageErrorKind::Invalid);
        assert_eq!(kind(Errno::ACCESS), StorageErrorKind::PermissionDenied);
        assert_eq!(kind(Errno::INTR), StorageErrorKind::Interrupted);
    }

    #[test]
    fn an_error_is_one_pointer() {
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }
}
