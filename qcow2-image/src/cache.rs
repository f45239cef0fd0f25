//! How much metadata is kept in memory: QEMU's options and what they come to.

use std::time::Duration;

use qcow2_format::Geometry;

use crate::ImageError;

/// Most that the L2 cache takes unless it is told to; bytes.
const L2_CACHE_MAX_DEFAULT: u64 = 32 << 20;
/// Slices are this long unless something else is asked for; bytes. Longer ones make each flush write more.
const SLICE_BYTES: u64 = 4096;
/// Clusters of refcount blocks that are kept at least.
const REFCOUNT_CLUSTERS_MIN: u64 = 4;
/// L2 slices that are kept at least.
const L2_SLICES_MIN: u64 = 2;
/// More are not kept, whatever is asked for: their list alone takes a hundred megabytes.
const L2_SLICES_MAX: u64 = 1 << 22;

/// Sizes of the metadata caches, by the names and rules of QEMU's options.
///
/// Unset ones follow from the others and from the size of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheOptions {
    /// `cache-size`: both caches together, in bytes.
    pub total_bytes: Option<u64>,
    /// `l2-cache-size`, in bytes.
    pub l2_bytes: Option<u64>,
    /// `l2-cache-entry-size`: bytes of an L2 slice, a power of two from 512 to the cluster size.
    pub l2_slice_bytes: Option<u64>,
    /// `refcount-cache-size`, in bytes.
    pub refcount_bytes: Option<u64>,
    /// `cache-clean-interval`: slices that were not used for so long are given up; zero keeps them. 600 seconds if unset.
    pub clean_interval: Option<Duration>,
}

impl CacheOptions {
    /// All unset.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `cache-size`.
    #[must_use]
    pub fn total_bytes(mut self, bytes: u64) -> Self {
        self.total_bytes = Some(bytes);
        self
    }

    /// Sets `l2-cache-size`.
    #[must_use]
    pub fn l2_bytes(mut self, bytes: u64) -> Self {
        self.l2_bytes = Some(bytes);
        self
    }

    /// Sets `l2-cache-entry-size`.
    #[must_use]
    pub fn l2_slice_bytes(mut self, bytes: u64) -> Self {
        self.l2_slice_bytes = Some(bytes);
        self
    }

    /// Sets `refcount-cache-size`.
    #[must_use]
    pub fn refcount_bytes(mut self, bytes: u64) -> Self {
        self.refcount_bytes = Some(bytes);
        self
    }

    /// Sets `cache-clean-interval`.
    #[must_use]
    pub fn clean_interval(mut self, interval: Duration) -> Self {
        self.clean_interval = Some(interval);
        self
    }
}

/// What the options come to for one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheSizes {
    pub(crate) l2_slice_bytes: u64,
    pub(crate) l2_slices: u64,
    pub(crate) refcount_slice_bytes: u64,
    pub(crate) refcount_slices: u64,
    /// `None` to keep slices for ever.
    pub(crate) clean_interval: Option<Duration>,
}

