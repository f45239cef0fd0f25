//! Batches of a file through io_uring, and by helpers.

mod helper;
mod ring;

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;

use crate::{Extent, File, Limits, Op, Request, Result, Storage, ZeroFlags};

use self::helper::{Helpers, OPS_PER_HELPER};
use self::ring::Ring;

/// How many batches run in rings at once, at most; each ring takes some pages of the kernel's memory.
const MAX_RINGS: usize = 16;

/// After so many reads of a batch that would have to wait the page cache is not asked for the others: each question costs a
/// system call, and the ring takes all of them with one.
const MISSES_MAX: usize = 2;

/// A file whose batches go to the kernel in one go.
///
/// [`submit`](Storage::submit) hands the transfers of a batch to the kernel together and waits for them together, where that
/// pays: reads, and writes of a file opened for direct I/O. A write to the page cache is quicker by a plain call, and so are
/// single requests and all requests of a file that lies in memory (tmpfs): they go to the [`File`] itself. Several
/// threads may submit at once: each batch takes a ring of its own, and plain calls if none is free.
///
/// Where the kernel refuses, because it is old, or an administrator or a sandbox forbids io_uring, all goes by plain calls:
/// slower for deep queues, the same otherwise.
///
/// What lies in memory is copied by the thread that submits, one operation after the other, unless there are
/// [helpers](Self::with_helpers) to share it with.
#[derive(Debug)]
pub struct Uring {
    // Before the file: rings hold on to it.
    rings: Box<[Mutex<Place>]>,
    helpers: Helpers,
    /// The last batch found in the page cache what it asked for.
    is_warm: AtomicBool,
    /// The file lies in memory, all of it.
    is_in_memory: bool,
    file: File,
}

/// Where a ring can be.
#[derive(Debug, Default)]
enum Place {
    /// Not needed so far.
    #[default]
    Empty,
    Ready(Box<Ring>),
    /// The kernel gives none, or it failed; not tried again.
    Refused,
}

impl Uring {
    /// Wraps a file. Never fails: without io_uring, batches go by plain calls.
    pub fn new(file: File) -> Self {
        let mut uring = Self::inactive(file);
        if uring.is_in_memory {
            return uring;
        }
        if let Ok(first) = Ring::new(uring.file.as_std()) {
            let empty = (1..processors().clamp(2, MAX_RINGS)).map(|_| Place::Empty);
            uring.rings = std::iter::once(Place::Ready(Box::new(first)))
                .chain(empty)
                .map(Mutex::new)
                .collect();
        }
        uring
    }

    /// Wraps a file and doesn't ask the kernel for a ring: what [`new`](Self::new) gives where it refuses.
    pub fn inactive(file: File) -> Self {
        Self {
            rings: Box::default(),
            helpers: Helpers::default(),
            is_warm: AtomicBool::new(true),
            is_in_memory: file.is_in_memory(),
            file,
        }
    }

    /// Lets up to `count` threads share the reads of a batch with the one that submits it, where these needn't wait for a
    /// disk: of files in memory and from the page cache. Without, no thread is started.
    ///
    /// A helper joins in for each 8 reads of a batch. It costs a thread, which keeps a processor busy while one batch follows the other and
    /// for 50 µs after the last, then sleeps; the next batch wakes it, for some microseconds. So it pays on machines with processors
    /// to spare, for batches that come in close order. Threads that submit at once don't wait for a helper: who finds it busy goes
    /// without.
    ///
    /// No more than 8 are started, and fewer than there are processors; none for a file opened for direct I/O, whose reads wait
    /// in rings. They are threads of the process that called this: a process forked later has none, and does all itself. They end
    /// when this is dropped.
    #[must_use]
    pub fn with_helpers(self, count: usize) -> Self {
        let spare = processors().saturating_sub(1);
        self.start_helpers(count.min(spare))
    }

    /// As [`with_helpers`](Self::with_helpers), on any machine.
    fn start_helpers(mut self, count: usize) -> Self {
        let is_direct = self.file.together().is_some();
        self.helpers = Helpers::start(if is_direct { 0 } else { count });
        self
    }

    /// How many threads help.
    pub fn helpers(&self) -> usize {
        self.helpers.count()
    }

