//! Refcounts, made anew of the references.
//!
//! The structures that hold them own nothing that could not be made again, so they give way to everything else: a block or table that
//! shares its place, lies past the end or can't be found is made anew at the end of the file. What is where it should be stays and
//! is corrected in place.

use qcow2_format::geometry::MAX_REFCOUNT_TABLE_BYTES;
use qcow2_format::{HostOffset, RefcountTableEntry, set_refcount};
use std::sync::Arc;

use qcow2_io::Storage;

use super::action::{Action, ActionKind, Effect};
use super::overlay::Overlay;
use super::plan::Planner;
use super::{Orphans, PlanError, header};
use crate::blocks::{BlockRef, Blocks};
use crate::compare::{self, Comparison};
use crate::copied::{self, Flags, WrongFlag};
use crate::image::Image;
use crate::load;
use crate::refmap::{PAGE_CLUSTERS, RefMap};
use crate::walk::{L1Scan, Window};
use crate::{Code, Finding, Place, Run, Structure, references};

/// Where the header says where the refcount table is: offset, then clusters.
const TABLE_FIELDS: u64 = 48;

/// The finding that ended a phase.
pub(super) fn hopeless(run: Run<'_>) -> PlanError {
    if run.is_cancelled() {
        return PlanError::Cancelled;
    }
    let (findings, _) = run.finish().1.finish();
    let last = findings
        .into_iter()
        .rfind(|finding| finding.severity() == crate::Severity::Error);
    let unknown = || Finding::new(Code::CheckLimited, Place::of(Structure::File), "unknown");
    PlanError::Hopeless(Box::new(last.unwrap_or_else(unknown)))
}

/// What a failure to start threads is called.
pub(super) fn no_threads() -> PlanError {
    let place = Place::of(Structure::File);
    PlanError::Hopeless(Box::new(Finding::new(
        Code::HeaderUnreadable,
        place,
        "no threads can be started",
    )))
}

/// Lowers refcounts that are too high, and does nothing else. All references must have been counted.
pub(super) fn lower(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    header::drop_void_bitmaps(planner)?;
    let options = planner.check_options();
    let layer = planner.overlay.layer();
    let overlay = Arc::clone(&planner.overlay);
    let overlay = &*overlay;
    let lowered = Run::start(&options, |run| {
        let counted = load::load(overlay, &run)
            .and_then(|loaded| Some((references::count(&loaded, &run)?, loaded)));
        let Some((counted, loaded)) = counted else {
            return Err(hopeless(run));
        };
        if !counted.complete {
            return Ok(Changed::default());
        }
        let pass = Pass {
            overlay,
            image: &loaded.image,
            map: &counted.map,
            blocks: &counted.blocks,
            keep: None,
        };
        pass.run(layer, Direction::Lower, &run)
    });
    let changed = lowered.unwrap_or_else(|| Err(no_threads()))?;
    changed.tell(planner, ActionKind::LowerRefcounts);
    Ok(())
}

/// Puts refcounts and COPIED flags right, and the structures that hold refcounts. Nothing else may be wrong by now.
pub(super) fn mend(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let options = planner.check_options();
    Run::start(&options, |run| mend_with(planner, run)).unwrap_or_else(|| Err(no_threads()))
}

