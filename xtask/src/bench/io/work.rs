//! Many requests to one disk, by one or more threads.

use std::sync::Barrier;
use std::thread;

use anyhow::{Result, bail};

use super::clock::{self, Clock, Lap, Stopwatch};
use super::disk::Disk;

/// Requests of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) kind: Kind,
    pub(super) order: Order,
    /// Bytes of a request, and what its offset is a multiple of.
    pub(super) size: usize,
    /// Requests that each thread makes.
    pub(super) count: u32,
    pub(super) threads: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Read,
    Write,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    /// Each place as likely as any other.
    Random,
    /// Each turn goes on where the one before has stopped, and from the start again behind the end.
    Sequential,
}

impl Work {
    /// Does it on a disk of `len` bytes. The same turn makes the same requests on every disk. Requests per second.
    pub(super) fn rate(&self, clock: Clock, disk: &impl Disk, len: u64, turn: u32) -> Result<f64> {
        let laps = if self.threads == 1 {
            vec![self.one(disk, len, turn, 0, None)?]
        } else {
            self.together(disk, len, turn)?
        };
        Ok(clock::rate(clock, self.count, &laps))
    }

    fn together(&self, disk: &impl Disk, len: u64, turn: u32) -> Result<Vec<Lap>> {
        let gate = &Barrier::new(usize::try_from(self.threads)?);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|thread| scope.spawn(move || self.one(disk, len, turn, thread, Some(gate))))
                .collect();
            let mut laps = Vec::new();
            for thread in threads {
                match thread.join() {
                    Ok(lap) => laps.push(lap?),
                    Err(_) => bail!("a thread panicked"),
                }
            }
            Ok(laps)
        })
    }

    /// The part of one thread.
    fn one(
        &self,
        disk: &impl Disk,
        len: u64,
        turn: u32,
        thread: u32,
        gate: Option<&Barrier>,
    ) -> Result<Lap> {
        let size = self.size as u64;
        let places = len / size;
        let mut random = Random::new((u64::from(turn) << 32) | u64::from(thread));
        let first = u64::from(turn) * u64::from(self.count);
        let mut buffer = Buffer::new(self.size);
        let buf = buffer.bytes();
        // The same of all threads, so that it doesn't matter whose write is the last.
        buf.fill(u8::try_from(turn % 251)?);
        if let Some(gate) = gate {
            gate.wait();
        }
        let watch = Stopwatch::start();
        for request in 0..self.count {
            let place = match self.order {
                Order::Random => random.below(places),
                Order::Sequential => (first + u64::from(request)) % places,
            };
            match self.kind {
                Kind::Read => disk.read(buf, place * size)?,
                Kind::Write => disk.write(buf, place * size)?,
            }
        }
        Ok(watch.lap())
    }
}

/// A buffer that starts on a page, as those of guests do: how fast it is copied depends on that.
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    pub(super) fn new(len: usize) -> Self {
        const PAGE: usize = 4096;
        // Written, so that no page is a shared one of zeros.
        let bytes = vec![1; len + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE).min(PAGE);
        Self { bytes, start, len }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.bytes
            .get_mut(self.start..self.start + self.len)
            .unwrap_or_default()
    }
}

/// Numbers without a pattern (splitmix64), the same for the same seed.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`; 0 if that is 0.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        let high = (u128::from(self.next()) * u128::from(end)) >> 64;
        u64::try_from(high).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers where requests went.
    #[derive(Default)]
    struct Log(Mutex<Vec<u64>>);

    impl Disk for Log {
        fn read(&self, _: &mut [u8], offset: u64) -> Result<()> {
            self.0.lock().unwrap().push(offset);
            Ok(())
        }

        fn write(&self, _: &[u8], _: u64) -> Result<()> {
            bail!("read-only")
        }
    }

    const WORK: Work = Work {
        kind: Kind::Read,
        order: Order::Random,
        size: 512,
        count: 100,
        threads: 1,
    };

    #[test]
    fn a_turn_makes_the_same_requests_on_every_disk() {
        let logged = |turn, threads| {
            let log = Log::default();
            let work = Work { threads, ..WORK };
            assert!(work.rate(Clock::Wall, &log, 1 << 20, turn).unwrap() > 0.0);
            let mut log = log.0.into_inner().unwrap();
            log.sort_unstable();
            log
        };
        assert_eq!(logged(3, 1), logged(3, 1));
        assert_ne!(logged(3, 1), logged(4, 1));
        let two = logged(3, 2);
        assert_eq!(two, logged(3, 2));
        assert_eq!(two.len(), 200);
        assert!(
            two.iter()
                .all(|offset| offset % 512 == 0 && *offset < 1 << 20)
        );
    }

    #[test]
    fn sequential_turns_go_on_and_wrap_around() {
        let log = Log::default();
        let work = Work {
            order: Order::Sequential,
            count: 3,
            ..WORK
        };
        for turn in 0..2 {
            work.rate(Clock::Wall, &log, 4 * 512, turn).unwrap();
        }
        assert_eq!(*log.0.lock().unwrap(), [0, 512, 1024, 1536, 0, 512]);
    }

    #[test]
    fn an_error_of_a_thread_is_told() {
        for threads in [1, 2] {
            let work = Work {
                kind: Kind::Write,
                threads,
                ..WORK
            };
            assert!(work.rate(Clock::Wall, &Log::default(), 1 << 20, 0).is_err());
        }
    }

    #[test]
    fn buffers_start_on_a_page() {
        let mut buffer = Buffer::new(512);
        assert_eq!(buffer.bytes().len(), 512);
        assert_eq!(buffer.bytes().as_ptr().align_offset(4096), 0);
    }
}