    /// Whether batches go through rings: the kernel gave one when this was made, and the file is one for which they pay.
    pub fn is_active(&self) -> bool {
        !self.rings.is_empty()
    }

    /// The file below.
    pub fn get_ref(&self) -> &File {
        &self.file
    }

    /// Gives the file back.
    pub fn into_inner(self) -> File {
        self.file
    }

    /// A place whose ring is there and that nobody uses.
    fn free_place(&self) -> Option<MutexGuard<'_, Place>> {
        self.rings.iter().find_map(|place| {
            // One that a panic poisoned is not used again.
            let mut place = place.try_lock().ok()?;
            if matches!(*place, Place::Empty) {
                *place = match Ring::new(self.file.as_std()) {
                    Ok(ring) => Place::Ready(Box::new(ring)),
                    Err(_) => Place::Refused,
                };
            }
            matches!(*place, Place::Ready(_)).then_some(place)
        })
    }

    /// Carries out what needs no waiting for, and leaves the rest without a result. A batch that has to wait for a disk is noticed
    /// by its first reads.
    fn run_now(&self, ops: &mut [Op<'_>]) {
        let misses = AtomicUsize::new(0);
        let run = |op: &mut Op<'_>| {
            if !is_read(op) {
                return true;
            }
            if self.file.read_now(op.request_mut()) {
                op.complete(Ok(()));
                return true;
            }
            misses.fetch_add(1, Ordering::Relaxed) + 1 < MISSES_MAX
        };
        // Nobody is woken for reads that wait for a disk.
        let was_warm = self.is_warm.load(Ordering::Relaxed);
        if was_warm && self.is_worth_sharing(ops) {
            self.helpers.share(ops, &run);
        } else {
            let _ = ops.iter_mut().all(run);
        }
        let is_warm = misses.into_inner() == 0;
        if is_warm != was_warm {
            self.is_warm.store(is_warm, Ordering::Relaxed);
        }
    }

    /// Carries out the reads of a file that lies in memory, together with helpers. Writes don't: the system takes one write of
    /// a file after the other.
    fn run_in_memory(&self, ops: &mut [Op<'_>]) {
        if self.is_worth_sharing(ops) {
            self.helpers.share(ops, &|op| {
                if is_read(op) {
                    op.run(&self.file);
                }
                true
            });
        }
    }

    fn is_worth_sharing(&self, ops: &[Op<'_>]) -> bool {
        let enough = OPS_PER_HELPER - 1;
        self.helpers.count() > 0 && ops.iter().filter(|op| is_read(op)).nth(enough).is_some()
    }

    /// Carries out what a ring can do, and leaves the rest without a result.
    fn run_in_ring(&self, ops: &mut [Op<'_>]) {
        let fits = |op: &Op<'_>| op.result().is_none() && self.file.takes_from_ring(op.request());
        if ops.iter().filter(|op| fits(op)).nth(1).is_none() {
            return;
        }
        let Some(mut place) = self.free_place() else {
            return;
        };
        let Place::Ready(ring) = &mut *place else {
            return;
        };
        let _gate = self.file.together();
        if ring.run(ops, fits).is_err() {
            *place = Place::Refused;
        }
    }
}

impl Storage for Uring {
    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.file.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.file.write_vectored_at(bufs, offset)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.file.write_zeroes(range, flags)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.file.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.file.flush()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len)
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.file.extents(range, max)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.file.allocated()
    }

    fn limits(&self) -> Limits {
        self.file.limits()
    }

    fn submit(&self, ops: &mut [Op<'_>]) {
        for op in &mut *ops {
            op.take_result();
        }
        if self.is_in_memory {
            self.run_in_memory(ops);
        } else if ops.len() > 1 && (self.is_active() || self.helpers.count() > 0) {
            self.run_now(ops);
            self.run_in_ring(ops);
        }
        // What is no transfer, or was not moved whole: at the end of the file, after a signal, or by an error. A plain call
        // does it, all of it, or says what is wrong.
        for op in ops.iter_mut().filter(|op| op.result().is_none()) {
            op.run(&self.file);
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.file.write_at(buf, offset)
    }
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn is_read(op: &Op<'_>) -> bool {
    matches!(
        op.request(),
        Request::Read { .. } | Request::ReadVectored { .. }
    )
}

#[cfg(test)]
mod tests;
