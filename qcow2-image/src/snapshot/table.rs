//! The snapshot table, and L1 tables that are not the active one.

use qcow2_alloc::{Allocation, Reason};
use qcow2_cache::{Kinds, MetadataError, field};
use qcow2_format::snapshot::encode_table;
use qcow2_format::{HostOffset, L1Entry, Snapshot};

use crate::ready::read_snapshots;
use crate::{Image, ImageError};

impl Image {
    /// The snapshot table, and its length in bytes.
    pub(crate) fn snapshot_table(&self) -> Result<(Vec<Snapshot>, u64), ImageError> {
        let header = self.header();
        if header.snapshot_count == 0 {
            return Ok((Vec::new(), 0));
        }
        read_snapshots(&**self.meta.storage(), &header)
    }

    /// Writes a snapshot table to where nothing is; an empty one needs no place.
    pub(crate) fn place_table(
        &self,
        snapshots: &[Snapshot],
    ) -> Result<Option<Allocation<'_>>, ImageError> {
        let bytes = encode_table(snapshots)?;
        self.place(Kinds::SNAPSHOT_TABLE, bytes)
    }

    /// Writes an L1 table to where nothing is; an empty one needs no place.
    pub(super) fn place_l1(&self, l1: &[L1Entry]) -> Result<Option<Allocation<'_>>, ImageError> {
        let bytes = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.place(Kinds::INACTIVE_L1, bytes)
    }

    fn place(
        &self,
        kinds: Kinds,
        mut bytes: Vec<u8>,
    ) -> Result<Option<Allocation<'_>>, ImageError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        bytes.resize(bytes.len().next_multiple_of(self.geometry.cluster_len()), 0);
        let clusters = self.geometry.clusters_for(bytes.len() as u64);
        let place = self.alloc()?.allocate_contiguous(clusters)?;
        self.meta.write(kinds, place.offset(), &bytes)?;
        Ok(Some(place))
    }

    /// Makes a table the image's, and releases the old one.
    pub(crate) fn switch_table(
        &self,
        snapshots: &[Snapshot],
        place: Option<Allocation<'_>>,
    ) -> Result<(), ImageError> {
        let header = self.header();
        let (_, old_len) = self.snapshot_table()?;
        let old_place = header.snapshot_table_offset;
        let offset = place
            .as_ref()
            .map_or(HostOffset::new(0), Allocation::offset);
        let map = self.meta.overlap();
        let len = encode_table(snapshots)?.len() as u64;
        map.add(offset, len, Kinds::SNAPSHOT_TABLE)
            .map_err(MetadataError::from)?;
        let alloc = self.alloc()?;
        // The refcounts of all that the new table leads to come before it.
        let switched = self
            .meta
            .commit(alloc)
            .and_then(|()| self.meta.write_refcounts())
            .and_then(|()| {
                self.meta.switch_header(field::SNAPSHOTS, |header| {
                    header.snapshot_count = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
                    header.snapshot_table_offset = offset;
                })
            });
        if let Err(error) = switched {
            map.remove(offset, len, Kinds::SNAPSHOT_TABLE);
            return Err(error.into());
        }
        if let Some(place) = place {
            place.keep();
        }
        map.remove(old_place, old_len, Kinds::SNAPSHOT_TABLE);
        // Without entries there is no table, whatever its place says.
        if old_len > 0 {
            alloc.release(
                self.geometry.host_cluster(old_place),
                self.geometry.clusters_for(old_len),
                Reason::Other,
            );
        }
        Ok(())
    }

    /// Notes where a snapshot's tables lie.
    pub(super) fn chart_tree(&self, place: HostOffset, l1: &[L1Entry]) -> Result<(), ImageError> {
        let map = self.meta.overlap();
        let add = |offset, len, kinds| map.add(offset, len, kinds).map_err(MetadataError::from);
        add(place, l1.len() as u64 * 8, Kinds::INACTIVE_L1)?;
        for entry in l1.iter().filter(|entry| entry.l2_table().get() != 0) {
            add(entry.l2_table(), self.cluster_size(), Kinds::INACTIVE_L2)?;
        }
        Ok(())
    }

    /// Forgets where the tables of a deleted snapshot lie, but not what others have of them.
    pub(super) fn unchart_tree(&self, old: &Snapshot, l1: &[L1Entry]) -> Result<(), ImageError> {
        let map = self.meta.overlap();
        let len = u64::from(old.l1_entries) * 8;
        map.remove(old.l1_table_offset, len, Kinds::INACTIVE_L1);
        for entry in l1.iter().filter(|entry| entry.l2_table().get() != 0) {
            map.remove(entry.l2_table(), self.cluster_size(), Kinds::INACTIVE_L2);
        }
        let header = self.header();
        if header.snapshot_count > 0 {
            self.chart_snapshots(&header)?;
        }
        Ok(())
    }
}
