//! The refcount table and the places of its blocks.

mod renew;

use qcow2_format::geometry::{MAX_REFCOUNT_TABLE_BYTES, MIN_CLUSTER_BITS};
use qcow2_format::{HostOffset, RefcountTableEntry};

use super::super::PlanError;
use super::super::action::{Action, ActionKind, Effect};
use super::super::plan::Planner;
use crate::blocks::BlockRef;
use crate::image::Image;
use crate::refmap::{PAGE_CLUSTERS, RefMap};
use crate::{Place, Structure};

/// Where the header says where the refcount table is: offset, then clusters.
const TABLE_FIELDS: u64 = 48;
/// Clusters of the largest table there can be.
const CLUSTERS_MAX: u64 = MAX_REFCOUNT_TABLE_BYTES >> MIN_CLUSTER_BITS;

/// The refcount table as it should be.
pub(super) struct Table {
    /// First byte, and length in clusters; `None` if it has to be made anew.
    place: Option<(u64, u64)>,
    /// The place that the header names, whether or not it can stay.
    named: (u64, u64),
    /// Entries as they are in the file, as far as the table can be read.
    found: Vec<u64>,
    /// Offsets of the blocks; 0 where there is none.
    entries: Vec<u64>,
    /// New blocks: index and offset.
    new_blocks: Vec<(u64, u64)>,
    /// Nobody knows where the blocks are.
    pub(super) is_unreadable: bool,
    /// Whether the named place has another owner.
    is_shared: bool,
    /// Indices of blocks whose place has another owner.
    shared_blocks: Vec<u64>,
    /// If all of this is made anew: the clusters that it had.
    old: Option<Vec<(u64, u64)>>,
    /// When all is made anew: no cluster before this is free for a block.
    no_room_before: u64,
}

impl Table {
    /// Reads the table, if there is one in a place that it can have.
    pub(super) fn read(image: &Image<'_>, others: &RefMap) -> Self {
        let offset = image.header.refcount_table_offset.get();
        let clusters = u64::from(image.header.refcount_table_clusters);
        let len = clusters << image.cluster_bits();
        let first = offset >> image.cluster_bits();
        let free = |cluster: u64| cluster > 0 && !others.is_seen(cluster);
        let usable = clusters > 0
            && len <= MAX_REFCOUNT_TABLE_BYTES
            && image.geometry.is_cluster_aligned(HostOffset::new(offset))
            && image.is_inside(offset, len)
            && (first..first.saturating_add(clusters)).all(free);
        let mut table = Self {
            place: usable.then_some((offset, clusters)),
            named: (offset, clusters),
            found: Vec::new(),
            entries: Vec::new(),
            new_blocks: Vec::new(),
            is_unreadable: false,
            is_shared: (first..first.saturating_add(clusters.min(CLUSTERS_MAX)))
                .any(|cluster| others.is_seen(cluster)),
            shared_blocks: Vec::new(),
            old: None,
            no_room_before: 0,
        };
        let in_file = len
            .min(MAX_REFCOUNT_TABLE_BYTES)
            .min(image.file_len().saturating_sub(offset));
        let mut bytes = vec![0; usize::try_from(in_file).unwrap_or(0).next_multiple_of(8)];
        // A table that lies on something else holds that by now; nothing of it is believed.
        if usable && image.reader.read(&mut bytes, offset).is_err() {
            // It is made anew elsewhere.
            table.place = None;
            table.is_unreadable = true;
        } else if usable {
            let words = bytes.as_chunks::<8>().0.iter();
            table.found = words.map(|word| u64::from_be_bytes(*word)).collect();
            let used = table.found.iter().rposition(|entry| *entry != 0);
            table.found.truncate(used.map_or(0, |last| last + 1));
        }
        table
    }

