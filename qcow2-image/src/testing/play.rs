//! Playing actions on an open disk, with the ledger beside it.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use qcow2_io::{Op, Request, Result as IoResult, Storage, StorageErrorKind, ZeroFlags};

use crate::create::Preallocation;

use super::action::Action;
use super::content::Content;
use super::differential::whole_clusters;
use super::engine::{Engine, Refusal, Subject, Tolerance};
use super::failure::{Failure, OrFail};
use super::files::Files;
use super::ledger::{Ledger, State, View};
use super::lifeline::Lifeline;
use super::random::Random;
use super::shape::Shape;

/// Bytes compared at once; no multiple of a cluster.
const CHUNK: u64 = (1 << 20) + 1536;

/// Whether operations may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// None may.
    Strict,
    /// They may, and leave their range old or new.
    Tolerant,
}

/// A disk in use, and what it must hold.
pub struct Player<'a> {
    engine: &'a dyn Engine,
    shape: &'a Shape,
    files: &'a Files,
    subject: Option<Box<dyn Subject>>,
    lifeline: Lifeline,
    killed: bool,
    manner: Manner,
    /// What the disk must hold.
    pub ledger: Ledger,
    /// What failed so far.
    pub refusals: Vec<Refusal>,
}

impl<'a> Player<'a> {
    /// Opens the image for a run.
    ///
    /// # Errors
    ///
    /// When it does not open.
    pub fn open(
        engine: &'a dyn Engine,
        shape: &'a Shape,
        files: &'a Files,
        ledger: Ledger,
        manner: Manner,
    ) -> Result<Self, Failure> {
        let mut player = Self {
            engine,
            shape,
            files,
            subject: None,
            lifeline: Lifeline::default(),
            killed: false,
            manner,
            ledger,
            refusals: Vec::new(),
        };
        player.reopen()?;
        Ok(player)
    }

    /// The open disk.
    ///
    /// # Panics
    ///
    /// When it is closed.
    pub fn disk(&self) -> &dyn Storage {
        self.subject().disk()
    }

    fn subject(&self) -> &dyn Subject {
        &**self.subject.as_ref().expect("open between actions")
    }

    /// Does one thing.
    ///
    /// # Errors
    ///
    /// When what comes of it is wrong.
    pub fn play(&mut self, action: &Action) -> Result<(), Failure> {
        if self.subject.is_none() {
            self.reopen()?;
            if self.subject.is_none() {
                return Ok(());
            }
        }
        match action {
            Action::Write {
                range,
                content,
                pieces,
            } => {
                let range = self.cut(range);
                let bytes = content.bytes(range.start, length(&range));
                let result = write(self.disk(), &bytes, range.start, *pieces);
                self.note(&range, *content, result)
            }
            Action::Pack { range, content } => self.pack(&self.cut(range), *content),
            Action::Zero { range, unmap } => {
                let range = self.cut(range);
                let result = self.disk().write_zeroes(range.clone(), zero_flags(*unmap));
                self.note(&range, Content::Zeros, result)
            }
            Action::Discard { range } => {
                let range = self.cut(range);
                let result = self.disk().discard(range.clone());
                self.note_discard(&range, result)
            }
            Action::DiscardWhole { range } => self.discard_whole(&self.cut(range)),
            Action::Read { range, pieces } => {
                let range = self.cut(range);
                let mut bytes = vec![0xa5; length(&range)];
                match read(self.disk(), &mut bytes, range.start, *pieces) {
                    Ok(()) => self.ledger.admit(range.start, &bytes, View::Running),
                    Err(error) => self.refused(error.into()),
                }
            }
            Action::Batch(actions) => self.batch(actions),
            Action::Flush => match self.disk().flush() {
                Ok(()) => {
                    self.ledger.flushed();
                    Ok(())
                }
                Err(error) => self.refused(error.into()),
            },
            Action::Reopen => {
                self.close()?;
                if self.manner == Manner::Strict {
                    self.engine.check(self.files, self.tolerance())?;
                }
                self.reopen()
            }
            Action::Kill => {
                self.lifeline.cut();
                self.killed = true;
                self.subject = None;
                self.ledger.forget_unflushed();
                self.reopen()
            }
            Action::Resize {
                size,
                preallocation,
            } => self.resize(*size, *preallocation),
            Action::Extents { range, max } => self.extents(&self.cut(range), *max),
            Action::WriteBeyond { past } => self.write_beyond(*past),
        }
    }