impl CacheSizes {
    pub(crate) fn new(
        options: &CacheOptions,
        geometry: Geometry,
        virtual_size: u64,
    ) -> Result<Self, ImageError> {
        let cluster = geometry.cluster_size();
        let entries = virtual_size.div_ceil(cluster);
        let l2_needed = entries
            .saturating_mul(geometry.l2_entry_size())
            .next_multiple_of(cluster);
        let refcount_min = REFCOUNT_CLUSTERS_MIN * cluster;
        let (l2_bytes, refcount_bytes) = match (
            options.total_bytes,
            options.l2_bytes,
            options.refcount_bytes,
        ) {
            (Some(total), Some(l2), Some(_)) => {
                return Err(refuse(
                    "cache-size",
                    total,
                    format!("l2-cache-size ({l2}) and refcount-cache-size are set, too"),
                ));
            }
            (Some(total), Some(l2), None) => {
                let rest = total
                    .checked_sub(l2)
                    .ok_or_else(|| refuse("l2-cache-size", l2, format!("cache-size is {total}")))?;
                (l2, rest)
            }
            (Some(total), None, Some(refcount)) => {
                let rest = total.checked_sub(refcount).ok_or_else(|| {
                    refuse(
                        "refcount-cache-size",
                        refcount,
                        format!("cache-size is {total}"),
                    )
                })?;
                (rest, refcount)
            }
            (Some(total), None, None) => match total.checked_sub(l2_needed) {
                Some(rest) if rest >= refcount_min => (l2_needed, rest),
                _ => {
                    let refcount = total.min(refcount_min);
                    (total - refcount, refcount)
                }
            },
            (None, l2, refcount) => (
                l2.unwrap_or(l2_needed.min(L2_CACHE_MAX_DEFAULT)),
                refcount.unwrap_or(refcount_min),
            ),
        };
        let l2_slice_bytes = options.l2_slice_bytes.unwrap_or(SLICE_BYTES.min(cluster));
        if !l2_slice_bytes.is_power_of_two() || l2_slice_bytes < 512 || l2_slice_bytes > cluster {
            return Err(refuse(
                "l2-cache-entry-size",
                l2_slice_bytes,
                format!("it must be a power of two from 512 to the cluster size of {cluster}"),
            ));
        }
        let refcount_slice_bytes = SLICE_BYTES.min(cluster);
        // What the disk needs is enough, whatever was asked for.
        let l2_useful = (l2_needed / l2_slice_bytes).max(L2_SLICES_MIN);
        Ok(Self {
            l2_slice_bytes,
            l2_slices: (l2_bytes / l2_slice_bytes)
                .clamp(L2_SLICES_MIN, l2_useful)
                .min(L2_SLICES_MAX),
            refcount_slice_bytes,
            refcount_slices: (refcount_bytes.max(refcount_min) / refcount_slice_bytes).min(1 << 20),
            clean_interval: match options.clean_interval {
                None => Some(Duration::from_secs(600)),
                Some(Duration::ZERO) => None,
                interval => interval,
            },
        })
    }
}

fn refuse(option: &'static str, value: u64, why: String) -> ImageError {
    ImageError::Option {
        option,
        value: value.to_string(),
        why,
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    fn sizes(options: CacheOptions, size: u64) -> Result<CacheSizes, ImageError> {
        CacheSizes::new(&options, Geometry::new(16, 4, false).unwrap(), size)
    }

    #[test]
    fn the_default_covers_the_disk_up_to_a_limit() {
        let small = sizes(CacheOptions::new(), 8 << 30).unwrap();
        assert_eq!(small.l2_slices * small.l2_slice_bytes, 1 << 20);
        let large = sizes(CacheOptions::new(), 1 << 40).unwrap();
        assert_eq!(large.l2_slices * large.l2_slice_bytes, 32 << 20);
        assert_eq!(large.refcount_slices * large.refcount_slice_bytes, 4 << 16);
    }

    #[test]
    fn one_total_goes_to_the_l2_cache_after_the_minimum_for_refcounts() {
        let both = sizes(CacheOptions::new().total_bytes(4 << 20), 1 << 40).unwrap();
        assert_eq!(both.refcount_slices * 4096, 4 << 16);
        assert_eq!(both.l2_slices * 4096, (4 << 20) - (4 << 16));
        let rest = CacheOptions::new().total_bytes(4 << 20).l2_bytes(1 << 20);
        assert_eq!(
            sizes(rest, 1 << 40).unwrap().refcount_slices * 4096,
            3 << 20
        );
    }

    #[test]
    fn what_no_machine_has_is_not_reserved() {
        let huge = CacheOptions::new().l2_slice_bytes(512).l2_bytes(1 << 60);
        let sizes = sizes(huge.refcount_bytes(1 << 60), 1 << 55).unwrap();
        assert_eq!(sizes.l2_slices, L2_SLICES_MAX);
        assert!(sizes.refcount_slices <= 1 << 20);
    }

    #[test]
    fn contradictions_are_refused() {
        let new = CacheOptions::new;
        let all = new().total_bytes(9).l2_bytes(1).refcount_bytes(1);
        assert!(sizes(all, 1 << 30).is_err());
        let over = new().total_bytes(1 << 20).l2_bytes(2 << 20);
        assert!(sizes(over, 1 << 30).is_err());
        for bytes in [256, 1000, 128 << 10] {
            assert!(sizes(new().l2_slice_bytes(bytes), 1 << 30).is_err());
        }
    }
}
