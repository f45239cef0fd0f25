//! Snapshot tables beyond the limits, or short of what version 3 asks for: mended by what can be found out, or taken at their word.

use qcow2_check::repair::{Level, RepairOptions, SnapshotCut, SnapshotTables, plan, undo};
use qcow2_check::synth::Builder;
use qcow2_check::{Options, Verdict, check};
use qcow2_format::header::Version;
use qcow2_format::snapshot::{decode_table, encode_table};
use qcow2_format::{Geometry, GuestCluster, Header, HostOffset, Snapshot};
use qcow2_io::Memory;

const DISK: u64 = 64 << 20;

/// An image with the snapshots `one`, `two` and `three`. Only `three` has the second guest cluster.
fn image() -> Vec<u8> {
    let geometry = Geometry::new(16, 4, false).unwrap();
    let mut builder = Builder::new(Version::V3, geometry, DISK);
    builder.data(GuestCluster::new(0), b"first").unwrap();
    builder.snapshot("one", &[]).unwrap();
    builder.snapshot("two", &[]).unwrap();
    builder
        .snapshot("three", b"the state of a machine")
        .unwrap();
    let memory = Memory::new();
    builder.finish(&memory).unwrap();
    memory.to_vec().unwrap()
}

fn header(bytes: &[u8]) -> Header {
    Header::decode_for_check(&bytes[..0x10000]).unwrap().0
}

fn snapshots(bytes: &[u8]) -> Vec<Snapshot> {
    let header = header(bytes);
    let at = usize::try_from(header.snapshot_table_offset.get()).unwrap();
    let table = decode_table(&bytes[at..], header.snapshot_count);
    table.map(Result::unwrap).collect()
}

/// The image with another table, at the end of the file, in which its clusters are counted; all of the file must be in one block.
fn with_table(mut bytes: Vec<u8>, table: &[u8], count: u32) -> Vec<u8> {
    let old = header(&bytes);
    let number =
        |at: usize| usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()));
    let block = number(number(48).unwrap()).unwrap();
    let offset = bytes.len().next_multiple_of(1 << 16);
    bytes.resize(offset, 0);
    bytes.extend(table);
    let end = bytes.len().next_multiple_of(1 << 16);
    bytes.resize(end, 0);
    let old_table = usize::try_from(old.snapshot_table_offset.get() >> 16).unwrap();
    for (cluster, refcount) in [(old_table, 0)]
        .into_iter()
        .chain((offset >> 16..end >> 16).map(|cluster| (cluster, 1)))
    {
        assert!(cluster < 1 << 15);
        bytes[block + cluster * 2 + 1] = refcount;
    }
    bytes[60..64].copy_from_slice(&count.to_be_bytes());
    bytes[64..72].copy_from_slice(&(offset as u64).to_be_bytes());
    bytes
}

/// Repairs, and brings the damage back in a copy. Gives what the plan says would go, and the repaired image.
fn repaired(damaged: &[u8], tables: SnapshotTables) -> (Vec<SnapshotCut>, bool, Vec<u8>) {
    let memory = Memory::from(damaged.to_vec());
    let options = RepairOptions {
        level: Level::All,
        snapshot_tables: tables,
        ..RepairOptions::default()
    };
    let made = plan(&memory, &options).unwrap();
    let file = Memory::new();
    made.apply(Some(&file)).unwrap();
    let report = check(&memory, &Options::default());
    let expected = if made.keeps_orphans() && made.after().counts.leaks > 0 {
        Verdict::Leaks
    } else {
        Verdict::Sound
    };
    assert_eq!(report.verdict(), expected, "{made}\n{:?}", report.findings);
    let done = memory.to_vec().unwrap();
    undo(&memory, &file, false).unwrap();
    assert!(memory.to_vec().unwrap() == damaged, "{made}");
    (made.snapshot_cuts().to_vec(), made.keeps_orphans(), done)
}

#[test]
fn entries_get_all_extra_data_that_is_known() {
    let bytes = image();
    let mut entries = snapshots(&bytes);
    entries[0].extra_data.clear();
    entries[1].extra_data.truncate(8);
    entries[1].extra_data.fill(0);
    let known = entries[2].clone();
    let damaged = with_table(bytes, &encode_table(&entries).unwrap(), 3);
    for tables in [SnapshotTables::Searched, SnapshotTables::AsWritten] {
        let (cuts, _, done) = repaired(&damaged, tables);
        assert!(cuts.is_empty());
        let mended = snapshots(&done);
        for (entry, old) in mended.iter().zip(&entries).take(2) {
            assert_eq!(entry.extra_data.len(), 24);
            assert_eq!(entry.vm_state_size(), 0);
            assert_eq!(entry.disk_size(), Some(DISK));
            assert_eq!(entry.icount(), None);
            assert_eq!(entry.name, old.name);
        }
        assert_eq!(mended[2], known);
    }
}

