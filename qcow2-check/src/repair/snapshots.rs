//! The snapshot table: entries that can be mended are, and those whose L1 table can't be found go.

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
/// Bytes of the table read at once; an entry is shorter.
const READ_BYTES: usize = 256 << 10;
const ENTRY_BYTES_MAX: usize = 136 << 10;

/// What becomes of the table.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) snapshots: Vec<Snapshot>,
    actions: Vec<Action>,
    hidden: bool,
    /// Bytes that the file must have so that all L1 tables lie in it.
    grow: u64,
}

/// Reads the table as far as that can be done.
pub(super) fn read(image: &Image<'_>) -> Table {
    let mut table = Table::default();
    let header = &image.header;
    let offset = header.snapshot_table_offset.get();
    let count = header.snapshot_count;
    let place = || Place::of(Structure::SnapshotTable).at(offset, 0);
    if count == 0 {
        return table;
    }
    if !image
        .geometry
        .is_cluster_aligned(header.snapshot_table_offset)
        || offset == 0
        || offset >= image.file_len()
    {
        let reason = format!("{count} snapshots, and their table would start at {offset:#x}");
        table.lose(place(), reason);
        return table;
    }
    if count > MAX_SNAPSHOTS {
        let reason = format!("{count} snapshots, at most {MAX_SNAPSHOTS} are allowed");
        table
            .actions
            .push(Action::new(ActionKind::MendSnapshot, place(), reason));
    }
    let mut at = offset;
    let mut buffer = vec![0; READ_BYTES];
    let (mut base, mut filled) = (at, 0);
    for number in 0..u64::from(count.min(MAX_SNAPSHOTS)) {
        at = at.next_multiple_of(8);
        let ahead = usize::try_from(at - base).unwrap_or(usize::MAX);
        if filled < ahead || filled - ahead < ENTRY_BYTES_MAX {
            base = at;
            filled = image.reader.read_ahead(&mut buffer, 1, base).unwrap_or(0);
            if filled == 0 {
                table.lose(place(), "the rest of the table can't be read".to_owned());
                break;
            }
        }
        let from = usize::try_from(at - base).unwrap_or(usize::MAX);
        let here = buffer.get(from..filled).unwrap_or_default();
        let is_last = number + 1 == u64::from(count.min(MAX_SNAPSHOTS));
        if let Some((snapshot, len)) = with_other_length(image, here, is_last) {
            let reason = format!("entry {number} has {len} bytes, by its id and what follows");
            let place = place().entry(number).snapshot(Some(number));
            table
                .actions
                .push(Action::new(ActionKind::MendSnapshot, place, reason));
            table.judge(image, snapshot, number);
            at += len as u64;
            continue;
        }
        let Ok((mut snapshot, len)) = Snapshot::decode_truncating(here).or_else(|_| fixed(here))
        else {
            table.lose(place().entry(number), format!("there is no entry {number}"));
            break;
        };
        let whole = Snapshot::decode(here).is_ok();
        let ends = at.saturating_add(len as u64) <= image.file_len();
        if !(is_blank(&snapshot) || whole && ends) {
            // Its lengths are wrong, and so are its names; its L1 table may be right.
            snapshot.id = (number + 1).to_string().into_bytes();
            snapshot.name = format!("recovered-{}", number + 1).into_bytes();
            snapshot.extra_data.truncate(24);
            let reason = format!("the lengths in entry {number} are wrong: its name is lost");
            let place = place().entry(number).snapshot(Some(number));
            table
                .actions
                .push(Action::new(ActionKind::MendSnapshot, place, reason));
            table.judge(image, snapshot, number);
            let steps = (from + 40..from + RESYNC).step_by(8);
            let next = steps.clone().find(|next| {
                let bytes = buffer.get(*next..).unwrap_or_default();
                Snapshot::decode(bytes).is_ok_and(|(next, _)| is_plausible(image, &next))
            });
            match next {
                Some(next) => at += (next - from) as u64,
                None if number + 1 < u64::from(count) => {
                    let what = "the entries behind it can't be found";
                    table.lose(
                        Place::of(Structure::SnapshotTable).entry(number + 1),
                        what.to_owned(),
                    );
                    break;
                }
                None => break,
            }
            continue;
        }
        let beyond = at.saturating_add(len as u64) - offset > MAX_TABLE_BYTES;
        if beyond || at >= image.file_len() || is_blank(&snapshot) {
            // Nothing is lost by that: there is nothing. But if that is so of all entries, the table may be elsewhere.
            table.hidden |= number == 0;
            let reason = format!("there is no entry {number}, the table ends before it");
            let place = place().entry(number);
            let action = Action::new(ActionKind::DropSnapshot, place, reason);
            table.actions.push(action);
            break;
        }
        at += len as u64;
        table.judge(image, snapshot, number);
    }
    table
}

/// Bytes behind a broken entry in which the next one is searched for.
const RESYNC: usize = 8 << 10;

/// The fixed part of an entry, as much as it says of the L1 table.
fn fixed(bytes: &[u8]) -> Result<(Snapshot, usize), ()> {
    let mut short: Vec<u8> = bytes.get(..40).ok_or(())?.to_vec();
    // Neither id nor name nor extra data.
    for at in (12..16).chain(36..40) {
        if let Some(byte) = short.get_mut(at) {
            *byte = 0;
        }
    }
    Snapshot::decode(&short).map_err(|_| ())
}

