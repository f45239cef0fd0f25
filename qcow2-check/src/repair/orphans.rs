//! Clusters that nothing refers to any more, after pointers had to be given up that may have led there.
//!
//! They are not free: what was lost may be in them. So they become a snapshot, whose disk is nothing but these clusters in the order of the
//! file: the image is consistent, nothing is overwritten, and who deletes the snapshot has the space.

use std::sync::Arc;

use qcow2_format::{HostOffset, L1Entry, L2Entry, Snapshot};

use super::action::{Action, ActionKind, Effect};
use super::plan::Planner;
use super::refcounts::{hopeless, no_threads};
use super::{PlanError, snapshots};
use crate::blocks::{self, BlockRef};
use crate::compare::{self, Comparison};
use crate::image::Image;
use crate::{Place, Run, Structure, load, references};

/// Name of the snapshot.
pub(super) const NAME: &[u8] = b"lost+found";
/// Clusters kept, at most: their list takes 8 bytes each.
const CLUSTERS_MAX: usize = 16 << 20;

/// Collects what has a refcount and no references.
struct Collector {
    found: Vec<u64>,
}

impl compare::Judge for Collector {
    fn differ(&mut self, first: u64, count: u64, on_disk: u64, expected: u64) {
        if expected == 0 && on_disk > 0 && self.found.len() < CLUSTERS_MAX {
            self.found.extend(first..first.saturating_add(count));
        }
    }

    fn behind(&mut self, _base: u64, _bits: u64, _value: impl Fn(u64) -> u64) {}

    fn overflow(&mut self, _cluster: u64, _weight: u64, _max: u64) {}

    fn unreadable(&mut self, _index: u64, _block: BlockRef, _start: u64, _stop: u64) {}
}

/// Makes a snapshot of all clusters without references. All pointers must be right by now.
pub(super) fn keep(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let options = planner.check_options();
    Run::start(&options, |run| keep_with(planner, run)).unwrap_or_else(|| Err(no_threads()))
}

fn keep_with(planner: &mut Planner<'_, '_>, run: Run<'_>) -> Result<(), PlanError> {
    let overlay = Arc::clone(&planner.overlay);
    let run = planner.look(run);
    let Some(loaded) = load::load(&*overlay, &run) else {
        return Err(hopeless(run));
    };
    let image = &loaded.image;
    if image.rules.external_data {
        // Guest data is elsewhere, and snapshots can't be.
        return Ok(());
    }
    let Some(mut counted) = references::count_others(&loaded, &run) else {
        return Err(hopeless(run));
    };
    let bits = image.cluster_bits();
    let header = &image.header;
    let table = header.refcount_table_offset.get();
    let clusters = u64::from(header.refcount_table_clusters);
    counted.map.add_run(table >> bits, clusters.min(1 << 20), 1);
    let blocks = blocks::load(image, &mut counted.map, &run);
    let map = &counted.map;
    planner.keep_clear(map.end() << bits);
    let end = image.file_clusters();
    let plan = compare::Plan::new(image, &blocks);
    let collector = Collector { found: Vec::new() };
    let mut comparison = Comparison::new(image, map, end, collector);
    let mut buffer = Vec::new();
    for unit in 0..plan.units {
        comparison.unit(&plan, unit, &mut buffer);
    }
    let mut found = comparison.judge.found;
    // Each was met as part of a block that may be there twice.
    found.sort_unstable();
    found.dedup();
    if found.is_empty() {
        planner.hidden = false;
        return Ok(());
    }
    let table = snapshots::read(image);
    if !table.has_room() {
        return Ok(());
    }
    let mut known = table.snapshots;
    known.push(snapshot(planner, image, &found, &known)?);
    snapshots::rewrite(planner, header, &known)?;
    let size = image.cluster_size();
    let first = found.first().copied().unwrap_or(0);
    let last = found.last().copied().unwrap_or(0);
    let place = Place::of(Structure::Cluster).at(first * size, (last - first + 1) * size);
    let reason = format!(
        "they have no references, but pointers were given up that may have led to them; they stay in the snapshot {:?}",
        String::from_utf8_lossy(NAME)
    );
    let action = Action::new(ActionKind::KeepOrphans, place, reason);
    planner.add(action.times(found.len() as u64).effect(Effect::None));
    planner.kept = true;
    // Whatever has no references from here on is known to be free.
    planner.hidden = found.len() >= CLUSTERS_MAX;
    Ok(())
}

/// Writes the tables of the snapshot.
fn snapshot(
    planner: &mut Planner<'_, '_>,
    image: &Image<'_>,
    found: &[u64],
    known: &[Snapshot],
) -> Result<Snapshot, PlanError> {
    let geometry = image.geometry;
    let size = geometry.cluster_size();
    let layer = planner.overlay.layer();
    let per_table = usize::try_from(geometry.l2_entries()).unwrap_or(usize::MAX);
    let bitmap = if geometry.extended_l2() {
        u64::from(u32::MAX)
    } else {
        0
    };
    let mut l1 = Vec::new();
    for clusters in found.chunks(per_table) {
        let table = planner.allocate(1, size)?;
        let mut bytes = Vec::new();
        for cluster in clusters {
            let entry = L2Entry::normal(HostOffset::new(cluster * size), false, bitmap);
            bytes.extend(entry.word().to_be_bytes());
            if geometry.extended_l2() {
                bytes.extend(bitmap.to_be_bytes());
            }
        }
        planner.overlay.write(layer, table, &bytes)?;
        planner.overlay.grow(table + size);
        l1.extend(L1Entry::new(HostOffset::new(table), false).to_be_bytes());
    }
    let clusters = geometry.clusters_for(l1.len() as u64);
    let offset = planner.allocate(clusters, size)?;
    planner.overlay.write(layer, offset, &l1)?;
    planner.overlay.grow(offset + clusters * size);
    let number = |snapshot: &Snapshot| {
        let id = std::str::from_utf8(&snapshot.id).ok()?;
        id.parse::<u32>().ok()
    };
    let id = known.iter().filter_map(number).max().unwrap_or(0);
    let disk = found.len() as u64 * size;
    Ok(Snapshot {
        l1_table_offset: HostOffset::new(offset),
        l1_entries: u32::try_from(l1.len() / 8).unwrap_or(u32::MAX),
        id: id.saturating_add(1).to_string().into_bytes(),
        name: NAME.to_vec(),
        extra_data: [0, disk, u64::MAX]
            .iter()
            .flat_map(|n| n.to_be_bytes())
            .collect(),
        ..Snapshot::default()
    })
}
