//! How to copy.

use std::fmt;

use qcow2_io::codec::Level;

use super::CopyError;
use crate::threads;

/// What one thread works on at a time, unless something else is asked for; bytes.
const CHUNK: u64 = 1 << 20;
/// The most of it.
const CHUNK_MAX: u64 = 64 << 20;
/// Zeros are looked for in pieces of this many bytes, unless something else is asked for: QEMU's default.
const SPARSE: u64 = 4096;
/// The smallest such piece.
const SPARSE_MIN: u64 = 512;

/// Watches a copy, and may end it. Called from any of its threads.
pub trait Monitor: Sync {
    /// `done` of `total` bytes of the disk are through, zeros among them. Threads may tell it in another order than it grows.
    fn progress(&self, done: u64, total: u64) {
        _ = (done, total);
    }

    /// Whether the copy should end as soon as it can, with [`CopyError::Cancelled`].
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// How to copy.
#[derive(Clone, Copy)]
#[must_use]
pub struct CopyOptions<'a> {
    threads: usize,
    pub(super) compress: Option<Level>,
    chunk: u64,
    sparse: u64,
    pub(super) target_is_zero: bool,
    pub(super) zero_rest: bool,
    pub(super) monitor: Option<&'a dyn Monitor>,
}

impl Default for CopyOptions<'_> {
    fn default() -> Self {
        Self {
            threads: 0,
            compress: None,
            chunk: CHUNK,
            sparse: SPARSE,
            target_is_zero: false,
            zero_rest: true,
            monitor: None,
        }
    }
}

impl<'a> CopyOptions<'a> {
    /// The defaults: as many threads as there are processors, nothing compressed, zeros left out as QEMU does.
    pub fn new() -> Self {
        Self::default()
    }

    /// Threads to work with, the caller's among them; 0, the default, means one for each processor.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Compresses every cluster; the target must be an image.
    pub fn compress(mut self, level: Level) -> Self {
        self.compress = Some(level);
        self
    }

    /// Bytes that a thread works on at a time, 1 MiB by default, at most 64 MiB; at least a cluster is taken where whole ones are
    /// needed.
    ///
    /// # Memory
    ///
    /// A copy has one buffer of this size for each thread; if it compresses, two for each piece in flight, of which there are
    /// twice as many as threads.
    pub fn chunk(mut self, bytes: u64) -> Self {
        self.chunk = bytes;
        self
    }

    /// Zeros in the source's data are not stored if they fill an aligned piece of so many bytes: a power of two from 512, 4096 by
    /// default. With 0 everything is stored, also what the source knows to be zeros, so that the target is fully allocated.
    pub fn sparse(mut self, bytes: u64) -> Self {
        self.sparse = bytes;
        self
    }

    /// The caller knows that the target reads as zeros all over, so zeros need no writing. Found out without help where the target
    /// can tell.
    pub fn target_is_zero(mut self, on: bool) -> Self {
        self.target_is_zero = on;
        self
    }

    /// Whether a target that is longer than the source gets zeros behind it, the default, or keeps what it has there.
    pub fn zero_rest(mut self, on: bool) -> Self {
        self.zero_rest = on;
        self
    }

    /// Who watches.
    pub fn monitor(mut self, monitor: &'a dyn Monitor) -> Self {
        self.monitor = Some(monitor);
        self
    }

    pub(super) fn thread_count(&self) -> usize {
        match self.threads {
            0 => threads::available(),
            threads => threads.min(threads::MAX),
        }
    }

    /// The size of a piece of work, in whole units.
    pub(super) fn chunk_bytes(&self, unit: u64) -> Result<u64, CopyError> {
        if self.chunk == 0 || self.chunk > CHUNK_MAX {
            return Err(CopyError::Option {
                option: "the chunk size",
                value: self.chunk,
                why: "it goes from 1 byte to 64 MiB",
            });
        }
        // Holes of most files begin and end at such borders.
        Ok(self.chunk.next_multiple_of(unit.max(SPARSE)))
    }

    /// The size of pieces that are looked at for zeros, in whole units; `None` to store all.
    pub(super) fn granule(&self, unit: u64) -> Result<Option<u64>, CopyError> {
        match self.sparse {
            0 => Ok(None),
            bytes if bytes.is_power_of_two() && (SPARSE_MIN..=CHUNK_MAX).contains(&bytes) => {
                Ok(Some(bytes.max(unit)))
            }
            value => Err(CopyError::Option {
                option: "the size of zero pieces",
                value,
                why: "it is a power of two from 512 bytes to 64 MiB, or 0",
            }),
        }
    }
}

impl fmt::Debug for CopyOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyOptions")
            .field("threads", &self.threads)
            .field("compress", &self.compress)
            .field("chunk", &self.chunk)
            .field("sparse", &self.sparse)
            .field("target_is_zero", &self.target_is_zero)
            .field("zero_rest", &self.zero_rest)
            .finish_non_exhaustive()
    }
}
