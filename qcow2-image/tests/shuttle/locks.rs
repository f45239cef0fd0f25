use std::sync::{Arc, Mutex as StdMutex};

use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::thread;

use crate::explore::{explore, explore_deeply};
use crate::gate::Gate;
use crate::stripes::Stripes;

/// Requests of one thread.
#[derive(Default)]
struct Traffic {
    /// Have passed the gate.
    entered: AtomicU64,
    /// Are about to leave.
    left: AtomicU64,
}

impl Traffic {
    fn run(&self, gate: &Gate, requests: u64) {
        for _ in 0..requests {
            let pass = gate.enter();
            self.entered.fetch_add(1, Ordering::SeqCst);
            for _ in 0..8 {
                assert!(self.inside());
            }
            self.left.fetch_add(1, Ordering::SeqCst);
            drop(pass);
        }
    }

    fn inside(&self) -> bool {
        let left = self.left.load(Ordering::SeqCst);
        self.entered.load(Ordering::SeqCst) != left
    }
}

struct World {
    gate: Gate,
    traffic: [Traffic; 2],
}

fn with_traffic(judge: impl FnOnce(&World)) {
    let world = Arc::new(World {
        gate: Gate::new(),
        traffic: Default::default(),
    });
    let start = |number: usize| {
        let world = world.clone();
        thread::spawn(move || world.traffic[number].run(&world.gate, 3))
    };
    let threads = [start(0), start(1)];
    judge(&world);
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(world.gate.drain(), "nobody is inside");
}

#[test]
fn after_a_drain_no_request_from_before_is_inside() {
    explore(3000, || {
        with_traffic(|world| {
            for _ in 0..2 {
                let before = world
                    .traffic
                    .each_ref()
                    .map(|t| t.entered.load(Ordering::SeqCst));
                if world.gate.drain() {
                    for (traffic, before) in world.traffic.iter().zip(before) {
                        assert!(traffic.left.load(Ordering::SeqCst) >= before);
                    }
                }
            }
        });
    });
}

#[test]
fn a_request_that_was_slow_to_enter_is_waited_for() {
    explore_deeply(20_000, || {
        let world = Arc::new(World {
            gate: Gate::new(),
            traffic: Default::default(),
        });
        let entrant = {
            let world = world.clone();
            thread::spawn(move || world.traffic[0].run(&world.gate, 1))
        };
        for _ in 0..2 {
            let before = world.traffic[0].entered.load(Ordering::SeqCst);
            if world.gate.drain() {
                assert!(world.traffic[0].left.load(Ordering::SeqCst) >= before);
            }
        }
        entrant.join().unwrap();
    });
}

#[test]
fn two_drains_at_once_are_both_right() {
    explore(3000, || {
        with_traffic(|world| {
            let drain = |world: &World| {
                let traffic = &world.traffic[0];
                let before = traffic.entered.load(Ordering::SeqCst);
                if world.gate.drain() {
                    assert!(traffic.left.load(Ordering::SeqCst) >= before);
                }
            };
            shuttle::thread::scope(|scope| {
                scope.spawn(|| drain(world));
                drain(world);
            });
        });
    });
}

#[test]
fn while_the_gate_is_closed_no_one_is_inside() {
    explore(3000, || {
        with_traffic(|world| {
            for _ in 0..2 {
                let closed = world.gate.close();
                for _ in 0..3 {
                    assert!(world.traffic.iter().all(|traffic| !traffic.inside()));
                }
                drop(closed);
            }
        });
    });
}

#[test]
fn stripes_exclude_each_other_and_nobody_waits_in_a_circle() {
    explore(300, || {
        let stripes = Arc::new(Stripes::new());
        let held = Arc::new(StdMutex::new([false; 8]));
        let start = |ranges: [(u64, u64); 2]| {
            let (stripes, held) = (stripes.clone(), held.clone());
            thread::spawn(move || {
                for (first, last) in ranges {
                    let guard = stripes.lock(first, last);
                    let mark = |on: bool| {
                        let mut held = held.lock().unwrap();
                        for cluster in first..=last {
                            // Clusters around the place where the stripes begin anew.
                            let cell = &mut held[(cluster - 252) as usize];
                            assert_ne!(*cell, on);
                            *cell = on;
                        }
                    };
                    mark(true);
                    thread::yield_now();
                    mark(false);
                    drop(guard);
                }
            })
        };
        let threads = [
            start([(252, 259), (255, 256)]),
            start([(256, 258), (253, 255)]),
            start([(254, 257), (252, 252)]),
        ];
        for thread in threads {
            thread.join().unwrap();
        }
    });
}
