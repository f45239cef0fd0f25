//! The frame of large images: where clusters lie, and refcounts written as a stream.

use qcow2_format::header::Version;
use qcow2_format::{Geometry, HostCluster, HostOffset, set_refcount};
use qcow2_io::Storage;

use super::{SynthError, count32, header, table_bytes};

/// A large image in the making.
///
/// Each refcount block is the first cluster of the range it counts, but the first, which follows the header; so every cluster
/// has its place without any memory of those before it. Clusters between the blocks are *slots*, numbered from 0
/// behind the metadata at the front. What is at the front fits in the first range. The refcount table comes last.
#[derive(Debug)]
pub(super) struct Bulk<'a> {
    storage: &'a dyn Storage,
    geometry: Geometry,
    virtual_size: u64,
    /// Host cluster of slot 0.
    front: u64,
    /// The refcount block being filled, and its number.
    block: Vec<u8>,
    block_number: u64,
    /// Clusters up to the last one that was counted.
    end: u64,
}

impl<'a> Bulk<'a> {
    /// An image with `front` clusters of metadata behind the header and the first refcount block.
    ///
    /// # Errors
    ///
    /// The storage's, or metadata that is too large for this layout.
    pub(super) fn new(
        storage: &'a dyn Storage,
        geometry: Geometry,
        virtual_size: u64,
        front: u64,
    ) -> Result<Self, SynthError> {
        storage.set_len(0)?;
        if front + 2 > geometry.refcounts_per_block() {
            return Err(SynthError::TooLarge {
                what: "the metadata at the front",
            });
        }
        let mut bulk = Self {
            storage,
            geometry,
            virtual_size,
            front: front + 2,
            block: vec![0; geometry.cluster_len()],
            block_number: 0,
            end: 0,
        };
        for cluster in 0..bulk.front {
            bulk.count(cluster)?;
        }
        Ok(bulk)
    }

    /// The cluster of metadata numbered `index` at the front.
    pub(super) fn front(&self, index: u64) -> HostOffset {
        self.offset(2 + index)
    }

    /// Where a slot lies.
    pub(super) fn slot(&self, slot: u64) -> HostOffset {
        self.offset(self.slot_cluster(slot))
    }

    /// Number of the host cluster of a slot.
    pub(super) fn slot_cluster(&self, slot: u64) -> u64 {
        let range = self.geometry.refcounts_per_block();
        let first_range = range - self.front;
        match slot.checked_sub(first_range) {
            None => self.front + slot,
            Some(behind) => {
                let (ranges, rest) = (behind / (range - 1), behind % (range - 1));
                (ranges + 1) * range + 1 + rest
            }
        }
    }

    /// Whether a cluster is a refcount block's; such a one is no slot.
    pub(super) fn is_block(&self, cluster: u64) -> bool {
        cluster.is_multiple_of(self.geometry.refcounts_per_block())
    }

    fn offset(&self, cluster: u64) -> HostOffset {
        let offset = self.geometry.host_offset(HostCluster::new(cluster));
        offset.expect("a cluster of a file that can be written")
    }

    /// Writes a table.
    pub(super) fn write(&self, offset: HostOffset, bytes: &[u8]) -> Result<(), SynthError> {
        Ok(self.storage.write_at(bytes, offset.get())?)
    }

    /// Sets the refcount of the next slots to 1.
    pub(super) fn count_slots(&mut self, slots: std::ops::Range<u64>) -> Result<(), SynthError> {
        for slot in slots {
            self.count(self.slot_cluster(slot))?;
        }
        Ok(())
    }

    /// Adds a reference to a cluster; no range of clusters is come back to once a later one was counted.
    pub(super) fn count(&mut self, cluster: u64) -> Result<(), SynthError> {
        self.count_many(cluster, 1)
    }

    /// Adds references to a cluster.
    pub(super) fn count_many(&mut self, cluster: u64, references: u64) -> Result<(), SynthError> {
        let range = self.geometry.refcounts_per_block();
        while cluster / range > self.block_number {
            self.finish_block()?;
            self.block_number += 1;
            self.block.fill(0);
            self.add(0, 1)?;
        }
        debug_assert_eq!(cluster / range, self.block_number, "ranges come in order");
        self.end = self.end.max(cluster + 1);
        self.add(cluster % range, references)
    }

    fn add(&mut self, index: u64, references: u64) -> Result<(), SynthError> {
        let too_large = SynthError::TooLarge { what: "a refcount" };
        let Ok(index) = usize::try_from(index) else {
            return Err(too_large);
        };
        let block = qcow2_format::RefcountBlock::new(&self.block, self.geometry);
        let sum = block.get(index).unwrap_or_default() + references;
        set_refcount(&mut self.block, self.geometry, index, sum).ok_or(too_large)
    }

    fn block_offset(&self, number: u64) -> HostOffset {
        match number {
            0 => self.offset(1),
            _ => self.offset(number * self.geometry.refcounts_per_block()),
        }
    }

    fn finish_block(&self) -> Result<(), SynthError> {
        self.write(self.block_offset(self.block_number), &self.block)
    }

    /// Writes the refcount table and the header, which gets `l1_entries` at the first cluster of the front, and the snapshot
    /// table at `snapshots`, if any.
    pub(super) fn finish(
        mut self,
        l1_entries: u64,
        snapshots: Option<(u32, HostOffset)>,
    ) -> Result<(), SynthError> {
        let range = self.geometry.refcounts_per_block();
        // In one piece: it goes behind the next refcount block where there is no room before it.
        let mut first = self.end;
        let mut clusters = self.table_clusters(first);
        if self.is_block(first) || first / range != (first + clusters - 1) / range {
            first = first.next_multiple_of(range) + 1;
            clusters = self.table_clusters(first);
        }
        for cluster in first..first + clusters {
            self.count(cluster)?;
        }
        self.finish_block()?;
        let blocks = (0..=self.block_number).map(|number| self.block_offset(number).get());
        self.write(self.offset(first), &table_bytes(blocks))?;

        let mut header = header(Version::V3, self.geometry, self.virtual_size);
        header.l1_table_offset = self.front(0);
        header.l1_entries = count32(l1_entries, "the L1 table")?;
        header.refcount_table_offset = self.offset(first);
        header.refcount_table_clusters = count32(clusters, "the refcount table")?;
        if let Some((count, offset)) = snapshots {
            header.snapshot_count = count;
            header.snapshot_table_offset = offset;
        }
        self.write(HostOffset::new(0), &header.encode()?)?;
        self.storage.set_len(self.offset(self.end).get())?;
        self.storage.flush()?;
        Ok(())
    }

    /// Clusters of a refcount table that starts at this cluster.
    fn table_clusters(&self, first: u64) -> u64 {
        let range = self.geometry.refcounts_per_block();
        let mut clusters = 1;
        loop {
            let blocks = (first + clusters).div_ceil(range);
            let needed = self.geometry.clusters_for(blocks * 8);
            if needed <= clusters {
                return clusters;
            }
            clusters = needed;
        }
    }
}
