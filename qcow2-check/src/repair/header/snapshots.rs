//! A header that names a snapshot table and says that it is empty: writers that have no snapshots name no table.

use qcow2_format::Header;
use qcow2_io::Storage;

use super::super::PlanError;
use super::super::action::{Action, ActionKind, Effect};
use super::super::plan::Planner;
use super::super::salvage::plausible_snapshots;
use super::cluster;
use crate::{Place, Structure};

/// Where the number of snapshots stands.
const COUNT: u64 = 60;
/// Bytes of a table looked at.
const READ_BYTES: usize = 256 << 10;

/// How many snapshots there are in a table that is said to have none.
pub(in super::super) fn hidden(planner: &Planner<'_, '_>) -> Result<Option<u32>, PlanError> {
    let Ok(cluster) = cluster(planner)? else {
        return Ok(None);
    };
    let Ok((header, _)) = Header::decode_for_check(&cluster) else {
        return Ok(None);
    };
    let offset = header.snapshot_table_offset;
    let len = planner.overlay.new_len();
    let is_named = (1..len).contains(&offset.get()) && header.geometry.is_cluster_aligned(offset);
    if header.snapshot_count > 0 || !is_named {
        return Ok(None);
    }
    let mut bytes = vec![0; READ_BYTES];
    planner.overlay.read_at(&mut bytes, offset.get())?;
    Ok(plausible_snapshots(
        &bytes,
        header.geometry.cluster_size(),
        len,
    ))
}

/// Counts snapshots that the header forgot.
pub(in super::super) fn mend(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let Some(count) = hidden(planner)? else {
        return Ok(());
    };
    let layer = planner.overlay.layer();
    planner.overlay.write(layer, COUNT, &count.to_be_bytes())?;
    let place = Place::of(Structure::Header).at(COUNT, 4);
    let reason = format!("the header has 0 snapshots, the table that it names {count}");
    let action = Action::new(ActionKind::MendHeader, place, reason);
    planner.add(action.changes(COUNT, 4).effect(Effect::Reachable));
    Ok(())
}
