//! One look at every cluster of the file: which of them look like tables?

use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, EntryRules, HostOffset, L1Entry};
use qcow2_io::{ExtentKind, Storage};

use super::super::PlanError;
use super::super::plan::Planner;

/// Clusters of the file looked at, at most: the list of those that look like tables is far shorter.
const CLUSTERS_MAX: u64 = 1 << 32;
/// Tables remembered.
const TABLES_MAX: usize = 1 << 20;

/// A cluster that looks like a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) offset: u64,
    /// Entries that are sound.
    pub(super) entries: u64,
    /// The table has COPIED flags: it is, or was, an active one.
    pub(super) copied: bool,
}

/// Calls `each` with every cluster that is not a hole and not all zeros.
pub(super) fn each_cluster(
    planner: &Planner<'_, '_>,
    cluster_size: u64,
    mut each: impl FnMut(u64, &[u8]),
) -> Result<(), PlanError> {
    let overlay = &planner.overlay;
    let len = overlay.new_len();
    let mut buffer = vec![0; usize::try_from(cluster_size).unwrap_or(0).max(1 << 20)];
    let mut at = 0;
    let mut looked_at = 0;
    while at < len && looked_at < CLUSTERS_MAX {
        if planner.is_cancelled() {
            return Err(PlanError::Cancelled);
        }
        let extents = overlay.extents(at..len, 1)?;
        let Some(extent) = extents.first() else { break };
        if extent.kind != ExtentKind::Data {
            let end = extent.end() / cluster_size * cluster_size;
            at = end.max(at + cluster_size);
            continue;
        }
        let whole = overlay.read_at(&mut buffer, at).is_ok();
        for cluster in buffer.chunks_exact_mut(usize::try_from(cluster_size).unwrap_or(1)) {
            if at >= len {
                break;
            }
            // What can't be read is no candidate.
            if !whole && overlay.read_at(cluster, at).is_err() {
                cluster.fill(0);
            }
            if !crate::reader::is_zero(cluster) {
                each(at, cluster);
            }
            at += cluster_size;
            looked_at += 1;
        }
    }
    Ok(())
}

/// Clusters that look like L2 tables: no entry makes no sense, and some lead to clusters inside the file.
pub(super) fn l2_tables(
    planner: &Planner<'_, '_>,
    rules: EntryRules,
) -> Result<Vec<Candidate>, PlanError> {
    let len = planner.overlay.new_len();
    let mut found = Vec::new();
    each_cluster(planner, rules.geometry.cluster_size(), |offset, bytes| {
        if offset > 0
            && found.len() < TABLES_MAX
            && let Some(candidate) = as_l2(offset, bytes, rules, len)
        {
            found.push(candidate);
        }
    })?;
    Ok(found)
}

/// The cluster as an L2 table, if it can be one.
pub(super) fn as_l2(offset: u64, bytes: &[u8], rules: EntryRules, len: u64) -> Option<Candidate> {
    let geometry = rules.geometry;
    let mut entries = 0;
    let mut copied = false;
    let mut seen = 0_u64;
    for entry in L2Table::new(bytes, geometry).iter() {
        if entry.is_empty() {
            continue;
        }
        if entry.reserved_bits() != 0 || entry.misplaced_zero_flag(rules) {
            return None;
        }
        match entry.kind(rules) {
            ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host) => {
                let both = entry.allocated_subclusters() & entry.zero_subclusters();
                if !geometry.is_cluster_aligned(host) || host.get() >= len || both != 0 {
                    return None;
                }
                // A table of one cluster over and over is a pattern that a guest wrote.
                if host.get() == seen {
                    return None;
                }
                seen = host.get();
                copied |= entry.is_copied();
                entries += 1;
            }
            ClusterKind::Compressed(extent) => {
                if entry.is_copied() || entry.bitmap() != 0 || extent.offset.get() >= len {
                    return None;
                }
                entries += 1;
            }
            ClusterKind::ZeroPlain => entries += u64::from(entry.word() == 1),
            ClusterKind::Unallocated => return None,
        }
    }
    (entries > 0).then_some(Candidate {
        offset,
        entries,
        copied,
    })
}

/// The bytes as an L1 table whose L2 tables are `tables` (sorted): how many of its entries lead to one, if no other makes no sense.
pub(super) fn as_l1(offset: u64, bytes: &[u8], tables: &[u64]) -> Option<Candidate> {
    let mut entries = 0;
    let mut copied = false;
    let mut known = Vec::new();
    for word in bytes.as_chunks::<8>().0.iter().filter(|w| **w != [0; 8]) {
        let entry = L1Entry::from_be_bytes(*word);
        let table: HostOffset = entry.l2_table();
        let leads = entry.reserved_bits() == 0
            && table.get() != offset
            && tables.binary_search(&table.get()).is_ok();
        if !leads {
            return None;
        }
        known.push(table.get());
        copied |= entry.is_copied();
        entries += 1;
    }
    known.sort_unstable();
    known.dedup();
    (entries > 0 && known.len() as u64 == entries).then_some(Candidate {
        offset,
        entries,
        copied,
    })
}