fn mend_with(planner: &mut Planner<'_, '_>, run: Run<'_>) -> Result<(), PlanError> {
    // The picture is read through the same overlay that is written to: structures that are read here are not written here.
    let raise = planner.overlay.layer();
    let switch = planner.overlay.layer();
    let flags = planner.overlay.layer();
    let lower = planner.overlay.layer();
    let overlay = Arc::clone(&planner.overlay);
    let Some(loaded) = load::load(&*overlay, &run) else {
        return Err(hopeless(run));
    };
    let image = &loaded.image;
    let Some(counted) = references::count_others(&loaded, &run) else {
        return Err(hopeless(run));
    };
    let (mut map, scan) = (counted.map, counted.scan);
    let suspect = counted.tally.copied_suspect || !scan.duplicates.is_empty();
    let bits = image.cluster_bits();
    planner.keep_clear(map.end() << bits);

    let mut table = Table::read(image, &map);
    let mut released = table.claim(image, &mut map);
    table.complete(planner, image, &mut map, &mut released)?;
    table.write(planner, image, (raise, switch))?;

    let blocks = Blocks::from(table.blocks());
    let keep = (planner.hidden && planner.options.orphans != Orphans::Free).then_some(&released);
    let pass = Pass {
        overlay: &overlay,
        image,
        map: &map,
        blocks: &blocks,
        keep,
    };
    let raised = pass.run(raise, Direction::Raise, &run)?;
    let wrong = if suspect {
        mend_flags(&overlay, flags, image, &map, &scan)
    } else {
        0
    };
    let lowered = pass.run(lower, Direction::Lower, &run)?;
    if run.is_cancelled() {
        return Err(PlanError::Cancelled);
    }
    if let Some((offset, reason)) = image.reader.failure() {
        let place = Place::of(Structure::File).at(*offset, 0);
        let finding = Finding::new(Code::ReadFailed, place, reason.clone());
        return Err(PlanError::Hopeless(Box::new(finding)));
    }
    raised.tell(planner, ActionKind::RaiseRefcounts);
    if wrong > 0 {
        let place = Place::of(Structure::L2Table);
        let reason = "the flags don't agree with the number of references";
        planner.add(Action::new(ActionKind::SetCopied, place, reason).times(wrong));
    }
    lowered.tell(planner, ActionKind::LowerRefcounts);
    Ok(())
}

/// The refcount table as it should be.
struct Table {
    /// First byte, and length in clusters; `None` if it has to be made anew.
    place: Option<(u64, u64)>,
    /// The place that the header names, whether or not it can stay.
    named: (u64, u64),
    /// Entries as they are in the file, as far as the table can be read.
    found: Vec<u64>,
    /// Offsets of the blocks; 0 where there is none.
    entries: Vec<u64>,
    /// New blocks and why the old ones can't stay.
    new_blocks: Vec<(u64, u64)>,
}

