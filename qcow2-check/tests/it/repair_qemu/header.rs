//! Single fields of the header that are wrong: a search of the whole file must not do worse than mending them.

use qcow2_check::repair::{Level, RepairOptions, plan};
use qcow2_check::{Options, Verdict, check};
use qcow2_io::Memory;

use super::guest;
use crate::mutants::bases;
use crate::oracle;

/// Fields with values that no header has: name, offset, bytes.
const FIELDS: &[(&str, usize, &[u8])] = &[
    ("header length below that of version 3", 100, &[0, 0, 0, 72]),
    ("header length beyond the cluster", 100, &[0, 0x10, 0, 0]),
    ("L1 table too large", 36, &[0x40, 0, 0, 0]),
    ("refcount table too large", 56, &[0x7f, 0, 0, 0]),
    (
        "refcount table unaligned",
        48,
        &[0, 0, 0, 0, 0, 0x01, 0x00, 0x08],
    ),
    (
        "refcount table past all ends",
        48,
        &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xe0, 0, 0],
    ),
];

#[test]
fn a_search_keeps_what_a_mended_field_keeps() {
    if !oracle::is_available(FIELDS.len() * 4, "single fields") {
        return;
    }
    for name in ["64k", "snapshots", "bitmaps", "backing"] {
        let base = bases::named(name);
        let sound = guest::read(&base.bytes).unwrap();
        for (field, at, value) in FIELDS {
            let mut damaged = base.bytes.clone();
            damaged[*at..at + value.len()].copy_from_slice(value);
            for level in [Level::All, Level::Salvage] {
                let image = Memory::from(damaged.clone());
                let options = RepairOptions {
                    level,
                    ..RepairOptions::default()
                };
                let made = plan(&image, &options).unwrap();
                made.apply(None).unwrap();
                let what = format!("{name}, {field}, {level}:\n{made}");
                let report = check(&image, &Options::default());
                assert_eq!(report.verdict(), Verdict::Sound, "{what}");
                let now = guest::read(&image.to_vec().unwrap()).unwrap();
                let same = |a: &guest::Disk, b: &guest::Disk| {
                    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.content == b.content)
                };
                assert!(same(&sound.active, &now.active), "{what}");
                for (key, disk) in &sound.snapshots {
                    assert!(same(disk, &now.snapshots[key]), "{what}");
                }
            }
        }
    }
}

/// Fields with values that a header may have, but not this one.
const POSSIBLE: &[(&str, &str, usize, &[u8])] = &[
    ("64k", "magic bytes", 0, &[0]),
    ("64k", "version 2", 4, &[0, 0, 0, 2]),
    ("snapshots", "version 2", 4, &[0, 0, 0, 2]),
    ("data-file", "version 2", 4, &[0, 0, 0, 2]),
    ("extended", "version 2", 4, &[0, 0, 0, 2]),
    ("v2", "version 3", 4, &[0, 0, 0, 3]),
    ("64k", "version 7", 4, &[0, 0, 0, 7]),
    ("v2", "version 0", 4, &[0, 0, 0, 0]),
    ("64k", "clusters of 4 KiB", 20, &[0, 0, 0, 12]),
    ("64k", "clusters of 2 MiB", 20, &[0, 0, 0, 21]),
    ("snapshots", "clusters of 512 bytes", 20, &[0, 0, 0, 9]),
    ("4k", "clusters of 64 KiB", 20, &[0, 0, 0, 16]),
    ("bitmaps", "clusters of 2^99 bytes", 20, &[0, 0, 0, 99]),
];

#[test]
fn a_possible_but_wrong_start_of_the_header_is_put_right() {
    if !oracle::is_available(POSSIBLE.len(), "possible fields") {
        return;
    }
    for (name, field, at, value) in POSSIBLE {
        let base = bases::named(name);
        let sound = guest::read(&base.bytes).unwrap();
        let mut damaged = base.bytes.clone();
        damaged[*at..at + value.len()].copy_from_slice(value);
        for level in [Level::All, Level::Salvage] {
            let image = Memory::from(damaged.clone());
            let options = RepairOptions {
                level,
                ..RepairOptions::default()
            };
            let made = plan(&image, &options).unwrap();
            made.apply(None).unwrap();
            let what = format!("{name}, {field}, {level}:\n{made}");
            let report = check(&image, &Options::default());
            assert_eq!(report.verdict(), Verdict::Sound, "{what}");
            let now = guest::read(&image.to_vec().unwrap()).unwrap();
            let contents = |disk: &guest::Disk| disk.iter().map(|c| c.content).collect::<Vec<_>>();
            assert!(contents(&sound.active) == contents(&now.active), "{what}");
            assert_eq!(sound.snapshots.len(), now.snapshots.len(), "{what}");
        }
    }
}

#[test]
fn the_lengths_of_a_snapshot_follow_from_what_lies_behind() {
    if !oracle::is_available(5, "lengths of snapshots") {
        return;
    }
    let base = bases::named("snapshots");
    let sound = guest::read(&base.bytes).unwrap();
    let table = usize::try_from(u64::from_be_bytes(base.bytes[64..72].try_into().unwrap()));
    let first = table.unwrap();
    let second = first + 72;
    // Lengths of names and extra data by which the next entry is not where it is, or the last one doesn't end in the file.
    let lengths = [
        (first, 15, 9),
        (first, 14, 0x80),
        (first, 39, 32),
        (first, 39, 8),
        (second, 14, 0x80),
    ];
    for (entry, field, value) in lengths {
        let mut damaged = base.bytes.clone();
        damaged[entry + field] = value;
        let image = Memory::from(damaged);
        let made = plan(&image, &RepairOptions::default()).unwrap();
        made.apply(None).unwrap();
        let what = format!("{value} at {field} of {entry:#x}:\n{made}");
        let report = check(&image, &Options::default());
        assert_eq!(report.verdict(), Verdict::Sound, "{what}");
        let now = guest::read(&image.to_vec().unwrap()).unwrap();
        assert!(now.snapshots.keys().eq(sound.snapshots.keys()), "{what}");
    }
}
