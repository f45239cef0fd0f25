//! Requests in flight.
//!
//! Reads and in-place writes take no lock. What they must not meet is the reuse of a cluster whose place they have
//! already looked up, and operations that change the disk as a whole. So each request passes a gate: a counter on its way in, the
//! same counter on its way out. Each thread has a counter of its own, so threads don't meet there, and counters come in two
//! phases: turning the phase over and waiting for the old one to run dry tells that all requests from before are gone,
//! without stopping new ones.

use std::marker::PhantomData;
use std::sync::{Mutex as StdMutex, PoisonError};
#[cfg(not(shuttle))]
use std::thread;
#[cfg(not(shuttle))]
use std::time::Duration;

use qcow2_cache::sync::atomic::{AtomicU64, Ordering};
use qcow2_cache::sync::{Condvar, Mutex, MutexGuard, lock, wait, yield_now};

/// Counters. Threads that come when all others are taken share the last.
const SLOTS: usize = 64;
const SHARED: usize = SLOTS - 1;
/// Bit of the state that tells the phase.
const PHASE: u64 = 1;
/// Bit of the state that keeps requests out.
const CLOSED: u64 = 2;
/// How often a wait looks again before it gives the processor away for longer.
const YIELDS: u32 = 256;
/// How long [`Gate::drain`] waits at most, in naps.
const NAPS_MAX: u32 = 200;
#[cfg(not(shuttle))]
const NAP: Duration = Duration::from_micros(100);

/// Counts requests in flight, tells when all of a moment are gone, and can keep new ones out.
pub(crate) struct Gate {
    state: AtomicU64,
    slots: Box<[Slot; SLOTS]>,
    /// One drain at a time.
    draining: Mutex<()>,
    /// One closing at a time.
    closing: Mutex<()>,
    /// Held to wait for the gate to open.
    shut: Mutex<()>,
    opened: Condvar,
}

/// A cache line of its own, and the one next to it, which processors fetch along.
#[repr(align(128))]
struct Slot {
    even: AtomicU64,
    odd: AtomicU64,
}

impl Slot {
    #[inline]
    fn counter(&self, phase: u64) -> &AtomicU64 {
        if phase == 0 { &self.even } else { &self.odd }
    }
}

/// A request on its way. Must not be held while the gate is closed or drained by the same thread.
pub(crate) struct Pass<'a> {
    counter: &'a AtomicU64,
    shared: bool,
    /// It has to end on the thread that began it.
    _here: PhantomData<*const ()>,
}

/// The gate is closed while this lives, and no request is in flight.
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
    _one: MutexGuard<'a, ()>,
}

/// The number of a counter that is this thread's, in every gate, while it lives.
struct Seat(usize);

static VACANT: StdMutex<Vacant> = StdMutex::new(Vacant {
    next: 0,
    left: Vec::new(),
});

struct Vacant {
    /// Counters from here on were never taken.
    next: usize,
    /// Counters of threads that have ended.
    left: Vec<usize>,
}

impl Seat {
    fn take() -> Self {
        let mut vacant = VACANT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seat) = vacant.left.pop() {
            return Self(seat);
        }
        if vacant.next == SHARED {
            return Self(SHARED);
        }
        vacant.next += 1;
        Self(vacant.next - 1)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.0 != SHARED {
            let mut vacant = VACANT.lock().unwrap_or_else(PoisonError::into_inner);
            vacant.left.push(self.0);
        }
    }
}

