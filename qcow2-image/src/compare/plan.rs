//! Which piece is compared next.

use std::ops::Range;

use qcow2_io::Storage;

use super::view::View;
use super::{CompareError, CompareOptions, Side};

/// What is passed over without work before others get their turn.
const STEPS: usize = 4096;

/// A piece of both disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) range: Range<u64>,
    /// Which of them may have something else than zeros there; not both are `false`.
    pub(super) reads: [bool; 2],
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Job(Job),
    /// So many bytes are zeros on both sides.
    Passed(u64),
    /// The disks are not allocated in the same way from here on.
    Allocation(u64),
    End,
}

/// Divides two disks into pieces, from front to back.
pub(super) struct Plan<'a> {
    first: View<'a>,
    second: View<'a>,
    at: u64,
    chunk: u64,
    strict: bool,
}

impl<'a> Plan<'a> {
    pub(super) fn new(
        first: (&'a dyn Storage, u64),
        second: (&'a dyn Storage, u64),
        chunk: u64,
        options: &CompareOptions<'_>,
    ) -> Self {
        Self {
            first: View::new(first.0, Side::First, first.1),
            second: View::new(second.0, Side::Second, second.1),
            at: 0,
            chunk,
            strict: options.strict,
        }
    }

    /// Length of the longer disk.
    pub(super) fn len(&self) -> u64 {
        self.first.len.max(self.second.len)
    }

    pub(super) fn next(&mut self) -> Result<Next, CompareError> {
        let start = self.at;
        for _ in 0..STEPS {
            if self.at >= self.len() {
                break;
            }
            let (a, a_end) = self.first.at(self.at)?;
            let (b, b_end) = self.second.at(self.at)?;
            let end = a_end.min(b_end).min(self.len());
            if self.strict && a != b {
                return Ok(match self.at - start {
                    0 => Next::Allocation(self.at),
                    passed => Next::Passed(passed),
                });
            }
            let reads = [a, b].map(|kind| !kind.reads_as_zeros());
            if reads == [false, false] {
                self.at = end;
                continue;
            }
            if self.at > start {
                return Ok(Next::Passed(self.at - start));
            }
            self.at = end.min(start.saturating_add(self.chunk));
            return Ok(Next::Job(Job {
                range: start..self.at,
                reads,
            }));
        }
        Ok(match self.at - start {
            0 => Next::End,
            passed => Next::Passed(passed),
        })
    }
}
