//! Locks of guest clusters, for requests that change what a cluster is mapped to.

use qcow2_cache::sync::{Mutex, MutexGuard, lock};

const STRIPES: u64 = 256;

/// One lock for each of many groups of guest clusters; neighbours are in different groups.
pub(crate) struct Stripes {
    locks: Box<[Stripe]>,
}

/// A cache line of its own.
#[repr(align(64))]
struct Stripe(Mutex<()>);

/// The locks of some clusters.
pub(crate) struct Held<'a> {
    _guards: Vec<MutexGuard<'a, ()>>,
}

impl Stripes {
    pub(crate) fn new() -> Self {
        Self {
            locks: (0..STRIPES).map(|_| Stripe(Mutex::new(()))).collect(),
        }
    }

    /// Locks the clusters numbered `first..=last`. All take their locks in the same order, so nobody waits in a circle.
    pub(crate) fn lock(&self, first: u64, last: u64) -> Held<'_> {
        let (from, to) = (first % STRIPES, last % STRIPES);
        let held = |number: u64| {
            if last - first >= STRIPES - 1 {
                true
            } else if from <= to {
                (from..=to).contains(&number)
            } else {
                number >= from || number <= to
            }
        };
        let wanted = (0..STRIPES).zip(&self.locks);
        let guards = if last - first < STRIPES - 1 && from <= to {
            // The common case without looking at all of them.
            let skip = usize::try_from(from).unwrap_or(0);
            let take = usize::try_from(to - from + 1).unwrap_or(0);
            let few = self.locks.iter().skip(skip).take(take);
            few.map(|stripe| lock(&stripe.0)).collect()
        } else {
            wanted
                .filter(|(number, _)| held(*number))
                .map(|(_, stripe)| lock(&stripe.0))
                .collect()
        };
        Held { _guards: guards }
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    fn held(first: u64, last: u64) -> Vec<usize> {
        let stripes = Stripes::new();
        let _held = stripes.lock(first, last);
        (0..256)
            .filter(|n| stripes.locks[*n].0.try_lock().is_err())
            .collect()
    }

    #[test]
    fn neighbours_wrap_around_and_long_ranges_take_all() {
        assert_eq!(held(3, 3), [3]);
        assert_eq!(held(256 + 7, 256 + 9), [7, 8, 9]);
        assert_eq!(held(255, 257), [0, 1, 255]);
        assert_eq!(held(5, 5 + 255).len(), 256);
        assert_eq!(held(5, 5 + 254).len(), 255);
        assert_eq!(held(0, 1_000_000).len(), 256);
    }
}
