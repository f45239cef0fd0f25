//! Sectors that can't be read: they are told, with their place, nothing is planned from them as if they were zeros, and the rest goes on.

use std::ops::Range;

use qcow2_check::repair::{ActionKind, Level, RepairOptions, plan, undo};
use qcow2_check::{ByteRange, Code, Options, Severity, Verdict, check};
use qcow2_io::{Fault, Faulty, Memory, Operation};

use super::classes::Bytes;
use super::guest::{self, Guest};
use crate::mutants::bases;
use crate::oracle;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

fn failing(bytes: &Bytes, range: Range<u64>) -> Faulty<Memory> {
    let image = Faulty::new(Memory::from(bytes.0.clone()));
    image.add(Fault::on(Operation::Read).within(range).forever());
    image
}

fn at(level: Level) -> RepairOptions<'static> {
    RepairOptions {
        level,
        threads: 1,
        ..RepairOptions::default()
    }
}

fn content(guest: &Guest) -> Vec<Vec<Option<u64>>> {
    let disks = std::iter::once(&guest.active).chain(guest.snapshots.values());
    disks
        .map(|disk| disk.iter().map(|cluster| cluster.content).collect())
        .collect()
}

#[test]
fn an_unreadable_sector_of_an_l2_table_is_told_and_the_rest_is_mended() {
    if !oracle::is_available(1, "unreadable L2 tables") {
        return;
    }
    let mut bytes = Bytes(bases::named("4k").bytes);
    let sound = content(&guest::read(&bytes.0).unwrap());
    let l2 = bytes.l2();
    // Bits that mean nothing, in another table; and a leak, which may be what the unreadable entries have.
    let second = bytes.get(bytes.l1() + 16) & OFFSET_MASK;
    bytes.put(second + 256 * 8, bytes.get(second + 256 * 8) | 1 << 57);
    let image = failing(&bytes, l2 + 512..l2 + 1024);
    let report = check(&image, &Options::default());
    assert_eq!(report.verdict(), Verdict::Incomplete);
    assert!(!report.complete);
    let told = report.findings.iter();
    let told: Vec<_> = told.filter(|f| f.code == Code::L2Unreadable).collect();
    assert_eq!(told.len(), 1, "{:?}", report.findings);
    assert_eq!(told[0].place.host, Some(ByteRange::new(l2 + 512, 512)));
    // 64 entries of 4 KiB each.
    assert_eq!(
        told[0].place.guest,
        Some(ByteRange::new(64 << 12, 64 << 12))
    );

    for level in [Level::All, Level::Salvage] {
        let made = plan(&image, &at(level)).unwrap();
        let kinds: Vec<_> = made.actions().iter().map(|action| action.kind).collect();
        assert!(kinds.contains(&ActionKind::MendL2Entry), "{made}");
        assert!(!kinds.contains(&ActionKind::LowerRefcounts), "{made}");
        let left = &made.after().findings;
        assert!(
            left.iter().any(|f| f.place.guest == told[0].place.guest),
            "{left:?}"
        );
        assert_eq!(made.after().total(Code::L2Reserved), 0);
    }
    let file = Memory::new();
    plan(&image, &at(Level::All))
        .unwrap()
        .apply(Some(&file))
        .unwrap();
    image.clear();
    let report = check(&image, &Options::default());
    assert_eq!(
        report.total_of(Severity::Corruption),
        0,
        "{:?}",
        report.findings
    );
    let now = image.get_ref().to_vec().unwrap();
    assert!(content(&guest::read(&now).unwrap()) == sound);
    undo(&image, &file, false).unwrap();
    assert!(image.get_ref().to_vec().unwrap() == bytes.0);
}

#[test]
fn refcounts_that_cannot_be_read_are_made_anew() {
    if !oracle::is_available(2, "unreadable refcounts") {
        return;
    }
    let bytes = Bytes(bases::named("64k").bytes);
    let table = bytes.refcounts();
    let block = bytes.get(table);
    for start in [table, block] {
        let image = failing(&bytes, start..start + 512);
        let made = plan(&image, &at(Level::All)).unwrap();
        made.apply(None).unwrap();
        let report = check(&image, &Options::default());
        assert_eq!(
            report.verdict(),
            Verdict::Sound,
            "{made}\n{:?}",
            report.findings
        );
    }
}

