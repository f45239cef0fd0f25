//! What is said of refcounts, of COPIED flags (the entry and the refcount that it should mirror), and of snapshot tables.

use std::ops::Range;

use qcow2_check::repair::{Plan, SnapshotCut};
use qcow2_check::{Code, Finding, Structure};
use qcow2_format::Snapshot;
use qcow2_format::geometry::{MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use qcow2_io::Storage;

/// Bits of an entry that are a host offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Entries of the largest L1 table.
const MAX_L1_ENTRIES: u64 = MAX_L1_BYTES / 8;

fn word(file: &dyn Storage, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    match file.read_at(&mut bytes, offset) {
        Ok(()) => u64::from_be_bytes(bytes),
        Err(_) => 0,
    }
}

fn half_word(file: &dyn Storage, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    match file.read_at(&mut bytes, offset) {
        Ok(()) => u32::from_be_bytes(bytes),
        Err(_) => 0,
    }
}

/// What goes of a snapshot table.
pub(super) fn of_cut(cut: SnapshotCut) -> String {
    match cut {
        SnapshotCut::ExtraData {
            entry,
            found,
            limit,
        } => format!(
            "Discarding too much extra metadata in snapshot table entry {entry} ({found} > {limit})"
        ),
        SnapshotCut::TooLarge { count } => {
            format!("Discarding {count} overhanging snapshots (snapshot table is too big)")
        }
        cut => format!("Discarding {} overhanging snapshots", cut.entries()),
    }
}

/// A snapshot whose L1 table can't be one.
fn of_snapshot_l1(file: &dyn Storage, finding: &Finding) -> String {
    let entry = finding.place.host.and_then(|range| {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).ok()?];
        file.read_at(&mut bytes, range.start).ok()?;
        Some(Snapshot::decode_truncating(&bytes).ok()?.0)
    });
    let Some(entry) = entry else {
        return format!("ERROR {finding}");
    };
    let (offset, entries) = (entry.l1_table_offset.get(), entry.l1_entries);
    let problem = if u64::from(entries) > MAX_L1_ENTRIES {
        format!("l1_size={entries:#x}: L1 table is too large")
    } else {
        format!("l1_offset={offset:#x}: L1 table is not cluster aligned")
    };
    format!(
        "ERROR snapshot {} ({}) {problem}; snapshot table entry corrupted",
        string(&entry.id),
        string(&entry.name)
    )
}

/// A string that a zero ends.
fn string(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default())
        .into_owned()
}

/// Where the entry lies that a finding is about.
fn place_of(file: &dyn Storage, finding: &Finding) -> u64 {
    let table = finding.place.host.map_or(0, |range| range.start);
    let extended = half_word(file, 4) >= 3 && word(file, 72) & 0x10 != 0;
    let size = match finding.place.structure {
        Structure::L2Table if extended => 16,
        _ => 8,
    };
    table.saturating_add(finding.place.index.unwrap_or(0).saturating_mul(size))
}

/// The refcount of the cluster that starts at an offset, as the file has it.
fn refcount(file: &dyn Storage, offset: u64) -> u64 {
    let bits = half_word(file, 20).min(21);
    let order = match half_word(file, 4) {
        3.. => half_word(file, 96).min(6),
        _ => 4,
    };
    let cluster = offset >> bits;
    let in_block = (bits + 3).saturating_sub(order);
    let entry = word(
        file,
        word(file, 48).saturating_add((cluster >> in_block) * 8),
    );
    let block = entry & !0x1ff;
    if block == 0 {
        return 0;
    }
    let index = cluster & ((1 << in_block) - 1);
    let first_bit = index << order;
    // Narrow refcounts fill a byte from its low end, wide ones are big-endian.
    let (len, mut bytes) = ((1_usize << order).div_ceil(8), [0; 8]);
    let Some(part) = bytes.get_mut(8 - len..) else {
        return 0;
    };
    if file
        .read_at(part, block.saturating_add(first_bit / 8))
        .is_err()
    {
        return 0;
    }
    let value = u64::from_be_bytes(bytes);
    match order {
        0..=2 => (value >> (first_bit % 8)) & ((1 << (1 << order)) - 1),
        _ => value,
    }
}

