//! The snapshot table: which trees there are besides the active one.

mod as_written;

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

use qcow2_format::header::{MAX_SNAPSHOTS, Version};
use qcow2_format::snapshot::{MAX_TABLE_BYTES, MIN_EXTRA_DATA_LEN_V3};
use qcow2_format::{Snapshot, SnapshotError};

use crate::image::{Image, MetaRange, Tree};
use crate::load::entries_in_file;
use crate::{Code, Finding, Place, Run, Structure};

pub use as_written::SnapshotCut;
pub(crate) use as_written::read as read_as_written;

/// Bytes of the table read at once.
const READ_BYTES: usize = 256 << 10;
/// Longest entry that may be right: fixed part, extra data, id, name, padding.
const ENTRY_BYTES_MAX: usize = 40 + 1024 + 2 * 65535 + 8;
/// Largest L1 table, in entries.
const L1_ENTRIES_MAX: u64 = qcow2_format::geometry::MAX_L1_BYTES / 8;
/// L1 entries of overlapping tables that are walked beyond those there would be without overlap.
const OVERLAP_ENTRIES_MAX: u64 = 1 << 20;
/// Clusters that all snapshots' L1 tables together may fill.
const L1_CLUSTERS_MAX: u64 = 64 << 20;

/// What the checker remembers of a snapshot.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotInfo {
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
    /// The L1 table may be walked.
    pub(crate) usable: bool,
}

/// Reads the snapshot table, adds its ranges and trees to the image. Also tells whether QEMU would stop here.
pub(crate) fn load(image: &mut Image<'_>, run: &Run<'_>) -> (Vec<SnapshotInfo>, bool) {
    let offset = image.header.snapshot_table_offset.get();
    let count = image.header.snapshot_count;
    let size = image.cluster_size();
    if count > MAX_SNAPSHOTS && !image.as_written {
        let detail = format!("{count} snapshots, at most {MAX_SNAPSHOTS} are allowed");
        unreadable(run, 60, detail);
        return (Vec::new(), true);
    }
    let entries = u64::from(count.min(MAX_SNAPSHOTS));
    let end = offset.checked_add(entries * 40);
    if !offset.is_multiple_of(size) || end.is_none_or(|end| i64::try_from(end).is_err()) {
        unreadable(run, 64, format!("the table would start at {offset:#x}"));
        return (Vec::new(), true);
    }
    let mut known = Known::default();
    let table_len = if image.as_written {
        take_as_written(image, &mut known, run)
    } else {
        read(image, &mut known, run)
    };
    if count > 0 {
        image.metadata.push(MetaRange {
            structure: Structure::SnapshotTable,
            offset,
            len: table_len,
            index: None,
            weight: 1,
        });
        if image.rules.external_data {
            run.find(Finding::new(
                Code::SnapshotExternal,
                Place::of(Structure::SnapshotTable).at(offset, table_len),
                format!("{count} snapshots"),
            ));
        }
    }
    trees(image, &known.snapshots, run);
    (known.snapshots, known.fatal)
}

fn unreadable(run: &Run<'_>, at: u64, detail: String) {
    let place = Place::of(Structure::SnapshotTable).at(at, 0);
    run.find(Finding::new(Code::SnapshotTableUnreadable, place, detail));
}

