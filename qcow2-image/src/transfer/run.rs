//! A transfer under way: what its threads share.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use qcow2_io::Storage;

use super::plan::{Job, Plan, grains};
use super::{Candidate, Disks, Rival, Transferred, Work};
use crate::buffer::Pages;
use crate::buffer::is_zero;
use crate::chain::ChainError;
use crate::rate::Rate;
use crate::{ImageError, Monitor};

/// Zeros are stored as data in pieces of this many bytes; no cluster is larger.
const PIECE: u64 = 2 << 20;

/// What the threads of a transfer share.
pub(super) struct Run<'a> {
    disks: Disks<'a>,
    grain: u64,
    plan: Mutex<Plan<'a>>,
    monitor: Option<&'a dyn Monitor>,
    rate: Option<Rate>,
    stopped: AtomicBool,
    failure: Mutex<Option<ChainError>>,
    done: AtomicU64,
    report: Mutex<Transferred>,
}

/// What becomes of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Leave,
    Write,
    Zero,
}

/// Room for one piece of each disk.
#[derive(Default)]
struct Room {
    source: Pages,
    other: Pages,
}

impl<'a> Run<'a> {
    pub(super) fn new(disks: Disks<'a>, plan: Plan<'a>, work: Work<'a>) -> Self {
        Self {
            grain: disks.target.grain(),
            disks,
            plan: Mutex::new(plan),
            monitor: work.monitor,
            rate: Rate::new(work.rate),
            stopped: AtomicBool::new(false),
            failure: Mutex::default(),
            done: AtomicU64::new(0),
            report: Mutex::default(),
        }
    }

    /// What each thread does.
    pub(super) fn work(&self) {
        let _watch = Watch(self);
        let mut room = Room::default();
        while let Some(job) = self.next() {
            for task in &job.tasks {
                if let Err(error) = self.carry(task, &mut room) {
                    self.fail(error);
                    return;
                }
            }
            self.note_done(job.len);
        }
    }

