//! L1 tables as a whole, and what gives way to other structures.

use std::collections::HashSet;

use qcow2_format::{HostOffset, L1Entry};

use super::PlanError;
use super::action::{Action, ActionKind, Effect};
use super::claims::Claims;
use super::entries::{is_near, judge_table};
use super::plan::Planner;
use super::{bitmaps, snapshots};
use crate::image::{Image, MetaRange, Tree};
use crate::refmap::RefMap;
use crate::{Place, Structure};

/// L2 tables looked at to tell whether what leads to them is an L1 table.
const TABLES_LOOKED_AT: u64 = 64;

/// Whether what lies where an L1 table should be can't be one: then nothing in it is changed, for it is somebody else's.
pub(super) fn is_no_l1(image: &Image<'_>, tree: &Tree, claims: &Claims) -> bool {
    if tree.offset == 0 && tree.entries > 0 {
        // That is the header.
        return true;
    }
    let (mut good, mut bad) = (0_u64, 0_u64);
    let mut buffer = vec![0; 1 << 16];
    let mut table = vec![0; image.geometry.cluster_len()];
    let mut looked_at = 0;
    let mut at = 0;
    // What the disk does not need may be too much, and something else.
    let needed = image.geometry.l1_entries_for(image.header.virtual_size_raw);
    let known = snapshots::read(image).snapshots;
    let mut of_snapshots = known
        .iter()
        .filter(|snapshot| snapshot.l1_table_offset.get() == tree.offset)
        .map(|snapshot| snapshots::needed_entries(image, snapshot));
    let needed = match of_snapshots.next() {
        Some(needed) if !tree.active => needed,
        _ => needed,
    };
    let entries = tree.entries.min(needed.max(1));
    let len = entries * 8;
    let mut wanted = false;
    while at < len {
        let part = usize::try_from(len - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let bytes = buffer.get_mut(..part).unwrap_or_default();
        let from = tree.offset.saturating_add(at);
        let end = from.saturating_add(part as u64);
        wanted |= (from..end)
            .step_by(image.geometry.cluster_len())
            .any(|at| claims.is_wanted(at));
        // What can't be read says nothing.
        image.reader.read_parts(bytes, from, |_, _| {});
        for word in bytes
            .as_chunks::<8>()
            .0
            .iter()
            .filter(|word| **word != [0; 8])
        {
            let entry = L1Entry::from_be_bytes(*word);
            let offset = entry.l2_table();
            if offset.get() == 0 || offset.get() == tree.offset {
                // An entry that leads to its own table says nothing against that.
                continue;
            }
            if !image.geometry.is_cluster_aligned(offset) || !is_near(image, offset.get()) {
                bad += 1;
                continue;
            }
            let mut leads = entry.reserved_bits() == 0;
            if looked_at < TABLES_LOOKED_AT && offset.get() < image.file_len() {
                looked_at += 1;
                image.reader.read_parts(&mut table, offset.get(), |_, _| {});
                let judged = judge_table(image, 0, &table);
                if judged.lost > judged.sound + judged.mendable + judged.cut {
                    bad += 1;
                    leads = false;
                }
            }
            good += u64::from(leads);
        }
        at += part as u64;
    }
    bad > good && (bad > 1 || wanted) || tree.active && wanted && is_snapshot_table(image)
}

/// Whether the active L1 table lies on the snapshot table, and that is one.
fn is_snapshot_table(image: &Image<'_>) -> bool {
    let same = image.header.snapshot_table_offset == image.header.l1_table_offset;
    same && !snapshots::read(image).snapshots.is_empty()
}

/// Drops structures that lie on others, and come after them. Tells whether there was any that could be.
pub(super) fn give_way(
    planner: &mut Planner<'_, '_>,
    image: &Image<'_>,
    lost: &[MetaRange],
) -> Result<bool, PlanError> {
    let mut bitmaps_lost = Vec::new();
    for range in lost {
        match range.structure {
            Structure::SnapshotTable | Structure::BitmapDirectory | Structure::BitmapTable
                if !planner.snapshots_known => {}
            Structure::SnapshotTable => {
                let reason = format!("the table at {:#x} lies on something else", range.offset);
                let action = Action::new(ActionKind::DropSnapshot, range.place(), reason);
                planner.add(action.effect(Effect::Lost));
                planner.hidden = true;
                snapshots::rewrite(planner, &image.header, &[])?;
                return Ok(true);
            }
            Structure::BitmapDirectory => {
                let all = u64::from(image.header.bitmaps().map_or(0, |bitmaps| bitmaps.count));
                let reason = "the directory lies on something else";
                bitmaps_lost.extend((0..all).map(|number| (number, reason.to_owned())));
            }
            Structure::BitmapTable => {
                let number = range.index.unwrap_or(0);
                let reason = format!("its table at {:#x} lies on something else", range.offset);
                bitmaps_lost.push((number, reason));
            }
            // Snapshots' L1 tables were settled before, and what is left can't move.
            _ => {}
        }
    }
    if !bitmaps_lost.is_empty() {
        bitmaps::drop_numbers(planner, image, &bitmaps_lost)?;
        return Ok(true);
    }
    Ok(false)
}

/// Gives each snapshot an L1 table of its own: those that share a place with anything are copied, too long ones cut, and what can't be
/// an L1 table takes its snapshot with it. Tells whether there was any.
pub(super) fn settle_snapshots(
    planner: &mut Planner<'_, '_>,
    image: &Image<'_>,
    claims: &Claims,
    none: &HashSet<u64>,
) -> Result<bool, PlanError> {
    if !planner.snapshots_known {
        return Ok(false);
    }
    let size = image.cluster_size();
    let mut kept = Vec::new();
    let mut seen: HashSet<u64> = HashSet::new();
    let mut content = None;
    let mut changed = false;
    for (number, mut snapshot) in (0..).zip(snapshots::read(image).snapshots) {
        let offset = snapshot.l1_table_offset.get();
        let mut len = u64::from(snapshot.l1_entries) * 8;
        let name = String::from_utf8_lossy(&snapshot.name).into_owned();
        let place = Place::of(Structure::SnapshotL1)
            .at(offset, len)
            .snapshot(Some(number));
        if len == 0 {
            kept.push(snapshot);
            continue;
        }
        let needed = snapshots::needed_entries(image, &snapshot) * 8;
        let is_wanted = |from: u64, to: u64| {
            (from..to)
                .step_by(image.geometry.cluster_len())
                .any(|at| claims.is_wanted(at))
        };
        if needed < len && is_wanted((offset + needed).next_multiple_of(size), offset + len) {
            let reason = format!("{name:?}: more L1 entries than needed, on something else");
            let action = Action::new(ActionKind::MendSnapshot, place.clone(), reason);
            planner.add(action);
            snapshot.l1_entries = u32::try_from(needed / 8).unwrap_or(0);
            len = needed;
            changed = true;
        }
        if none.contains(&offset) {
            let reason = format!("{name:?}: what lies at {offset:#x} is no L1 table");
            let action = Action::new(ActionKind::DropSnapshot, place, reason);
            planner.add(action.effect(Effect::Lost));
            planner.hidden = true;
            changed = true;
            continue;
        }
        let shared = !seen.insert(offset) || is_wanted(offset, offset + len);
        // A copy of what can't be read is none.
        if shared && planner.overlay.can_read(offset, len) {
            let clusters = image.geometry.clusters_for(len);
            let new = planner.allocate(clusters, size)?;
            let layer = *content.get_or_insert_with(|| planner.overlay.layer());
            planner.overlay.copy(layer, offset, new, clusters * size)?;
            snapshot.l1_table_offset = HostOffset::new(new);
            let reason = format!("{name:?} has its L1 table where something else is");
            let action = Action::new(ActionKind::CopyTable, place, reason);
            let action = action.changes(new, clusters * size);
            planner.add(action.effect(Effect::Ambiguous));
            changed = true;
        }
        kept.push(snapshot);
    }
    if changed {
        snapshots::rewrite(planner, &image.header, &kept)?;
    }
    Ok(changed)
}

/// Snapshots that share an L1 table, which the map of references does not tell.
pub(super) fn part_shared_l1(
    planner: &mut Planner<'_, '_>,
    image: &Image<'_>,
) -> Result<bool, PlanError> {
    if !image.trees.iter().any(|tree| tree.weight > 1) {
        return Ok(false);
    }
    let claims = Claims::new(image, RefMap::new(0), false);
    settle_snapshots(planner, image, &claims, &HashSet::new())
}