impl Table {
    /// Reads the table, if there is one in a place that it can have.
    fn read(image: &Image<'_>, others: &RefMap) -> Self {
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
        };
        let in_file = len
            .min(MAX_REFCOUNT_TABLE_BYTES)
            .min(image.file_len().saturating_sub(offset));
        let mut bytes = vec![0; usize::try_from(in_file).unwrap_or(0).next_multiple_of(8)];
        // A table that lies on something else holds that by now; nothing of it is believed.
        if usable && image.reader.read(&mut bytes, offset).is_ok() {
            let words = bytes.as_chunks::<8>().0.iter();
            table.found = words.map(|word| u64::from_be_bytes(*word)).collect();
            let used = table.found.iter().rposition(|entry| *entry != 0);
            table.found.truncate(used.map_or(0, |last| last + 1));
        }
        table
    }

    /// Counts what can stay: the table's own clusters, and each block that has its place for itself. Gives what can't and is free.
    fn claim(&mut self, image: &Image<'_>, map: &mut RefMap) -> RefMap {
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
            if stays {
                map.add(cluster, 1, crate::refmap::Sharing::Exclusive);
            }
            self.entries.push(if stays { offset } else { 0 });
        }
        if self.place.is_none() && self.named.1 > 0 && image.is_inside(self.named.0, 1) {
            // What lies there besides is counted, and so not released.
            let first = self.named.0 >> bits;
            for cluster in (first..).take(usize::try_from(self.named.1.min(1 << 14)).unwrap_or(0)) {
                if cluster < image.file_clusters() && !map.is_seen(cluster) {
                    released.insert(cluster);
                }
            }
        }
        released
    }

    /// Makes blocks where clusters have references and no block, and a table that holds them all.
    fn complete(
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
                        self.set_block(index, planner.allocate(1, size)?);
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
                    // Some room, since the table itself may call for another block.
                    let clusters = (needed + needed / 8).min(MAX_REFCOUNT_TABLE_BYTES / size);
                    let offset = planner.allocate(clusters, size)?;
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

    fn blocks(&self) -> Vec<BlockRef> {
        let entries = self.entries.iter();
        entries
            .map(|offset| match offset {
                0 => BlockRef::Absent,
                offset => BlockRef::At(*offset),
            })
            .collect()
    }

    /// Writes the table, or what has changed of it, and the header's pointer.
    fn write(
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
            let reason = match old {
                None | Some(0) => "no block holds the refcounts of clusters in use".to_owned(),
                Some(old) => format!("the entry {old:#x} leads to no block of its own"),
            };
            let place = Place::of(Structure::RefcountBlock)
                .at(*block, size)
                .entry(*index);
            let action = Action::new(ActionKind::MakeRefcountBlock, place, reason);
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
            let reason = format!(
                "the table at {:#x}, {} clusters, is too short or has no place of its own",
                self.named.0, self.named.1
            );
            let action = Action::new(ActionKind::MakeRefcountTable, place, reason);
            planner.add(
                action
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

/// Which refcounts a pass changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Raise,
    Lower,
}

/// Refcounts on their way to what they should be.
struct Pass<'p, 'i> {
    overlay: &'p Overlay<'p>,
    image: &'p Image<'i>,
    map: &'p RefMap,
    blocks: &'p Blocks,
    /// If set, clusters without references stay allocated but for these.
    keep: Option<&'p RefMap>,
}

impl Pass<'_, '_> {
    fn run(&self, layer: usize, direction: Direction, run: &Run<'_>) -> Result<Changed, PlanError> {
        let plan = compare::Plan::new(self.image, self.blocks);
        let setter = Setter {
            pass: self,
            layer,
            direction,
            block: None,
            changed: Changed::default(),
            failure: None,
        };
        let end = self.map.end().max(self.image.file_clusters());
        let mut comparison = Comparison::new(self.image, self.map, end, setter);
        let mut buffer = Vec::new();
        for unit in 0..plan.units {
            if run.is_cancelled() {
                return Err(PlanError::Cancelled);
            }
            comparison.unit(&plan, unit, &mut buffer);
        }
        comparison.judge.put();
        match comparison.judge.failure {
            Some(error) => Err(PlanError::Storage(error)),
            None => Ok(comparison.judge.changed),
        }
    }
}

/// What a pass has changed.
#[derive(Debug, Default)]
struct Changed {
    clusters: u64,
    /// Host range of the clusters.
    first: Option<u64>,
    last: u64,
    /// Blocks written, as far as they are told.
    blocks: Vec<u64>,
    cluster_size: u64,
}

impl Changed {
    fn tell(self, planner: &mut Planner<'_, '_>, kind: ActionKind) {
        let Some(first) = self.first else { return };
        let size = self.cluster_size;
        let place = Place::of(Structure::Cluster)
            .at(first * size, (self.last - first + 1).saturating_mul(size));
        let reason = if kind == ActionKind::LowerRefcounts {
            "refcounts are higher than the references"
        } else {
            "refcounts are lower than the references"
        };
        let mut action = Action::new(kind, place, reason).times(self.clusters);
        for block in self.blocks {
            action = action.changes(block, size);
        }
        planner.add(action.effect(Effect::None));
    }
}

/// Blocks that an action names.
const BLOCKS_TOLD: usize = 1000;

/// Sets refcounts, block by block.
struct Setter<'p, 'q, 'i> {
    pass: &'q Pass<'p, 'i>,
    layer: usize,
    direction: Direction,
    /// Offset, index and content of the block at hand.
    block: Option<(u64, u64, Vec<u8>)>,
    changed: Changed,
    failure: Option<qcow2_io::StorageError>,
}

impl Setter<'_, '_, '_> {
    /// Hands the block at hand over.
    fn put(&mut self) {
        let Some((offset, _, bytes)) = self.block.take() else {
            return;
        };
        if self.changed.blocks.len() < BLOCKS_TOLD {
            self.changed.blocks.push(offset);
        }
        if let Err(error) = self.pass.overlay.write(self.layer, offset, &bytes) {
            self.failure.get_or_insert(error);
        }
    }

    fn set(&mut self, first: u64, count: u64, value: u64) {
        let geometry = self.pass.image.geometry;
        let per_block = geometry.refcounts_per_block();
        for cluster in first..first.saturating_add(count) {
            let index = cluster / per_block;
            if self
                .block
                .as_ref()
                .is_none_or(|(_, known, _)| *known != index)
            {
                self.put();
                let BlockRef::At(offset) = self.pass.blocks.get(index) else {
                    continue;
                };
                let mut bytes = vec![0; geometry.cluster_len()];
                if let Err(error) = self.pass.overlay.read_at(&mut bytes, offset) {
                    self.failure.get_or_insert(error);
                }
                self.block = Some((offset, index, bytes));
            }
            if let Some((_, _, bytes)) = &mut self.block {
                let at = usize::try_from(cluster % per_block).unwrap_or(usize::MAX);
                if set_refcount(bytes, geometry, at, value).is_some() {
                    self.changed.clusters += 1;
                    self.changed.cluster_size = geometry.cluster_size();
                    let known = self.changed.first.get_or_insert(cluster);
                    *known = cluster.min(*known);
                    self.changed.last = self.changed.last.max(cluster);
                }
            }
        }
    }

    /// Whether a cluster without references is to stay allocated.
    fn is_kept(&self, cluster: u64) -> bool {
        let keep = self.pass.keep;
        keep.is_some_and(|released| !released.is_seen(cluster))
    }
}

