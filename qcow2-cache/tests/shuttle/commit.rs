use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex as StdMutex};

use qcow2_cache::GroupCommit;
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::thread;

use crate::explore::explore;

/// When a run began, and how it ended.
struct Run {
    begun: u64,
    failed: bool,
}

#[derive(Default)]
struct Log {
    commit: GroupCommit<u64>,
    clock: AtomicU64,
    under_way: AtomicU64,
    runs: StdMutex<Vec<Run>>,
}

impl Log {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// One caller. The runs that `fails` picks, by their number, fail.
    fn call(&self, fails: fn(u64) -> bool) {
        let asked = self.now();
        let result = self.commit.run(|| self.work(fails), |error| *error);
        let runs = self.runs.lock().unwrap();
        let covered = runs
            .iter()
            .any(|run| run.begun > asked && run.failed == result.is_err());
        assert!(covered, "no run that began after {asked} gave {result:?}");
        if let Err(begun) = result {
            assert!(begun > asked, "the error of a run from before");
        }
    }

    fn work(&self, fails: fn(u64) -> bool) -> Result<(), u64> {
        assert_eq!(self.under_way.fetch_add(1, Ordering::SeqCst), 0);
        let begun = self.now();
        let number = self.runs.lock().unwrap().len() as u64;
        let failed = fails(number);
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        self.runs.lock().unwrap().push(Run { begun, failed });
        if failed { Err(begun) } else { Ok(()) }
    }
}

fn callers(log: &Arc<Log>, each: usize, fails: fn(u64) -> bool) {
    let start = |_| {
        let log = log.clone();
        thread::spawn(move || (0..each).for_each(|_| log.call(fails)))
    };
    let threads: Vec<_> = (0..3).map(start).collect();
    (0..each).for_each(|_| log.call(fails));
    for thread in threads {
        thread.join().unwrap();
    }
    // Each caller at most once, and fewer where they shared.
    assert!(log.runs.lock().unwrap().len() <= 4 * each);
}

#[test]
fn each_caller_is_covered_by_a_run_that_began_after_it_asked() {
    explore(2000, || callers(&Arc::default(), 2, |_| false));
}

#[test]
fn who_shares_a_run_shares_its_error_and_no_one_else_does() {
    explore(2000, || {
        callers(&Arc::default(), 2, |number| number % 2 == 1);
    });
}

#[test]
fn a_panic_leaves_nobody_waiting_and_no_one_covered() {
    explore(2000, || {
        let log: Arc<Log> = Arc::default();
        let panicking = {
            let log = log.clone();
            thread::spawn(move || {
                let work = || {
                    log.now();
                    resume_unwind(Box::new("on purpose"))
                };
                let call = AssertUnwindSafe(|| log.commit.run(work, |error| *error));
                // It may also share the run of another.
                let _either = catch_unwind(call);
            })
        };
        callers(&log, 2, |number| number == 1);
        panicking.join().unwrap();
    });
}
