//! Which piece comes next.

use std::collections::VecDeque;
use std::ops::Range;

use qcow2_io::Storage;

use super::CopyError;

/// Extents that the source is asked for at a time.
const BATCH: usize = 256;

/// A piece of work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Job {
    /// Its number in the order of the disk, from 0, among those that are to be worked on.
    pub(super) ticket: u64,
    /// Where on the disk. It starts at a multiple of the chunk size; what has data is no longer than a chunk.
    pub(super) range: Range<u64>,
    /// What has to be read, in order; all else is zeros.
    pub(super) data: Vec<Range<u64>>,
}

impl Job {
    /// Bytes of the disk that it is about.
    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Divides the source into pieces, from front to back.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    source: &'a dyn Storage,
    /// Length of the source.
    len: u64,
    chunk: u64,
    /// Pieces without data are joined.
    joins_zeros: bool,
    /// Pieces without data are no work, and get no number of their own.
    passes_zeros: bool,
    at: u64,
    tickets: u64,
    /// Where the source has data, from `at` on and as far as it was asked.
    known: VecDeque<Range<u64>>,
    asked_until: u64,
}

impl<'a> Plan<'a> {
    /// A plan for a source of `len` bytes.
    pub(super) fn new(source: &'a dyn Storage, len: u64, chunk: u64, joins_zeros: bool) -> Self {
        Self {
            source,
            len,
            chunk,
            joins_zeros,
            passes_zeros: false,
            at: 0,
            tickets: 0,
            known: VecDeque::new(),
            asked_until: 0,
        }
    }

    /// Those who do the work pass over pieces without data.
    pub(super) fn passing_zeros(mut self, on: bool) -> Self {
        self.passes_zeros = on;
        self
    }

    /// The next piece; `None` behind the last.
    pub(super) fn next(&mut self) -> Result<Option<Job>, CopyError> {
        if self.at >= self.len {
            return Ok(None);
        }
        let start = self.at;
        let mut end = self.len.min(start.saturating_add(self.chunk));
        while self.known.is_empty() && self.asked_until < self.len {
            self.ask()?;
        }
        let first = self.known.front().map_or(self.len, |data| data.start);
        let data = if first < end {
            while self.asked_until < end {
                self.ask()?;
            }
            self.take(end)
        } else {
            if self.joins_zeros {
                end = if first < self.len {
                    first / self.chunk * self.chunk
                } else {
                    self.len
                };
            }
            Vec::new()
        };
        self.at = end;
        let ticket = self.tickets;
        if !(self.passes_zeros && data.is_empty()) {
            self.tickets += 1;
        }
        Ok(Some(Job {
            ticket,
            range: start..end,
            data,
        }))
    }

    /// Learns more of the source.
    fn ask(&mut self) -> Result<(), CopyError> {
        let (from, to) = (self.asked_until, self.len);
        let found = self.source.extents(from..to, BATCH);
        let found = found.map_err(|error| CopyError::source_at(from, to - from, error))?;
        for extent in &found {
            let end = extent.end().min(to);
            if end > self.asked_until {
                if !extent.kind.reads_as_zeros() {
                    self.note_data(self.asked_until..end);
                }
                self.asked_until = end;
            }
        }
        if self.asked_until == from {
            // One that says nothing would be asked for ever.
            self.note_data(from..to);
            self.asked_until = to;
        }
        Ok(())
    }

