//! The table, taken at its word: what goes beyond the limits goes, and with it what only that led to.

use super::super::action::{Action, ActionKind, Effect};
use super::Table;
use crate::image::Image;
use crate::snapshots::{SnapshotCut, read_as_written};
use crate::{Place, Structure};

/// Reads the table as it is written.
pub(super) fn read(image: &Image<'_>, table: &mut Table) {
    let offset = image.header.snapshot_table_offset.get();
    let place = |entry| Place::of(Structure::SnapshotTable).entry(entry);
    let Ok(found) = read_as_written(image) else {
        let place = Place::of(Structure::SnapshotTable).at(offset, 0);
        table.lose(place, "the table can't be read".to_owned());
        return;
    };
    let entries = found.entries.len() as u64;
    for cut in found.cuts {
        match cut {
            SnapshotCut::ExtraData {
                entry,
                found,
                limit,
            } => {
                let reason = format!("{found} bytes of extra data, {limit} of them stay");
                let place = place(entry).snapshot(Some(entry));
                let action = Action::new(ActionKind::MendSnapshot, place, reason);
                table.actions.push(action);
            }
            SnapshotCut::TooMany { count } | SnapshotCut::TooLarge { count } => {
                drop_from(table, entries, count);
            }
        }
    }
    for (number, (_, snapshot)) in (0..).zip(found.entries) {
        if !table.judge(image, snapshot, number) {
            // It was mended, and that made the table longer.
            drop_from(table, number, entries - number);
            break;
        }
    }
    table.is_head = table.snapshots.len() as u64 == entries
        && table
            .actions
            .iter()
            .all(|action| action.kind == ActionKind::DropSnapshot);
}

/// Drops entries from one on. Their tables are known, and so is what becomes free.
fn drop_from(table: &mut Table, entry: u64, count: u64) {
    let place = Place::of(Structure::SnapshotTable).entry(entry);
    let reason = "there is no room for this entry in the largest table, nor for those behind it";
    let action = Action::new(ActionKind::DropSnapshot, place, reason);
    let action = action.times(count).effect(Effect::Lost);
    table.actions.push(action);
}
