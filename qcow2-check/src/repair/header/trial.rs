//! The feature bit of extended L2 entries, by which all of them are read: where nothing at all is wrong without it, it is what is wrong.
//!
//! Not the other way round: every second entry would be taken for the bitmap of the one before, and almost any number can be one.

use qcow2_format::Header;
use qcow2_format::header::Version;

use super::super::PlanError;
use super::super::action::{Action, ActionKind, Effect};
use super::super::overlay::Overlay;
use super::super::plan::Planner;
use super::cluster;
use crate::{Code, Place, Report, Severity, Structure, Verdict, check};

/// Where the features stand, and the bit of extended L2 entries.
const INCOMPATIBLE: u64 = 72;
const EXTENDED_L2: u64 = 1 << 4;

/// What entries look like that are read as they are not meant.
const CODES: [Code; 7] = [
    Code::SubclusterConflict,
    Code::SubclusterUnallocated,
    Code::CompressedSubclusters,
    Code::L2Reserved,
    Code::L2Unaligned,
    Code::L2UnalignedZero,
    Code::ReferencePastEnd,
];

/// Clears the bit of extended L2 entries, if the image is sound with that.
pub(in super::super) fn mend(
    planner: &mut Planner<'_, '_>,
    before: &Report,
) -> Result<(), PlanError> {
    if !CODES.iter().any(|code| before.total(*code) > 0) {
        return Ok(());
    }
    let Ok(cluster) = cluster(planner)? else {
        return Ok(());
    };
    let Ok((header, _)) = Header::decode_for_check(&cluster) else {
        return Ok(());
    };
    if header.version != Version::V3 || !header.geometry.extended_l2() {
        return Ok(());
    }
    let word = header.incompatible.bits() ^ EXTENDED_L2;
    let trial = Overlay::new(planner.overlay.base())?;
    let layer = trial.layer();
    trial.write(layer, INCOMPATIBLE, &word.to_be_bytes())?;
    let report = check(&trial, &planner.check_options());
    if report.verdict() != Verdict::Sound || report.total_of(Severity::Corruption) > 0 {
        return Ok(());
    }
    let layer = planner.overlay.layer();
    let bytes = word.to_be_bytes();
    planner.overlay.write(layer, INCOMPATIBLE, &bytes)?;
    let place = Place::of(Structure::Header).at(INCOMPATIBLE, 8);
    let reason = "without the feature of extended L2 entries, nothing is wrong";
    let action = Action::new(ActionKind::MendHeader, place, reason);
    planner.add(action.changes(INCOMPATIBLE, 8).effect(Effect::Reachable));
    Ok(())
}
