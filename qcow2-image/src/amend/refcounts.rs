//! Another width of refcounts: new blocks and a new table beside the old ones, then one write to the header.
//!
//! The new ones lie behind the end of the file and describe themselves; what the old ones fill is free in them. So nothing
//! is in use twice, whatever is on disk when the machine fails, and nothing is lost.

use qcow2_alloc::AllocError;
use qcow2_cache::{Kinds, field};
use qcow2_format::geometry::{HOST_OFFSET_LIMIT, MAX_REFCOUNT_TABLE_BYTES};
use qcow2_format::{Geometry, HostCluster, HostOffset, RefcountBlock, set_refcount};
use qcow2_io::Storage as _;

use super::AmendError;
use super::plan::geometry_with;
use crate::Image;
use crate::copy::Monitor;

/// Refcounts that are looked at together, at most.
const STEP: u64 = 4096;

/// Where the refcounts of an image lie now.
struct Old {
    geometry: Geometry,
    blocks: Vec<u64>,
    /// Clusters of blocks and table, in order: nothing is in them soon.
    own: Vec<u64>,
    /// The block that was read last.
    loaded: Option<(usize, Vec<u8>)>,
}

/// Where they will lie.
struct New {
    geometry: Geometry,
    /// First cluster of the blocks; the table follows them.
    start: u64,
    /// Numbers of the blocks that there are, in order.
    blocks: Vec<u64>,
    table_clusters: u64,
}

impl Old {
    /// Reads the refcounts of clusters from `first` on, all of one block; to be asked for in order.
    fn read(&mut self, image: &Image, first: u64, counts: &mut [u64]) -> Result<(), AmendError> {
        counts.fill(0);
        let block = index(first >> self.geometry.refcount_block_bits());
        let Some(place) = self.blocks.get(block).copied().filter(|at| *at != 0) else {
            return Ok(());
        };
        if self
            .loaded
            .as_ref()
            .is_none_or(|(number, _)| *number != block)
        {
            let mut bytes = vec![0; self.geometry.cluster_len()];
            image.meta.storage().read_at(&mut bytes, place)?;
            self.loaded = Some((block, bytes));
        }
        let bytes = self.loaded.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        let number = index(first & (self.geometry.refcounts_per_block() - 1));
        let block = RefcountBlock::new(bytes, self.geometry);
        for (number, count) in (number..).zip(counts.iter_mut()) {
            *count = block.get(number).unwrap_or(0);
        }
        let from = self.own.partition_point(|cluster| *cluster < first);
        for cluster in self.own.iter().skip(from) {
            match counts.get_mut(index(cluster - first)) {
                Some(count) => *count = 0,
                None => break,
            }
        }
        Ok(())
    }

    /// Pieces of `step` clusters of all blocks that exist; each begins with the one given.
    fn pieces(&self, step: u64) -> impl Iterator<Item = u64> + use<> {
        let per_block = self.geometry.refcounts_per_block();
        let present: Vec<u64> = (0..)
            .zip(&self.blocks)
            .filter(|(_, place)| **place != 0)
            .map(|(number, _)| number)
            .collect();
        present
            .into_iter()
            .flat_map(move |number| number * per_block..(number + 1) * per_block)
            .step_by(index(step))
    }
}

impl New {
    fn end(&self) -> u64 {
        self.start + self.blocks.len() as u64 + self.table_clusters
    }

    fn at(&self, cluster: u64) -> HostOffset {
        HostOffset::new(cluster << self.geometry.cluster_bits())
    }
}

impl Image {
    /// Gives refcounts another width. All must be in the file, and the image nobody else's.
    pub(super) fn rebuild_refcounts(
        &self,
        order: u32,
        monitor: Option<&dyn Monitor>,
    ) -> Result<(), AmendError> {
        let new = geometry_with(self.geometry, order)?;
        let mut old = self.old_refcounts()?;
        let new = self.plan_refcounts(&mut old, new)?;
        let storage = self.meta.storage();
        let before = storage.len()?;
        let written = self.write_structures(&mut old, &new, monitor);
        if let Err(error) = written {
            return Err(self.cut_back(before, error));
        }
        let switched = self.meta.switch_header(field::REFCOUNTS, |header| {
            header.geometry = new.geometry;
            header.refcount_table_offset = new.at(new.start + new.blocks.len() as u64);
            header.refcount_table_clusters = u32::try_from(new.table_clusters).unwrap_or(u32::MAX);
        });
        switched.map_err(|error| self.cut_back(before, error.into()))
    }

    /// Nothing leads to what has been written; and since it is taken for never written, it must go.
    fn cut_back(&self, len: u64, error: AmendError) -> AmendError {
        if self.meta.storage().set_len(len).is_err() {
            self.meta.give_up();
        }
        error
    }