    fn note_data(&mut self, range: Range<u64>) {
        match self.known.back_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.known.push_back(range),
        }
    }

    /// Takes what is known to be data before `end`.
    fn take(&mut self, end: u64) -> Vec<Range<u64>> {
        let mut taken = Vec::new();
        while let Some(data) = self.known.front_mut() {
            if data.start >= end {
                break;
            }
            if data.end > end {
                taken.push(data.start..end);
                data.start = end;
                break;
            }
            taken.extend(self.known.pop_front());
        }
        taken
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use qcow2_io::{Extent, ExtentKind, Memory, Result as StorageResult, ZeroFlags};

    use super::*;

    /// Tells of extents of a fixed length in turn: data, zeros, data…
    #[derive(Debug)]
    struct Striped {
        memory: Memory,
        stripe: u64,
    }

    impl Storage for Striped {
        fn len(&self) -> StorageResult<u64> {
            self.memory.len()
        }
        fn read_vectored_at(
            &self,
            bufs: &mut [std::io::IoSliceMut<'_>],
            offset: u64,
        ) -> StorageResult<()> {
            self.memory.read_vectored_at(bufs, offset)
        }
        fn write_vectored_at(
            &self,
            bufs: &[std::io::IoSlice<'_>],
            offset: u64,
        ) -> StorageResult<()> {
            self.memory.write_vectored_at(bufs, offset)
        }
        fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> StorageResult<()> {
            self.memory.write_zeroes(range, flags)
        }
        fn discard(&self, range: Range<u64>) -> StorageResult<()> {
            self.memory.discard(range)
        }
        fn flush(&self) -> StorageResult<()> {
            self.memory.flush()
        }
        fn set_len(&self, len: u64) -> StorageResult<()> {
            self.memory.set_len(len)
        }
        fn extents(&self, range: Range<u64>, max: usize) -> StorageResult<Vec<Extent>> {
            let kind = |number: u64| match number % 2 {
                0 => ExtentKind::Data,
                _ => ExtentKind::Hole,
            };
            let mut at = range.start;
            let found = std::iter::from_fn(|| {
                let start = at;
                at = (at / self.stripe + 1) * self.stripe;
                let len = at
                    .min(range.end)
                    .checked_sub(start)
                    .filter(|len| *len > 0)?;
                Some(Extent::new(start, len, kind(start / self.stripe)))
            });
            Ok(found.take(max).collect())
        }
    }

    fn jobs(stripe: u64, len: u64, chunk: u64, joins_zeros: bool) -> Vec<Job> {
        let memory = Memory::with_len(len).unwrap();
        let source = Striped { memory, stripe };
        let mut plan = Plan::new(&source, len, chunk, joins_zeros);
        std::iter::from_fn(|| plan.next().unwrap()).collect()
    }

    #[test]
    fn pieces_cover_the_disk_and_data_is_what_the_source_says() {
        for (stripe, len, chunk) in [
            (10, 1000, 64),
            (64, 1000, 64),
            (100, 1001, 64),
            (333, 5000, 64),
            (1, 3000, 1024),
        ] {
            for joins in [false, true] {
                let mut at = 0;
                let mut is_data = vec![false; 5000];
                for (number, job) in (0..).zip(jobs(stripe, len, chunk, joins)) {
                    assert_eq!((job.ticket, job.range.start), (number, at));
                    assert!(at % chunk == 0 && job.range.end > at);
                    assert!(job.data.is_empty() || job.len() <= chunk);
                    for data in &job.data {
                        assert!(data.start >= at && data.end <= job.range.end);
                        let [from, to] =
                            [data.start, data.end].map(|at| usize::try_from(at).unwrap());
                        is_data[from..to].fill(true);
                    }
                    at = job.range.end;
                }
                assert_eq!(at, len);
                for (at, is_data) in (0..len).zip(is_data) {
                    assert_eq!(is_data, at / stripe % 2 == 0, "{at}, stripes of {stripe}");
                }
            }
        }
    }

    #[test]
    fn long_zeros_are_one_piece_where_that_is_wanted() {
        let found = jobs(1 << 40, 3 << 40, 1 << 38, true);
        // Four of data, all zeros, four of data.
        assert_eq!(found.len(), 9);
        assert_eq!(found[4].len(), 1 << 40);
        assert!(found[4].data.is_empty());
        assert_eq!(jobs(1 << 40, 3 << 40, 1 << 38, false).len(), 12);
    }
}
