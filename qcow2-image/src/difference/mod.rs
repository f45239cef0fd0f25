//! Differences: where two states of a disk are not the same.
//!
//! A state is any [`Chain`]: the active state of an image, one of its [snapshots](crate::ImageOptions::snapshot), an overlay, another
//! image, a raw disk. What both have from the same place of the same file is the same without a look at it, and so are two
//! stretches that read as zeros by what the tables say. The rest differs ([`Comparison::Structure`]), or is read and
//! compared ([`Comparison::Exact`]).
//!
//! [`export`] stores what differs in an overlay: opened over the old state it reads as the new one. That is an incremental backup.
//!
//! ```
//! use std::sync::Arc;
//! use qcow2_image::create::CreateOptions;
//! use qcow2_image::difference::{Changes, Comparison, ExportOptions, export};
//! use qcow2_image::{Image, SnapshotKey, SnapshotOptions};
//! use qcow2_io::{Memory, Storage};
//!
//! let file = Arc::new(Memory::new());
//! Image::create(&file, &CreateOptions::new(1 << 30))?;
//! let image = Image::options().open(file.clone())?;
//! image.write_at(&[1; 65536], 0)?;
//! image.create_snapshot(&SnapshotOptions::new("monday"))?;
//! image.write_at(&[2; 65536], 1 << 20)?;
//! image.flush()?;
//!
//! let monday = Image::options().snapshot(SnapshotKey::any("monday")).open(file)?;
//! let (old, new) = (monday.chain(), image.chain());
//! let changes = Changes::Between { old: &old, comparison: Comparison::Structure };
//! let backup = Arc::new(Memory::new());
//! Image::create(&backup, &CreateOptions::new(1 << 30).backing_file("monday.qcow2", "qcow2"))?;
//! let backup = Image::options().backing(Arc::new(Memory::new())).open(backup)?;
//! let report = export(&new, changes, &backup, &ExportOptions::new())?;
//! assert_eq!(report.stored_bytes, 65536);
//! backup.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod differ;
mod export;

use std::collections::VecDeque;
use std::ops::Range;

use crate::ImageError;
use crate::buffer::Pages;
use crate::buffer::is_zero;
use crate::chain::{Chain, ChainError};

pub(crate) use self::differ::{Differ, Verdict};
pub use self::export::{Changes, ExportOptions, export};

/// Bytes that are read of each state at a time.
const PIECE: u64 = 1 << 20;
/// The smallest piece that contents are compared in; bytes.
const GRAIN_MIN: u64 = 512;

/// How two states of a disk are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Comparison {
    /// By what the tables say alone; no guest data is read. What has been written since counts as different, also if it is
    /// the same as before.
    Structure,
    /// Where the tables don't say that it is the same, contents are read and compared, in pieces of so many bytes: a power of
    /// two from 512 to 1 MiB. A piece differs as a whole.
    Exact(u64),
}

/// A stretch where two states differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Whether the new state reads as zeros there, as far as that is known.
    pub is_zero: bool,
}

impl Difference {
    /// The first byte after it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// Where two states of a disk differ, in order; neighbours that are alike are one. The first error is the last item.
#[derive(Debug)]
pub struct Differences<'a> {
    differ: Differ<'a>,
    old: Chain<'a>,
    new: Chain<'a>,
    comparison: Comparison,
    at: u64,
    end: u64,
    /// Contents before this are compared.
    compared: u64,
    found: VecDeque<Difference>,
    /// The last one found, which the next may join.
    last: Option<Difference>,
    buffers: [Pages; 2],
}

impl<'a> Differences<'a> {
    /// The differences within a range, as far as the new state reaches. A shorter old state counts as if zeros followed it.
    ///
    /// Both states must stay as they are meanwhile. What one image has not flushed, another handle on its file does not see.
    ///
    /// # Errors
    ///
    /// Pieces of a size that is not allowed, and when a layer can't tell its length.
    pub fn new(
        old: &Chain<'a>,
        new: &Chain<'a>,
        range: Range<u64>,
        comparison: Comparison,
    ) -> Result<Self, ImageError> {
        if let Comparison::Exact(grain) = comparison
            && !(grain.is_power_of_two() && (GRAIN_MIN..=PIECE).contains(&grain))
        {
            return Err(ImageError::Option {
                option: "the size of pieces that are compared",
                value: grain.to_string(),
                why: "it is a power of two from 512 bytes to 1 MiB".to_owned(),
            });
        }
        let end = range.end.min(new.virtual_size()?);
        Ok(Self {
            differ: Differ::new(new, old, end)?,
            old: old.clone(),
            new: new.clone(),
            comparison,
            at: range.start,
            end,
            compared: range.start,
            found: VecDeque::new(),
            last: None,
            buffers: [Pages::EMPTY, Pages::EMPTY],
        })
    }

    fn advance(&mut self) -> Result<Option<Difference>, ChainError> {
        loop {
            while let Some(next) = self.found.pop_front() {
                match &mut self.last {
                    Some(last) if last.end() == next.offset && last.is_zero == next.is_zero => {
                        last.len += next.len;
                    }
                    last => {
                        if let Some(whole) = last.replace(next) {
                            return Ok(Some(whole));
                        }
                    }
                }
            }
            if self.at >= self.end {
                return Ok(self.last.take());
            }
            let start = self.at;
            let (verdict, stop) = self.differ.look(start, self.end)?;
            self.at = stop;
            let Verdict::Open { is_zero, .. } = verdict else {
                continue;
            };
            match self.comparison {
                Comparison::Structure => self.found.push_back(Difference {
                    offset: start,
                    len: stop - start,
                    is_zero,
                }),
                Comparison::Exact(grain) => {
                    let stop = stop.min((start / PIECE + 1) * PIECE);
                    self.at = stop.next_multiple_of(grain).min(self.end);
                    let from = (start / grain * grain).max(self.compared);
                    self.compare(from..self.at, grain)?;
                    self.compared = self.at;
                }
            }
        }
    }

    /// Reads a range of both states and notes which pieces of it differ.
    fn compare(&mut self, range: Range<u64>, grain: u64) -> Result<(), ChainError> {
        let (offset, len) = (range.start, range.end.saturating_sub(range.start));
        let [new, old] = &mut self.buffers;
        let disks = [
            (&self.new, &mut *new, "new state"),
            (&self.old, &mut *old, "old state"),
        ];
        for (chain, buffer, what) in disks {
            buffer.resize(usize::try_from(len).unwrap_or(0));
            let read = chain
                .storage()
                .map_or(Ok(()), |disk| disk.read_at(buffer, offset));
            read.map_err(|source| ChainError::Read {
                what,
                offset,
                len,
                source,
            })?;
        }
        let mut at = offset;
        while at < range.end {
            let end = ((at / grain + 1) * grain).min(range.end);
            let part = |bytes: &[u8]| -> Range<usize> {
                let index = |place: u64| usize::try_from(place - offset).unwrap_or(usize::MAX);
                index(at).min(bytes.len())..index(end).min(bytes.len())
            };
            let (a, b) = (new.get(part(new)), old.get(part(old)));
            if a != b {
                self.found.push_back(Difference {
                    offset: at,
                    len: end - at,
                    is_zero: a.is_some_and(is_zero),
                });
            }
            at = end;
        }
        Ok(())
    }
}

impl Iterator for Differences<'_> {
    type Item = Result<Difference, ChainError>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = self.advance();
        if result.is_err() {
            self.at = self.end;
            self.last = None;
        }
        result.transpose()
    }
}
