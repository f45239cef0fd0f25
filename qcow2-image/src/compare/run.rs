//! A comparison under way: what its threads share.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use qcow2_io::Storage;

use super::plan::{Job, Next, Plan};
use super::view::View;
use super::{CompareError, CompareOptions, Difference, Side};
use crate::Monitor;
use crate::buffer::Pages;
use crate::chain::Chain;

/// What ends a comparison.
type Outcome = Result<Difference, CompareError>;

/// Each thread takes so many sections, if there is enough for all.
const SECTIONS: u64 = 64;
/// Sections have so many pieces, at least.
const PIECES: u64 = 16;
/// Larger sections end at multiples of this, so that few tables are read for two of them; bytes.
const EVEN: u64 = 1 << 30;

/// What the threads of a comparison share. Each looks at the maps of a section by itself, then at what has to be read of it;
/// sections are taken in order, so that all before a difference is looked at.
pub(super) struct Run<'a> {
    chains: [&'a Chain<'a>; 2],
    disks: [&'a dyn Storage; 2],
    monitor: Option<&'a dyn Monitor>,
    shares: bool,
    strict: bool,
    chunk: u64,
    total: u64,
    section: u64,
    /// Where the next section begins.
    next: AtomicU64,
    /// The outcome that comes first on the disk.
    outcome: Mutex<Option<(u64, Outcome)>>,
    /// Nothing from here on is of interest.
    limit: AtomicU64,
    done: AtomicU64,
    read: AtomicU64,
}

impl<'a> Run<'a> {
    /// A comparison of the first `total` bytes; `shares` tells whether layers may be the same.
    pub(super) fn new(
        chains: [&'a Chain<'a>; 2],
        disks: [&'a dyn Storage; 2],
        shares: bool,
        total: u64,
        options: &CompareOptions<'a>,
    ) -> Result<Self, CompareError> {
        let chunk = options.chunk_bytes()?;
        let section = total / (options.thread_count() as u64 * SECTIONS);
        let section = section.max(chunk * PIECES);
        Ok(Self {
            chains,
            disks,
            monitor: options.monitor,
            shares,
            strict: options.strict,
            chunk,
            total,
            section: if section < EVEN {
                section
            } else {
                section.next_multiple_of(EVEN)
            },
            next: AtomicU64::new(0),
            outcome: Mutex::new(None),
            limit: AtomicU64::new(u64::MAX),
            done: AtomicU64::new(0),
            read: AtomicU64::new(0),
        })
    }

    /// Works until nothing is left.
    pub(super) fn work(&self) {
        let _watch = Watch(self);
        let mut buffers = [Pages::EMPTY, Pages::EMPTY];
        while let Some(section) = self.next_section() {
            let start = section.start;
            let mut plan = match self.plan(section) {
                Ok(plan) => plan,
                Err(error) => return self.end(start, Err(error)),
            };
            while let Some(job) = self.next(&mut plan) {
                match self.look(&job, &mut buffers) {
                    Ok(None) => self.note_done(job.range.end - job.range.start),
                    Ok(Some(offset)) => self.end(offset, Ok(Difference::Content { offset })),
                    Err(error) => self.end(job.range.start, Err(error)),
                }
            }
        }
    }

    fn next_section(&self) -> Option<Range<u64>> {
        let start = self.next.fetch_add(self.section, Ordering::Relaxed);
        let is_left = start < self.total.min(self.limit.load(Ordering::Acquire));
        is_left.then(|| start..start.saturating_add(self.section).min(self.total))
    }

    fn plan(&self, section: Range<u64>) -> Result<Plan<'a>, CompareError> {
        let [first, second] = self.chains;
        let views = [
            View::new(first, Side::First, section.end)?,
            View::new(second, Side::Second, section.end)?,
        ];
        let shares = self.shares && views[0].shares_layer(&views[1]);
        Ok(Plan::new(views, section, shares, self.chunk, self.strict))
    }

    /// The next piece of work of a section; `None` when there is none, or it is of no interest any more.
    fn next(&self, plan: &mut Plan<'a>) -> Option<Job> {
        loop {
            if self.monitor.is_some_and(Monitor::is_cancelled) {
                self.end(0, Err(CompareError::Cancelled));
            }
            if plan.position() >= self.limit.load(Ordering::Acquire) {
                return None;
            }
            match plan.next() {
                Ok(Next::Job(job)) => return Some(job),
                Ok(Next::Passed(len)) => self.note_done(len),
                Ok(Next::Allocation(offset)) => {
                    self.end(offset, Ok(Difference::Allocation { offset }));
                    return None;
                }
                Ok(Next::End) => return None,
                Err(error) => {
                    let offset = match &error {
                        CompareError::Storage { offset, .. } => *offset,
                        _ => 0,
                    };
                    self.end(offset, Err(error));
                    return None;
                }
            }
        }
    }

    /// The first byte of a piece that differs.
    fn look(&self, job: &Job, buffers: &mut [Pages; 2]) -> Result<Option<u64>, CompareError> {
        let len = usize::try_from(job.range.end - job.range.start).unwrap_or(usize::MAX);
        let sides = [Side::First, Side::Second];
        for (((buffer, disk), side), wanted) in
            buffers.iter_mut().zip(self.disks).zip(sides).zip(job.reads)
        {
            if !wanted {
                continue;
            }
            buffer.grow(len);
            disk.read_at(buffer.get_mut(..len).unwrap_or_default(), job.range.start)
                .map_err(|source| CompareError::Storage {
                    side,
                    offset: job.range.start,
                    len: len as u64,
                    source,
                })?;
            self.read.fetch_add(len as u64, Ordering::Relaxed);
        }
        let [first, second] = buffers;
        let first = first.get(..len).unwrap_or_default();
        let second = second.get(..len).unwrap_or_default();
        let found = match job.reads {
            [true, true] => first_difference(first, second),
            [true, false] => first_nonzero(first),
            _ => first_nonzero(second),
        };
        Ok(found.map(|index| job.range.start + index as u64))
    }

    fn note_done(&self, len: u64) {
        let done = self.done.fetch_add(len, Ordering::Relaxed) + len;
        if let Some(monitor) = self.monitor {
            monitor.progress(done, self.total);
        }
    }

    /// Keeps the outcome that comes first.
    fn end(&self, offset: u64, outcome: Outcome) {
        let mut first = lock(&self.outcome);
        if first.as_ref().is_none_or(|(at, _)| offset < *at) {
            *first = Some((offset, outcome));
            self.limit.fetch_min(offset, Ordering::AcqRel);
        }
    }

    /// The first difference, and the bytes that were read, once all threads are through.
    pub(super) fn finish(self) -> Result<(Option<Difference>, u64), CompareError> {
        let outcome = lock(&self.outcome).take();
        let difference = match outcome {
            Some((_, outcome)) => Some(outcome?),
            None => None,
        };
        Ok((difference, self.read.load(Ordering::Relaxed)))
    }
}

/// Stops the others when its thread panics.
struct Watch<'r, 'a>(&'r Run<'a>);

impl Drop for Watch<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.limit.store(0, Ordering::Release);
        }
    }
}

fn first_difference(first: &[u8], second: &[u8]) -> Option<usize> {
    if first == second {
        return None;
    }
    first.iter().zip(second).position(|(a, b)| a != b)
}

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    if crate::buffer::is_zero(bytes) {
        return None;
    }
    bytes.iter().position(|byte| *byte != 0)
}

/// A panic elsewhere ends the comparison, so what it leaves behind a lock is of no account.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
