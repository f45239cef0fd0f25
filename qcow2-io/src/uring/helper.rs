//! Threads that take over part of a batch.
//!
//! Who submits a batch shows it to helpers that are free, and all of them take operations from it until none is left: the
//! submitter from the front, helpers from the back. A helper that hasn't begun by then is not waited for.
//!
//! The batch belongs to the submitter and lies on its stack. So [`share`](Helpers::share) does not return, not even by a panic,
//! before every helper that has begun is done with it. Each helper has a [`Seat`], whose state says whose turn it is:
//!
//! ```text
//!            claimed by a submitter     shown        taken by the helper      done
//! IDLE|PARKED ───────────────► CLAIMED ──────► POSTED ───────────► RUNNING ───────► DONE
//!      ▲                                          │                   └──► AWAITED ──┘│
//!      └──────────── withdrawn by the submitter ──┴──────── seen by the submitter ────┘
//! ```
#![expect(
    unsafe_code,
    reason = "a batch that lives on one thread's stack is worked on by others"
)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Op;

/// The most helpers.
pub(super) const MAX_HELPERS: usize = 8;

/// Operations of a batch for each helper that is called: waking one may take as long as some of them.
pub(super) const OPS_PER_HELPER: usize = 8;

/// How long a helper looks out for the next batch before it goes to sleep, at least.
const PATIENCE: Duration = Duration::from_micros(50);

/// Looks at the state before others may have the processor, and before a submitter goes to sleep.
const LOOKS: u32 = 32;
const LOOKS_MAX: u32 = 8 * LOOKS;

/// The most batches for which a helper is left asleep after it came too late again and again.
const PAUSE_MAX: u32 = 63;

/// The most operations taken in one go.
const TAKEN_MAX: u32 = 4;

/// What is done with an operation; `false` says that the rest is to be left.
type Run<'a> = dyn Fn(&mut Op<'_>) -> bool + Sync + 'a;

const IDLE: u8 = 0;
/// Idle, and must be woken.
const PARKED: u8 = 1;
const CLAIMED: u8 = 2;
const POSTED: u8 = 3;
const RUNNING: u8 = 4;
/// Running, and the submitter sleeps until it is done.
const AWAITED: u8 = 5;
const DONE: u8 = 6;

/// Threads that wait for batches; they end with this.
#[derive(Debug, Default)]
pub(super) struct Helpers(Vec<Helper>);

impl Helpers {
    /// Starts threads; fewer than asked for where the system gives no more.
    pub(super) fn start(count: usize) -> Self {
        let start = |_| Helper::start().ok();
        Self((0..count.min(MAX_HELPERS)).map_while(start).collect())
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// Calls `run` once for each operation, on this thread and on those that are free, and returns when all of it is done. After
    /// a call that gave `false` no more are begun. A panic of `run` comes out of here if it was on this thread; if not, it is
    /// reported as those of threads are, and the operations that the helper had taken may be left without a call.
    pub(super) fn share(&self, ops: &mut [Op<'_>], run: &Run<'_>) {
        let most = ops.len() / OPS_PER_HELPER;
        let Some(job) = Job::new(ops, run) else {
            return;
        };
        let mut shown = Shown {
            job: &job,
            seats: [None; MAX_HELPERS],
        };
        let taken = self.0.iter().filter_map(|helper| helper.show(&job));
        for (place, seat) in shown.seats.iter_mut().take(most).zip(taken) {
            *place = Some(seat);
        }
        job.work(End::Front);
    }
}

/// One thread.
#[derive(Debug)]
struct Helper {
    seat: Arc<Seat>,
    /// There until this is dropped.
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    fn start() -> std::io::Result<Self> {
        let seat = Arc::new(Seat::default());
        let of_thread = Arc::clone(&seat);
        let thread = thread::Builder::new()
            .name("batch-helper".to_owned())
            .spawn(move || of_thread.serve())?;
        Ok(Self {
            seat,
            thread: Some(thread),
        })
    }

    /// Shows it a batch. `None` if it is busy.
    ///
    /// Whoever gets the seat must have it cleared before the job goes away.
    fn show(&self, job: &Job<'_, '_>) -> Option<&Seat> {
        let seat = &*self.seat;
        let parked = if seat.change(IDLE, CLAIMED) {
            false
        } else if !seat.pauses() && seat.change(PARKED, CLAIMED) {
            true
        } else {
            return None;
        };
        let job = ptr::from_ref(job).cast_mut().cast();
        seat.job.store(job, Ordering::Relaxed);
        seat.state.store(POSTED, Ordering::Release);
        if parked && let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
        Some(seat)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.seat.is_over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It catches what panics.
            let _ = thread.join();
        }
    }
}

/// Where a helper is shown a batch.
#[derive(Debug, Default)]
struct Seat {
    state: AtomicU8,
    /// The batch, from `POSTED` to `DONE`.
    job: AtomicPtr<Job<'static, 'static>>,
    /// No batches come any more.
    is_over: AtomicBool,
    /// For how many batches it is left asleep, and for how many it was last. Set by who clears the seat: where processors are
    /// busy or batches short, waking it costs more than it helps.
    pause: AtomicU32,
    last_pause: AtomicU32,
    /// For a submitter that sleeps.
    sleep: Mutex<()>,
    done: Condvar,
}

impl Seat {
    fn change(&self, from: u8, to: u8) -> bool {
        // Looking alone doesn't take the line away from others.
        self.state.load(Ordering::Relaxed) == from
            && self
                .state
                .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }

