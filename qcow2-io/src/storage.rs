//! The one interface: a flat, addressable, flushable range of bytes.

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::ops::{BitOr, Range};
use std::sync::Arc;

use crate::{Extent, ExtentKind, Op, Operation, Result, StorageError, StorageErrorKind};

/// The longest a storage can be, in bytes; no request may reach beyond it. What the host's file offsets can express.
pub const MAX_LEN: u64 = i64::MAX.cast_unsigned();

/// How [`Storage::write_zeroes`] may do its work.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ZeroFlags(u8);

impl ZeroFlags {
    /// Keep the space reserved, write zeros where nothing better works.
    pub const NONE: Self = Self(0);
    /// The space may be given back.
    pub const MAY_UNMAP: Self = Self(1);
    /// Fail with [`StorageErrorKind::Unsupported`] rather than write buffers of zeros.
    pub const NO_FALLBACK: Self = Self(2);

    /// Whether all flags of `other` are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for ZeroFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for ZeroFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut set = f.debug_set();
        if self.contains(Self::MAY_UNMAP) {
            set.entry(&format_args!("MAY_UNMAP"));
        }
        if self.contains(Self::NO_FALLBACK) {
            set.entry(&format_args!("NO_FALLBACK"));
        }
        set.finish()
    }
}

/// What a storage likes. Every request is served; one that keeps to these numbers is served best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths that are multiples of this need no extra work; bytes, a power of two.
    pub alignment: u64,
    /// A longer request is split inside; bytes.
    pub max_transfer: u64,
    /// Requests from this length on run at full speed; bytes.
    pub optimal: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            alignment: 1,
            max_transfer: MAX_LEN,
            optimal: 64 << 10,
        }
    }
}

/// A flat range of bytes that can be read, written and made durable.
///
/// # Contract
///
/// *Requests are whole.* A call does all it was asked to or fails; short transfers and signals stay inside. After a failed
/// write any part of its range may hold old or new bytes, after a failed read the buffers' content is unspecified. An
/// empty request succeeds and changes nothing.
///
/// *The end.* Reads past the end give zeros. Writes and zero writes past the end grow the storage, and what lies between
/// the old end and the request reads as zeros. A storage of fixed length refuses them with
/// [`OutOfRange`](StorageErrorKind::OutOfRange) or [`NoSpace`](StorageErrorKind::NoSpace). Discards never grow. A request
/// that would end beyond [`MAX_LEN`] fails with `OutOfRange`; a range whose start lies after its end is
/// [`Invalid`](StorageErrorKind::Invalid). Neither panics.
///
/// *Concurrency.* Any number of threads may call at once. Requests on disjoint bytes don't disturb each other, however close
/// they lie. Where two requests overlap and one writes, each byte is one of the two; who needs an order waits for the
/// first call to return.
///
/// *Durability.* A completed write is visible to every later read, but may be lost in a crash until a [`flush`](Self::flush)
/// that began after it has succeeded; without one, writes may reach the medium in any order, torn at 512 bytes. After
/// a failed flush nothing is known about any write since the last good one.
pub trait Storage: Send + Sync + fmt::Debug {
    /// The length in bytes.
    ///
    /// # Errors
    ///
    /// When the backend can't tell.
    fn len(&self) -> Result<u64>;

    /// Whether the length is 0.
    ///
    /// # Errors
    ///
    /// As [`len`](Self::len).
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills the buffers in order with the bytes from `offset` on. The slices themselves stay as they were.
    ///
    /// # Errors
    ///
    /// When any byte can't be read, or lies beyond [`MAX_LEN`].
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()>;

    /// Stores the buffers in order from `offset` on.
    ///
    /// # Errors
    ///
    /// When any byte can't be written: read-only, no space, beyond the end of a storage of fixed length.
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()>;

    /// Makes a range read as zeros.
    ///
    /// # Errors
    ///
    /// As a write; and [`Unsupported`](StorageErrorKind::Unsupported) when [`ZeroFlags::NO_FALLBACK`] is set and there is no
    /// quick way.
    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()>;

    /// Gives the space of a range back; it reads as zeros afterwards. What lies past the end is ignored.
    ///
    /// # Errors
    ///
    /// As a write; and [`Unsupported`](StorageErrorKind::Unsupported), with the bytes unchanged, when the backend can't.
    fn discard(&self, range: Range<u64>) -> Result<()>;