#[test]
fn a_wrong_length_is_corrected_or_taken_at_its_word() {
    let bytes = image();
    let entries = snapshots(&bytes);
    let mut table = encode_table(&entries).unwrap();
    let last = table.len() - entries[2].encode().unwrap().len();
    table[last + 36..last + 40].copy_from_slice(&0x10000_u32.to_be_bytes());
    let damaged = with_table(bytes, &table, 3);

    let (cuts, _, done) = repaired(&damaged, SnapshotTables::Searched);
    assert!(cuts.is_empty());
    assert_eq!(snapshots(&done), entries);

    let (cuts, _, done) = repaired(&damaged, SnapshotTables::AsWritten);
    let cut = SnapshotCut::ExtraData {
        entry: 2,
        found: 0x10000,
        limit: 1024,
    };
    assert_eq!(cuts, [cut]);
    let kept = snapshots(&done);
    assert_eq!(kept[..2], entries[..2]);
    assert_eq!(kept[2].l1_table_offset, entries[2].l1_table_offset);
    assert_eq!(kept[2].extra_data.len(), 1024);
    assert_eq!(kept[2].extra_data[..24], entries[2].extra_data);
}

/// A snapshot of an empty disk.
fn empty(number: usize, name: usize) -> Snapshot {
    Snapshot {
        id: number.to_string().into_bytes(),
        name: vec![b'n'; name],
        extra_data: vec![0; 24],
        ..Snapshot::default()
    }
}

/// The bytes of a table that may go beyond the limits.
fn table_of(entries: &[Snapshot]) -> Vec<u8> {
    let mut table = Vec::new();
    for entry in entries {
        table.resize(table.len().next_multiple_of(8), 0);
        table.extend(entry.encode().unwrap());
    }
    table
}

/// What only the last of too many entries led to is free, or kept, as is asked for.
fn judge_overhang(damaged: &[u8], left: usize, cut: SnapshotCut) {
    let (cuts, keeps, done) = repaired(damaged, SnapshotTables::AsWritten);
    assert_eq!(cuts, [cut]);
    assert!(!keeps);
    assert_eq!(header(&done).snapshot_count as usize, left);
    let report = check(&Memory::from(done), &Options::default());
    assert_eq!(report.counts.leaks, 0);

    let (cuts, keeps, done) = repaired(damaged, SnapshotTables::Searched);
    assert!(cuts.is_empty());
    assert!(keeps);
    let report = check(&Memory::from(done), &Options::default());
    assert!(report.counts.leaks > 0, "there was room for a snapshot");
}

#[test]
fn the_last_of_too_many_snapshots_goes() {
    let bytes = image();
    let mut entries: Vec<Snapshot> = (0..65536).map(|number| empty(number + 10, 4)).collect();
    entries.push(snapshots(&bytes)[2].clone());
    let damaged = with_table(bytes, &table_of(&entries), 65537);
    judge_overhang(&damaged, 65536, SnapshotCut::TooMany { count: 1 });
}

#[test]
fn what_is_behind_the_largest_table_goes() {
    let bytes = image();
    // They fill the largest table to the last byte.
    let mut entries: Vec<Snapshot> = (0..1024)
        .map(|number| empty(number + 1000, 65_461))
        .collect();
    entries.push(snapshots(&bytes)[2].clone());
    let table = table_of(&entries);
    let last = table.len() - entries[1024].encode().unwrap().len();
    assert!(
        last <= 64 << 20 && table.len() > 64 << 20,
        "{last} {}",
        table.len()
    );
    let damaged = with_table(bytes, &table, 1025);
    judge_overhang(&damaged, 1024, SnapshotCut::TooLarge { count: 1 });
}

#[test]
fn a_snapshot_without_a_table_does_not_get_the_header_for_one() {
    let bytes = image();
    let mut entries = snapshots(&bytes);
    entries[0].l1_table_offset = HostOffset::new(0);
    entries[0].l1_entries = 0;
    let damaged = with_table(bytes, &encode_table(&entries).unwrap(), 3);
    let (_, _, done) = repaired(&damaged, SnapshotTables::Searched);
    let first = &snapshots(&done)[0];
    assert_eq!((first.l1_entries, first.disk_size()), (0, Some(0)));
}
