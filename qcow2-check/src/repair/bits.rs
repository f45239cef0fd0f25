//! The dirty and the corrupt bit.

use qcow2_format::raw;
use qcow2_io::Storage;

use super::PlanError;
use super::action::{Action, ActionKind};
use super::plan::Planner;
use crate::{Place, Structure};

const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
/// Where incompatible features stand.
const OFFSET: u64 = 72;

/// The incompatible features of a version 3 header; `None` where there is none.
fn features(planner: &Planner<'_, '_>) -> Result<Option<u64>, PlanError> {
    let mut start = [0; 80];
    planner.overlay.read_at(&mut start, 0)?;
    let known = start.starts_with(&raw::Header::MAGIC) && start.get(4..8) == Some(&[0, 0, 0, 3]);
    let word = start.last_chunk::<8>().copied().unwrap_or_default();
    Ok(known.then(|| u64::from_be_bytes(word)))
}

/// Sets the corrupt bit before anything else is changed: a repair that is cut short leaves an image that nobody writes to.
pub(super) fn mark(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let Some(found) = features(planner)?.filter(|found| found & CORRUPT == 0) else {
        return Ok(());
    };
    let layer = planner.overlay.layer();
    let word = (found | CORRUPT).to_be_bytes();
    planner.overlay.write(layer, OFFSET, &word)?;
    let place = Place::of(Structure::Header).at(OFFSET, 8);
    let action = Action::new(
        ActionKind::MarkCorrupt,
        place,
        "until the repair is through",
    );
    planner.add(action.changes(OFFSET, 8));
    Ok(())
}

/// Clears both bits in a layer of their own. Tells whether any was set.
pub(super) fn clear(planner: &mut Planner<'_, '_>) -> Result<bool, PlanError> {
    let Some(found) = features(planner)?.filter(|found| found & (DIRTY | CORRUPT) != 0) else {
        return Ok(false);
    };
    let layer = planner.overlay.layer();
    let word = (found & !(DIRTY | CORRUPT)).to_be_bytes();
    planner.overlay.write(layer, OFFSET, &word)?;
    let place = Place::of(Structure::Header).at(OFFSET, 8);
    let action = Action::new(ActionKind::ClearBits, place, "nothing is wrong any more");
    planner.add(action.changes(OFFSET, 8));
    Ok(true)
}

/// Takes back what [`mark`] did, where something is left that nobody could repair: a mark that was not there before stands for nothing.
pub(super) fn unmark(planner: &mut Planner<'_, '_>) -> Result<bool, PlanError> {
    let found = features(planner)?;
    let Some(found) = found.filter(|_| planner.actions.has(ActionKind::MarkCorrupt)) else {
        return Ok(false);
    };
    let layer = planner.overlay.layer();
    let word = (found & !CORRUPT).to_be_bytes();
    planner.overlay.write(layer, OFFSET, &word)?;
    let place = Place::of(Structure::Header).at(OFFSET, 8);
    let action = Action::new(
        ActionKind::ClearBits,
        place,
        "the mark of this repair goes, the rest stays as it was",
    );
    planner.add(action.changes(OFFSET, 8));
    Ok(true)
}