/// Where the lengths of an entry's parts stand: id and name (2 bytes each), extra data (4).
const NAMES_LEN: std::ops::Range<usize> = 12..16;
const EXTRA_LEN: std::ops::Range<usize> = 36..40;
/// Lengths that extra data has had.
const EXTRA_LENS: [u32; 3] = [24, 16, 0];
/// Digits that an id may have.
const ID_MAX: usize = 20;
/// Longest name that is looked for.
const NAME_MAX: usize = 1023;

/// The first entry of `bytes` and its length, if it makes sense with one other length only: by that its id is a number, and the next
/// entry is where it should be.
fn with_other_length(image: &Image<'_>, bytes: &[u8], is_last: bool) -> Option<(Snapshot, usize)> {
    let sound = |bytes: &[u8]| {
        let (snapshot, len) = Snapshot::decode(bytes).ok()?;
        let next = bytes.get(len.next_multiple_of(8)..)?;
        let follows = || Snapshot::decode(next).is_ok_and(|(next, _)| is_plausible(image, &next));
        let id = !snapshot.id.is_empty() && snapshot.id.iter().all(u8::is_ascii_digit);
        let name = !snapshot.name.contains(&0);
        (id && name && (is_last || follows())).then_some((snapshot, len))
    };
    if sound(bytes).is_some() {
        return None;
    }
    let mut tried = bytes.get(..RESYNC.min(bytes.len()))?.to_vec();
    for len in EXTRA_LENS {
        let field = tried.get_mut(EXTRA_LEN)?;
        field.copy_from_slice(&len.to_be_bytes());
        let found = sound(&tried).filter(|(snapshot, _)| is_plausible(image, snapshot));
        if found.is_some() {
            return found;
        }
    }
    tried
        .get_mut(EXTRA_LEN)?
        .copy_from_slice(bytes.get(EXTRA_LEN)?);
    let extra = u32::from_be_bytes(bytes.get(EXTRA_LEN)?.try_into().ok()?);
    let start = usize::try_from(extra).ok()?.checked_add(40)?;
    // Names end where the padding or the next entry begins, both with a zero.
    let names = bytes.get(start..)?;
    let names = names.iter().take(ID_MAX + NAME_MAX);
    let names: Vec<u8> = names.take_while(|byte| **byte != 0).copied().collect();
    let digits = names
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    let said = u16::from_be_bytes(bytes.get(12..14)?.try_into().ok()?);
    [usize::from(said), digits.min(ID_MAX)]
        .into_iter()
        .find_map(|id| {
            let name = u16::try_from(names.len().checked_sub(id)?).ok()?;
            let id = u16::try_from(id).ok()?;
            let both = [id.to_be_bytes(), name.to_be_bytes()].concat();
            tried.get_mut(NAMES_LEN)?.copy_from_slice(&both);
            sound(&tried).filter(|(snapshot, _)| is_plausible(image, snapshot))
        })
}

/// Whether an entry found by searching is one.
fn is_plausible(image: &Image<'_>, snapshot: &Snapshot) -> bool {
    let l1 = snapshot.l1_table_offset;
    !snapshot.id.is_empty()
        && snapshot.id.len() <= 20
        && snapshot.id.iter().all(u8::is_ascii_digit)
        && l1.get() != 0
        && image.geometry.is_cluster_aligned(l1)
        && snapshot.l1_entries > 0
        && image.is_inside(l1.get(), u64::from(snapshot.l1_entries) * 8)
}

/// Whether this is no snapshot: every one has an id.
fn is_blank(snapshot: &Snapshot) -> bool {
    snapshot.id.is_empty() && snapshot.name.is_empty()
}

impl Table {
    fn lose(&mut self, place: Place, reason: String) {
        let action = Action::new(ActionKind::DropSnapshot, place, reason);
        self.actions.push(action.effect(Effect::Lost));
        self.hidden = true;
    }

    /// Takes a snapshot as it is, mended, or not at all.
    fn judge(&mut self, image: &Image<'_>, mut snapshot: Snapshot, number: u64) {
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
            return;
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
            return;
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
            let state = snapshot.vm_state_size();
            snapshot.extra_data = [state, disk].iter().flat_map(|n| n.to_be_bytes()).collect();
        }
        mend_sizes(image, &mut snapshot, &mut reasons);
        if !reasons.is_empty() {
            let reason = format!("{name:?}: {}", reasons.join(", "));
            let action = Action::new(ActionKind::MendSnapshot, place(), reason);
            self.actions.push(action.effect(Effect::None));
        }
        self.snapshots.push(snapshot);
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
    let current = image.header.virtual_size();
    let disk = snapshot.disk_size().unwrap_or(current);
    let state = snapshot.vm_state_size();
    let for_disk = geometry.l1_entries_for(disk);
    if for_disk.saturating_add(geometry.l1_entries_for(state)) <= entries {
        return;
    }
    // The table's last cluster has room for more entries than are counted: then the count is what is wrong.
    let room = geometry.clusters_for((entries * 8).max(1)) * geometry.cluster_size() / 8;
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
    rewrite(planner, header, &table.snapshots)?;
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
