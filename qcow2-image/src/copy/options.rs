//! How to copy.

use std::fmt;
use std::ops::Range;

use qcow2_io::codec::Level;

use super::{Checkpoint, CopyError};
use crate::threads;

/// What one thread works on at a time, unless something else is asked for; bytes. It stays in a processor's own cache between
/// reading and writing.
const CHUNK: u64 = 256 << 10;
/// The same where it is compressed in between.
const CHUNK_COMPRESSED: u64 = 1 << 20;
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

    /// A piece with data is through: `bytes` of this range of the source were read.
    fn data(&self, range: Range<u64>, bytes: u64) {
        _ = (range, bytes);
    }

    /// Whether the copy should end as soon as it can, with [`CopyError::Cancelled`].
    fn is_cancelled(&self) -> bool {
        false
    }

    /// All before this is copied and durable. Only copies that were [asked](CopyOptions::checkpoints) for checkpoints tell it.
    fn checkpoint(&self, checkpoint: &Checkpoint) {
        _ = checkpoint;
    }
}

/// How to copy.
#[derive(Clone, Copy)]
#[must_use]
pub struct CopyOptions<'a> {
    threads: usize,
    pub(super) compress: Option<Level>,
    chunk: Option<u64>,
    sparse: u64,
    pub(super) target_is_zero: bool,
    pub(super) zero_rest: bool,
    pub(super) window: Option<(u64, u64)>,
    pub(super) at: u64,
    pub(super) layers: Option<u32>,
    pub(super) only_changes: bool,
    pub(super) salvage: bool,
    ordered: Option<bool>,
    pub(super) write_zeros: bool,
    pub(super) checkpoints: u64,
    pub(super) resume: Option<Checkpoint>,
    pub(super) rate: u64,
    pub(super) reserve: bool,
    pub(super) monitor: Option<&'a dyn Monitor>,
}

impl Default for CopyOptions<'_> {
    fn default() -> Self {
        Self {
            threads: 0,
            compress: None,
            chunk: None,
            sparse: SPARSE,
            target_is_zero: false,
            zero_rest: true,
            window: None,
            at: 0,
            layers: None,
            only_changes: false,
            salvage: false,
            ordered: None,
            write_zeros: false,
            checkpoints: 0,
            resume: None,
            rate: 0,
            reserve: false,
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

    /// Bytes that a thread works on at a time, by default 256 KiB or, if it is compressed, 1 MiB; at most 64 MiB; at least a cluster is taken where whole ones are
    /// needed.
    ///
    /// # Memory
    ///
    /// A copy has one buffer of this size for each thread; if it compresses, two for each piece in flight, of which there are
    /// twice as many as threads.
    pub fn chunk(mut self, bytes: u64) -> Self {
        self.chunk = Some(bytes);
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

    /// Copies only `range` of the source; what of it lies behind the source's end is left out. With this, or a
    /// [place](Self::at), the target keeps all else that it has.
    pub fn window(mut self, range: Range<u64>) -> Self {
        self.window = Some((range.start, range.end.max(range.start)));
        self
    }

    /// Where in the target the copy begins, in bytes; what is compressed goes to whole clusters only.
    pub fn at(mut self, offset: u64) -> Self {
        self.at = offset;
        self
    }

    /// The part that `dd` would copy: blocks of `size` bytes, `count` of them or all, without the first `skip` of the source, to
    /// behind the first `seek` of the target.
    pub fn blocks(self, size: u64, count: Option<u64>, skip: u64, seek: u64) -> Self {
        let start = skip.saturating_mul(size);
        let end = count.map_or(u64::MAX, |count| {
            start.saturating_add(count.saturating_mul(size))
        });
        self.window(start..end).at(seek.saturating_mul(size))
    }

    /// Copies only what the uppermost `layers` layers of the source hold, zeros among it, and leaves the target as it is elsewhere:
    /// for one with a backing file that shows what the lower layers do. By default all is copied that the source shows.
    pub fn layers(mut self, layers: u32) -> Self {
        self.layers = Some(layers);
        self
    }

    /// Reads the target, too, and stores only what differs from what it shows, its backing file included: in whole clusters, if they
    /// are compressed. Not together with [reserved space](Self::reserve).
    pub fn only_changes(mut self, on: bool) -> Self {
        self.only_changes = on;
        self
    }

    /// Zeros are written even where the target reads as zeros by itself: so an image notes zeros of its own, which stay if it
    /// gets another backing file. A [target that is zero](CopyOptions::target_is_zero) gets none all the same.
    pub fn write_zeros(mut self, on: bool) -> Self {
        self.write_zeros = on;
        self
    }

    /// Goes on where the source can't be read: sectors of 512 bytes that fail, each tried on its own, become zeros. The
    /// [report](super::CopyReport::lost) says which.
    pub fn salvage(mut self, on: bool) -> Self {
        self.salvage = on;
        self
    }

    /// Whether the target is written from front to back, whoever is ready first: so compressed copies are, unless told
    /// otherwise, and others are not. Takes the memory of compressed copies.
    pub fn ordered(mut self, on: bool) -> Self {
        self.ordered = Some(on);
        self
    }

    /// Makes a checkpoint whenever so many more bytes of the source are through, and when the copy ends early: the target is
    /// flushed, and the [monitor](Monitor::checkpoint) told. 0, the default, for none.
    pub fn checkpoints(mut self, every: u64) -> Self {
        self.checkpoints = every;
        self
    }

    /// Takes up a copy that was interrupted. Source and target must be as it left them, and the options the same.
    pub fn resume(mut self, checkpoint: Checkpoint) -> Self {
        self.resume = Some(checkpoint);
        self
    }

    /// Reads no more bytes of the source a second, on average. 0, the default, means no limit.
    pub fn rate(mut self, bytes_per_second: u64) -> Self {
        self.rate = bytes_per_second;
        self
    }

    /// Reserves space for all that is copied, zeros among it, before the first byte is. For plain files and the like; an
    /// image is [created](crate::create::CreateOptions::preallocation) so.
    pub fn reserve(mut self, on: bool) -> Self {
        self.reserve = on;
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

    /// Whether pieces are stored in their order.
    pub(super) fn is_ordered(&self) -> bool {
        self.ordered.unwrap_or(self.compress.is_some())
    }

    /// Whether the copy goes from the start of the source to the start of the target.
    pub(super) fn is_whole(&self) -> bool {
        self.window.is_none() && self.at == 0
    }

    /// The size of a piece of work, in whole units.
    pub(super) fn chunk_bytes(&self, unit: u64) -> Result<u64, CopyError> {
        let chunk = self.chunk.unwrap_or(match self.compress {
            Some(_) => CHUNK_COMPRESSED,
            None => CHUNK,
        });
        if chunk == 0 || chunk > CHUNK_MAX {
            return Err(CopyError::Option {
                option: "the chunk size",
                value: chunk,
                why: "it goes from 1 byte to 64 MiB",
            });
        }
        // Holes of most files begin and end at such borders.
        Ok(chunk.next_multiple_of(unit.max(SPARSE)))
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
            .field("window", &self.window)
            .field("at", &self.at)
            .field("layers", &self.layers)
            .field("only_changes", &self.only_changes)
            .field("salvage", &self.salvage)
            .field("ordered", &self.is_ordered())
            .field("checkpoints", &self.checkpoints)
            .field("resume", &self.resume)
            .field("rate", &self.rate)
            .field("reserve", &self.reserve)
            .finish_non_exhaustive()
    }
}
