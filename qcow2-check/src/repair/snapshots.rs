//! The snapshot table: entries that can be mended are, and those whose L1 table can't be found go.

mod as_written;
mod search;

use qcow2_format::header::{Header, MAX_SNAPSHOTS, Version};
use qcow2_format::snapshot::{MAX_TABLE_BYTES, MIN_EXTRA_DATA_LEN_V3, encode_table};
use qcow2_format::{HostOffset, Snapshot};

use super::PlanError;
use super::action::{Action, ActionKind, Effect};
use super::plan::Planner;
use crate::image::Image;
use crate::{Place, Structure};

/// Where the header says how many snapshots there are, and where: 4 and 8 bytes.
const FIELDS: u64 = 60;

/// What becomes of the table.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) snapshots: Vec<Snapshot>,
    actions: Vec<Action>,
    hidden: bool,
    /// The entries that stay are the first ones, and are what they were: the table can stay where it is.
    is_head: bool,
    /// Bytes of the table that the snapshots make, the last one without padding.
    len: u64,
    /// Bytes that the file must have so that all L1 tables lie in it.
    grow: u64,
}

/// Reads the table as far as that can be done.
pub(super) fn read(image: &Image<'_>) -> Table {
    let mut table = Table::default();
    let header = &image.header;
    let offset = header.snapshot_table_offset.get();
    let count = header.snapshot_count;
    if count == 0 {
        return table;
    }
    let is_aligned = image
        .geometry
        .is_cluster_aligned(header.snapshot_table_offset);
    let is_inside = offset < image.file_len() || image.as_written;
    if !is_aligned || offset == 0 || !is_inside || offset >> 63 != 0 {
        let place = Place::of(Structure::SnapshotTable).at(offset, 0);
        let reason = format!("{count} snapshots, and their table would start at {offset:#x}");
        table.lose(place, reason);
        return table;
    }
    if image.as_written {
        as_written::read(image, &mut table);
    } else {
        search::read(image, &mut table);
    }
    table
}

/// Bytes that suffice for an entry whose name and id are short.
const SHORT_ENTRY_BYTES: u64 = 256;

impl Table {
    /// Whether one more snapshot with a short name can be added.
    pub(super) fn has_room(&self) -> bool {
        self.snapshots.len() < MAX_SNAPSHOTS as usize
            && self.len + SHORT_ENTRY_BYTES <= MAX_TABLE_BYTES
    }

    fn lose(&mut self, place: Place, reason: String) {
        self.lose_many(place, reason, 1);
    }

    fn lose_many(&mut self, place: Place, reason: String, count: u64) {
        let action = Action::new(ActionKind::DropSnapshot, place, reason).times(count.max(1));
        self.actions.push(action.effect(Effect::Lost));
        self.hidden = true;
    }

