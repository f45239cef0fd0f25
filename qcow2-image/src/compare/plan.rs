//! Which piece is compared next.

use std::ops::Range;

use super::CompareError;
use super::view::View;

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
    /// So many bytes are the same on both sides.
    Passed(u64),
    /// The disks are not allocated in the same way from here on.
    Allocation(u64),
    End,
}

/// Divides a section of two disks into pieces, from front to back.
pub(super) struct Plan<'a> {
    first: View<'a>,
    second: View<'a>,
    /// Layers may be the same.
    shares: bool,
    at: u64,
    end: u64,
    chunk: u64,
    strict: bool,
}

impl<'a> Plan<'a> {
    pub(super) fn new(
        [first, second]: [View<'a>; 2],
        section: Range<u64>,
        shares: bool,
        chunk: u64,
        strict: bool,
    ) -> Self {
        Self {
            shares,
            first,
            second,
            at: section.start,
            end: section.end,
            chunk,
            strict,
        }
    }

    /// All before this has been given out.
    pub(super) fn position(&self) -> u64 {
        self.at
    }

    pub(super) fn next(&mut self) -> Result<Next, CompareError> {
        let start = self.at;
        for _ in 0..STEPS {
            if self.at >= self.end {
                break;
            }
            if self.shares
                && let Some(stop) = self.first.same_until(&self.second, self.at)
            {
                self.at = stop.min(self.end);
                continue;
            }
            let (a, a_end) = self.first.at(self.at)?;
            let (b, b_end) = self.second.at(self.at)?;
            let end = a_end.min(b_end).min(self.end);
            if self.strict && a.state != b.state {
                return Ok(match self.at - start {
                    0 => Next::Allocation(self.at),
                    passed => Next::Passed(passed),
                });
            }
            let reads = [a, b].map(|look| !look.state.reads_as_zeros());
            if reads == [false, false] || (self.shares && self.first.is_same(a, &self.second, b)) {
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