#[test]
fn snapshots_that_cannot_be_read_are_not_dropped() {
    if !oracle::is_available(1, "unreadable snapshot tables") {
        return;
    }
    let mut bytes = Bytes(bases::named("snapshots").bytes);
    let sound = content(&guest::read(&bytes.0).unwrap());
    bytes.put(bytes.l2() + 8, bytes.get(bytes.l2() + 8) | 1 << 57);
    let table = bytes.get(64);
    for level in [Level::All, Level::Salvage] {
        let image = failing(&bytes, table..table + 512);
        let made = plan(&image, &at(level)).unwrap();
        let left = made.after().total(Code::SnapshotTableUnreadable);
        assert_eq!(left, 1, "{made}");
        let is_drop = |kind| kind == ActionKind::DropSnapshot || kind == ActionKind::LowerRefcounts;
        assert!(
            !made.actions().iter().any(|action| is_drop(action.kind)),
            "{made}"
        );
        made.apply(None).unwrap();
        image.clear();
        let now = image.get_ref().to_vec().unwrap();
        assert!(content(&guest::read(&now).unwrap()) == sound);
        assert_eq!(
            check(&image, &Options::default()).verdict(),
            Verdict::Sound,
            "{made}"
        );
    }
}

#[test]
fn shared_data_that_cannot_be_read_stays_shared() {
    if !oracle::is_available(1, "unreadable shared clusters") {
        return;
    }
    let mut bytes = Bytes(bases::named("64k").bytes);
    let entry = bytes.get(bytes.l2());
    bytes.put(bytes.l2() + 16, entry);
    let data = entry & OFFSET_MASK;
    let image = failing(&bytes, data + 4096..data + 4608);
    let made = plan(&image, &at(Level::All)).unwrap();
    let shared = made.after().findings.iter();
    let shared: Vec<_> = shared.filter(|f| f.code == Code::DataShared).collect();
    assert_eq!(shared.len(), 1, "{made}");
    assert_eq!(shared[0].place.host.unwrap().start, data);
    made.apply(None).unwrap();
    drop(made);
    // Once it can be read, they are parted.
    image.clear();
    let made = plan(&image, &at(Level::All)).unwrap();
    assert_eq!(made.after().verdict(), Verdict::Sound, "{made}");
}

/// Every sector of small images in turn: whatever a repair does while it can't be read, once it can, the guest has all that it had.
#[test]
fn no_sector_that_cannot_be_read_counts_as_zeros() {
    if !oracle::is_available(500, "unreadable sectors") {
        return;
    }
    let mut planned = 0;
    let mut refused = 0;
    for name in [
        "512",
        "snapshots",
        "extended",
        "bitmaps-512",
        "refcount-64",
        "luks",
    ] {
        let mut bytes = Bytes(bases::named(name).bytes);
        let sound = content(&guest::read(&bytes.0).unwrap());
        bytes.put(bytes.l2(), bytes.get(bytes.l2()) | 1 << 57);
        let len = bytes.0.len() as u64;
        // Much of what is large is data, of which a few sectors do.
        let near = (0..len.min(128 << 10)).step_by(512);
        let far = (128 << 10..len).step_by(31 << 9);
        for start in near.chain(far) {
            for level in [Level::All, Level::Salvage] {
                let image = failing(&bytes, start..start + 512);
                let what = format!("{name}, {start:#x}, {level}");
                let made = match plan(&image, &at(level)) {
                    Ok(made) => made,
                    // Without its header an image is nothing.
                    Err(error) => {
                        assert!(start < 1 << bytes.0[23], "{what}: {error}");
                        refused += 1;
                        continue;
                    }
                };
                planned += 1;
                let text = made.to_string();
                let done: Result<_, _> = made.apply(None);
                drop(made);
                image.clear();
                if let Err(error) = done {
                    panic!("{what}: {error}\n{text}");
                }
                let now = image.get_ref().to_vec().unwrap();
                assert!(
                    content(&guest::read(&now).unwrap()) == sound,
                    "{what}\n{text}"
                );
                let report = check(&image, &Options::default());
                let verdict = report.verdict();
                let table = bytes.l2()..bytes.l2() + (1 << bytes.0[23]);
                let spoiled = bytes.l1() == start || table.contains(&start);
                assert!(
                    verdict <= Verdict::Leaks || spoiled && report.total(Code::L2Reserved) == 1,
                    "{what}: {:?}\n{text}",
                    report.findings
                );
            }
        }
    }
    eprintln!("{planned} plans; none for {refused} sectors of headers");
    assert!(planned > 500);
}
