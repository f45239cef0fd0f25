//! Which piece comes next.

use std::collections::VecDeque;
use std::ops::Range;

use qcow2_io::{Extent, Storage};

use super::CopyError;
use super::salvage::{Lost, SECTOR};

/// Extents that the source is asked for at a time.
const BATCH: usize = 256;

/// A piece of work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Job {
    /// Its number in the order of the disk, from 0, among those that are to be worked on.
    pub(super) ticket: u64,
    /// Where on the disk. It starts at a multiple of the unit; what has data is no longer than a chunk.
    pub(super) range: Range<u64>,
    /// What has to be read, in order; all else is zeros.
    pub(super) data: Vec<Range<u64>>,
    /// The target keeps what it has there.
    pub(super) is_kept: bool,
}

impl Job {
    /// Bytes of the disk that it is about.
    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Something that is not zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    range: Range<u64>,
    /// It is in a layer that is left out.
    is_kept: bool,
}

/// How to divide.
#[derive(Clone, Copy, Debug)]
pub(super) struct Division {
    /// Bytes of a piece with data.
    pub(super) chunk: u64,
    /// Only multiples of this are left out; bytes.
    pub(super) unit: u64,
    /// Where to begin, a multiple of the chunk.
    pub(super) start: u64,
    /// Pieces without data are joined.
    pub(super) joins_zeros: bool,
    /// Pieces without data are no work, and get no number of their own.
    pub(super) passes_zeros: bool,
    /// Only what the uppermost layers have is copied.
    pub(super) layers: Option<u32>,
    /// Where the source does not tell what it has, it is taken to have data.
    pub(super) salvages: bool,
}

/// Divides the source into pieces, from front to back.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    source: &'a dyn Storage,
    /// Length of the source.
    len: u64,
    division: Division,
    at: u64,
    tickets: u64,
    /// Where the source has data, from `at` on and as far as it was asked.
    known: VecDeque<Known>,
    asked_until: u64,
    unmapped: Lost,
    /// How much is taken for data next if the source fails; bytes.
    blind: u64,
}

impl<'a> Plan<'a> {
    /// A plan for a source of `len` bytes.
    pub(super) fn new(source: &'a dyn Storage, len: u64, division: Division) -> Self {
        Self {
            source,
            len,
            division,
            at: division.start,
            tickets: 0,
            known: VecDeque::new(),
            asked_until: division.start,
            unmapped: Lost::default(),
            blind: SECTOR,
        }
    }

    /// The next piece; `None` behind the last.
    pub(super) fn next(&mut self) -> Result<Option<Job>, CopyError> {
        if self.at >= self.len {
            return Ok(None);
        }
        let start = self.at;
        let chunk = self.division.chunk;
        let mut end = self.len.min((start / chunk + 1).saturating_mul(chunk));
        while self.known.is_empty() && self.asked_until < self.len {
            self.ask()?;
        }
        let mut job = Job::default();
        match self.known.front() {
            Some(first) if first.is_kept && first.range.start <= start => {
                end = first.range.end;
                job.is_kept = true;
                self.known.pop_front();
            }
            Some(first) if first.range.start < end => {
                while self.asked_until < end {
                    self.ask()?;
                }
                let kept = self.known.iter().find(|known| known.is_kept);
                end = kept.map_or(end, |known| end.min(known.range.start));
                job.data = self.take(end);
            }
            first if self.division.joins_zeros => {
                end = match first {
                    Some(first) if first.is_kept => first.range.start,
                    Some(first) => first.range.start / chunk * chunk,
                    None => self.len,
                };
            }
            _ => {}
        }
        self.at = end;
        job.range = start..end;
        job.ticket = self.tickets;
        let is_passed = self.division.passes_zeros && job.data.is_empty();
        if !job.is_kept && !is_passed {
            self.tickets += 1;
        }
        Ok(Some(job))
    }

    /// Learns more of the source.
    fn ask(&mut self) -> Result<(), CopyError> {
        let (from, to) = (self.asked_until, self.len);
        let found = match self.source.extents(from..to, BATCH) {
            Ok(found) => found,
            Err(_) if self.division.salvages => match self.ask_less(from) {
                Some(found) => found,
                None => return Ok(()),
            },
            Err(error) => return Err(CopyError::source_at(from, to - from, error)),
        };
        self.blind = SECTOR;
        for extent in &found {
            let end = extent.end().min(to);
            if end > self.asked_until {
                let range = self.asked_until..end;
                let layers = self.division.layers;
                if layers.is_some_and(|layers| extent.depth >= layers) {
                    self.keep(range);
                } else if !extent.kind.reads_as_zeros() {
                    self.note(range, false);
                }
                self.asked_until = end;
            }
        }
        if self.asked_until == from {
            // One that says nothing would be asked for ever.
            self.note(from..to, false);
            self.asked_until = to;
        }
        Ok(())
    }

    /// Learns what it can of a source that fails somewhere: of ever shorter pieces, and takes the first sector for data that can't
    /// be asked about. Where one after the other can't, they are taken by twice as many each time, for there may be billions.
    fn ask_less(&mut self, from: u64) -> Option<Vec<Extent>> {
        let chunk = self.division.chunk;
        let end = self.len.min((from / chunk + 1).saturating_mul(chunk));
        let mut len = if self.blind == SECTOR {
            end - from
        } else {
            SECTOR.min(end - from)
        };
        loop {
            if let Ok(found) = self.source.extents(from..from + len, BATCH) {
                return Some(found);
            }
            if len <= SECTOR {
                break;
            }
            len = (len / 2).next_multiple_of(SECTOR);
        }
        let end = end.min((from / SECTOR * SECTOR).saturating_add(self.blind));
        self.note(from..end, false);
        self.unmapped.add(from..end);
        self.blind = (self.blind * 2).min(chunk.max(SECTOR));
        self.asked_until = end;
        None
    }

    /// Where the source could not tell whether it has data.
    pub(super) fn unmapped(&self) -> &Lost {
        &self.unmapped
    }

    /// Leaves out as much of a range as is whole units; the rest shows the same bytes, and is copied with its neighbours.
    fn keep(&mut self, range: Range<u64>) {
        let unit = self.division.unit;
        let start = range.start.next_multiple_of(unit);
        let end = if range.end == self.len {
            range.end
        } else {
            range.end / unit * unit
        };
        if start >= end {
            return self.note(range, false);
        }
        self.note(range.start..start, false);
        self.note(start..end, true);
        self.note(end..range.end, false);
    }

    fn note(&mut self, range: Range<u64>, is_kept: bool) {
        match self.known.back_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.range.end == range.start && last.is_kept == is_kept => {
                last.range.end = range.end;
            }
            _ => self.known.push_back(Known { range, is_kept }),
        }
    }

    /// Takes what is known to be data before `end`.
    fn take(&mut self, end: u64) -> Vec<Range<u64>> {
        let mut taken = Vec::new();
        while let Some(known) = self.known.front_mut() {
            let data = &mut known.range;
            if data.start >= end {
                break;
            }
            if data.end > end {
                taken.push(data.start..end);
                data.start = end;
                break;
            }
            taken.push(data.clone());
            self.known.pop_front();
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
        let division = Division {
            chunk,
            unit: 1,
            start: 0,
            joins_zeros,
            passes_zeros: false,
            layers: None,
            salvages: false,
        };
        let mut plan = Plan::new(&source, len, division);
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