/// Reads the entries, piece by piece, up to the first that can't be. Gives the length of the table as far as it was read.
fn read(image: &Image<'_>, known: &mut Known, run: &Run<'_>) -> u64 {
    let offset = image.header.snapshot_table_offset.get();
    let count = image.header.snapshot_count;
    let mut buffer = vec![0; if count == 0 { 0 } else { READ_BYTES }];
    let mut base = offset;
    let mut filled = 0_usize;
    let mut at = offset;
    let mut table_len = 0;
    for number in 0..u64::from(count) {
        at = at.next_multiple_of(8);
        let ahead = usize::try_from(at - base).unwrap_or(usize::MAX);
        if filled.saturating_sub(ahead) < ENTRY_BYTES_MAX {
            base = at;
            match image.reader.read_ahead(&mut buffer, 40, base) {
                Ok(read) => filled = read,
                Err(error) => {
                    unreadable(run, at, format!("can't be read: {error}"));
                    known.fatal = true;
                    break;
                }
            }
        }
        let from = usize::try_from(at - base).unwrap_or(usize::MAX);
        let (snapshot, len) = match Snapshot::decode(buffer.get(from..filled).unwrap_or_default()) {
            Ok(decoded) => decoded,
            Err(error) => {
                let stop = base.saturating_add(filled as u64);
                if filled < buffer.len()
                    && let Err(error) = image.reader.read(&mut [0; 512], stop)
                {
                    // The entry goes on where nothing can be read.
                    unreadable(run, stop, format!("can't be read: {error}"));
                    known.fatal = true;
                    break;
                }
                let place = Place::of(Structure::SnapshotTable).at(at, 40).entry(number);
                run.find(Finding::new(
                    Code::SnapshotTableUnreadable,
                    place,
                    error.to_string(),
                ));
                known.fatal = true;
                break;
            }
        };
        at += len as u64;
        table_len = at - offset;
        if table_len > MAX_TABLE_BYTES {
            let error = SnapshotError::TableTooLarge {
                found: table_len,
                limit: MAX_TABLE_BYTES,
            };
            unreadable(run, at, error.to_string());
            known.fatal = true;
            break;
        }
        known.take(image, &snapshot, at - len as u64, len as u64, number, run);
    }
    table_len
}

/// The same, but without what goes beyond the limits.
fn take_as_written(image: &Image<'_>, known: &mut Known, run: &Run<'_>) -> u64 {
    let offset = image.header.snapshot_table_offset.get();
    let table = match read_as_written(image) {
        Ok(table) => table,
        Err(error) => {
            unreadable(run, offset, format!("can't be read: {error}"));
            known.fatal = true;
            return 0;
        }
    };
    for (number, (place, snapshot)) in (0..).zip(&table.entries) {
        let len = place.end.saturating_sub(place.start);
        known.take(image, snapshot, place.start, len, number, run);
    }
    let last = table.entries.last();
    last.map_or(0, |(place, _)| place.end.saturating_sub(offset))
}

/// What is known of snapshots while their table is read.
#[derive(Default)]
struct Known {
    snapshots: Vec<SnapshotInfo>,
    /// QEMU would stop here.
    fatal: bool,
    hasher: RandomState,
    ids: HashSet<u64>,
    names: HashSet<u64>,
}

impl Known {
    /// One more entry, `len` bytes at `at`.
    fn take(
        &mut self,
        image: &Image<'_>,
        snapshot: &Snapshot,
        at: u64,
        len: u64,
        number: u64,
        run: &Run<'_>,
    ) {
        let place = Place::of(Structure::SnapshotTable)
            .at(at, len)
            .entry(number);
        self.fatal |= judge(image, snapshot, &place, number, run);
        for (what, text, known) in [
            ("id", &snapshot.id, &mut self.ids),
            ("name", &snapshot.name, &mut self.names),
        ] {
            // Hashes do: a name may have tens of kilobytes, and to call two the same by mistake is a note.
            if text.is_empty() || !known.insert(self.hasher.hash_one(text)) {
                run.find_with(Code::SnapshotDuplicate, || {
                    let detail = format!("{what} {:?}", String::from_utf8_lossy(text));
                    (place.clone(), detail)
                });
                break;
            }
        }
        let l1_offset = snapshot.l1_table_offset.get();
        let usable = l1_offset.is_multiple_of(image.cluster_size())
            && u64::from(snapshot.l1_entries) <= L1_ENTRIES_MAX;
        self.snapshots.push(SnapshotInfo {
            l1_offset,
            l1_entries: snapshot.l1_entries,
            usable,
        });
    }
}

