//! A copy under way: what its threads share.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use qcow2_io::Storage;

use super::plan::{Job, Plan};
use super::target::Place;
use super::{CopyError, CopyOptions, CopyReport, Monitor};

/// What the threads of a copy share.
pub(super) struct Run<'a> {
    source: &'a dyn Storage,
    len: u64,
    pub(super) place: Place<'a>,
    monitor: Option<&'a dyn Monitor>,
    zero_rest: bool,
    /// Pieces without data need no work.
    passes_zeros: bool,
    plan: Mutex<Plan<'a>>,
    stopped: AtomicBool,
    failure: Mutex<Option<CopyError>>,
    done: AtomicU64,
    report: Mutex<CopyReport>,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        source: &'a dyn Storage,
        len: u64,
        place: Place<'a>,
        options: &CopyOptions<'a>,
    ) -> Self {
        let joins_zeros = place.granule.is_some();
        let passes_zeros = joins_zeros && place.is_zero();
        let plan = Plan::new(source, len, place.chunk, joins_zeros);
        Self {
            source,
            len,
            place,
            monitor: options.monitor,
            zero_rest: options.zero_rest,
            passes_zeros,
            plan: Mutex::new(plan.passing_zeros(passes_zeros)),
            stopped: AtomicBool::new(false),
            failure: Mutex::new(None),
            done: AtomicU64::new(0),
            report: Mutex::new(CopyReport::default()),
        }
    }

    /// The next piece of work; `None` when there is none, or when all are to stop.
    pub(super) fn next(&self) -> Option<Job> {
        loop {
            if self.monitor.is_some_and(Monitor::is_cancelled) {
                self.fail(CopyError::Cancelled);
            }
            if self.is_stopped() {
                return None;
            }
            let next = lock(&self.plan).next();
            match next {
                Ok(Some(job)) if job.data.is_empty() && self.passes_zeros => {
                    self.note_done(job.len());
                }
                Ok(job) => return job,
                Err(error) => {
                    self.fail(error);
                    return None;
                }
            }
        }
    }

    /// Reads a piece into a buffer that begins where it begins, and has room for whole units. Gives the stretches of the disk,
    /// in whole units, that are in the buffer now.
    pub(super) fn read(&self, job: &Job, buffer: &mut [u8]) -> Result<Vec<Range<u64>>, CopyError> {
        let (base, unit) = (job.range.start, self.place.unit);
        let mut filled: Vec<Range<u64>> = Vec::new();
        if self.place.granule.is_none() {
            filled.push(base..job.range.end.next_multiple_of(unit));
        }
        for data in &job.data {
            let whole = data.start / unit * unit..data.end.next_multiple_of(unit);
            match filled.last_mut() {
                Some(last) if last.end >= whole.start => last.end = last.end.max(whole.end),
                _ => filled.push(whole),
            }
        }
        let mut data = job.data.iter();
        let mut next = data.next();
        for whole in &filled {
            let mut at = whole.start;
            while let Some(part) = next.filter(|part| part.start < whole.end) {
                slice(buffer, base, at..part.start).fill(0);
                self.source
                    .read_at(slice(buffer, base, part.clone()), part.start)
                    .map_err(|error| {
                        CopyError::source_at(part.start, part.end - part.start, error)
                    })?;
                at = part.end;
                next = data.next();
            }
            slice(buffer, base, at..whole.end).fill(0);
        }
        let read: u64 = job.data.iter().map(|part| part.end - part.start).sum();
        self.count(|report| report.read_bytes += read);
        Ok(filled)
    }

    /// Adds to the report.
    pub(super) fn count(&self, add: impl Fn(&mut CopyReport)) {
        add(&mut lock(&self.report));
    }

    /// So many bytes of the disk are through.
    pub(super) fn note_done(&self, len: u64) {
        let done = self.done.fetch_add(len, Ordering::Relaxed) + len;
        if let Some(monitor) = self.monitor {
            monitor.progress(done, self.len);
        }
    }

    /// Ends all threads; the first reason is kept.
    pub(super) fn fail(&self, error: CopyError) {
        lock(&self.failure).get_or_insert(error);
        self.stop();
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// What came of it, once all threads are through; zeros what is left of the target.
    pub(super) fn finish(self) -> Result<CopyReport, CopyError> {
        if let Some(error) = lock(&self.failure).take() {
            return Err(error);
        }
        let end = self.len.next_multiple_of(self.place.unit);
        if self.zero_rest && end < self.place.len {
            for part in self.place.zero_parts(end..self.place.len) {
                if self.monitor.is_some_and(Monitor::is_cancelled) {
                    return Err(CopyError::Cancelled);
                }
                self.place.zero(part)?;
            }
        }
        let report = *lock(&self.report);
        Ok(CopyReport {
            len_bytes: self.len,
            ..report
        })
    }
}

/// Stops the others when its thread panics.
pub(super) struct Watch<'r, 'a>(pub(super) &'r Run<'a>);

impl Drop for Watch<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop();
        }
    }
}

/// The bytes of a range of the disk, in a buffer that begins at `base`.
pub(super) fn slice(buffer: &mut [u8], base: u64, range: Range<u64>) -> &mut [u8] {
    let index = |at: u64| usize::try_from(at.saturating_sub(base)).unwrap_or(usize::MAX);
    buffer
        .get_mut(index(range.start)..index(range.end))
        .unwrap_or_default()
}

/// A panic elsewhere ends the copy, so what it leaves behind a lock is of no account.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
