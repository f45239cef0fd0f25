//! Single references on their way to the map, sorted by region.
//!
//! Where clusters lie in random order, each reference is a miss in the processor's caches. So they are collected first, region by
//! region, and a region's are set in one go while its bits are near.

/// References collected for a region before they are set.
const BATCH: usize = 512;
/// Regions, at most.
const REGIONS_MAX: u64 = 256;
/// Clusters in a region, at least: their bits fill half of a first-level cache.
const REGION_BITS_MIN: u32 = 17;

/// References by region.
#[derive(Debug, Default)]
pub(super) struct Scatter {
    /// Base-2 logarithm of the clusters in a region.
    region_bits: u32,
    /// A batch of cluster numbers for each region.
    clusters: Vec<u32>,
    /// How many there are in each.
    filled: Vec<usize>,
}

impl Scatter {
    /// Collects references to any of `clusters` clusters, fewer than 2^32. Allocates when first used.
    #[inline]
    pub(super) fn push(&mut self, cluster: u32, clusters: u64) -> Option<usize> {
        if self.filled.is_empty() {
            self.start(clusters);
        }
        let region = (cluster >> self.region_bits) as usize;
        let filled = self.filled.get_mut(region)?;
        *self.clusters.get_mut(region * BATCH + *filled)? = cluster;
        *filled += 1;
        (*filled == BATCH).then_some(region)
    }

    #[cold]
    fn start(&mut self, clusters: u64) {
        self.region_bits = REGION_BITS_MIN;
        while clusters.div_ceil(1 << self.region_bits) > REGIONS_MAX {
            self.region_bits += 1;
        }
        let regions = usize::try_from(clusters.div_ceil(1 << self.region_bits)).unwrap_or(0);
        self.clusters = vec![0; regions * BATCH];
        self.filled = vec![0; regions];
    }

    /// Regions that references were collected for.
    pub(super) fn regions(&self) -> usize {
        self.filled.len()
    }

    /// The references collected for a region; they count as taken.
    pub(super) fn take(&mut self, region: usize) -> &[u32] {
        let filled = self.filled.get_mut(region).map_or(0, std::mem::take);
        let start = region * BATCH;
        self.clusters.get(start..start + filled).unwrap_or_default()
    }
}
