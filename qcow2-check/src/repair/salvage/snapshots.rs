//! The snapshot table, where the header leads to none.

use qcow2_format::header::Header;
use qcow2_format::{HostOffset, Snapshot};
use qcow2_io::Storage;

use super::super::action::{Action, ActionKind, Effect};
use super::super::plan::Planner;
use super::super::{PlanError, header};
use super::scan::each_cluster;
use crate::{Place, Structure};

/// Where the header says how many snapshots there are, and where: 4 and 8 bytes.
const FIELDS: u64 = 60;
/// Bytes of a table looked at.
const READ_BYTES: usize = 256 << 10;

/// Finds the snapshot table, if the header names one and there is none.
pub(in super::super) fn find(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let Ok(cluster) = header::cluster(planner)? else {
        return Ok(());
    };
    let Ok((header, _)) = Header::decode_for_check(&cluster) else {
        return Ok(());
    };
    let size = header.geometry.cluster_size();
    let len = planner.overlay.new_len();
    let named = header.snapshot_table_offset;
    if header.snapshot_count == 0 {
        return Ok(());
    }
    if header.geometry.is_cluster_aligned(named) && (1..len).contains(&named.get()) {
        let mut bytes = vec![0; READ_BYTES];
        planner.overlay.read_at(&mut bytes, named.get())?;
        // Single entries are mended later.
        if Snapshot::decode(&bytes).is_ok_and(|(first, _)| is_plausible(&first, size, len)) {
            return Ok(());
        }
    }
    // The one with as many snapshots as there should be, and of such the last: the newest, most likely.
    let mut best = None;
    each_cluster(planner, size, |offset, bytes| {
        if let Some(count) = plausible(bytes, size, len).filter(|_| offset > 0) {
            let rank = (count == header.snapshot_count, count, offset);
            best = best.max(Some(rank));
        }
    })?;
    let Some((_, count, offset)) = best else {
        return Ok(());
    };
    let layer = planner.overlay.layer();
    let mut fields = count.to_be_bytes().to_vec();
    fields.extend(offset.to_be_bytes());
    planner.overlay.write(layer, FIELDS, &fields)?;
    planner.hidden = true;
    let place = Place::of(Structure::SnapshotTable).at(offset, size);
    let reason = format!(
        "{} snapshots and no table at {named}; here is one of {count}",
        header.snapshot_count
    );
    let action = Action::new(ActionKind::FindSnapshots, place, reason);
    planner.add(action.changes(FIELDS, 12).effect(Effect::Reachable));
    Ok(())
}

/// The bytes as a snapshot table: how many entries, one after the other, are snapshots.
pub(in super::super) fn plausible(bytes: &[u8], size: u64, len: u64) -> Option<u32> {
    let mut at = 0;
    let mut count = 0;
    while let Ok((snapshot, used)) = Snapshot::decode(bytes.get(at..).unwrap_or_default())
        && is_plausible(&snapshot, size, len)
    {
        count += 1;
        at += used.next_multiple_of(8);
    }
    (count > 0).then_some(count)
}

fn is_plausible(snapshot: &Snapshot, size: u64, len: u64) -> bool {
    let l1: HostOffset = snapshot.l1_table_offset;
    !snapshot.id.is_empty()
        && snapshot.id.len() <= 20
        && snapshot.id.iter().all(u8::is_ascii_digit)
        && (1..len).contains(&l1.get())
        && l1.get().is_multiple_of(size)
        && snapshot.l1_entries > 0
}