    /// Compares the whole disk, and what it says about its holes.
    ///
    /// # Errors
    ///
    /// The first difference.
    pub fn compare(&mut self) -> Result<(), Failure> {
        let disk = self.disk();
        let size = disk.len().or_fail("asking for the size")?;
        if size != self.ledger.size() {
            let known = self.ledger.size();
            return Err(Failure::new(format!("the size is {size}, not {known}")));
        }
        for start in (0..size).step_by(CHUNK as usize) {
            let mut bytes = vec![0x5a; CHUNK.min(size - start) as usize];
            disk.read_at(&mut bytes, start).or_fail("reading")?;
            self.ledger.admit(start, &bytes, View::Running)?;
        }
        self.extents(&(0..size), 1000)
    }

    /// Closes the image. In tolerant manner, and when that fails, what was not flushed is uncertain from now on.
    ///
    /// # Errors
    ///
    /// When it fails and must not.
    pub fn close(&mut self) -> Result<(), Failure> {
        let Some(subject) = self.subject.take() else {
            return Ok(());
        };
        match subject.close() {
            Ok(()) => {
                self.ledger.flushed();
                Ok(())
            }
            Err(refusal) => {
                self.ledger.forget_unflushed();
                self.refused(refusal)
            }
        }
    }

    /// How far the image may be from perfect once it is closed: a killed program leaves leaks.
    pub fn tolerance(&self) -> Tolerance {
        if self.killed {
            Tolerance::Recovered
        } else {
            Tolerance::Closed
        }
    }

    /// Opens the image again.
    ///
    /// # Errors
    ///
    /// When it does not open, in tolerant manner twice in a row. There it may stay closed for want of space.
    pub fn reopen(&mut self) -> Result<(), Failure> {
        self.lifeline = Lifeline::default();
        let held = Files {
            image: self.lifeline.hold(&self.files.image),
            data: self
                .files
                .data
                .as_ref()
                .map(|data| self.lifeline.hold(data)),
            ..self.files.clone()
        };
        let open = || self.engine.open(self.shape, &held, false);
        let subject = match (open(), self.manner) {
            (Ok(subject), _) => subject,
            (Err(refusal), Manner::Strict) => return Err(Failure::from(refusal).during("opening")),
            (Err(refusal), Manner::Tolerant) => {
                self.refusals.push(refusal);
                match open() {
                    Ok(subject) => subject,
                    // To recover an image takes space.
                    Err(refusal) if is_full(&refusal) => return Ok(()),
                    Err(refusal) => {
                        return Err(Failure::from(refusal).during("opening once more"));
                    }
                }
            }
        };
        let size = subject.disk().len().or_fail("asking for the size")?;
        if !self.ledger.sizes().contains(&size) {
            let sizes = self.ledger.sizes();
            return Err(Failure::new(format!(
                "the size is {size} after opening, not one of {sizes:?}"
            )));
        }
        if size != self.ledger.size() {
            self.ledger.settle_size(size);
        }
        self.subject = Some(subject);
        Ok(())
    }

    fn cut(&self, range: &Range<u64>) -> Range<u64> {
        let size = self.ledger.size();
        let start = range.start.min(size);
        start..range.end.clamp(start, size)
    }

    fn refused(&mut self, refusal: Refusal) -> Result<(), Failure> {
        if self.manner == Manner::Strict {
            return Err(refusal.into());
        }
        self.refusals.push(refusal);
        Ok(())
    }

    fn note(
        &mut self,
        range: &Range<u64>,
        content: Content,
        result: IoResult<()>,
    ) -> Result<(), Failure> {
        match result {
            Ok(()) => {
                self.ledger.add(range.clone(), content, State::Done);
                Ok(())
            }
            Err(error) => {
                self.ledger.add(range.clone(), content, State::Open);
                self.refused(error.into())
            }
        }
    }

    fn note_discard(&mut self, range: &Range<u64>, result: IoResult<()>) -> Result<(), Failure> {
        match result {
            Err(error)
                if error.kind() == StorageErrorKind::Unsupported && self.shape.cannot_discard() =>
            {
                Ok(())
            }
            result => self.note(range, Content::Zeros, result),
        }
    }

