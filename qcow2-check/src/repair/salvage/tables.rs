//! L2 tables that nothing refers to, put back where the active L1 table has none.
//!
//! Where a table belongs is not written anywhere. But a guest's disk is mostly written in order, so the clusters of one table lie near
//! each other, and the tables in the order of the disk. So lost tables, in the order of the file, go to the entries that were given up, in
//! the order of the disk: for one lost table and one lost entry that is all there is to choose.

use std::sync::Arc;

use qcow2_format::{HostOffset, L1Entry};
use qcow2_io::Storage;

use super::super::PlanError;
use super::super::action::{Action, ActionKind, Effect};
use super::super::plan::Planner;
use super::super::refcounts::{hopeless, no_threads};
use super::scan::{Candidate, as_l2, each_cluster};
use crate::image::Image;
use crate::refmap::RefMap;
use crate::{Place, Run, Structure, load, references};

/// Finds lost L2 tables and puts them back. Tells whether there were any.
pub(in super::super) fn find(planner: &mut Planner<'_, '_>) -> Result<bool, PlanError> {
    let options = planner.check_options();
    Run::start(&options, |run| find_with(planner, run)).unwrap_or_else(|| Err(no_threads()))
}

fn find_with(planner: &mut Planner<'_, '_>, run: Run<'_>) -> Result<bool, PlanError> {
    let overlay = Arc::clone(&planner.overlay);
    let Some(loaded) = load::load(&*overlay, &run) else {
        return Err(hopeless(run));
    };
    let image = &loaded.image;
    let free = free_entries(planner, image)?;
    if free.is_empty() || !planner.hidden {
        return Ok(false);
    }
    let Some(counted) = references::count_others(&loaded, &run) else {
        return Err(hopeless(run));
    };
    let mut found = candidates(planner, image, &counted.map)?;
    if found.is_empty() {
        return Ok(false);
    }
    // More entries are more evidence; of two tables that claim one cluster the better one is taken.
    found.sort_by_key(|table| std::cmp::Reverse((table.copied, table.entries)));
    let mut taken = apart(planner, image, &found)?;
    taken.truncate(free.len());
    taken.sort_by_key(|table| table.offset);
    let layer = planner.overlay.layer();
    let sure = taken.len() == 1 && free.len() == 1;
    for (table, index) in taken.iter().zip(&free) {
        let at = image.active_entry(*index);
        let entry = L1Entry::new(HostOffset::new(table.offset), false);
        planner.overlay.write(layer, at, &entry.to_be_bytes())?;
        let place = Place::of(Structure::L2Table)
            .at(table.offset, image.cluster_size())
            .entry(*index)
            .guest(image.guest_offset(*index, 0), image.geometry.l2_coverage());
        let reason = format!(
            "nothing refers to it, all of its {} entries make sense, and L1 entry {index} was lost",
            table.entries
        );
        let effect = if sure {
            Effect::Reachable
        } else {
            Effect::Ambiguous
        };
        let action = Action::new(ActionKind::FindL2, place, reason);
        planner.add(action.changes(at, 8).effect(effect));
    }
    Ok(!taken.is_empty())
}

/// Entries of the active L1 table that this repair has given up, and that had a table before; where the table itself is another one or
/// was cut, all that are empty and within the disk. An entry that was empty in a table that was sound is none that lost something.
fn free_entries(planner: &Planner<'_, '_>, image: &Image<'_>) -> Result<Vec<u64>, PlanError> {
    let offset = image.header.l1_table_offset.get();
    let entries = image
        .geometry
        .l1_entries_for(image.header.virtual_size())
        .min(u64::from(image.header.l1_entries));
    let mut now = vec![0; usize::try_from(entries * 8).unwrap_or(0)];
    let mut before = now.clone();
    planner.overlay.read_at(&mut now, offset)?;
    planner.overlay.base().read_at(&mut before, offset)?;
    let empty = |word: &[u8; 8]| *word == [0; 8];
    let words = now.as_chunks::<8>().0.iter().zip(before.as_chunks::<8>().0);
    let words: Vec<(u64, bool, bool)> = (0..)
        .zip(words)
        .map(|(index, (now, before))| (index, empty(now), empty(before)))
        .collect();
    let given_up: Vec<u64> = words
        .iter()
        .filter(|(_, now, before)| *now && !*before)
        .map(|(index, ..)| *index)
        .collect();
    let another = [
        ActionKind::FindHeader,
        ActionKind::FindL1,
        ActionKind::GrowFile,
    ];
    let is_another = another.iter().any(|kind| planner.actions.has(*kind));
    if !given_up.is_empty() || !is_another {
        return Ok(given_up);
    }
    Ok(words
        .iter()
        .filter(|(_, now, _)| *now)
        .map(|(index, ..)| *index)
        .collect())
}

/// Unreferenced clusters that look like L2 tables, with clusters that nothing refers to either.
fn candidates(
    planner: &Planner<'_, '_>,
    image: &Image<'_>,
    map: &RefMap,
) -> Result<Vec<Candidate>, PlanError> {
    let len = planner.overlay.new_len();
    let bits = image.cluster_bits();
    let mut found = Vec::new();
    let refcounts = super::l1::refcount_table(&image.header);
    each_cluster(planner, image.cluster_size(), |offset, bytes| {
        if map.is_seen(offset >> bits) || refcounts.contains(&offset) {
            return;
        }
        let Some(candidate) = as_l2(offset, bytes, image.rules, len) else {
            return;
        };
        let mut clusters = 0_u64;
        let mut seen = 0_u64;
        let table = qcow2_format::l2::L2Table::new(bytes, image.geometry);
        for entry in table.iter() {
            let host = match entry.kind(image.rules) {
                qcow2_format::ClusterKind::Normal(host)
                | qcow2_format::ClusterKind::ZeroAllocated(host) => host.get(),
                qcow2_format::ClusterKind::Compressed(extent) => extent.offset.get(),
                _ => continue,
            };
            clusters += 1;
            seen += u64::from(map.is_seen(host >> bits));
        }
        // A table whose clusters somebody else has by now is an old one.
        if seen * 2 <= clusters && clusters > 0 {
            found.push(candidate);
        }
    })?;
    Ok(found)
}

/// Of candidates in the order of their evidence, those that don't lead into each other: a table that another one has as data is data.
fn apart(
    planner: &Planner<'_, '_>,
    image: &Image<'_>,
    found: &[Candidate],
) -> Result<Vec<Candidate>, PlanError> {
    let mut mine = RefMap::new(image.file_clusters());
    let mut taken: Vec<Candidate> = Vec::new();
    let bits = image.cluster_bits();
    let mut bytes = vec![0; image.geometry.cluster_len()];
    for candidate in found {
        if mine.is_seen(candidate.offset >> bits) {
            continue;
        }
        planner.overlay.read_at(&mut bytes, candidate.offset)?;
        let table = qcow2_format::l2::L2Table::new(&bytes, image.geometry);
        let hosts: Vec<u64> = table
            .iter()
            .filter_map(|entry| match entry.kind(image.rules) {
                qcow2_format::ClusterKind::Normal(host)
                | qcow2_format::ClusterKind::ZeroAllocated(host) => Some(host.get() >> bits),
                _ => None,
            })
            .collect();
        let clash = hosts.iter().filter(|host| mine.is_seen(**host)).count();
        if clash * 2 > hosts.len() {
            continue;
        }
        for host in hosts {
            mine.insert(host);
        }
        mine.insert(candidate.offset >> bits);
        taken.push(candidate.clone());
    }
    Ok(taken)
}
