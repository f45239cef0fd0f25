//! Differences as findings.

use super::{Compared, Judge};
use crate::blocks::BlockRef;
use crate::image::Image;
use crate::report::Collector;
use crate::{Code, Place, Structure};

/// Clusters in a row with the same difference.
#[derive(Clone, Copy, Debug)]
struct Difference {
    first: u64,
    count: u64,
    on_disk: u64,
    expected: u64,
}

/// Makes findings of differences, and counts them.
pub(crate) struct Findings<'a, 'i> {
    image: &'a Image<'i>,
    pub(super) sum: Compared,
    pub(crate) found: Collector,
    open: Option<Difference>,
    /// Refcounts behind the end, not told yet: first cluster, count.
    behind: Option<(u64, u64)>,
}

impl<'a, 'i> Findings<'a, 'i> {
    /// `limit` findings of each kind are kept.
    pub(crate) fn new(image: &'a Image<'i>, limit: usize) -> Self {
        Self {
            image,
            sum: Compared::default(),
            found: Collector::new(limit),
            open: None,
            behind: None,
        }
    }

    fn flush_difference(&mut self) {
        let Some(Difference {
            first,
            count,
            on_disk,
            expected,
        }) = self.open.take()
        else {
            return;
        };
        let code = if on_disk == 0 {
            Code::RefcountMissing
        } else if on_disk < expected {
            Code::RefcountLow
        } else {
            Code::Leak
        };
        let image = self.image;
        self.found.add_with(code, count, || {
            let bits = image.cluster_bits();
            let place = Place::of(Structure::Cluster).at(first << bits, count << bits);
            let detail = if count == 1 {
                format!("refcount {on_disk}, references {expected}")
            } else {
                format!("{count} clusters: refcount {on_disk}, references {expected}")
            };
            (place, detail)
        });
    }

    /// Makes findings of what was gathered.
    pub(super) fn flush(&mut self) {
        self.flush_difference();
        if let Some((first, count)) = self.behind.take() {
            let image = self.image;
            self.found.add_with(Code::RefcountPastEnd, count, || {
                let place = Place::of(Structure::File).at(first << image.cluster_bits(), 0);
                (
                    place,
                    format!("{count} clusters from here on have refcounts"),
                )
            });
        }
    }
}

impl Judge for Findings<'_, '_> {
    fn differ(&mut self, first: u64, count: u64, on_disk: u64, expected: u64) {
        if on_disk > expected {
            self.sum.leaks = self.sum.leaks.saturating_add(count);
        } else {
            self.sum.corruptions = self.sum.corruptions.saturating_add(count);
        }
        match &mut self.open {
            Some(open)
                if open.first + open.count == first
                    && open.on_disk == on_disk
                    && open.expected == expected =>
            {
                open.count += count;
            }
            _ => {
                self.flush_difference();
                self.open = Some(Difference {
                    first,
                    count,
                    on_disk,
                    expected,
                });
            }
        }
    }

    fn behind(&mut self, base: u64, bits: u64, _value: impl Fn(u64) -> u64) {
        let count = u64::from(bits.count_ones());
        let first = base + u64::from(bits.trailing_zeros());
        match &mut self.behind {
            Some((_, sum)) => *sum = sum.saturating_add(count),
            None => self.behind = Some((first, count)),
        }
    }

    fn overflow(&mut self, cluster: u64, weight: u64, max: u64) {
        let excess = weight.saturating_sub(max);
        self.sum.corruptions = self.sum.corruptions.saturating_add(excess);
        let image = self.image;
        self.found.add_with(Code::RefcountOverflow, excess, || {
            let place = Place::of(Structure::Cluster)
                .at(cluster << image.cluster_bits(), image.cluster_size());
            (
                place,
                format!("{weight} references, refcounts go up to {max}"),
            )
        });
    }

    fn unreadable(&mut self, index: u64, block: BlockRef, start: u64, stop: u64) {
        let lost = stop.saturating_sub(start);
        self.sum.errors = self.sum.errors.saturating_add(lost);
        let image = self.image;
        self.found.add_with(Code::RefcountUnreadable, lost, || {
            let mut place = Place::of(Structure::RefcountBlock).entry(index);
            if let BlockRef::At(offset) = block {
                place = place.at(offset, image.cluster_size());
            }
            let bits = image.cluster_bits();
            let detail = format!(
                "refcounts of the clusters at {:#x}..{:#x} can't be read",
                start << bits,
                stop << bits
            );
            (place, detail)
        });
    }
}
