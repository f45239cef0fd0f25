//! The active L1 table, where the header leads to none.

use qcow2_format::geometry::MAX_L1_BYTES;
use qcow2_format::{Geometry, Header, HostOffset, L1Entry};
use qcow2_io::Storage;

use super::super::action::{Action, ActionKind, Effect};
use super::super::plan::Planner;
use super::super::{PlanError, header};
use super::scan::{Candidate, as_l1, each_cluster, l2_tables};
use crate::{Place, Structure};

/// Bytes of the snapshot table looked at.
const SNAPSHOT_BYTES: usize = 1 << 20;
/// Where the header says how many entries the table has, and where it is: 4 and 8 bytes.
const FIELDS: u64 = 36;

/// Finds the active L1 table, or makes one of the L2 tables there are, if the one that the header names can't be it.
pub(in super::super) fn find(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let Ok(cluster) = header::cluster(planner)? else {
        return Ok(());
    };
    let Ok((header, _)) = Header::decode_for_check(&cluster) else {
        return Ok(());
    };
    if is_sound(planner, &header)? {
        return Ok(());
    }
    replace(planner, &header, true)
}

/// Finds or makes another table than the one that the header names.
pub(in super::super) fn find_another(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let Ok(cluster) = header::cluster(planner)? else {
        return Ok(());
    };
    match Header::decode_for_check(&cluster) {
        Ok((header, _)) => replace(planner, &header, false),
        Err(_) => Ok(()),
    }
}

/// Takes the best candidate; where the table that is named may be `right`, its length being wrong, it is one of them.
fn replace(planner: &mut Planner<'_, '_>, header: &Header, right: bool) -> Result<(), PlanError> {
    let snapshots = snapshot_tables(planner, header)?;
    let (mut candidates, tables) = search(planner, header, &snapshots)?;
    candidates.retain(|candidate| right || candidate.offset != header.l1_table_offset.get());
    match candidates.first() {
        Some(best) => {
            // A snapshot's table looks the same, and so does one that was given back.
            let all_known = snapshots.len() as u64 == u64::from(header.snapshot_count);
            take(planner, header, best, candidates.len() == 1 && all_known)
        }
        // With snapshots, there is something to keep even if the active disk is lost.
        None if !tables.is_empty() || !snapshots.is_empty() => make(planner, header, &tables),
        None => Ok(()),
    }
}

/// Where the refcount table is: it looks like an L2 table without flags.
pub(super) fn refcount_table(header: &Header) -> std::ops::Range<u64> {
    let start = header.refcount_table_offset.get();
    let len = u64::from(header.refcount_table_clusters) << header.geometry.cluster_bits();
    start..start.saturating_add(len)
}

/// Whether what the header names can be an L1 table: it lies in the file, and most entries lead to where a table can be.
pub(in super::super) fn is_sound(
    planner: &Planner<'_, '_>,
    header: &Header,
) -> Result<bool, PlanError> {
    // What the disk does not need may be too much, and something else.
    let needed = header.geometry.l1_entries_for(header.virtual_size_raw);
    let len = u64::from(header.l1_entries).min(needed.max(1)) * 8;
    let offset = header.l1_table_offset.get();
    let end = planner.overlay.new_len();
    if len == 0 {
        return Ok(true);
    }
    if offset == 0 || offset >= end {
        return Ok(false);
    }
    let mut bytes = vec![0; usize::try_from(len.min(MAX_L1_BYTES)).unwrap_or(0)];
    planner.overlay.read_at(&mut bytes, offset)?;
    let (mut good, mut bad) = (0_u64, 0_u64);
    for word in bytes.as_chunks::<8>().0.iter().filter(|w| **w != [0; 8]) {
        let entry = L1Entry::from_be_bytes(*word);
        let table = entry.l2_table();
        let leads = table.get() != 0
            && header.geometry.is_cluster_aligned(table)
            && table.get() < end
            && entry.reserved_bits() == 0;
        if leads {
            good += 1;
        } else {
            bad += 1;
        }
    }
    // A table of nothing is sound: an empty disk has no L2 tables. And one entry that is wrong is one entry.
    Ok(bad <= good || bad == 1)
}

/// Candidates for the active L1 table, the best one first, and all L2 tables.
fn search(
    planner: &Planner<'_, '_>,
    header: &Header,
    snapshots: &[u64],
) -> Result<(Vec<Candidate>, Vec<Candidate>), PlanError> {
    let rules = header.entry_rules();
    let mut l2 = l2_tables(planner, rules)?;
    let refcounts = refcount_table(header);
    l2.retain(|table| !refcounts.contains(&table.offset));
    let tables: Vec<u64> = l2.iter().map(|table| table.offset).collect();
    let mut found = Vec::new();
    each_cluster(planner, header.geometry.cluster_size(), |offset, bytes| {
        // What snapshots have is theirs.
        if offset > 0
            && !snapshots.contains(&offset)
            && let Some(candidate) = as_l1(offset, bytes, &tables)
        {
            found.push(candidate);
        }
    })?;
    let needed = header.geometry.l1_entries_for(header.virtual_size_raw);
    join(planner, header.geometry, needed, &mut found)?;
    // The active table has flags, snapshots' have them from when they were it; more entries are more evidence; the later one is newer.
    found.sort_by_key(|c| std::cmp::Reverse((c.copied, c.entries, c.offset)));
    Ok((found, l2))
}

