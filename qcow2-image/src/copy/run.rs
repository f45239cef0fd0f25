//! A copy under way: what its threads share.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use qcow2_io::Storage;

use super::checkpoint::Marks;
use super::plan::{Division, Job, Plan};
use super::salvage;
use super::target::Place;
use super::{Checkpoint, CopyError, CopyOptions, CopyReport, Monitor};
use crate::rate::Rate;

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
    rate: Option<Rate>,
    salvages: bool,
    /// Where in a sector the source begins.
    phase: u64,
    marks: Marks,
    /// The target had nothing but zeros when the copy began.
    was_zero: bool,
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
        let start = options
            .resume
            .map_or(0, |checkpoint| checkpoint.offset.min(len));
        let start = start / place.chunk * place.chunk;
        let division = Division {
            chunk: place.chunk,
            unit: place.unit,
            start,
            joins_zeros,
            passes_zeros,
            layers: options.layers,
            salvages: options.salvage,
        };
        Self {
            source,
            len,
            place,
            monitor: options.monitor,
            zero_rest: options.zero_rest && options.is_whole() && options.layers.is_none(),
            passes_zeros,
            plan: Mutex::new(Plan::new(source, len, division)),
            rate: Rate::new(options.rate),
            salvages: options.salvage,
            phase: options.window.map_or(0, |(start, _)| start % 512),
            marks: Marks::new(options.checkpoints, start),
            was_zero: place.is_zero(),
            stopped: AtomicBool::new(false),
            failure: Mutex::new(None),
            done: AtomicU64::new(start),
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
            let mut plan = lock(&self.plan);
            let next = plan.next();
            if let Ok(Some(job)) = &next {
                self.marks.begin(job.range.start, job.range.end);
            }
            drop(plan);
            match next {
                Ok(Some(job)) if job.is_kept || (job.data.is_empty() && self.passes_zeros) => {
                    self.note_done(&job);
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
                self.fetch(slice(buffer, base, part.clone()), part.start)?;
                at = part.end;
                next = data.next();
            }
            slice(buffer, base, at..whole.end).fill(0);
        }
        let read: u64 = job.data.iter().map(|part| part.end - part.start).sum();
        self.count(|report| report.read_bytes += read);
        Ok(filled)
    }

    /// Reads from the source, or what can be read of it.
    fn fetch(&self, bytes: &mut [u8], offset: u64) -> Result<(), CopyError> {
        let len = bytes.len() as u64;
        if let Some(rate) = &self.rate {
            let is_over = || self.is_stopped() || self.monitor.is_some_and(Monitor::is_cancelled);
            if !rate.take(len, is_over) {
                return Err(CopyError::Cancelled);
            }
        }
        match self.source.read_at(bytes, offset) {
            Err(_) if self.salvages => {
                salvage::read(self.source, bytes, offset, self.phase, &mut |range| {
                    self.count(|report| report.lost.add(range.clone()));
                });
                Ok(())
            }
            Err(error) => Err(CopyError::source_at(offset, len, error)),
            Ok(()) => Ok(()),
        }
    }

    /// Adds to the report.
    pub(super) fn count(&self, add: impl Fn(&mut CopyReport)) {
        add(&mut lock(&self.report));
    }

    /// A piece is through.
    pub(super) fn note_done(&self, job: &Job) {
        let done = self.done.fetch_add(job.len(), Ordering::Relaxed) + job.len();
        self.marks.end(job.range.start);
        if let Some(monitor) = self.monitor {
            monitor.progress(done, self.len);
            if !job.data.is_empty() {
                let data = job.data.iter().map(|part| part.end - part.start).sum();
                monitor.data(job.range.clone(), data);
            }
        }
        if let Err(error) = self.mark(false) {
            self.fail(error);
        }
    }

    /// Makes a checkpoint if it is time for one.
    fn mark(&self, now: bool) -> Result<(), CopyError> {
        self.marks.make(now, |offset| {
            self.place.flush()?;
            if let Some(monitor) = self.monitor {
                monitor.checkpoint(&Checkpoint {
                    offset,
                    len: self.len,
                    was_zero: self.was_zero,
                });
            }
            Ok(())
        })
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
        let failure = lock(&self.failure).take();
        if let Some(error) = failure {
            // The reason why it ended is what counts.
            let _ = self.mark(true);
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
        self.place.round_up()?;
        let report = lock(&self.report).clone();
        Ok(CopyReport {
            len_bytes: self.len,
            unmapped: lock(&self.plan).unmapped().clone(),
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