    /// What the helper does all its life.
    fn serve(&self) {
        while self.await_job() {
            let job = self.job.load(Ordering::Relaxed);
            // SAFETY: `show` stored the address of a job before `POSTED`, which this thread has seen and changed to `RUNNING`.
            // From then on the submitter, who shares the job and won't let go of it, waits for `DONE`: `Shown` does, in its
            // `drop`. That the lifetimes are called static is no harm: they end after `DONE`, and what is behind the job is
            // not kept, for `work` hands it only to a function that takes operations of any lifetime.
            let job = unsafe { &*job };
            // The operation it was at has no result, and those are done again elsewhere.
            let _ = catch_unwind(AssertUnwindSafe(|| job.work(End::Back)));
            // The last that is seen of the job.
            if self.state.swap(DONE, Ordering::AcqRel) == AWAITED {
                let _sleep = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
                self.done.notify_one();
            }
        }
    }

    /// Waits for a batch and begins it. `false` when none will come.
    fn await_job(&self) -> bool {
        let mut since = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if self.change(POSTED, RUNNING) {
                    return true;
                }
                std::hint::spin_loop();
            }
            if self.is_over.load(Ordering::Acquire) {
                return false;
            }
            // Maybe to the submitter.
            thread::yield_now();
            if since.elapsed() >= PATIENCE && self.change(IDLE, PARKED) {
                while self.state.load(Ordering::Relaxed) == PARKED
                    && !self.is_over.load(Ordering::Acquire)
                {
                    thread::park();
                }
                since = Instant::now();
            }
        }
    }

    /// Whether the helper is to be left asleep this time.
    fn pauses(&self) -> bool {
        let pause = self.pause.load(Ordering::Relaxed);
        if pause > 0 {
            self.pause.store(pause - 1, Ordering::Relaxed);
        }
        pause > 0
    }

    /// Withdraws the batch, or waits until the helper is done with it.
    fn clear(&self) {
        let pause = self.last_pause.load(Ordering::Relaxed);
        if self.change(POSTED, IDLE) {
            let longer = (2 * pause + 1).min(PAUSE_MAX);
            self.last_pause.store(longer, Ordering::Relaxed);
            self.pause.store(longer, Ordering::Relaxed);
            return;
        }
        if pause > 0 {
            self.last_pause.store(0, Ordering::Relaxed);
            self.pause.store(0, Ordering::Relaxed);
        }
        for look in 1..=LOOKS_MAX {
            if self.change(DONE, IDLE) {
                return;
            }
            if look.is_multiple_of(LOOKS) {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        if self.change(RUNNING, AWAITED) {
            let mut sleep = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            while self.state.load(Ordering::Acquire) == AWAITED {
                sleep = self
                    .done
                    .wait(sleep)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        // It is DONE, and only who was shown at this seat changes that.
        self.change(DONE, IDLE);
    }
}

/// Where a batch was shown. Goes away when nobody looks at it any more.
struct Shown<'a, 'ops> {
    job: &'a Job<'a, 'ops>,
    seats: [Option<&'a Seat>; MAX_HELPERS],
}

impl Drop for Shown<'_, '_> {
    fn drop(&mut self) {
        // Nothing is left unless this thread panics; then helpers take no more.
        self.job.end();
        for seat in self.seats.iter().flatten() {
            seat.clear();
        }
    }
}

/// From where operations are taken: each thread finds buffers in its processor's cache that it filled the last time.
#[derive(Clone, Copy, Debug)]
enum End {
    Front,
    Back,
}

/// A batch that several threads work on.
struct Job<'a, 'ops> {
    ops: *mut Op<'ops>,
    /// Which operations nobody has taken: the first, in the upper half, and the one after the last.
    left: AtomicU64,
    run: &'a Run<'a>,
}

// SAFETY: threads that share a job get exclusive references to operations, never two to the same one: see `work`. `Op` may go
// from thread to thread, which the function below makes sure of, and `run` may be shared by them.
unsafe impl Sync for Job<'_, '_> {}

const _: () = {
    const fn may_go_from_thread_to_thread<T: Send>() {}
    may_go_from_thread_to_thread::<Op<'static>>();
};

impl<'a, 'ops> Job<'a, 'ops> {
    /// `None` for more operations than it can count.
    fn new(ops: &'a mut [Op<'ops>], run: &'a Run<'a>) -> Option<Self> {
        let len = u32::try_from(ops.len()).ok()?;
        Some(Self {
            ops: ops.as_mut_ptr(),
            left: AtomicU64::new(u64::from(len)),
            run,
        })
    }

    /// Runs operations until none is left.
    fn work(&self, end: End) {
        while let Some((first, count)) = self.take(end) {
            for index in first..first + count {
                // SAFETY: `index` is less than the number of operations, which lie one after the other and are borrowed
                // exclusively as long as this lives.
                let op = unsafe { self.ops.add(index) };
                // SAFETY: it points to an operation, as said, and `take` gives each index to one thread only, once. The submitter
                // touches the operations by this pointer alone until nobody works on the job any more.
                let op = unsafe { &mut *op };
                if !(self.run)(op) {
                    self.end();
                    return;
                }
            }
        }
    }

    /// Takes some operations: the first one's index, and how many. Fewer and fewer, so that all threads end at about the same time.
    fn take(&self, end: End) -> Option<(usize, usize)> {
        let mut taken = None;
        // Relaxed: each operation is touched by one thread; the seats order what is before and after.
        let _ = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                let (first, end_of_left) = halves(left);
                let len = end_of_left.checked_sub(first).filter(|len| *len > 0)?;
                let count = (len / 4).clamp(1, TAKEN_MAX);
                let (start, rest) = match end {
                    End::Front => (first, (first + count, end_of_left)),
                    End::Back => (end_of_left - count, (first, end_of_left - count)),
                };
                taken = Some((start as usize, count as usize));
                Some(u64::from(rest.0) << 32 | u64::from(rest.1))
            })
            .ok()?;
        taken
    }

    /// Leaves what nobody has taken.
    fn end(&self) {
        self.left.store(0, Ordering::Relaxed);
    }
}

fn halves(left: u64) -> (u32, u32) {
    let half = |value: u64| u32::try_from(value & u64::from(u32::MAX)).unwrap_or_default();
    (half(left >> 32), half(left))
}

#[cfg(test)]
mod tests;