    fn old_refcounts(&self) -> Result<Old, AmendError> {
        let alloc = self.alloc()?;
        let bits = self.geometry.cluster_bits();
        let (table, len, _) = alloc.tables();
        let mut blocks = Vec::new();
        for number in 0..len / 8 {
            blocks.push(alloc.block(number)?.map_or(0, HostOffset::get));
        }
        let first = table.get() >> bits;
        let mut own: Vec<u64> = (first..first + self.geometry.clusters_for(len)).collect();
        own.extend(blocks.iter().filter(|at| **at != 0).map(|at| at >> bits));
        own.sort_unstable();
        own.dedup();
        Ok(Old {
            geometry: self.geometry,
            blocks,
            own,
            loaded: None,
        })
    }

    /// Finds out which blocks there will be, and whether all refcounts fit.
    fn plan_refcounts(&self, old: &mut Old, geometry: Geometry) -> Result<New, AmendError> {
        let bits = geometry.refcount_block_bits();
        let mut blocks: Vec<u64> = Vec::new();
        let mut end = self.alloc()?.file_clusters();
        let step = step(old.geometry, geometry);
        let mut counts = vec![0; index(step)];
        for first in old.pieces(step) {
            old.read(self, first, &mut counts)?;
            let Some(last) = counts.iter().rposition(|count| *count > 0) else {
                continue;
            };
            let too_large = |count: &u64| *count > geometry.refcount_max();
            if let Some(at) = counts.iter().position(too_large) {
                let error = AllocError::RefcountOverflow {
                    cluster: HostCluster::new(first + at as u64),
                    value: counts.get(at).copied().unwrap_or(0),
                    bits: geometry.refcount_bits(),
                };
                return Err(AmendError::refused(
                    "refcount_bits",
                    format!("it is too narrow for what is there: {error}"),
                ));
            }
            end = end.max(first + last as u64 + 1);
            if blocks.last() != Some(&(first >> bits)) {
                blocks.push(first >> bits);
            }
        }
        let known = blocks.len();
        let mut table_clusters = 1;
        loop {
            // Those that describe the blocks and the table themselves.
            blocks.truncate(known);
            let mut count = known as u64;
            loop {
                let last = (end + count + table_clusters - 1) >> bits;
                let first = (end >> bits).max(blocks.last().map_or(0, |last| last + 1));
                blocks.extend(first..=last);
                if blocks.len() as u64 == count {
                    break;
                }
                count = blocks.len() as u64;
            }
            let entries = blocks.last().map_or(0, |last| last + 1);
            let needed = geometry.clusters_for(entries * 8).max(1);
            if needed <= table_clusters {
                break;
            }
            table_clusters = needed;
        }
        let bytes = table_clusters << geometry.cluster_bits();
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            let error = AllocError::RefcountTableTooLarge {
                needed: bytes,
                limit: MAX_REFCOUNT_TABLE_BYTES,
            };
            return Err(AmendError::refused("refcount_bits", error.to_string()));
        }
        let new = New {
            geometry,
            start: end,
            blocks,
            table_clusters,
        };
        if new.end() > HOST_OFFSET_LIMIT >> geometry.cluster_bits() {
            return Err(AllocError::FileTooLarge {
                limit: HOST_OFFSET_LIMIT,
            }
            .into());
        }
        Ok(new)
    }

    /// Writes the new blocks and the new table.
    fn write_structures(
        &self,
        old: &mut Old,
        new: &New,
        monitor: Option<&dyn Monitor>,
    ) -> Result<(), AmendError> {
        let geometry = new.geometry;
        let per_block = geometry.refcounts_per_block();
        let step = step(old.geometry, geometry);
        let mut counts = vec![0; index(step)];
        let size = geometry.cluster_size();
        let total = new.blocks.len() as u64 * size;
        let entries = index(new.table_clusters << geometry.cluster_bits()) / 8;
        let mut table = vec![0_u64; entries];
        for (number, block) in (0..).zip(&new.blocks) {
            if monitor.is_some_and(Monitor::is_cancelled) {
                return Err(AmendError::Cancelled);
            }
            let first = block * per_block;
            let mut bytes = vec![0; geometry.cluster_len()];
            for piece in (first..first + per_block).step_by(index(step)) {
                old.read(self, piece, &mut counts)?;
                for (cluster, count) in (piece..).zip(&counts) {
                    let own = (new.start..new.end()).contains(&cluster);
                    let count = if own { 1 } else { *count };
                    if count > 0 {
                        // It fits, as the plan has found.
                        let _ = set_refcount(&mut bytes, geometry, index(cluster - first), count);
                    }
                }
            }
            let place = new.at(new.start + number);
            self.meta.write(Kinds::REFCOUNT_BLOCK, place, &bytes)?;
            if let Some(entry) = table.get_mut(index(*block)) {
                *entry = place.get();
            }
            if let Some(monitor) = monitor {
                monitor.progress((number + 1) * size, total);
            }
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let place = new.at(new.start + new.blocks.len() as u64);
        Ok(self.meta.write(Kinds::REFCOUNT_TABLE, place, &bytes)?)
    }
}

/// Clusters that are looked at together: they are all of one block, old and new.
fn step(old: Geometry, new: Geometry) -> u64 {
    old.refcounts_per_block()
        .min(new.refcounts_per_block())
        .min(STEP)
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
