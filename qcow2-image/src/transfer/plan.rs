//! Which piece comes next.

use std::ops::Range;

use super::{Candidate, Candidates, Rival};
use crate::chain::ChainError;

/// What a thread works on at a time, at least a unit; bytes.
const CHUNK: u64 = 1 << 20;
/// Zeros that need no look are stored in pieces of at most this many bytes, so that the work can be cancelled in between.
const ZERO_MAX: u64 = 1 << 30;

/// A piece of work: some tasks that touch no unit of another piece.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) tasks: Vec<Candidate>,
    /// Bytes of the disk that are through with it.
    pub(super) len: u64,
}

/// Cuts candidates into pieces of whole units.
pub(super) struct Plan<'a> {
    candidates: &'a mut dyn Candidates,
    unit: u64,
    chunk: u64,
    size: u64,
    pending: Option<Candidate>,
    /// All before is given out.
    at: u64,
}

impl<'a> Plan<'a> {
    /// A plan for a disk of `size` bytes; `unit` is a power of two.
    pub(super) fn new(candidates: &'a mut dyn Candidates, unit: u64, size: u64) -> Self {
        Self {
            candidates,
            unit,
            chunk: CHUNK.max(unit),
            size,
            pending: None,
            at: 0,
        }
    }

    /// Puts the next candidate into `pending`, unless there is one.
    fn pend(&mut self) -> Result<Option<&mut Candidate>, ChainError> {
        while self.pending.is_none() {
            let Some(mut next) = self.candidates.next()? else {
                return Ok(None);
            };
            next.range.end = next.range.end.min(self.size);
            if !next.range.is_empty() {
                self.pending = Some(next);
            }
        }
        Ok(self.pending.as_mut())
    }

    /// The next piece; `None` behind the last.
    pub(super) fn next(&mut self) -> Result<Option<Job>, ChainError> {
        let (unit, chunk, size) = (self.unit, self.chunk, self.size);
        let Some(first) = self.pend()? else {
            return Ok(None);
        };
        let start = first.range.start / chunk * chunk;
        let mut end = size.min(start.saturating_add(chunk));
        if first.is_zero
            && first.rival == Rival::None
            && first.range.start == start
            && first.range.end >= end
        {
            let long = first.range.end.min(start.saturating_add(ZERO_MAX));
            end = if long == size {
                size
            } else {
                (long / chunk * chunk).max(end)
            };
            let task = Candidate {
                range: start..end,
                ..first.clone()
            };
            self.consume(end);
            return Ok(Some(self.job(vec![task], end)));
        }
        let units = usize::try_from((end - start).div_ceil(unit)).unwrap_or(0);
        let mut states: Vec<Option<(bool, Rival)>> = vec![None; units];
        while let Some(next) = self.pend()? {
            if next.range.start >= end {
                break;
            }
            let part = next.range.start..next.range.end.min(end);
            let (is_zero, rival) = (next.is_zero, next.rival);
            let first = usize::try_from((part.start - start) / unit).unwrap_or(usize::MAX);
            let first_at = part.start / unit * unit;
            for (state, at) in states
                .iter_mut()
                .skip(first)
                .zip((first_at..part.end).step_by(usize::try_from(unit).unwrap_or(usize::MAX)))
            {
                let unit_end = (at + unit).min(size);
                let is_whole = part.start <= at && unit_end <= part.end;
                *state = Some(match *state {
                    None if is_whole => (is_zero, rival),
                    // The rest of the unit may be anything.
                    None => (false, rival.max(Rival::Data)),
                    Some((_, other)) => (false, rival.max(other).max(Rival::Data)),
                });
            }
            let stop = part.end;
            self.consume(stop);
        }
        let mut tasks: Vec<Candidate> = Vec::new();
        let step = usize::try_from(unit).unwrap_or(usize::MAX);
        for (state, at) in states.into_iter().zip((start..end).step_by(step)) {
            let Some((is_zero, rival)) = state else {
                continue;
            };
            let range = at..(at + unit).min(end);
            match tasks.last_mut() {
                Some(last)
                    if last.range.end == at && (last.is_zero, last.rival) == (is_zero, rival) =>
                {
                    last.range.end = range.end;
                }
                _ => tasks.push(Candidate {
                    range,
                    is_zero,
                    rival,
                }),
            }
        }
        Ok(Some(self.job(tasks, end)))
    }

