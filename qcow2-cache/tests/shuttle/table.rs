use std::sync::{Arc, Mutex as StdMutex};

use qcow2_cache::{Room, TableCache};
use qcow2_format::HostOffset;
use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::thread;

use crate::explore::explore;

const SLICE: u64 = 512;

/// A cache of two slices over a file of three, and the file.
struct Disk {
    cache: TableCache,
    /// Nothing switches threads while it is held.
    file: StdMutex<Vec<u8>>,
    /// One writer of slices at a time.
    writer: Mutex<()>,
    /// Touching it lets others go first.
    point: AtomicU64,
}

impl Disk {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            cache: TableCache::new(SLICE as usize, 2),
            file: StdMutex::new(vec![0; 3 * SLICE as usize]),
            writer: Mutex::new(()),
            point: AtomicU64::new(0),
        })
    }

    fn word(&self, at: u64) -> u64 {
        let file = self.file.lock().unwrap();
        u64::from_be_bytes(file[at as usize..at as usize + 8].try_into().unwrap())
    }

    fn set_word(&self, at: u64, value: u64) {
        let mut file = self.file.lock().unwrap();
        file[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
    }

    fn load(&self, at: u64) {
        let room = self.cache.ensure(HostOffset::new(at), |offset, bytes| {
            self.point.load(Ordering::SeqCst);
            let from = offset.get() as usize;
            bytes.copy_from_slice(&self.file.lock().unwrap()[from..from + bytes.len()]);
            self.point.load(Ordering::SeqCst);
            Ok::<_, ()>(())
        });
        if room.unwrap() == Room::Full {
            self.write_back();
            // What is still in the way is being loaded or written by others.
            thread::yield_now();
        }
    }

    fn write_back(&self) {
        let _one = self.writer.lock().unwrap();
        for copy in self.cache.take_dirty() {
            self.point.load(Ordering::SeqCst);
            let from = copy.offset.get() as usize;
            self.file.lock().unwrap()[from..from + copy.bytes.len()].copy_from_slice(&copy.bytes);
            self.point.load(Ordering::SeqCst);
            self.cache.written(&copy);
        }
    }

    /// Adds one to both words at the start of a slice.
    fn count(&self, slice: u64) {
        let at = HostOffset::new(slice * SLICE);
        while self
            .cache
            .update(at, |words| {
                let (a, b) = (words.get(0), words.get(1));
                assert_eq!(a, b);
                words.set_pair(0, a + 1, b + 1);
            })
            .is_none()
        {
            self.load(at.get());
        }
    }

    fn pair(&self, slice: u64) -> u64 {
        let at = HostOffset::new(slice * SLICE);
        loop {
            if let Some((a, b)) = self.cache.get_pair(at) {
                assert_eq!(a, b, "a torn pair");
                return a;
            }
            self.load(at.get());
        }
    }
}

#[test]
fn no_update_is_lost_and_no_pair_torn_while_slices_come_and_go() {
    explore(1500, || {
        let disk = Disk::new();
        let counting = |slices: [u64; 3]| {
            let disk = disk.clone();
            thread::spawn(move || slices.into_iter().for_each(|slice| disk.count(slice)))
        };
        let one = counting([0, 1, 0]);
        let two = counting([2, 0, 1]);
        let reader = {
            let disk = disk.clone();
            thread::spawn(move || {
                let mut last = 0;
                for slice in [2, 1] {
                    let now = disk.pair(0);
                    assert!(now >= last, "went back from {last} to {now}");
                    last = now;
                    disk.pair(slice);
                    disk.cache.trim();
                }
                assert!(disk.pair(0) >= last);
            })
        };
        for thread in [one, two, reader] {
            thread.join().unwrap();
        }
        assert_eq!([disk.pair(0), disk.pair(1), disk.pair(2)], [3, 2, 1]);
        disk.write_back();
        assert_eq!(disk.cache.dirty_count(), 0);
        let counts = [0, 1, 2].map(|slice| disk.word(slice * SLICE));
        assert_eq!(counts, [3, 2, 1]);
    });
}

#[test]
fn updates_during_a_write_back_are_written_by_the_next() {
    explore(2000, || {
        let disk = Disk::new();
        let writer = {
            let disk = disk.clone();
            thread::spawn(move || (0..2).for_each(|_| disk.write_back()))
        };
        disk.count(0);
        disk.count(0);
        writer.join().unwrap();
        disk.write_back();
        assert_eq!(disk.word(0), 2);
        assert_eq!(disk.word(8), 2);
    });
}

#[test]
fn a_forgotten_slice_is_not_written_over_its_next_owner() {
    explore(2000, || {
        let disk = Disk::new();
        disk.count(0);
        let writer = {
            let disk = disk.clone();
            thread::spawn(move || disk.write_back())
        };
        let loader = {
            let disk = disk.clone();
            thread::spawn(move || disk.count(1))
        };
        disk.cache.forget(HostOffset::new(0), SLICE);
        assert_eq!(disk.cache.get(HostOffset::new(0)), None);
        disk.set_word(0, 77);
        disk.set_word(8, 77);
        writer.join().unwrap();
        loader.join().unwrap();
        disk.write_back();
        assert_eq!(disk.word(0), 77);
        assert_eq!(disk.pair(0), 77);
        assert_eq!(disk.word(SLICE), 1);
    });
}

#[test]
fn whoever_waits_for_a_load_that_fails_loads_by_himself() {
    explore(2000, || {
        let disk = Disk::new();
        disk.set_word(0, 5);
        disk.set_word(8, 5);
        let failing = {
            let disk = disk.clone();
            thread::spawn(move || {
                let room = disk.cache.ensure(HostOffset::new(0), |_, bytes| {
                    bytes.fill(0xff);
                    disk.point.load(Ordering::SeqCst);
                    Err("no such luck")
                });
                // Someone else may have been first.
                assert!(matches!(room, Err(_) | Ok(Room::Resident)));
            })
        };
        assert_eq!(disk.pair(0), 5);
        failing.join().unwrap();
        assert_eq!(disk.pair(0), 5);
    });
}

#[test]
fn a_load_that_panics_leaves_nobody_waiting() {
    explore(1000, || {
        let disk = Disk::new();
        let panicking = {
            let disk = disk.clone();
            thread::spawn(move || {
                let load = std::panic::AssertUnwindSafe(|| {
                    disk.cache
                        .ensure(HostOffset::new(0), |_, _| -> Result<(), ()> {
                            disk.point.load(Ordering::SeqCst);
                            std::panic::resume_unwind(Box::new("on purpose"))
                        })
                });
                let _either = std::panic::catch_unwind(load);
            })
        };
        assert_eq!(disk.pair(0), 0);
        panicking.join().unwrap();
    });
}