    /// Takes a snapshot as it is, mended, or not at all. Tells whether the largest table has room for it.
    fn judge(&mut self, image: &Image<'_>, mut snapshot: Snapshot, number: u64) -> bool {
        let place = || {
            Place::of(Structure::SnapshotTable)
                .entry(number)
                .snapshot(Some(number))
        };
        let name = String::from_utf8_lossy(&snapshot.name).into_owned();
        if image.rules.external_data {
            let reason = format!("{name:?}: an image with an external data file can't have any");
            let action = Action::new(ActionKind::DropSnapshot, place(), reason);
            self.actions.push(action.effect(Effect::Lost));
            return true;
        }
        let geometry = image.geometry;
        let l1 = snapshot.l1_table_offset;
        let disk = snapshot.disk_size().unwrap_or(image.header.virtual_size());
        let mut reasons = Vec::new();
        let entries_max = qcow2_format::geometry::MAX_L1_BYTES / 8;
        let needed = geometry
            .l1_entries_for(disk)
            .saturating_add(geometry.l1_entries_for(snapshot.vm_state_size()));
        if u64::from(snapshot.l1_entries) > entries_max
            && let Some(needed) = u32::try_from(needed)
                .ok()
                .filter(|n| u64::from(*n) <= entries_max)
        {
            reasons.push(format!(
                "{} L1 entries, {needed} are needed",
                snapshot.l1_entries
            ));
            snapshot.l1_entries = needed;
        }
        let len = u64::from(snapshot.l1_entries) * 8;
        let found = geometry.is_cluster_aligned(l1)
            && len / 8 <= entries_max
            && (len == 0 || l1.get() != 0 && l1.get() < image.file_len());
        if !found {
            let reason = format!("{name:?}: its L1 table would be at {l1}, {len} bytes");
            self.lose(place(), reason);
            return true;
        }
        let end = l1.get().saturating_add(len);
        if len > 0 && !image.is_inside(l1.get(), len) {
            match u32::try_from(needed) {
                Ok(needed) if needed < snapshot.l1_entries => {
                    reasons.push(format!(
                        "{} L1 entries, {needed} are needed",
                        snapshot.l1_entries
                    ));
                    snapshot.l1_entries = needed;
                }
                _ => self.grow = self.grow.max(end),
            }
        }
        if image.header.version == Version::V3 && snapshot.extra_data.len() < MIN_EXTRA_DATA_LEN_V3
        {
            reasons.push("it lacks 64-bit sizes".to_owned());
            let words = [snapshot.vm_state_size(), disk, u64::MAX];
            snapshot.extra_data = words.iter().flat_map(|n| n.to_be_bytes()).collect();
        }
        mend_sizes(image, &mut snapshot, &mut reasons);
        let entry = 40 + snapshot.extra_data.len() + snapshot.id.len() + snapshot.name.len();
        let len = self.len.next_multiple_of(8) + entry as u64;
        if len > MAX_TABLE_BYTES {
            return false;
        }
        self.len = len;
        if !reasons.is_empty() {
            let reason = format!("{name:?}: {}", reasons.join(", "));
            let action = Action::new(ActionKind::MendSnapshot, place(), reason);
            self.actions.push(action.effect(Effect::None));
        }
        self.snapshots.push(snapshot);
        true
    }
}

/// L1 entries that a snapshot's disk and VM state need.
pub(super) fn needed_entries(image: &Image<'_>, snapshot: &Snapshot) -> u64 {
    let geometry = image.geometry;
    let disk = snapshot.disk_size().unwrap_or(image.header.virtual_size());
    let state = geometry.l1_entries_for(snapshot.vm_state_size());
    geometry.l1_entries_for(disk).saturating_add(state)
}

/// Makes a snapshot's sizes such that its L1 table can map them.
fn mend_sizes(image: &Image<'_>, snapshot: &mut Snapshot, reasons: &mut Vec<String>) {
    let geometry = image.geometry;
    let entries = u64::from(snapshot.l1_entries);
    if entries == 0 && image.as_written {
        // It has no table, and can do without.
        return;
    }
    let current = image.header.virtual_size();
    let disk = snapshot.disk_size().unwrap_or(current);
    let state = snapshot.vm_state_size();
    let for_disk = geometry.l1_entries_for(disk);
    if for_disk.saturating_add(geometry.l1_entries_for(state)) <= entries {
        return;
    }
    // The table's last cluster has room for more entries than are counted: then the count is what is wrong.
    let room = match snapshot.l1_table_offset.get() {
        // That is the header.
        0 => 0,
        _ => geometry.clusters_for((entries * 8).max(1)) * geometry.cluster_size() / 8,
    };
    let needed = for_disk.saturating_add(geometry.l1_entries_for(state));
    if needed <= room
        && let Ok(needed) = u32::try_from(needed)
    {
        reasons.push(format!("{entries} L1 entries, {needed} are needed"));
        snapshot.l1_entries = needed;
        return;
    }
    let mut new_disk = disk;
    if for_disk > entries {
        new_disk = if geometry.l1_entries_for(current) <= entries {
            current
        } else {
            entries.saturating_mul(geometry.l2_coverage())
        };
        reasons.push(format!(
            "a disk of {disk} bytes, {new_disk} at most are mapped"
        ));
    }
    let left = entries.saturating_sub(geometry.l1_entries_for(new_disk));
    let new_state = state.min(left.saturating_mul(geometry.l2_coverage()));
    if new_state != state {
        reasons.push(format!(
            "a VM state of {state} bytes, {new_state} at most are mapped"
        ));
    }
    snapshot.vm_state_size_32 = u32::try_from(new_state).unwrap_or(0);
    let mut extra = snapshot.extra_data.clone();
    extra.resize(extra.len().max(16), 0);
    for (to, from) in extra
        .iter_mut()
        .zip([new_state, new_disk].iter().flat_map(|n| n.to_be_bytes()))
    {
        *to = from;
    }
    snapshot.extra_data = extra;
}