    fn discard_whole(&mut self, range: &Range<u64>) -> Result<(), Failure> {
        let result = self.subject().discard_whole(range.clone());
        if self.shape.cannot_discard() {
            return match result {
                Err(refusal) if refusal.kind != Some(StorageErrorKind::Unsupported) => {
                    self.refused(refusal)
                }
                _ => Ok(()),
            };
        }
        let cluster = self.shape.format.cluster_size();
        let whole = whole_clusters(range, cluster, self.ledger.size());
        let state = match &result {
            Ok(()) => State::Done,
            Err(_) => State::Open,
        };
        self.ledger.add(whole, Content::Zeros, state);
        result.or_else(|refusal| self.refused(refusal))
    }

    fn pack(&mut self, range: &Range<u64>, content: Content) -> Result<(), Failure> {
        // The disk may end elsewhere than when the range was made up.
        let cluster = self.shape.format.cluster_size();
        let end = range.end.next_multiple_of(cluster);
        let start = range.start / cluster * cluster;
        if start >= self.ledger.size() {
            return Ok(());
        }
        let range = &(start..end.min(self.ledger.size()));
        let bytes = content.bytes(range.start, length(range));
        let result = self.subject().pack(&bytes, range.start);
        let state = match &result {
            Ok(()) => State::Done,
            Err(_) => State::Open,
        };
        self.ledger.add(range.clone(), content, state);
        result.or_else(|refusal| self.refused(refusal))
    }

    fn resize(&mut self, size: u64, preallocation: Preallocation) -> Result<(), Failure> {
        let result = self.subject().resize(size, preallocation);
        let now = self.disk().len().or_fail("asking for the size")?;
        match result {
            Ok(()) => {
                self.ledger.resize(size, State::Done);
                if now != size {
                    let text = format!("the size is {now} after a resize to {size}");
                    return Err(Failure::new(text));
                }
                Ok(())
            }
            Err(refusal) => {
                let old = self.ledger.size();
                self.ledger.resize(size, State::Open);
                if now == size {
                    self.ledger.resize(size, State::Done);
                } else if now != old {
                    let text = format!("the size is {now} after a failed resize to {size}");
                    return Err(Failure::new(text));
                }
                self.refused(refusal)
                    .map_err(|failure| failure.during("resize"))
            }
        }
    }

    fn batch(&mut self, actions: &[Action]) -> Result<(), Failure> {
        let ranges: Vec<Range<u64>> = actions
            .iter()
            .map(|action| match action {
                Action::Write { range, .. }
                | Action::Zero { range, .. }
                | Action::Discard { range }
                | Action::Read { range, .. } => self.cut(range),
                _ => 0..0,
            })
            .collect();
        let mut buffers: Vec<Vec<u8>> = actions
            .iter()
            .zip(&ranges)
            .map(|(action, range)| match action {
                Action::Write { content, .. } => content.bytes(range.start, length(range)),
                Action::Read { .. } => vec![0xa5; length(range)],
                _ => Vec::new(),
            })
            .collect();
        let mut ops: Vec<Op<'_>> = Vec::new();
        for ((action, range), buffer) in actions.iter().zip(&ranges).zip(&mut buffers) {
            let offset = range.start;
            ops.push(match action {
                Action::Write { pieces, .. } => Op::new(Request::WriteVectored {
                    bufs: split(buffer, *pieces),
                    offset,
                }),
                Action::Zero { unmap, .. } => Op::write_zeroes(range.clone(), zero_flags(*unmap)),
                Action::Discard { .. } => Op::discard(range.clone()),
                Action::Read { pieces, .. } => Op::new(Request::ReadVectored {
                    bufs: split_mut(buffer, *pieces),
                    offset,
                }),
                _ => Op::discard(0..0),
            });
        }
        self.subject().disk().submit(&mut ops);
        let results: Vec<Option<IoResult<()>>> = ops.iter_mut().map(Op::take_result).collect();
        drop(ops);
        for (index, result) in results.into_iter().enumerate() {
            let range = &ranges[index];
            let result = result.ok_or_else(|| {
                Failure::new(format!("operation {index} of a batch has no result"))
            })?;
            match &actions[index] {
                Action::Write { content, .. } => self.note(range, *content, result),
                Action::Zero { .. } => self.note(range, Content::Zeros, result),
                Action::Discard { .. } => self.note_discard(range, result),
                Action::Read { .. } => match result {
                    Ok(()) => self
                        .ledger
                        .admit(range.start, &buffers[index], View::Running),
                    Err(error) => self.refused(error.into()),
                },
                _ => Ok(()),
            }?;
        }
        Ok(())
    }

