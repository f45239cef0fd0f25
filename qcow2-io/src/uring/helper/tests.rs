//! Who works on a batch, and who waits for whom. What a test waits for here comes unless the code is wrong.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::Request;

const COUNT: usize = 4 * OPS_PER_HELPER;

/// Operations that are told apart by their offset, from 0 on.
fn numbered<'a>(count: usize) -> Vec<Op<'a>> {
    (0..count as u64)
        .map(|number| Op::discard(number..number + 1))
        .collect()
}

fn number(op: &Op<'_>) -> usize {
    match op.request() {
        Request::Discard { range } => usize::try_from(range.start).unwrap(),
        other => panic!("{other:?} is not numbered"),
    }
}

fn counters(count: usize) -> Vec<AtomicUsize> {
    (0..count).map(|_| AtomicUsize::new(0)).collect()
}

fn sum(counters: &[AtomicUsize]) -> usize {
    counters
        .iter()
        .map(|counter| counter.load(Ordering::Relaxed))
        .sum()
}

fn wait_until(come: impl Fn() -> bool) {
    while !come() {
        thread::yield_now();
    }
}

fn is_in(helpers: &Helpers, state: u8) -> bool {
    helpers.0[0].seat.state.load(Ordering::Acquire) == state
}

/// Shares a batch and doesn't do anything before the helper does. Says how much each of both did.
fn shared_by_two(helpers: &Helpers) -> [usize; 2] {
    let submitter = thread::current().id();
    let done = counters(2);
    helpers.share(&mut numbered(COUNT), &|_| {
        if thread::current().id() == submitter {
            wait_until(|| done[1].load(Ordering::Relaxed) > 0);
            done[0].fetch_add(1, Ordering::Relaxed);
        } else {
            done[1].fetch_add(1, Ordering::Relaxed);
        }
        true
    });
    [0, 1].map(|who| done[who].load(Ordering::Relaxed))
}

#[test]
fn each_operation_is_done_once() {
    let helpers = Helpers::start(3);
    for _ in 0..20 {
        for count in (0..60).chain([1000]) {
            let done = counters(count);
            let mut ops = numbered(count);
            helpers.share(&mut ops, &|op| {
                done[number(op)].fetch_add(1, Ordering::Relaxed);
                op.complete(Ok(()));
                true
            });
            assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
            assert!(ops.iter().all(|op| op.result().is_some()));
        }
    }
}

#[test]
fn a_helper_that_sleeps_is_woken() {
    let helpers = Helpers::start(1);
    for _ in 0..10 {
        wait_until(|| is_in(&helpers, PARKED));
        let [submitter, helper] = shared_by_two(&helpers);
        assert!(helper > 0);
        assert_eq!(submitter + helper, COUNT);
    }
}

#[test]
fn a_helper_that_has_not_begun_is_not_waited_for() {
    let nobody = Helpers(vec![Helper {
        seat: Arc::default(),
        thread: None,
    }]);
    let done = AtomicUsize::new(0);
    nobody.share(&mut numbered(COUNT), &|_| {
        assert!(is_in(&nobody, POSTED));
        done.fetch_add(1, Ordering::Relaxed);
        true
    });
    assert_eq!(done.into_inner(), COUNT);
    assert!(is_in(&nobody, IDLE));
}

#[test]
fn a_small_batch_calls_nobody() {
    let helpers = Helpers::start(1);
    wait_until(|| is_in(&helpers, PARKED));
    helpers.share(&mut numbered(OPS_PER_HELPER - 1), &|_| {
        assert!(is_in(&helpers, PARKED));
        true
    });
}

