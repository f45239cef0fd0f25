//! Where everything lies in a new image.

use std::ops::Range;

use qcow2_format::geometry::{HOST_OFFSET_LIMIT, MAX_REFCOUNT_TABLE_BYTES};
use qcow2_format::{Geometry, HostOffset};

use super::{CreateError, Preallocation};

/// The places of all structures of a new image, cluster by cluster from the front.
///
/// Every cluster has exactly one reference, and no cluster is left out. All places lie below
/// [`HOST_OFFSET_LIMIT`], so that nothing here can overflow once it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    geometry: Geometry,
    /// Whether guest data lies in another file, at its guest offset.
    external: bool,
    l1_entries: u64,
    /// Clusters of the refcount table.
    table_clusters: u64,
    /// Refcount blocks, a cluster each.
    blocks: u64,
    /// Guest clusters that have their place; none unless the image is preallocated.
    guest_clusters: u64,
    /// Bytes of the LUKS area, behind all else.
    crypto_len: u64,
    /// All clusters of the image file.
    clusters: u64,
}

impl Layout {
    /// The layout of an image of `size` bytes, whose L1 table is known to be small enough. The refcount table has entries for a file
    /// of `room` bytes.
    pub(super) fn new(
        geometry: Geometry,
        size: u64,
        preallocation: Preallocation,
        external: bool,
        crypto_len: u64,
        room: u64,
    ) -> Result<Self, CreateError> {
        let l1_entries = geometry.l1_entries_for(size);
        let preallocated = preallocation != Preallocation::Off;
        let guest_clusters = if preallocated {
            geometry.clusters_for(size)
        } else {
            0
        };
        let mut layout = Self {
            geometry,
            external,
            l1_entries,
            table_clusters: 1,
            blocks: 1,
            guest_clusters,
            crypto_len,
            clusters: 0,
        };
        // A few million at most, and 2^54 at most: no sum below comes near 2^64.
        let others = 1
            + layout.l1_clusters()
            + layout.l2_tables()
            + layout.crypto_clusters()
            + if external { 0 } else { guest_clusters };
        let room = geometry
            .clusters_for(room)
            .div_ceil(geometry.refcounts_per_block())
            .div_ceil(geometry.cluster_size() / 8);
        (layout.table_clusters, layout.blocks) = Self::refcounts_for(geometry, others, room.max(1));
        layout.clusters = others + layout.table_clusters + layout.blocks;
        layout.check_limits(preallocation)?;
        Ok(layout)
    }

    /// Clusters of a refcount table, at least `least`, and blocks, that describe `others` clusters and themselves.
    pub(super) fn refcounts_for(geometry: Geometry, others: u64, least: u64) -> (u64, u64) {
        let table_words = geometry.cluster_size() / 8;
        let (mut table, mut blocks) = (least, 1);
        loop {
            let clusters = others.saturating_add(table + blocks);
            let wanted = clusters.div_ceil(geometry.refcounts_per_block());
            let found = (wanted.div_ceil(table_words).max(least), wanted);
            if found == (table, blocks) {
                return found;
            }
            // Each grows with the other and never shrinks: the first agreement is the smallest.
            (table, blocks) = found;
        }
    }

    /// All clusters that hold neither refcounts nor where they are.
    pub(super) fn clusters_beside_refcounts(&self) -> u64 {
        self.clusters - self.table_clusters - self.blocks
    }

    fn check_limits(&self, preallocation: Preallocation) -> Result<(), CreateError> {
        let size = self.geometry.cluster_size();
        if self.table_clusters > MAX_REFCOUNT_TABLE_BYTES / size {
            return Err(CreateError::RefcountTableTooLarge {
                preallocation,
                limit: MAX_REFCOUNT_TABLE_BYTES,
            });
        }
        let data = if self.external {
            self.guest_clusters
        } else {
            0
        };
        let end = self.clusters.max(data).saturating_mul(size);
        if end > HOST_OFFSET_LIMIT {
            return Err(CreateError::FileTooLarge {
                preallocation,
                end,
                limit: HOST_OFFSET_LIMIT,
            });
        }
        Ok(())
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// All clusters of the image file; each has refcount 1.
    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    pub(super) fn refcount_table(&self) -> HostOffset {
        self.at(1)
    }

    pub(super) fn refcount_table_clusters(&self) -> u64 {
        self.table_clusters
    }

    pub(super) fn refcount_blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) fn refcount_block(&self, index: u64) -> HostOffset {
        self.at(1 + self.table_clusters + index)
    }

    /// The L1 table; 0 where it has no entry.
    pub(super) fn l1_table(&self) -> HostOffset {
        if self.l1_entries == 0 {
            HostOffset::new(0)
        } else {
            self.at(1 + self.table_clusters + self.blocks)
        }
    }

    pub(super) fn l1_entries(&self) -> u64 {
        self.l1_entries
    }

    /// L2 tables that are laid out: none, or one for each L1 entry.
    pub(super) fn l2_tables(&self) -> u64 {
        self.guest_clusters.div_ceil(self.geometry.l2_entries())
    }

    pub(super) fn l2_table(&self, index: u64) -> HostOffset {
        self.at(self.front() + index * self.stride())
    }

    /// The guest clusters that a laid out L2 table maps.
    pub(super) fn guest_clusters_of(&self, l2_table: u64) -> Range<u64> {
        let first = l2_table * self.geometry.l2_entries();
        let end = first + self.geometry.l2_entries();
        first..end.min(self.guest_clusters)
    }

    /// Where the data of a guest cluster lies, in whichever file that is.
    pub(super) fn data(&self, guest_cluster: u64) -> HostOffset {
        if self.external {
            return self.at(guest_cluster);
        }
        let entries = self.geometry.l2_entries();
        let table = guest_cluster / entries;
        self.at(self.front() + table * self.stride() + 1 + guest_cluster % entries)
    }

    /// From the first L2 table to the end: all tables behind the L1 table, and the data between them.
    pub(super) fn preallocated(&self) -> Range<u64> {
        self.at(self.front()).get()..self.crypto().get()
    }

    /// Where the LUKS area begins, if there is one.
    pub(super) fn crypto(&self) -> HostOffset {
        self.at(self.clusters - self.crypto_clusters())
    }

    /// Bytes of the LUKS area.
    pub(super) fn crypto_len(&self) -> u64 {
        self.crypto_len
    }

    /// Guest clusters that have their place.
    #[cfg(feature = "encryption")]
    pub(super) fn guest_clusters(&self) -> u64 {
        self.guest_clusters
    }

    /// End of the last L1 entry, or of the cluster before where there is none.
    pub(super) fn tables_end(&self) -> u64 {
        if self.l1_entries == 0 {
            self.at(self.front()).get()
        } else {
            self.l1_table().get() + self.l1_entries * 8
        }
    }

    /// Length of the image file.
    pub(super) fn file_len(&self) -> u64 {
        if self.guest_clusters == 0 && self.crypto_len == 0 {
            self.tables_end()
        } else {
            self.at(self.clusters).get()
        }
    }

    fn l1_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.l1_entries * 8)
    }

    fn crypto_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.crypto_len)
    }

    /// Clusters up to the end of the L1 table.
    fn front(&self) -> u64 {
        1 + self.table_clusters + self.blocks + self.l1_clusters()
    }

    /// Clusters from one L2 table to the next.
    fn stride(&self) -> u64 {
        if self.external {
            1
        } else {
            1 + self.geometry.l2_entries()
        }
    }

    fn at(&self, cluster: u64) -> HostOffset {
        HostOffset::new(cluster << self.geometry.cluster_bits())
    }
}
