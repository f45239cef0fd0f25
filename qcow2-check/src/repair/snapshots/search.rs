//! The table, searched: lengths that can't be right are corrected by what the entries look like.

use qcow2_format::Snapshot;
use qcow2_format::header::MAX_SNAPSHOTS;

use super::super::action::{Action, ActionKind};
use super::Table;
use crate::image::Image;
use crate::{Place, Structure};

/// Bytes of the table read at once; an entry is shorter.
const READ_BYTES: usize = 256 << 10;
const ENTRY_BYTES_MAX: usize = 136 << 10;

/// Reads the table as far as that can be done.
pub(super) fn read(image: &Image<'_>, table: &mut Table) {
    let header = &image.header;
    let offset = header.snapshot_table_offset.get();
    let count = header.snapshot_count;
    let place = || Place::of(Structure::SnapshotTable).at(offset, 0);
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
                return;
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
            if !table.judge(image, snapshot, number) {
                return overhang(table, number, count);
            }
            at += len as u64;
            continue;
        }
        let Ok((mut snapshot, len)) = Snapshot::decode_truncating(here).or_else(|_| fixed(here))
        else {
            table.lose(place().entry(number), format!("there is no entry {number}"));
            return;
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
            if !table.judge(image, snapshot, number) {
                return overhang(table, number, count);
            }
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
                    return;
                }
                None => return,
            }
            continue;
        }
        if at >= image.file_len() || is_blank(&snapshot) {
            // Nothing is lost by that: there is nothing. But if that is so of all entries, the table may be elsewhere.
            table.hidden |= number == 0;
            let reason = format!("there is no entry {number}, the table ends before it");
            let place = place().entry(number);
            let action = Action::new(ActionKind::DropSnapshot, place, reason);
            table.actions.push(action);
            return;
        }
        at += len as u64;
        if !table.judge(image, snapshot, number) {
            return overhang(table, number, count);
        }
    }
    if count > MAX_SNAPSHOTS {
        overhang(table, MAX_SNAPSHOTS.into(), count);
    }
}

/// Gives up the entries from one on, since there is no room for them. What they led to is not known.
fn overhang(table: &mut Table, from: u64, count: u32) {
    let over = u64::from(count).saturating_sub(from);
    let reason = "there is no room for this entry in the largest table, nor for those behind it";
    table.lose_many(
        Place::of(Structure::SnapshotTable).entry(from),
        reason.to_owned(),
        over,
    );
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