#[test]
fn a_submitter_sleeps_while_a_helper_takes_its_time() {
    let helpers = Helpers::start(1);
    let submitter = thread::current().id();
    let (begun, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    helpers.share(&mut numbered(COUNT), &|_| {
        if thread::current().id() == submitter {
            wait_until(|| begun.load(Ordering::Relaxed) > 0);
        } else {
            begun.fetch_add(1, Ordering::Relaxed);
            wait_until(|| is_in(&helpers, AWAITED));
        }
        done.fetch_add(1, Ordering::Relaxed);
        true
    });
    assert_eq!(done.into_inner(), COUNT);
    assert!(is_in(&helpers, IDLE) || is_in(&helpers, PARKED));
}

#[test]
fn who_finds_the_helper_busy_goes_without() {
    let helpers = Helpers::start(1);
    let submitter = thread::current().id();
    let is_free = AtomicBool::new(false);
    let done = counters(2);
    helpers.share(&mut numbered(COUNT), &|_| {
        if thread::current().id() == submitter {
            wait_until(|| is_in(&helpers, RUNNING));
            if !is_free.load(Ordering::Relaxed) {
                // The helper is at work on the first batch until this one is done.
                thread::scope(|scope| {
                    scope.spawn(|| {
                        let second = thread::current().id();
                        helpers.share(&mut numbered(COUNT), &|_| {
                            assert_eq!(thread::current().id(), second);
                            done[1].fetch_add(1, Ordering::Relaxed);
                            true
                        });
                    });
                });
                is_free.store(true, Ordering::Relaxed);
            }
        } else {
            wait_until(|| is_free.load(Ordering::Relaxed));
        }
        done[0].fetch_add(1, Ordering::Relaxed);
        // The helper may be done with its share before the next look at it.
        !is_free.load(Ordering::Relaxed)
    });
    assert!(done[0].load(Ordering::Relaxed) > 0);
    assert_eq!(done[1].load(Ordering::Relaxed), COUNT);
}

#[test]
fn after_a_refusal_nothing_more_is_begun() {
    let alone = Helpers::default();
    let done = AtomicUsize::new(0);
    alone.share(&mut numbered(COUNT), &|op| {
        done.fetch_add(1, Ordering::Relaxed);
        number(op) < 5
    });
    assert_eq!(done.into_inner(), 6);
}

#[test]
fn a_panic_of_a_helper_leaves_its_operations_and_the_helper_goes_on() {
    let helpers = Helpers::start(1);
    let submitter = thread::current().id();
    let (done, panics) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut ops = numbered(COUNT);
    helpers.share(&mut ops, &|op| {
        if thread::current().id() == submitter {
            wait_until(|| panics.load(Ordering::Relaxed) == 1);
        } else {
            panics.fetch_add(1, Ordering::Relaxed);
            panic!("on purpose");
        }
        done.fetch_add(1, Ordering::Relaxed);
        op.complete(Ok(()));
        true
    });
    let left = ops.iter().filter(|op| op.result().is_none()).count();
    assert!((1..=TAKEN_MAX as usize).contains(&left), "{left}");
    assert_eq!(done.into_inner(), COUNT - left);
    assert_eq!(panics.into_inner(), 1);
    assert!(shared_by_two(&helpers)[1] > 0);
}

#[test]
fn a_panic_of_the_submitter_waits_for_the_helper() {
    let helpers = Helpers::start(1);
    let submitter = thread::current().id();
    let (begun, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut ops = numbered(COUNT);
    let share = AssertUnwindSafe(|| {
        helpers.share(&mut ops, &|_| {
            if thread::current().id() == submitter {
                wait_until(|| begun.load(Ordering::Relaxed) > 0);
                panic!("on purpose");
            }
            begun.fetch_add(1, Ordering::Relaxed);
            // By then the submitter is on its way out.
            wait_until(|| is_in(&helpers, AWAITED));
            done.fetch_add(1, Ordering::Relaxed);
            true
        });
    });
    catch_unwind(share).unwrap_err();
    let done = done.into_inner();
    assert_eq!(begun.into_inner(), done);
    assert!((1..=TAKEN_MAX as usize).contains(&done), "{done}");
    assert!(is_in(&helpers, IDLE) || is_in(&helpers, PARKED));
    assert!(shared_by_two(&helpers)[1] > 0);
}

#[test]
fn threads_share_helpers() {
    let helpers = Helpers::start(2);
    let done = counters(4);
    thread::scope(|scope| {
        for done in &done {
            let helpers = &helpers;
            scope.spawn(move || {
                for _ in 0..200 {
                    helpers.share(&mut numbered(COUNT), &|_| {
                        done.fetch_add(1, Ordering::Relaxed);
                        true
                    });
                }
            });
        }
    });
    assert_eq!(sum(&done), 4 * 200 * COUNT);
}

#[test]
fn helpers_end_whatever_they_are_at() {
    for _ in 0..20 {
        drop(Helpers::start(2));
    }
    let sleeps = Helpers::start(1);
    wait_until(|| is_in(&sleeps, PARKED));
    let seat = Arc::clone(&sleeps.0[0].seat);
    drop(sleeps);
    // The thread is gone, and its seat with it.
    assert_eq!(Arc::strong_count(&seat), 1);
    let worked = Helpers::start(1);
    assert!(shared_by_two(&worked)[1] > 0);
}