#[inline]
fn seat() -> usize {
    thread_local! {
        static SEAT: Seat = Seat::take();
    }
    // The scheduler of the exploration runs all its threads on one.
    if cfg!(shuttle) {
        return SHARED;
    }
    SEAT.try_with(|seat| seat.0).unwrap_or(SHARED)
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            slots: Box::new(std::array::from_fn(|_| Slot {
                even: AtomicU64::new(0),
                odd: AtomicU64::new(0),
            })),
            draining: Mutex::new(()),
            closing: Mutex::new(()),
            shut: Mutex::new(()),
            opened: Condvar::new(),
        }
    }

    /// Lets a request in; waits while the gate is closed.
    #[expect(clippy::inline_always, reason = "each request passes")]
    #[inline(always)]
    pub(crate) fn enter(&self) -> Pass<'_> {
        let seat = seat();
        let shared = seat == SHARED;
        let [first, ..] = &*self.slots;
        let slot = self.slots.get(seat).unwrap_or(first);
        loop {
            let phase = self.state.load(Ordering::SeqCst) & PHASE;
            let counter = slot.counter(phase);
            // The count comes before any look at the mapping, in the one order that all threads see.
            if shared {
                counter.fetch_add(1, Ordering::SeqCst);
            } else {
                let count = counter.load(Ordering::Relaxed);
                counter.store(count + 1, Ordering::SeqCst);
            }
            let pass = Pass {
                counter,
                shared,
                _here: PhantomData,
            };
            if self.state.load(Ordering::SeqCst) & CLOSED == 0 {
                return pass;
            }
            drop(pass);
            self.wait_until_open();
        }
    }

    #[cold]
    fn wait_until_open(&self) {
        let mut guard = lock(&self.shut);
        while self.state.load(Ordering::SeqCst) & CLOSED != 0 {
            guard = wait(&self.opened, guard);
        }
    }

    fn is_dry(&self, phase: u64) -> bool {
        self.slots
            .iter()
            .all(|slot| slot.counter(phase).load(Ordering::SeqCst) == 0)
    }

    fn wait_dry(&self, phase: u64, naps_max: Option<u32>) -> bool {
        let mut yields = 0;
        let mut naps = 0;
        while !self.is_dry(phase) {
            if yields < YIELDS {
                yields += 1;
                yield_now();
            } else if naps_max.is_some_and(|max| naps >= max) {
                return false;
            } else {
                naps += 1;
                nap();
            }
        }
        true
    }

    /// Whether all requests that were in flight when this was called are gone now. Waits for them, but not for ever: `false`
    /// says that they take their time.
    pub(crate) fn drain(&self) -> bool {
        let _one = lock(&self.draining);
        let old = self.state.load(Ordering::SeqCst) & PHASE;
        // A request may have been slow between looking at the phase and counting: it counts in the phase before.
        if !self.wait_dry(old ^ PHASE, Some(NAPS_MAX)) {
            return false;
        }
        self.state.fetch_xor(PHASE, Ordering::SeqCst);
        self.wait_dry(old, Some(NAPS_MAX))
    }

    /// Keeps new requests out and waits until none is in flight.
    pub(crate) fn close(&self) -> Closed<'_> {
        let one = lock(&self.closing);
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        let closed = Closed {
            gate: self,
            _one: one,
        };
        self.wait_dry(0, None);
        self.wait_dry(PHASE, None);
        closed
    }
}

#[cfg(not(shuttle))]
fn nap() {
    thread::sleep(NAP);
}

#[cfg(shuttle)]
fn nap() {
    yield_now();
}

impl Drop for Pass<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.shared {
            self.counter.fetch_sub(1, Ordering::Release);
        } else {
            let count = self.counter.load(Ordering::Relaxed);
            self.counter.store(count - 1, Ordering::Release);
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        let guard = lock(&self.gate.shut);
        self.gate.state.fetch_and(!CLOSED, Ordering::SeqCst);
        drop(guard);
        self.gate.opened.notify_all();
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn drain_waits_for_requests_from_before_and_not_for_new_ones() {
        let gate = Gate::new();
        assert!(gate.drain());
        let pass = gate.enter();
        assert!(!gate.drain(), "a request was in flight");
        let newer = gate.enter();
        assert!(!gate.drain(), "the first is still in flight");
        drop(pass);
        drop(newer);
        assert!(gate.drain());
    }

    #[test]
    fn more_threads_than_counters_are_all_counted() {
        let gate = Gate::new();
        let (send, receive) = mpsc::channel();
        let (stop, wait) = (Mutex::new(true), Condvar::new());
        thread::scope(|scope| {
            for _ in 0..SLOTS * 2 {
                let send = send.clone();
                let (gate, stop, wait) = (&gate, &stop, &wait);
                scope.spawn(move || {
                    let pass = gate.enter();
                    send.send(()).unwrap();
                    let mut stopped = lock(stop);
                    while *stopped {
                        stopped = qcow2_cache::sync::wait(wait, stopped);
                    }
                    drop(pass);
                });
            }
            for _ in 0..SLOTS * 2 {
                receive.recv().unwrap();
            }
            assert!(!gate.drain());
            *lock(&stop) = false;
            wait.notify_all();
        });
        assert!(gate.drain());
    }

    #[test]
    fn a_closed_gate_keeps_requests_out_until_it_opens() {
        let gate = Gate::new();
        let (send, receive) = mpsc::channel();
        thread::scope(|scope| {
            let closed = gate.close();
            scope.spawn(|| {
                let _pass = gate.enter();
                send.send(()).unwrap();
            });
            assert!(receive.try_recv().is_err());
            drop(closed);
            receive.recv().unwrap();
        });
        drop(gate.close());
    }
}