    /// Counts what can stay: the table's own clusters, and each block that has its place for itself. Gives what can't and is free.
    pub(super) fn claim(&mut self, image: &Image<'_>, map: &mut RefMap) -> RefMap {
        let mut released = RefMap::new(image.file_clusters());
        let bits = image.cluster_bits();
        if let Some((offset, clusters)) = self.place {
            map.add_run(offset >> bits, clusters, 1);
        }
        let mut block = vec![0; image.geometry.cluster_len()];
        for word in &self.found {
            let entry = RefcountTableEntry::from_bits(*word);
            let offset = entry.block().get();
            let cluster = offset >> bits;
            let stays = offset != 0
                && image.geometry.is_cluster_aligned(entry.block())
                && offset < image.file_len()
                && !map.is_seen(cluster)
                && image.reader.read(&mut block, offset).is_ok();
            if offset != 0 && map.is_seen(cluster) {
                self.shared_blocks.push(self.entries.len() as u64);
            }
            if stays {
                map.add(cluster, 1, crate::refmap::Sharing::Exclusive);
            }
            self.entries.push(if stays { offset } else { 0 });
        }
        if self.place.is_none() && self.named.1 > 0 && image.is_inside(self.named.0, 1) {
            // What lies there besides is counted, and so not released.
            let first = self.named.0 >> bits;
            for cluster in
                (first..).take(usize::try_from(self.named.1.min(CLUSTERS_MAX)).unwrap_or(0))
            {
                if cluster < image.file_clusters() && !map.is_seen(cluster) {
                    released.insert(cluster);
                }
            }
        }
        released
    }

    /// Makes blocks where clusters have references and no block, and a table that holds them all.
    pub(super) fn complete(
        &mut self,
        planner: &mut Planner<'_, '_>,
        image: &Image<'_>,
        map: &mut RefMap,
        released: &mut RefMap,
    ) -> Result<(), PlanError> {
        let size = image.cluster_size();
        let bits = image.cluster_bits();
        let per_block = image.geometry.refcounts_per_block();
        loop {
            let mut added = false;
            let mut page = 0;
            self.no_room_before = 0;
            while let Some(found) = map.next_page(page, u64::MAX) {
                // A block may be for a part of a page, where blocks are small.
                let first = found.saturating_mul(PAGE_CLUSTERS);
                let mut cluster = first;
                while cluster < first.saturating_add(PAGE_CLUSTERS) {
                    let index = cluster / per_block;
                    let stop = (index + 1)
                        .saturating_mul(per_block)
                        .min(first.saturating_add(PAGE_CLUSTERS));
                    let used = (cluster..stop).any(|cluster| map.is_seen(cluster));
                    if used && self.block(index) == 0 {
                        // Before memory is set aside for an index: a sparse file may reach far.
                        limit_table((index + 1).saturating_mul(8))?;
                        let place = self.block_place(planner, map, index * per_block, size)?;
                        self.set_block(index, place);
                        map.add(
                            self.block(index) >> bits,
                            1,
                            crate::refmap::Sharing::Exclusive,
                        );
                        added = true;
                    }
                    cluster = stop;
                }
                // All pages of a large block have it now.
                page = (found + 1)
                    .max(((first / per_block + 1).saturating_mul(per_block)) / PAGE_CLUSTERS);
            }
            let needed = (self.entries.len() as u64 * 8).div_ceil(size).max(1);
            limit_table(needed * size)?;
            match self.place {
                Some((_, clusters)) if clusters >= needed => {}
                old => {
                    let (offset, clusters) = self.table_place(planner, map, needed, size)?;
                    map.add_run(offset >> bits, clusters, 1);
                    if let Some((old, clusters)) = old {
                        // What the old table has now is free again: it was counted once.
                        map.remove_run(old >> bits, clusters);
                        for cluster in old >> bits..(old >> bits) + clusters {
                            released.insert(cluster);
                        }
                    }
                    self.place = Some((offset, clusters));
                    added = true;
                }
            }
            if !added {
                return Ok(());
            }
        }
    }