    /// Asks for extents until the range is covered, and compares with the content.
    fn extents(&mut self, range: &Range<u64>, max: usize) -> Result<(), Failure> {
        let mut position = range.start;
        while position < range.end {
            let list = match self.disk().extents(position..range.end, max) {
                Ok(list) => list,
                Err(error) => return self.refused(error.into()),
            };
            if list.is_empty() || list.len() > max {
                let text = format!("{} extents from {position:#x} on", list.len());
                return Err(Failure::new(text));
            }
            for extent in list {
                if extent.offset != position || extent.len == 0 || extent.end() > range.end {
                    let text = format!("the extent {extent:?} does not go on from {position:#x}");
                    return Err(Failure::new(text));
                }
                if extent.depth as usize > self.shape.backing.len() {
                    let text = format!("the extent {extent:?} is from below the chain");
                    return Err(Failure::new(text));
                }
                if extent.kind.reads_as_zeros() {
                    let zeros = vec![0; extent.len as usize];
                    self.ledger
                        .admit(extent.offset, &zeros, View::Running)
                        .map_err(|failure| failure.during(format_args!("{extent:?}")))?;
                }
                position = extent.end();
            }
        }
        Ok(())
    }

    fn write_beyond(&mut self, past: u64) -> Result<(), Failure> {
        let size = self.ledger.size();
        let start = size.saturating_sub(700);
        let content = Content::Byte(0xee);
        let bytes = content.bytes(start, (size - start + past) as usize);
        match self.disk().write_at(&bytes, start) {
            Ok(()) => Err(Failure::new("a write past the end of the disk succeeded")),
            // Nothing of it may take place.
            Err(error) if error.kind() == StorageErrorKind::OutOfRange => Ok(()),
            Err(error) => {
                self.ledger.add(start..size, content, State::Open);
                self.refused(error.into())
            }
        }
    }
}

/// Whether an operation failed for want of space.
fn is_full(refusal: &Refusal) -> bool {
    matches!(
        refusal.kind,
        Some(StorageErrorKind::NoSpace | StorageErrorKind::OutOfRange)
    )
}

fn length(range: &Range<u64>) -> usize {
    (range.end - range.start) as usize
}

fn zero_flags(unmap: bool) -> ZeroFlags {
    if unmap {
        ZeroFlags::MAY_UNMAP
    } else {
        ZeroFlags::NONE
    }
}

fn write(disk: &dyn Storage, bytes: &[u8], offset: u64, pieces: u8) -> IoResult<()> {
    if pieces == 1 {
        return disk.write_at(bytes, offset);
    }
    disk.write_vectored_at(&split(bytes, pieces), offset)
}

fn read(disk: &dyn Storage, bytes: &mut [u8], offset: u64, pieces: u8) -> IoResult<()> {
    if pieces == 1 {
        return disk.read_at(bytes, offset);
    }
    disk.read_vectored_at(&mut split_mut(bytes, pieces), offset)
}

/// Lengths of `pieces` parts of `len` bytes; some of them empty.
fn parts(len: usize, pieces: u8) -> Vec<usize> {
    let mut random = Random::new(len as u64);
    let mut cuts: Vec<usize> = (1..pieces)
        .map(|_| random.below(len as u64 + 1) as usize)
        .collect();
    cuts.sort_unstable();
    cuts.push(len);
    let mut last = 0;
    cuts.into_iter()
        .map(|cut| cut - std::mem::replace(&mut last, cut))
        .collect()
}

fn split(bytes: &[u8], pieces: u8) -> Vec<IoSlice<'_>> {
    let mut rest = bytes;
    parts(bytes.len(), pieces)
        .into_iter()
        .map(|len| {
            let (part, tail) = rest.split_at(len);
            rest = tail;
            IoSlice::new(part)
        })
        .collect()
}

fn split_mut(bytes: &mut [u8], pieces: u8) -> Vec<IoSliceMut<'_>> {
    let lens = parts(bytes.len(), pieces);
    let mut rest = bytes;
    lens.into_iter()
        .map(|len| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(len);
            rest = tail;
            IoSliceMut::new(part)
        })
        .collect()
}