/// Judges one snapshot. Tells whether QEMU would stop here.
fn judge(
    image: &Image<'_>,
    snapshot: &Snapshot,
    place: &Place,
    number: u64,
    run: &Run<'_>,
) -> bool {
    if image.header.version == Version::V3 && snapshot.extra_data.len() < MIN_EXTRA_DATA_LEN_V3 {
        run.find_with(Code::SnapshotIncomplete, || {
            let detail = format!("{} bytes of extra data", snapshot.extra_data.len());
            (place.clone(), detail)
        });
    }
    let geometry = image.geometry;
    let l1_offset = snapshot.l1_table_offset.get();
    let entries = u64::from(snapshot.l1_entries);
    let place = || place.clone().snapshot(Some(number));
    if !l1_offset.is_multiple_of(geometry.cluster_size()) {
        run.find_with(Code::SnapshotL1Invalid, || {
            (
                place(),
                format!("the L1 table would start at {l1_offset:#x}"),
            )
        });
        return false;
    }
    if entries > L1_ENTRIES_MAX {
        run.find_with(Code::SnapshotL1Invalid, || {
            (
                place(),
                format!("the L1 table would have {entries} entries"),
            )
        });
        return false;
    }
    let disk = snapshot.disk_size().unwrap_or(image.header.virtual_size());
    let state = snapshot.vm_state_size();
    // The VM state begins where the next L2 table would, and an empty one needs no table.
    let needed = geometry
        .l1_entries_for(disk)
        .saturating_add(geometry.l1_entries_for(state));
    if needed > entries {
        run.find_with(Code::SnapshotSize, || {
            let detail = format!(
                "disk of {disk} bytes and VM state of {state} bytes need {needed} L1 entries, there are {entries}"
            );
            (place(), detail)
        });
    }
    // QEMU gives up on offsets that its signed arithmetic can't hold.
    entries > 0 && i64::try_from(l1_offset).is_err()
}

/// Makes trees of the snapshots' L1 tables: one for each distinct table.
fn trees(image: &mut Image<'_>, snapshots: &[SnapshotInfo], run: &Run<'_>) {
    let mut tables: Vec<(u64, u32, u64)> = (0_u64..)
        .zip(snapshots)
        .filter(|(_, s)| s.usable && s.l1_entries > 0)
        .map(|(number, s)| (s.l1_offset, s.l1_entries, number))
        .collect();
    tables.sort_unstable();
    let active = (
        image.header.l1_table_offset.get(),
        u64::from(image.header.l1_entries),
    );
    let mut reached = 0;
    let mut distinct = if active.1 > 0 { active.1 } else { 0 };
    let mut walked = distinct;
    let mut clusters = 0_u64;
    let mut cut = 0;
    let mut trees: Vec<Tree> = Vec::new();
    for same in tables.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
        let Some(&(offset, entries, number)) = same.first() else {
            continue;
        };
        let weight = same.len() as u64;
        let len = u64::from(entries) * 8;
        clusters = clusters.saturating_add(image.geometry.clusters_for(len));
        let in_file = entries_in_file(image, offset, entries);
        let end = offset.saturating_add(in_file * 8);
        let new = end.saturating_sub(reached.max(offset)) / 8;
        reached = reached.max(end);
        distinct += new;
        walked += in_file;
        if walked
            > distinct
                .saturating_mul(2)
                .saturating_add(OVERLAP_ENTRIES_MAX)
            || clusters > L1_CLUSTERS_MAX
        {
            walked -= in_file;
            cut += weight;
            continue;
        }
        image.metadata.push(MetaRange {
            structure: Structure::SnapshotL1,
            offset,
            len,
            index: Some(number),
            weight,
        });
        if weight > 1 {
            let place = Place::of(Structure::SnapshotL1)
                .at(offset, len)
                .snapshot(Some(number));
            let detail = format!("{weight} snapshots have this L1 table");
            run.find(Finding::new(Code::MetadataOverlap, place, detail));
        }
        trees.push(Tree {
            offset,
            entries: in_file,
            active: false,
            weight,
            snapshot: Some(number),
        });
    }
    trees.sort_by_key(|tree| tree.snapshot);
    image.trees.append(&mut trees);
    if cut > 0 {
        run.find(Finding::new(
            Code::CheckLimited,
            Place::of(Structure::SnapshotL1),
            format!(
                "the L1 tables of {cut} snapshots overlap others so much that they were not walked"
            ),
        ));
    }
}