    fn block(&self, index: u64) -> u64 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.entries.get(index).copied().unwrap_or(0)
    }

    fn set_block(&mut self, index: u64, offset: u64) {
        let slot = usize::try_from(index).unwrap_or(usize::MAX);
        if self.entries.len() <= slot {
            self.entries.resize(slot + 1, 0);
        }
        if let Some(entry) = self.entries.get_mut(slot) {
            *entry = offset;
        }
        self.new_blocks.push((index, offset));
    }

    /// Counts every cluster of the file whose refcount was in a block that is lost: who may have it can't be read.
    pub(super) fn keep_all(&self, image: &Image<'_>, map: &mut RefMap) {
        let per_block = image.geometry.refcounts_per_block();
        for (index, _) in &self.new_blocks {
            let old = usize::try_from(*index).ok().and_then(|i| self.found.get(i));
            if old.is_none_or(|old| *old == 0) {
                // Nothing was in use there.
                continue;
            }
            let first = index.saturating_mul(per_block);
            let stop = first.saturating_add(per_block).min(image.file_clusters());
            for cluster in first..stop {
                if !map.is_seen(cluster) {
                    map.add(cluster, 1, crate::refmap::Sharing::Exclusive);
                }
            }
        }
    }

    pub(super) fn blocks(&self) -> Vec<BlockRef> {
        let entries = self.entries.iter();
        entries
            .map(|offset| match offset {
                0 => BlockRef::Absent,
                offset => BlockRef::At(*offset),
            })
            .collect()
    }

    /// Writes the table, or what has changed of it, and the header's pointer.
    pub(super) fn write(
        &self,
        planner: &mut Planner<'_, '_>,
        image: &Image<'_>,
        (content, switch): (usize, usize),
    ) -> Result<(), PlanError> {
        let Some((offset, clusters)) = self.place else {
            return Ok(());
        };
        let size = image.cluster_size();
        for (index, block) in &self.new_blocks {
            let old = usize::try_from(*index).ok().and_then(|i| self.found.get(i));
            let is_shared = self.shared_blocks.contains(index);
            if self.old.is_some() {
                // Whoever had that place before has left something there.
                let zeros = vec![0; image.geometry.cluster_len()];
                planner.overlay.write(content, *block, &zeros)?;
            }
            let reason = match old {
                _ if self.old.is_some() => "all blocks are made anew".to_owned(),
                None | Some(0) => "no block holds the refcounts of clusters in use".to_owned(),
                Some(old) if is_shared => format!(
                    "what the entry {old:#x} leads to is somebody else's, too, and may hold refcounts by now"
                ),
                Some(old) => format!("the entry {old:#x} leads to no block of its own"),
            };
            let place = Place::of(Structure::RefcountBlock)
                .at(*block, size)
                .entry(*index);
            let action = Action::new(ActionKind::MakeRefcountBlock, place, reason);
            let action = action.effect(effect(is_shared));
            planner.add(action.changes(*block, size));
        }
        if (offset, clusters) != self.named {
            let mut bytes: Vec<u8> = self.entries.iter().flat_map(|e| e.to_be_bytes()).collect();
            bytes.resize(usize::try_from(clusters * size).unwrap_or(0), 0);
            planner.overlay.write(content, offset, &bytes)?;
            let mut fields = offset.to_be_bytes().to_vec();
            let count = u32::try_from(clusters).unwrap_or(u32::MAX);
            fields.extend(count.to_be_bytes());
            planner.overlay.write(switch, TABLE_FIELDS, &fields)?;
            let place = Place::of(Structure::RefcountTable).at(offset, clusters * size);
            let why = if self.old.is_some() {
                "is made anew: refcounts are missing"
            } else {
                "is too short or has no place of its own"
            };
            let reason = format!(
                "the table at {:#x}, {} clusters, {why}",
                self.named.0, self.named.1
            );
            let action = Action::new(ActionKind::MakeRefcountTable, place, reason);
            planner.add(
                action
                    .effect(effect(self.is_shared))
                    .changes(TABLE_FIELDS, 12)
                    .changes(offset, clusters * size),
            );
            return Ok(());
        }
        for (index, entry) in (0_u64..).zip(&self.entries) {
            let old = usize::try_from(index).ok().and_then(|i| self.found.get(i));
            if old.copied().unwrap_or(0) == *entry {
                continue;
            }
            let at = offset + index * 8;
            planner.overlay.write(switch, at, &entry.to_be_bytes())?;
            let is_new = self.new_blocks.iter().any(|(new, _)| *new == index);
            if !is_new {
                let place = Place::of(Structure::RefcountTable).at(at, 8).entry(index);
                let reason = format!("the entry was {:#x}", old.copied().unwrap_or(0));
                let action = Action::new(ActionKind::MendRefcountEntry, place, reason);
                planner.add(action.changes(at, 8));
            }
        }
        Ok(())
    }
}

/// What becomes of the data of a cluster that refcounts lay in: whoever else has it keeps it, with what was written there last.
fn effect(is_shared: bool) -> Effect {
    if is_shared {
        Effect::Ambiguous
    } else {
        Effect::None
    }
}

/// Refuses a refcount table that nobody could open.
fn limit_table(bytes: u64) -> Result<(), PlanError> {
    if bytes > MAX_REFCOUNT_TABLE_BYTES {
        return Err(PlanError::Limit {
            what: "refcount table",
            found: bytes,
            limit: MAX_REFCOUNT_TABLE_BYTES,
        });
    }
    Ok(())
}