/// What is wrong with a flag: the entry as it is in `file`, the refcount as it is in `counts`.
pub(super) fn of_flag(file: &dyn Storage, counts: &dyn Storage, finding: &Finding) -> String {
    let entry = word(file, place_of(file, finding));
    let refcount = refcount(counts, entry & OFFSET);
    match finding.place.structure {
        Structure::L2Table => {
            format!("OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
        }
        _ => format!(
            "OFLAG_COPIED L2 cluster: l1_index={} l1_entry={entry:x} refcount={refcount}",
            finding.place.index.unwrap_or(0)
        ),
    }
}

/// Flags of the disk's data that were right, and are turned since the refcounts that they mirror are: a line for each that is
/// in none of the `known` findings.
pub(super) fn flags_turned(file: &dyn Storage, plan: &Plan<'_>, known: &[&Finding]) -> Vec<String> {
    let after = plan.preview();
    let writes = plan.writes();
    let cluster_size = 1_u64 << half_word(file, 20).clamp(9, 21);
    let extended = half_word(file, 4) >= 3 && word(file, 72) & 0x10 != 0;
    let entry_size = if extended { 16 } else { 8 };
    let known: Vec<u64> = known.iter().map(|one| place_of(file, one)).collect();
    let turned = |place: u64| {
        let (old, new) = (word(file, place), word(after, place));
        (old ^ new == 1 << 63 && !known.contains(&place))
            .then_some((old, refcount(after, old & OFFSET)))
    };
    let is_written = |start: u64, len: u64| {
        // They are ascending and apart.
        let first = writes.partition_point(|range| range.end <= start);
        writes
            .get(first)
            .is_some_and(|range| range.start < start.saturating_add(len))
    };
    let l1 = word(file, 40);
    let entries = u64::from(half_word(file, 36)).min(MAX_L1_ENTRIES);
    let mut lines = Vec::new();
    for index in 0..entries {
        let place = l1.saturating_add(index * 8);
        if let Some((entry, count)) = turned(place) {
            lines.push(format!(
                "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}"
            ));
        }
        let table = word(file, place) & OFFSET;
        if table == 0 || !is_written(table, cluster_size) {
            continue;
        }
        for place in (table..table.saturating_add(cluster_size)).step_by(entry_size) {
            if let Some((entry, count)) = turned(place) {
                lines.push(format!(
                    "OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}"
                ));
            }
        }
    }
    lines
}

/// Whether a repair changes the flag itself.
pub(super) fn flag_changes(file: &dyn Storage, repaired: &dyn Storage, finding: &Finding) -> bool {
    let place = place_of(file, finding);
    word(file, place) != word(repaired, place)
}

/// Bytes in a cluster.
pub(super) fn cluster_size(file: &dyn Storage) -> u64 {
    1 << half_word(file, 20).clamp(9, 21)
}

/// Clusters whose refcount is the same and wrong, that refcount, and their references.
pub(super) fn of_count(finding: &Finding, cluster_size: u64) -> Option<(Range<u64>, u64, u64)> {
    let number = |name: &str| {
        let (_, rest) = finding.detail.rsplit_once(name)?;
        rest.split(',').next()?.trim().parse::<u64>().ok()
    };
    let range = finding.place.host?;
    Some((
        range.start / cluster_size..range.end.div_ceil(cluster_size),
        number("refcount ")?,
        number("references ")?,
    ))
}

/// A finding in the words that scripts know.
pub(super) fn line(file: &dyn Storage, finding: &Finding, verb: &str) -> String {
    let range = finding.place.host;
    match finding.code {
        Code::SnapshotIncomplete => format!(
            "{verb} snapshot table entry {} is incomplete",
            finding.place.index.unwrap_or(0)
        ),
        Code::SnapshotL1Invalid => of_snapshot_l1(file, finding),
        Code::ReferencePastEnd => format!(
            "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
             offset {:#x} size {:#x}",
            range.map_or(0, |range| range.start),
            range.map_or(0, |range| range.end - range.start)
        ),
        Code::RefcountOverflow => format!(
            "ERROR: overflow cluster offset={:#x}\n\
             Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if \
             the image cannot be opened for writing",
            range.map_or(0, |range| range.start)
        ),
        _ => format!("ERROR {finding}"),
    }
}

/// Whether a repair makes the refcount table anew.
pub(super) fn is_rebuilt(file: &dyn Storage, plan: &Plan<'_>) -> bool {
    word(file, 48) != word(plan.preview(), 48)
}

/// The clusters that the refcount structures of `file` have and those of the repaired image have not, in their order, with the references
/// that they have without them.
pub(super) fn structures_left(file: &dyn Storage, plan: &Plan<'_>) -> Vec<(u64, u64)> {
    let after = plan.preview();
    let size = cluster_size(file);
    let kept = structures(after);
    let mut left = structures(file);
    left.retain(|cluster| {
        kept.binary_search(cluster).is_err() && cluster.saturating_mul(size) < plan.old_len()
    });
    left.into_iter()
        .map(|cluster| (cluster, refcount(after, cluster * size)))
        .collect()
}

/// The clusters of the refcount table and of its blocks.
fn structures(file: &dyn Storage) -> Vec<u64> {
    let size = cluster_size(file);
    let table = word(file, 48);
    let len = u64::from(half_word(file, 56)).saturating_mul(size);
    let len = len.min(MAX_REFCOUNT_TABLE_BYTES);
    let mut clusters: Vec<u64> = (table / size..table.saturating_add(len) / size).collect();
    for place in (table..table.saturating_add(len)).step_by(8) {
        match word(file, place) & !0x1ff {
            0 => {}
            block => clusters.push(block / size),
        }
    }
    clusters.sort_unstable();
    clusters.dedup();
    clusters
}
