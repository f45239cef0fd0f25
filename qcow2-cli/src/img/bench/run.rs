//! The requests themselves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use qcow2_io::Storage;
use rustix::io::Errno;

use crate::words::system;

/// Most threads that send requests.
const THREADS_MAX: u64 = 256;
/// Most bytes that the buffers of all threads may take, unless one alone is larger.
const BUFFERS_MAX: u64 = 1 << 30;

/// What is asked of a disk.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// Requests in all.
    pub(super) count: u64,
    /// Requests at once.
    pub(super) depth: u64,
    /// Bytes of a request.
    pub(super) bytes: u64,
    /// Where the first one begins; bytes.
    pub(super) offset: u64,
    /// How far behind it the next one does; bytes.
    pub(super) step: u64,
    /// Length of the disk in bytes.
    pub(super) disk: u64,
    /// They write.
    pub(super) writes: bool,
    /// What they write.
    pub(super) pattern: u8,
    /// A flush follows so many requests; 0 for none.
    pub(super) flush_interval: u64,
    /// It waits until no request is under way.
    pub(super) drains: bool,
    /// Each write is flushed.
    pub(super) flushes_each: bool,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            count: 75_000,
            depth: 64,
            bytes: 4096,
            offset: 0,
            step: 4096,
            disk: 0,
            writes: false,
            pattern: 0,
            flush_interval: 0,
            drains: true,
            flushes_each: false,
        }
    }
}

/// Requests that several threads work off.
struct Work<'a> {
    load: &'a Load,
    storage: &'a dyn Storage,
    next: AtomicU64,
    /// Held by requests; by a flush alone, where it drains.
    under_way: RwLock<()>,
    failed: Mutex<Option<String>>,
}

impl Load {
    /// Sends all requests, and tells how long they took. Stops at the first that fails, and tells why in the system's words.
    pub(super) fn run(&self, storage: &dyn Storage) -> Result<Duration, String> {
        let work = Work {
            load: self,
            storage,
            next: AtomicU64::new(0),
            under_way: RwLock::new(()),
            failed: Mutex::new(None),
        };
        let room = (BUFFERS_MAX / self.bytes.max(1)).max(1);
        let threads = self.depth.min(self.count).min(THREADS_MAX).min(room);
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 1..threads {
                // With fewer threads it takes longer.
                if thread::Builder::new()
                    .spawn_scoped(scope, || work.go_on())
                    .is_err()
                {
                    break;
                }
            }
            work.go_on();
        });
        let took = start.elapsed();
        let failed = work.failed.into_inner();
        failed
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(took), Err)
    }

    /// Where a request begins: what would lie behind the end of the disk starts again from its front.
    fn place(&self, number: u64) -> u64 {
        if number == 0 || self.disk == 0 {
            return self.offset;
        }
        let place = u128::from(self.offset) + u128::from(number) * u128::from(self.step);
        u64::try_from(place % u128::from(self.disk)).unwrap_or(0)
    }
}

impl Work<'_> {
    fn go_on(&self) {
        if let Err(text) = self.send() {
            let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
            failed.get_or_insert(text);
            self.next.store(self.load.count, Ordering::Relaxed);
        }
    }

    /// One thread's part.
    fn send(&self) -> Result<(), String> {
        let load = self.load;
        // Not before it is known to be of use.
        let mut buffer = Vec::new();
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= load.count {
                return Ok(());
            }
            let at = load.place(number);
            if at.checked_add(load.bytes).is_none_or(|end| end > load.disk) {
                return Err(system::text(Errno::IO));
            }
            if buffer.is_empty() {
                buffer = self.buffer()?;
            }
            self.request(&mut buffer, at)?;
            let is_due = (number + 1).is_multiple_of(load.flush_interval);
            if load.writes && is_due {
                self.flush()?;
            }
        }
    }

    fn buffer(&self) -> Result<Vec<u8>, String> {
        let len = usize::try_from(self.load.bytes).unwrap_or(usize::MAX);
        let mut buffer = Vec::new();
        buffer
            .try_reserve_exact(len)
            .map_err(|_| system::text(Errno::NOMEM))?;
        buffer.resize(len, self.load.pattern);
        Ok(buffer)
    }

    fn request(&self, buffer: &mut [u8], at: u64) -> Result<(), String> {
        let _pass = self
            .under_way
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut done = if self.load.writes {
            self.storage.write_at(buffer, at)
        } else {
            self.storage.read_at(buffer, at)
        };
        if self.load.flushes_each {
            done = done.and_then(|()| self.storage.flush());
        }
        done.map_err(|error| system::describe(&error))
    }

    fn flush(&self) -> Result<(), String> {
        let _alone = self.load.drains.then(|| {
            self.under_way
                .write()
                .unwrap_or_else(PoisonError::into_inner)
        });
        self.storage
            .flush()
            .map_err(|error| system::describe(&error))
    }
}

#[cfg(test)]
mod tests {
    use qcow2_io::{Event, Memory, Trace};

    use super::*;

    fn load() -> Load {
        Load {
            count: 10,
            depth: 3,
            bytes: 4096,
            step: 4096,
            disk: 1 << 20,
            writes: true,
            pattern: 7,
            ..Load::default()
        }
    }

    #[test]
    fn requests_are_as_many_and_where_they_should_be() {
        let disk = Memory::from(vec![0; 1 << 20]);
        let load = Load {
            offset: 1 << 19,
            step: 100_000,
            ..load()
        };
        load.run(&disk).unwrap();
        let mut expected = vec![0; 1 << 20];
        for number in 0..10 {
            let at = ((1 << 19) + number * 100_000) % (1 << 20);
            expected[at..at + 4096].fill(7);
        }
        let mut found = vec![0; 1 << 20];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found == expected);
    }

    #[test]
    fn flushes_follow_as_many_requests_as_asked_for() {
        for drains in [false, true] {
            let disk = Trace::new(Memory::from(vec![0; 1 << 20]));
            let load = Load {
                flush_interval: 4,
                drains,
                ..load()
            };
            load.run(&disk).unwrap();
            let events = disk.events();
            let flushes = events.iter().filter(|event| matches!(event, Event::Flush));
            assert_eq!(flushes.count(), 2);
        }
    }

    #[test]
    fn a_request_behind_the_end_fails_before_memory_is_asked_for() {
        let disk = Memory::from(vec![0; 1 << 20]);
        let beyond = Load {
            bytes: 1 << 40,
            ..load()
        };
        assert_eq!(beyond.run(&disk).unwrap_err(), "Input/output error");
        let nothing = Load { disk: 0, ..load() };
        assert_eq!(
            nothing.run(&Memory::new()).unwrap_err(),
            "Input/output error"
        );
    }
}
