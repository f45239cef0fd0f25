//! Storing what differs in an overlay.

use std::fmt;
use std::ops::Range;

use qcow2_io::codec::Level;
use qcow2_io::{Null, Storage};

use super::{Comparison, Differ, Verdict};
use crate::chain::{Chain, ChainError, Transferred, Walker};
use crate::transfer::{Candidate, Candidates, Disks, Rival, Sink, Work, transfer};
use crate::{Image, ImageError, Monitor};

/// Which parts of the new state are stored.
pub enum Changes<'a> {
    /// Those that differ from an old state. With [`Comparison::Exact`], clusters of the target are compared, whatever piece it names.
    Between {
        /// The old state.
        old: &'a Chain<'a>,
        /// How they are compared.
        comparison: Comparison,
    },
    /// These, in order and apart: what a dirty bitmap says, for instance.
    Ranges(&'a mut (dyn Iterator<Item = Result<Range<u64>, ImageError>> + Send)),
}

impl fmt::Debug for Changes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Between { old, comparison } => f
                .debug_struct("Between")
                .field("old", old)
                .field("comparison", comparison)
                .finish(),
            Self::Ranges(_) => f.debug_struct("Ranges").finish_non_exhaustive(),
        }
    }
}

/// How differences are stored.
#[derive(Clone, Copy, Default)]
#[must_use]
pub struct ExportOptions<'a> {
    work: Work<'a>,
    compress: Option<Level>,
}

impl<'a> ExportOptions<'a> {
    /// The defaults: as many threads as there are processors, nothing compressed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Threads to work with, the caller's among them; 0, the default, means one for each processor.
    pub fn threads(mut self, threads: usize) -> Self {
        self.work.threads = threads;
        self
    }

    /// Compresses what is stored.
    pub fn compress(mut self, level: Level) -> Self {
        self.compress = Some(level);
        self
    }

    /// Looks at no more bytes of the disk a second, on average, where the tables don't tell what they are. 0, the default, means no
    /// limit.
    pub fn rate(mut self, bytes_per_second: u64) -> Self {
        self.work.rate = bytes_per_second;
        self
    }

    /// Who watches.
    pub fn monitor(mut self, monitor: &'a dyn Monitor) -> Self {
        self.work.monitor = Some(monitor);
        self
    }
}

impl fmt::Debug for ExportOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExportOptions")
            .field("threads", &self.work.threads)
            .field("rate", &self.work.rate)
            .field("compress", &self.compress)
            .finish_non_exhaustive()
    }
}

/// Stores the changed parts of a state in an overlay, in whole clusters (or subclusters, where it has some): where the new state
/// has zeros, as zero clusters. The overlay, opened over the old state, then reads as the new one.
///
/// The overlay must be new, and open with a [backing file](crate::ImageOptions::backing), for else it would not note zeros; any will do, as nothing
/// is read from it. A disk longer than that of the new state keeps what it has behind.
///
/// # Errors
///
/// [`ChainError::TooSmall`] for a target that is shorter than the new state; [`ImageError::Unsupported`] for one without a backing
/// file, or that can't be compressed; what the states and the target report. The target then has any part of it. The same export can be
/// done again, into the same target.
///
/// # Durability
///
/// None: [flush](Storage::flush) or [close](Image::close) the target. After a crash the target shows each byte of the old state or of the
/// new one, and the export can be done again.
pub fn export(
    new: &Chain<'_>,
    changes: Changes<'_>,
    target: &Image,
    options: &ExportOptions<'_>,
) -> Result<Transferred, ChainError> {
    let size = new.virtual_size()?;
    let target_len = target.virtual_size();
    if target_len < size {
        return Err(ChainError::TooSmall {
            source_len: size,
            target_len,
        });
    }
    if target.backing.is_none() {
        return Err(ChainError::Image(ImageError::Unsupported {
            what: "an overlay that is open without a backing file can't note where zeros take the place of data",
        }));
    }
    if options.compress.is_some() {
        let end = size.next_multiple_of(target.cluster_size()).min(target_len);
        target.check_compressible(0, end)?;
    }
    let none = Null::new();
    let mut other: &dyn Storage = &none;
    let mut between;
    let mut listed;
    let candidates: &mut dyn Candidates = match changes {
        Changes::Between { old, comparison } => {
            other = old.storage().unwrap_or(&none);
            between = Between {
                differ: Differ::new(new, old, size)?,
                exact: matches!(comparison, Comparison::Exact(_)),
                at: 0,
                end: size,
            };
            &mut between
        }
        Changes::Ranges(ranges) => {
            listed = Listed {
                walker: Walker::new(new, size)?,
                ranges,
                rest: 0..0,
            };
            &mut listed
        }
    };
    let disks = Disks {
        source: new.storage().unwrap_or(&none),
        source_name: "new state",
        other,
        other_name: "old state",
        target: Sink::Gaps(target, options.compress),
        target_name: "overlay",
        size,
        dense_below: 0,
    };
    transfer(disks, candidates, options.work)
}

/// What differs between two states.
struct Between<'a> {
    differ: Differ<'a>,
    exact: bool,
    at: u64,
    end: u64,
}

impl Candidates for Between<'_> {
    fn next(&mut self) -> Result<Option<Candidate>, ChainError> {
        while self.at < self.end {
            let start = self.at;
            let (verdict, stop) = self.differ.look(start, self.end)?;
            self.at = stop;
            let Verdict::Open {
                is_zero,
                other_is_zero,
            } = verdict
            else {
                continue;
            };
            let rival = match (self.exact, other_is_zero) {
                (false, _) => Rival::None,
                (true, true) => Rival::Zeros,
                (true, false) => Rival::Data,
            };
            return Ok(Some(Candidate {
                range: start..stop,
                is_zero,
                rival,
            }));
        }
        Ok(None)
    }
}

/// What someone else knows to have changed.
struct Listed<'a> {
    walker: Walker<'a>,
    ranges: &'a mut (dyn Iterator<Item = Result<Range<u64>, ImageError>> + Send),
    rest: Range<u64>,
}

impl Candidates for Listed<'_> {
    fn next(&mut self) -> Result<Option<Candidate>, ChainError> {
        while self.rest.is_empty() {
            let Some(next) = self.ranges.next() else {
                return Ok(None);
            };
            let next = next?;
            // What lies before has been dealt with, or is out of order.
            self.rest = next.start.max(self.rest.end)..next.end.min(self.walker.len());
        }
        let start = self.rest.start;
        let (found, run) = self.walker.look(start, self.rest.end)?;
        self.rest.start = start + run;
        Ok(Some(Candidate {
            range: start..start + run,
            is_zero: found.local.reads_as_zeros(),
            rival: Rival::None,
        }))
    }
}
