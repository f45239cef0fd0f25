//! All sizes and limits that follow from the header's few numbers.

use thiserror::Error;

use crate::{GuestCluster, GuestOffset, HostCluster, HostOffset};

/// Smallest `cluster_bits`: clusters of 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest `cluster_bits`: clusters of 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest `cluster_bits` with extended L2 entries: a subcluster is at least a sector.
pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Largest `refcount_order`: refcounts of 64 bits.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Largest L1 table, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;
/// L1 and L2 entries address host bytes below this.
pub const HOST_OFFSET_LIMIT: u64 = 1 << 56;

/// A header field that no geometry can be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// `cluster_bits` out of range.
    #[error("cluster_bits is {found}, allowed are 9 to 21")]
    ClusterBits {
        /// Value in the header.
        found: u32,
    },
    /// Clusters too small to be divided into 32 subclusters.
    #[error("extended L2 entries need clusters of 16 KiB or more, cluster_bits is {found}")]
    ExtendedClusterBits {
        /// Value in the header.
        found: u32,
    },
    /// `refcount_order` out of range.
    #[error("refcount_order is {found}, allowed are 0 to 6")]
    RefcountOrder {
        /// Value in the header.
        found: u32,
    },
}

/// Sizes of an image's structures, proven once from the header.
///
/// Small and `Copy`: it converts between offsets and clusters, so that nobody passes `cluster_bits` around.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
}

impl Geometry {
    /// Geometry of an image with these header fields.
    ///
    /// # Errors
    ///
    /// A field outside the range the format allows.
    pub const fn new(
        cluster_bits: u32,
        refcount_order: u32,
        extended_l2: bool,
    ) -> Result<Self, GeometryError> {
        if cluster_bits < MIN_CLUSTER_BITS || cluster_bits > MAX_CLUSTER_BITS {
            return Err(GeometryError::ClusterBits {
                found: cluster_bits,
            });
        }
        if extended_l2 && cluster_bits < MIN_EXTENDED_CLUSTER_BITS {
            return Err(GeometryError::ExtendedClusterBits {
                found: cluster_bits,
            });
        }
        if refcount_order > MAX_REFCOUNT_ORDER {
            return Err(GeometryError::RefcountOrder {
                found: refcount_order,
            });
        }
        Ok(Self {
            cluster_bits,
            refcount_order,
            extended_l2,
        })
    }

    /// Base-2 logarithm of the cluster size.
    pub const fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes in a cluster: 512 to 2 MiB.
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes in a cluster, to index memory with.
    pub const fn cluster_len(self) -> usize {
        1 << self.cluster_bits
    }

    /// Whether L2 entries have a second word with subclusters.
    pub const fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// Bytes in an L2 entry: 8, or 16 with extended entries.
    pub const fn l2_entry_size(self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Base-2 logarithm of the entries in an L2 table.
    pub const fn l2_bits(self) -> u32 {
        self.cluster_bits
            .wrapping_sub(if self.extended_l2 { 4 } else { 3 })
    }

    /// Entries in an L2 table; a table fills one cluster.
    pub const fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Guest bytes that one L2 table maps.
    pub const fn l2_coverage(self) -> u64 {
        1 << self.l2_bits().wrapping_add(self.cluster_bits)
    }

    /// Entries an L1 table needs to map `virtual_size` bytes.
    pub const fn l1_entries_for(self, virtual_size: u64) -> u64 {
        virtual_size.div_ceil(self.l2_coverage())
    }

    /// Bytes in a subcluster; the cluster size where there are none.
    pub const fn subcluster_size(self) -> u64 {
        if self.extended_l2 {
            self.cluster_size() >> 5
        } else {
            self.cluster_size()
        }
    }

    /// Base-2 logarithm of the refcount width.
    pub const fn refcount_order(self) -> u32 {
        self.refcount_order
    }

    /// Bits in a refcount: 1, 2, 4, 8, 16, 32 or 64.
    pub const fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// Largest refcount the width holds.
    pub const fn refcount_max(self) -> u64 {
        u64::MAX >> 64_u32.wrapping_sub(self.refcount_bits())
    }

    /// Base-2 logarithm of the refcounts in a refcount block.
    pub const fn refcount_block_bits(self) -> u32 {
        self.cluster_bits
            .wrapping_add(3)
            .wrapping_sub(self.refcount_order)
    }

    /// Refcounts in a refcount block; a block fills one cluster.
    pub const fn refcounts_per_block(self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// Bits of a compressed descriptor that hold the host byte offset.
    pub const fn compressed_offset_bits(self) -> u32 {
        70_u32.wrapping_sub(self.cluster_bits)
    }

    /// The host cluster that holds a byte.
    pub const fn host_cluster(self, offset: HostOffset) -> HostCluster {
        HostCluster::new(offset.get() >> self.cluster_bits)
    }

    /// First byte of a host cluster, or `None` where 64 bits don't hold it.
    pub const fn host_offset(self, cluster: HostCluster) -> Option<HostOffset> {
        match cluster.get().checked_mul(self.cluster_size()) {
            Some(bytes) => Some(HostOffset::new(bytes)),
            None => None,
        }
    }

    /// The guest cluster that holds a byte.
    pub const fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster::new(offset.get() >> self.cluster_bits)
    }

    /// First byte of a guest cluster, or `None` where 64 bits don't hold it.
    pub const fn guest_offset(self, cluster: GuestCluster) -> Option<GuestOffset> {
        match cluster.get().checked_mul(self.cluster_size()) {
            Some(bytes) => Some(GuestOffset::new(bytes)),
            None => None,
        }
    }

    /// Whether a host offset lies at the start of a cluster.
    pub const fn is_cluster_aligned(self, offset: HostOffset) -> bool {
        offset.is_aligned_to(self.cluster_size())
    }

    /// Clusters that `bytes` bytes fill, the last one perhaps in part.
    pub const fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }
}
