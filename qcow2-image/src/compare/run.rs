//! A comparison under way: what its threads share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use qcow2_io::Storage;

use super::plan::{Job, Next, Plan};
use super::{CompareError, CompareOptions, Difference, Side};
use crate::Monitor;

/// What ends a comparison.
type Outcome = Result<Difference, CompareError>;

/// What the threads of a comparison share.
pub(super) struct Run<'a> {
    disks: [&'a dyn Storage; 2],
    monitor: Option<&'a dyn Monitor>,
    total: u64,
    plan: Mutex<Plan<'a>>,
    /// The outcome that comes first on the disk.
    outcome: Mutex<Option<(u64, Outcome)>>,
    /// Nothing from here on is of interest.
    limit: AtomicU64,
    done: AtomicU64,
    read: AtomicU64,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        first: &'a dyn Storage,
        second: &'a dyn Storage,
        plan: Plan<'a>,
        options: &CompareOptions<'a>,
    ) -> Self {
        Self {
            disks: [first, second],
            monitor: options.monitor,
            total: plan.len(),
            plan: Mutex::new(plan),
            outcome: Mutex::new(None),
            limit: AtomicU64::new(u64::MAX),
            done: AtomicU64::new(0),
            read: AtomicU64::new(0),
        }
    }

    /// Works until nothing is left.
    pub(super) fn work(&self) {
        let _watch = Watch(self);
        let mut buffers = [Vec::new(), Vec::new()];
        while let Some(job) = self.next() {
            match self.look(&job, &mut buffers) {
                Ok(None) => self.note_done(job.range.end - job.range.start),
                Ok(Some(offset)) => self.end(offset, Ok(Difference::Content { offset })),
                Err(error) => self.end(job.range.start, Err(error)),
            }
        }
    }

    /// The next piece of work; `None` when there is none, or all are to stop.
    fn next(&self) -> Option<Job> {
        loop {
            if self.monitor.is_some_and(Monitor::is_cancelled) {
                self.end(0, Err(CompareError::Cancelled));
            }
            let mut plan = lock(&self.plan);
            let next = plan.next();
            drop(plan);
            match next {
                // Pieces come in order, so nothing of interest follows one that is of none.
                Ok(Next::Job(job)) if job.range.start < self.limit.load(Ordering::Acquire) => {
                    return Some(job);
                }
                Ok(Next::Passed(len)) => {
                    if self.limit.load(Ordering::Acquire) < u64::MAX {
                        return None;
                    }
                    self.note_done(len);
                }
                Ok(Next::Allocation(offset)) => {
                    self.end(offset, Ok(Difference::Allocation { offset }));
                    return None;
                }
                Ok(Next::Job(_) | Next::End) => return None,
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
    fn look(&self, job: &Job, buffers: &mut [Vec<u8>; 2]) -> Result<Option<u64>, CompareError> {
        let len = usize::try_from(job.range.end - job.range.start).unwrap_or(usize::MAX);
        let sides = [Side::First, Side::Second];
        for (((buffer, disk), side), wanted) in
            buffers.iter_mut().zip(self.disks).zip(sides).zip(job.reads)
        {
            if !wanted {
                continue;
            }
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
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
    if crate::copy::is_zero(bytes) {
        return None;
    }
    bytes.iter().position(|byte| *byte != 0)
}

/// A panic elsewhere ends the comparison, so what it leaves behind a lock is of no account.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