    /// What is pending is given out up to `end`.
    fn consume(&mut self, end: u64) {
        if let Some(pending) = &mut self.pending {
            pending.range.start = pending.range.start.max(end);
            if pending.range.is_empty() {
                self.pending = None;
            }
        }
    }

    fn job(&mut self, tasks: Vec<Candidate>, end: u64) -> Job {
        let len = end - self.at;
        self.at = end;
        Job { tasks, len }
    }

    /// Bytes behind the last piece.
    pub(super) fn rest(&mut self) -> u64 {
        let rest = self.size.saturating_sub(self.at);
        self.at = self.size;
        rest
    }
}

/// The pieces of a range that end at multiples of `grain`, and at its end.
pub(super) fn grains(range: Range<u64>, grain: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        (at < range.end).then(|| {
            let start = at;
            at = ((at / grain).saturating_add(1).saturating_mul(grain)).min(range.end);
            start..at
        })
    })
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    struct List(Vec<Candidate>);

    impl Candidates for List {
        fn next(&mut self) -> Result<Option<Candidate>, ChainError> {
            Ok((!self.0.is_empty()).then(|| self.0.remove(0)))
        }
    }

    fn candidate(range: Range<u64>, is_zero: bool, rival: Rival) -> Candidate {
        Candidate {
            range,
            is_zero,
            rival,
        }
    }

    fn plan(list: Vec<Candidate>, unit: u64, size: u64) -> Vec<Job> {
        let mut list = List(list);
        let mut plan = Plan::new(&mut list, unit, size);
        let mut jobs: Vec<Job> = std::iter::from_fn(|| plan.next().unwrap()).collect();
        jobs.push(Job {
            tasks: Vec::new(),
            len: plan.rest(),
        });
        assert_eq!(jobs.iter().map(|job| job.len).sum::<u64>(), size);
        jobs
    }

    #[test]
    fn tasks_are_whole_units_and_parts_of_units_are_compared_as_a_whole() {
        let jobs = plan(
            vec![
                candidate(0..4096, false, Rival::Zeros),
                candidate(4096..4608, false, Rival::Zeros),
                candidate(5000..5100, true, Rival::Data),
                candidate(8192..8200, true, Rival::Data),
                candidate(12_288..16_384, true, Rival::Data),
                candidate(20_480..20_580, false, Rival::Zeros),
            ],
            4096,
            20_580,
        );
        assert_eq!(
            jobs[0].tasks,
            [
                candidate(0..4096, false, Rival::Zeros),
                candidate(4096..12_288, false, Rival::Data),
                candidate(12_288..16_384, true, Rival::Data),
                candidate(20_480..20_580, false, Rival::Zeros),
            ]
        );
        assert_eq!(jobs.len(), 2);
    }

    #[test]
    fn long_candidates_are_cut_and_long_zeros_are_not() {
        let size = 3 << 30;
        let jobs = plan(
            vec![
                candidate(512..5 << 20, false, Rival::Data),
                candidate(5 << 20..(2 << 30) + 512, true, Rival::None),
            ],
            512,
            size,
        );
        assert_eq!(jobs[0].tasks[0].range, 512..1 << 20);
        assert_eq!(jobs[4].tasks[0].range, 4 << 20..5 << 20);
        let zeros: Vec<_> = jobs[5..].iter().flat_map(|job| &job.tasks).collect();
        assert_eq!(zeros[0].range, 5 << 20..(1 << 30) + (5 << 20));
        assert_eq!(zeros[1].range, (1 << 30) + (5 << 20)..2 << 30);
        assert_eq!(zeros[2].range, 2 << 30..(2 << 30) + 512);
        assert_eq!(zeros.len(), 3);
    }

    #[test]
    fn grains_end_at_multiples() {
        let all: Vec<_> = grains(100..1000, 256).collect();
        assert_eq!(all, [100..256, 256..512, 512..768, 768..1000]);
        assert_eq!(grains(7..7, 8).count(), 0);
    }
}