/// Puts the table right. Tells whether anything was wrong.
pub(super) fn mend(planner: &mut Planner<'_, '_>, image: &Image<'_>) -> Result<bool, PlanError> {
    let header = &image.header;
    if header.snapshot_count == 0 {
        let offset = header.snapshot_table_offset;
        let is_refused = !image.geometry.is_cluster_aligned(offset) || offset.get() >> 63 != 0;
        if is_refused {
            let reason = format!("no snapshots, and their table would be at {offset}");
            let place = Place::of(Structure::Header).at(FIELDS, 12);
            let action = Action::new(ActionKind::MendHeader, place, reason);
            planner.add(action.changes(FIELDS, 12));
            let layer = planner.overlay.layer();
            planner.overlay.write(layer, FIELDS, &[0; 12])?;
        }
        return Ok(is_refused);
    }
    let table = read(image);
    if table.actions.is_empty() && table.grow == 0 {
        return Ok(false);
    }
    planner.hidden |= table.hidden;
    if table.grow > planner.overlay.new_len() {
        let place = Place::of(Structure::SnapshotL1);
        let reason = "the file ends inside an L1 table";
        planner.add(Action::new(ActionKind::GrowFile, place, reason).effect(Effect::Lost));
        planner.keep_clear(table.grow);
        planner.overlay.grow(table.grow);
    }
    if table.actions.is_empty() {
        return Ok(true);
    }
    for action in table.actions {
        planner.add(action.changes(FIELDS, 12));
    }
    match u32::try_from(table.snapshots.len()) {
        Ok(count) if table.is_head && count > 0 => {
            let layer = planner.overlay.layer();
            planner.overlay.write(layer, FIELDS, &count.to_be_bytes())?;
        }
        _ => rewrite(planner, header, &table.snapshots)?,
    }
    Ok(true)
}

/// Writes the table anew, at the end of the file, and lets the header point at it.
pub(super) fn rewrite(
    planner: &mut Planner<'_, '_>,
    header: &Header,
    snapshots: &[Snapshot],
) -> Result<(), PlanError> {
    let content = planner.overlay.layer();
    let switch = planner.overlay.layer();
    let bytes = encode_table(snapshots).map_err(|_| PlanError::Limit {
        what: "snapshot table",
        found: MAX_TABLE_BYTES + 1,
        limit: MAX_TABLE_BYTES,
    })?;
    let size = header.geometry.cluster_size();
    let mut offset = HostOffset::new(0);
    if !snapshots.is_empty() {
        let clusters = header.geometry.clusters_for(bytes.len() as u64);
        // Whole clusters, since a table that a longer one follows must not be read on.
        let mut padded = bytes;
        padded.resize(usize::try_from(clusters * size).unwrap_or(0), 0);
        offset = HostOffset::new(planner.allocate(clusters, size)?);
        planner.overlay.write(content, offset.get(), &padded)?;
        planner.overlay.grow(offset.get() + clusters * size);
    }
    let count = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
    let mut fields = count.to_be_bytes().to_vec();
    fields.extend(offset.get().to_be_bytes());
    planner.overlay.write(switch, FIELDS, &fields)?;
    Ok(())
}
