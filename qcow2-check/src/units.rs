//! Units of work: threads take them one after the other, and findings come out in the units' order.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Run;
use crate::report::Collector;

impl Run<'_> {
    /// Calls `work` for each unit below `units`, every thread with a worker of its own that `worker` makes. Gives the workers
    /// back. Once the run is cancelled, units are left out.
    pub(crate) fn share_out<W: Send>(
        &self,
        units: u64,
        worker: impl Fn() -> W + Sync,
        work: impl Fn(&mut W, u64) + Sync,
    ) -> Vec<W> {
        let next = AtomicU64::new(0);
        self.on_each_thread(|| {
            let mut worker = worker();
            loop {
                let unit = next.fetch_add(1, Ordering::Relaxed);
                if unit >= units || self.is_cancelled() {
                    return worker;
                }
                work(&mut worker, unit);
            }
        })
    }
}

/// Brings the findings of units, done in any order, into the units' order.
pub(crate) struct Ordered<'a> {
    run: &'a Run<'a>,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    next: u64,
    waiting: BTreeMap<u64, Collector>,
}

impl<'a> Ordered<'a> {
    pub(crate) fn new(run: &'a Run<'a>) -> Self {
        Self {
            run,
            pending: Mutex::default(),
        }
    }

    /// Takes the findings of a unit.
    pub(crate) fn deliver(&self, unit: u64, found: &mut Collector) {
        let found = mem::replace(found, Collector::new(self.run.limit()));
        let Ok(mut pending) = self.pending.lock() else {
            return;
        };
        pending.waiting.insert(unit, found);
        loop {
            let next = pending.next;
            let Some(found) = pending.waiting.remove(&next) else {
                return;
            };
            self.run.append(found);
            pending.next = next.saturating_add(1);
        }
    }
}