    /// Makes all writes that returned before this call durable.
    ///
    /// # Errors
    ///
    /// When that can't be said for all of them.
    fn flush(&self) -> Result<()>;

    /// Cuts the storage or grows it with zeros.
    ///
    /// # Errors
    ///
    /// When the length can't be changed, or is beyond [`MAX_LEN`].
    fn set_len(&self, len: u64) -> Result<()>;

    /// The extents from `range.start` on, at most `max` of them, in order and without gaps. The last may end before
    /// `range.end`, then the caller asks again from there; none reaches beyond it. At least one is given unless the range is
    /// empty or `max` is 0. What lies past the end is a hole.
    ///
    /// A snapshot: a concurrent writer makes it old. A backend that can't tell says data.
    ///
    /// # Errors
    ///
    /// When the backend fails to tell.
    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        let len = check_range(Operation::Extents, &range)?;
        if len == 0 || max == 0 {
            return Ok(Vec::new());
        }
        Ok(vec![Extent::new(range.start, len, ExtentKind::Data)])
    }

    /// Bytes of the medium that it takes up, holes left out, where the backend can tell; an estimate for reports and
    /// decisions about speed.
    ///
    /// # Errors
    ///
    /// When the backend fails to tell.
    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// What this storage likes; does not change during its life.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Runs a batch, in any order or at once, and returns when all of it is complete. Each operation holds its own
    /// result; one that fails doesn't stop the others. Operations of a batch should not overlap.
    fn submit(&self, ops: &mut [Op<'_>]) {
        for op in ops {
            op.run(self);
        }
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// As [`read_vectored_at`](Self::read_vectored_at).
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_vectored_at(&mut [IoSliceMut::new(buf)], offset)
    }

    /// Stores `buf` from `offset` on.
    ///
    /// # Errors
    ///
    /// As [`write_vectored_at`](Self::write_vectored_at).
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_vectored_at(&[IoSlice::new(buf)], offset)
    }
}

macro_rules! forward {
    ($pointer:ty) => {
        impl<T: Storage + ?Sized> Storage for $pointer {
            fn len(&self) -> Result<u64> {
                (**self).len()
            }

            fn is_empty(&self) -> Result<bool> {
                (**self).is_empty()
            }

            fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
                (**self).read_vectored_at(bufs, offset)
            }

            fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
                (**self).write_vectored_at(bufs, offset)
            }

            fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
                (**self).write_zeroes(range, flags)
            }

            fn discard(&self, range: Range<u64>) -> Result<()> {
                (**self).discard(range)
            }

            fn flush(&self) -> Result<()> {
                (**self).flush()
            }

            fn set_len(&self, len: u64) -> Result<()> {
                (**self).set_len(len)
            }

            fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
                (**self).extents(range, max)
            }

            fn allocated(&self) -> Result<Option<u64>> {
                (**self).allocated()
            }

            fn limits(&self) -> Limits {
                (**self).limits()
            }

            fn submit(&self, ops: &mut [Op<'_>]) {
                (**self).submit(ops);
            }

            fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
                (**self).read_at(buf, offset)
            }

            fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
                (**self).write_at(buf, offset)
            }
        }
    };
}

forward!(&T);
forward!(Box<T>);
forward!(Arc<T>);

/// The end of a request, unless it lies beyond [`MAX_LEN`].
pub(crate) fn check_end(operation: Operation, offset: u64, len: u64) -> Result<u64> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_LEN => Ok(end),
        _ => Err(StorageError::new(operation, StorageErrorKind::OutOfRange).at(offset, len)),
    }
}

/// The length of a range that runs forward and ends within [`MAX_LEN`].
pub(crate) fn check_range(operation: Operation, range: &Range<u64>) -> Result<u64> {
    let Some(len) = range.end.checked_sub(range.start) else {
        return Err(StorageError::new(operation, StorageErrorKind::Invalid)
            .at(range.start, 0)
            .with_detail("the range ends before it starts"));
    };
    check_end(operation, range.start, len)?;
    Ok(len)
}

/// The bytes that all buffers hold together.
pub(crate) fn total_len<T: std::ops::Deref<Target = [u8]>>(bufs: &[T]) -> u64 {
    bufs.iter()
        .fold(0, |sum: u64, buf| sum.saturating_add(buf.len() as u64))
}