/// Adds to each first cluster of a table of several what the others have: they lie one behind the other, and some may be all zeros.
fn join(
    planner: &Planner<'_, '_>,
    geometry: Geometry,
    entries: u64,
    found: &mut [Candidate],
) -> Result<(), PlanError> {
    let size = geometry.cluster_size();
    let clusters = geometry.clusters_for(entries.saturating_mul(8).min(MAX_L1_BYTES));
    if clusters < 2 {
        return Ok(());
    }
    let mut alone = found.to_vec();
    alone.sort_by_key(|candidate| candidate.offset);
    let mut bytes = vec![0; geometry.cluster_len()];
    for first in found {
        for number in 1..clusters {
            let offset = first.offset.saturating_add(number * size);
            let known = alone.binary_search_by_key(&offset, |candidate| candidate.offset);
            if let Some(more) = known.ok().and_then(|at| alone.get(at)) {
                first.entries += more.entries;
                first.copied |= more.copied;
                continue;
            }
            planner.overlay.read_at(&mut bytes, offset)?;
            if !crate::reader::is_zero(&bytes) {
                break;
            }
        }
    }
    Ok(())
}

/// Where the snapshots' L1 tables are, as far as the snapshot table can be read.
fn snapshot_tables(planner: &Planner<'_, '_>, header: &Header) -> Result<Vec<u64>, PlanError> {
    let offset = header.snapshot_table_offset.get();
    if header.snapshot_count == 0 || offset >= planner.overlay.new_len() {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; SNAPSHOT_BYTES];
    planner.overlay.read_at(&mut bytes, offset)?;
    let entries = qcow2_format::snapshot::decode_table(&bytes, header.snapshot_count);
    let known = entries.map_while(Result::ok);
    Ok(known.map(|entry| entry.l1_table_offset.get()).collect())
}

fn write_fields(
    planner: &mut Planner<'_, '_>,
    layer: usize,
    entries: u64,
    offset: u64,
) -> Result<(), PlanError> {
    let entries = u32::try_from(entries).unwrap_or(u32::MAX);
    let mut fields = entries.to_be_bytes().to_vec();
    fields.extend(offset.to_be_bytes());
    planner.overlay.write(layer, FIELDS, &fields)?;
    Ok(())
}

fn take(
    planner: &mut Planner<'_, '_>,
    header: &Header,
    best: &Candidate,
    is_only: bool,
) -> Result<(), PlanError> {
    let geometry = header.geometry;
    let needed = geometry.l1_entries_for(header.virtual_size_raw);
    let entries = u64::from(header.l1_entries).max(needed);
    let layer = planner.overlay.layer();
    write_fields(planner, layer, entries, best.offset)?;
    planner.hidden = true;
    let place = Place::of(Structure::ActiveL1).at(best.offset, entries * 8);
    let reason = format!(
        "the header leads to no L1 table; {} entries here lead to L2 tables",
        best.entries
    );
    let action = Action::new(ActionKind::FindL1, place, reason);
    let effect = if is_only {
        Effect::Reachable
    } else {
        Effect::Ambiguous
    };
    planner.add(action.changes(FIELDS, 12).effect(effect));
    Ok(())
}

/// Makes an L1 table of all L2 tables, in the order of the file: mostly the order in which the guest wrote.
fn make(
    planner: &mut Planner<'_, '_>,
    header: &Header,
    tables: &[Candidate],
) -> Result<(), PlanError> {
    let geometry = header.geometry;
    let needed = geometry.l1_entries_for(header.virtual_size_raw);
    let entries = needed.max(u64::from(header.l1_entries));
    if entries * 8 > MAX_L1_BYTES {
        return Err(PlanError::Limit {
            what: "L1 table",
            found: entries * 8,
            limit: MAX_L1_BYTES,
        });
    }
    let taken = usize::try_from(needed).unwrap_or(usize::MAX);
    let mut bytes: Vec<u8> = tables
        .iter()
        .take(taken)
        .flat_map(|table| L1Entry::new(HostOffset::new(table.offset), false).to_be_bytes())
        .collect();
    bytes.resize(usize::try_from(entries * 8).unwrap_or(0), 0);
    let clusters = geometry.clusters_for(entries * 8);
    let size = geometry.cluster_size();
    let layer = planner.overlay.layer();
    let switch = planner.overlay.layer();
    let offset = planner.allocate(clusters, size)?;
    planner.overlay.write(layer, offset, &bytes)?;
    planner.overlay.grow(offset + clusters * size);
    write_fields(planner, switch, entries, offset)?;
    planner.hidden = true;
    let place = Place::of(Structure::ActiveL1)
        .at(offset, clusters * size)
        .guest(0, header.virtual_size_raw);
    let count = tables.len().min(taken) as u64;
    let (reason, effect) = if count > 0 {
        (
            "no L1 table can be found; L2 tables are put in the order of the file",
            Effect::Ambiguous,
        )
    } else {
        (
            "neither L1 nor L2 tables can be found; the disk is empty, its snapshots stay",
            Effect::Lost,
        )
    };
    let action = Action::new(ActionKind::MakeL1, place, reason).times(count.max(1));
    planner.add(
        action
            .changes(offset, clusters * size)
            .changes(FIELDS, 12)
            .effect(effect),
    );
    Ok(())
}