    fn next(&self) -> Option<Job> {
        if self.monitor.is_some_and(Monitor::is_cancelled) {
            self.fail(ChainError::Cancelled);
        }
        if self.stopped.load(Ordering::Acquire) {
            return None;
        }
        match lock(&self.plan).next() {
            Ok(job) => job,
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    fn fail(&self, error: ChainError) {
        lock(&self.failure).get_or_insert(error);
        self.stopped.store(true, Ordering::Release);
    }

    fn note_done(&self, len: u64) {
        let done = self.done.fetch_add(len, Ordering::Relaxed) + len;
        if let Some(monitor) = self.monitor {
            monitor.progress(done, self.disks.size);
        }
    }

    /// What came of it, once all threads are through.
    pub(super) fn finish(self) -> Result<Transferred, ChainError> {
        if let Some(error) = lock(&self.failure).take() {
            return Err(error);
        }
        let rest = lock(&self.plan).rest();
        if rest > 0 {
            self.note_done(rest);
        }
        Ok(*lock(&self.report))
    }

    /// Waits until it is time for so many bytes more.
    fn wait(&self, bytes: u64) -> Result<(), ChainError> {
        let is_over = || {
            self.stopped.load(Ordering::Acquire) || self.monitor.is_some_and(Monitor::is_cancelled)
        };
        match &self.rate {
            Some(rate) if !rate.take(bytes, is_over) => Err(ChainError::Cancelled),
            _ => Ok(()),
        }
    }

    /// Stores what differs of one task.
    fn carry(&self, task: &Candidate, room: &mut Room) -> Result<(), ChainError> {
        let disks = &self.disks;
        let range = task.range.clone();
        if task.is_zero && task.rival == Rival::None {
            return self.zero(range);
        }
        self.wait(range.end - range.start)?;
        let len = usize::try_from(range.end - range.start).unwrap_or(0);
        if !task.is_zero {
            self.read(disks.source, disks.source_name, &range, &mut room.source)?;
        }
        if task.rival == Rival::Data {
            self.read(disks.other, disks.other_name, &range, &mut room.other)?;
        }
        let source = (!task.is_zero).then(|| room.source.get(..len).unwrap_or_default());
        let other = (task.rival == Rival::Data).then(|| room.other.get(..len).unwrap_or_default());
        let mut run = (Fate::Leave, range.start..range.start);
        for piece in grains(range.clone(), self.grain) {
            let fate = fate(
                source.map(|bytes| part(bytes, &range, &piece)),
                other.map(|bytes| part(bytes, &range, &piece)),
                task.rival,
            );
            if fate == run.0 {
                run.1.end = piece.end;
                continue;
            }
            self.store(run.0, &run.1, &range, source)?;
            run = (fate, piece);
        }
        self.store(run.0, &run.1, &range, source)
    }

    fn store(
        &self,
        fate: Fate,
        run: &Range<u64>,
        whole: &Range<u64>,
        source: Option<&[u8]>,
    ) -> Result<(), ChainError> {
        if run.is_empty() || fate == Fate::Leave {
            return Ok(());
        }
        let Some(source) = source.filter(|_| fate == Fate::Write) else {
            return self.zero(run.clone());
        };
        let bytes = part(source, whole, run);
        let compressed = self.disks.target.write(bytes, run.start);
        let compressed = compressed.map_err(|error| self.write_failed(run, error))?;
        let mut report = lock(&self.report);
        report.stored_bytes += run.end - run.start;
        report.compressed_clusters += compressed;
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> Result<(), ChainError> {
        let dense_end = self.disks.dense_below.clamp(range.start, range.end);
        self.store_zeros(range.start..dense_end)?;
        let range = dense_end..range.end;
        if range.is_empty() {
            return Ok(());
        }
        let zeroed = self.disks.target.zero(range.clone());
        zeroed.map_err(|error| self.write_failed(&range, error))?;
        lock(&self.report).zeroed_bytes += range.end - range.start;
        Ok(())
    }

    /// Stores zeros as data.
    fn store_zeros(&self, range: Range<u64>) -> Result<(), ChainError> {
        let zeros = vec![0; usize::try_from(PIECE.min(range.end - range.start)).unwrap_or(0)];
        let mut at = range.start;
        while at < range.end {
            // Pieces end where clusters do.
            let end = (at / PIECE + 1).saturating_mul(PIECE).min(range.end);
            let piece = at..end;
            self.wait(end - at)?;
            let len = usize::try_from(end - at).unwrap_or(0);
            let written = self
                .disks
                .target
                .write(zeros.get(..len).unwrap_or_default(), at);
            let compressed = written.map_err(|error| self.write_failed(&piece, error))?;
            let mut report = lock(&self.report);
            report.stored_bytes += piece.end - piece.start;
            report.compressed_clusters += compressed;
            at = end;
        }
        Ok(())
    }

    fn write_failed(&self, range: &Range<u64>, source: ImageError) -> ChainError {
        ChainError::Write {
            what: self.disks.target_name,
            offset: range.start,
            len: range.end - range.start,
            source: Box::new(source),
        }
    }

    fn read(
        &self,
        disk: &dyn Storage,
        what: &'static str,
        range: &Range<u64>,
        room: &mut Pages,
    ) -> Result<(), ChainError> {
        let (offset, len) = (range.start, range.end - range.start);
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        room.grow(bytes);
        disk.read_at(room.get_mut(..bytes).unwrap_or_default(), offset)
            .map_err(|source| ChainError::Read {
                what,
                offset,
                len,
                source,
            })?;
        lock(&self.report).read_bytes += len;
        Ok(())
    }
}

/// What becomes of a piece; `None` stands for zeros, or for nothing that was read.
fn fate(source: Option<&[u8]>, other: Option<&[u8]>, rival: Rival) -> Fate {
    let (is_equal, is_zero) = match (source, other) {
        (Some(source), Some(other)) if source == other => return Fate::Leave,
        (Some(source), _) => {
            let is_zero = is_zero(source);
            (is_zero && rival == Rival::Zeros, is_zero)
        }
        (None, Some(other)) => (is_zero(other), true),
        (None, None) => (rival == Rival::Zeros, true),
    };
    match (is_equal, is_zero) {
        (true, _) => Fate::Leave,
        (false, true) => Fate::Zero,
        (false, false) => Fate::Write,
    }
}

/// The bytes of a piece, of those of a whole range.
fn part<'b>(bytes: &'b [u8], whole: &Range<u64>, piece: &Range<u64>) -> &'b [u8] {
    let at = |place: u64| usize::try_from(place - whole.start).unwrap_or(usize::MAX);
    bytes
        .get(at(piece.start)..at(piece.end))
        .unwrap_or_default()
}

/// Stops the others when its thread panics.
struct Watch<'r, 'a>(&'r Run<'a>);

impl Drop for Watch<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stopped.store(true, Ordering::Release);
        }
    }
}

/// A panic elsewhere ends the work, so what it leaves behind a lock is of no account.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_stored() {
        let (zeros, ones, twos) = (&[0; 8][..], &[1; 8][..], &[2; 8][..]);
        for (source, other, rival, wanted) in [
            (Some(ones), Some(ones), Rival::Data, Fate::Leave),
            (Some(ones), Some(twos), Rival::Data, Fate::Write),
            (Some(zeros), Some(twos), Rival::Data, Fate::Zero),
            (Some(zeros), Some(zeros), Rival::Data, Fate::Leave),
            (None, Some(zeros), Rival::Data, Fate::Leave),
            (None, Some(ones), Rival::Data, Fate::Zero),
            (Some(ones), None, Rival::Zeros, Fate::Write),
            (Some(zeros), None, Rival::Zeros, Fate::Leave),
            (Some(zeros), None, Rival::None, Fate::Zero),
            (Some(ones), None, Rival::None, Fate::Write),
            (None, None, Rival::None, Fate::Zero),
            (None, None, Rival::Zeros, Fate::Leave),
        ] {
            assert_eq!(fate(source, other, rival), wanted, "{source:?} {other:?}");
        }
    }
}