impl compare::Judge for Setter<'_, '_, '_> {
    fn differ(&mut self, first: u64, count: u64, on_disk: u64, expected: u64) {
        let wanted = match self.direction {
            Direction::Raise => on_disk < expected,
            Direction::Lower => on_disk > expected,
        };
        if !wanted {
            return;
        }
        if expected > 0 || self.pass.keep.is_none() {
            self.set(first, count, expected);
            return;
        }
        for cluster in first..first.saturating_add(count) {
            if !self.is_kept(cluster) {
                self.set(cluster, 1, 0);
            }
        }
    }

    fn behind(&mut self, base: u64, bits: u64, _value: impl Fn(u64) -> u64) {
        if self.direction == Direction::Lower {
            for cluster in (base..).take(64).filter(|c| bits >> (c % 64) & 1 != 0) {
                self.set(cluster, 1, 0);
            }
        }
    }

    fn overflow(&mut self, _cluster: u64, _weight: u64, _max: u64) {
        // The refcount is set to the most there can be; the check of the outcome tells.
    }

    fn unreadable(&mut self, _index: u64, _block: BlockRef, _start: u64, _stop: u64) {
        // Where it matters such blocks were replaced.
    }
}

/// Corrects COPIED flags. Tells how many.
fn mend_flags(
    overlay: &Overlay<'_>,
    layer: usize,
    image: &Image<'_>,
    map: &RefMap,
    scan: &L1Scan,
) -> u64 {
    let judge = FlagSetter {
        overlay,
        layer,
        image,
        map,
        count: 0,
    };
    let plan = Window::plan(image);
    let mut flags = Flags::new(image, judge);
    for unit in 0..copied::units(scan) {
        flags.unit(&plan, scan, unit);
    }
    flags.judge.count
}

struct FlagSetter<'p, 'i> {
    overlay: &'p Overlay<'p>,
    layer: usize,
    image: &'p Image<'i>,
    map: &'p RefMap,
    count: u64,
}

impl copied::Judge for FlagSetter<'_, '_> {
    fn is_one(&self, cluster: u64) -> Option<bool> {
        Some(self.map.weight(cluster) == 1)
    }

    fn wrong(&mut self, flag: WrongFlag<'_>) {
        let entry_size = self.image.geometry.l2_entry_size();
        let at = match flag.table {
            Some(table) => table.offset.saturating_add(flag.index * entry_size),
            None => self.image.active_entry(flag.index),
        };
        let mut word = [0; 8];
        if self.overlay.read_at(&mut word, at).is_ok() {
            let flipped = u64::from_be_bytes(word) ^ 1 << 63;
            if self
                .overlay
                .write(self.layer, at, &flipped.to_be_bytes())
                .is_ok()
            {
                self.count += 1;
            }
        }
    }
}
