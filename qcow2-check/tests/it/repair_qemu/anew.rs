//! Refcount structures made anew where QEMU makes them.

use qcow2_check::repair::{Level, Orphans, Plan, RefcountRepair, RepairOptions, plan, undo};
use qcow2_check::{Options, Verdict, check};
use qcow2_io::{Memory, Storage, Trace, replay};

use super::classes;
use super::crashes::{Random, states};
use crate::mutants::bases::{self, IMAGE};
use crate::oracle::{self, Access, Workshop, words};

/// Images with refcounts of 16 bits or more, free places in the file, and several blocks.
const MADE: &[(&str, &str, &str)] = &[
    ("cluster_size=512", "1M", "write 0 300k"),
    (
        "cluster_size=512",
        "1M",
        "write 0 300k; discard 10k 1k; discard 200k 1k; discard 250k 4k",
    ),
    ("cluster_size=512,refcount_bits=64", "1M", "write 0 64k"),
    // The file ends where a block ends, before it, and behind it.
    ("cluster_size=512", "1M", "write 0 123904"),
    ("cluster_size=512", "1M", "write 0 124416"),
    ("cluster_size=512", "1M", "write 0 124928"),
];

fn options() -> RepairOptions<'static> {
    RepairOptions {
        level: Level::All,
        threads: 1,
        refcounts: RefcountRepair::Anew,
        ..RepairOptions::default()
    }
}

fn number(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Where the refcount table lies, and all that it says.
fn structures(bytes: &[u8]) -> (u64, Vec<u64>) {
    let table = number(bytes, 48);
    let clusters = number(bytes, 56) >> 32;
    let len = clusters << (number(bytes, 16) & 0xffff_ffff);
    let entries = (table..table + len).step_by(8);
    (table, entries.map(|at| number(bytes, at)).collect())
}

/// Takes the refcount of the cluster at `offset` from an image with refcounts of whole bytes.
fn forget(bytes: &mut [u8], offset: u64) {
    let bits = number(bytes, 16) & 0xffff_ffff;
    let width = match number(bytes, 0) & 0xffff_ffff {
        2 => 2,
        _ => (1 << (number(bytes, 96) >> 32)) / 8,
    };
    let block = number(bytes, number(bytes, 48));
    let at = usize::try_from(block + (offset >> bits) * width).unwrap();
    bytes[at..at + usize::try_from(width).unwrap()].fill(0);
}

/// Damaged images: each lacks the refcount of its header, or of its first L2 table.
fn damaged() -> Vec<(String, Vec<u8>)> {
    let mut images: Vec<(String, Vec<u8>)> =
        ["64k", "4k", "v2", "snapshots", "bitmaps", "refcount-64"]
            .map(|name| (name.to_owned(), bases::named(name).bytes))
            .into();
    for (options, size, steps) in MADE {
        let shop = Workshop::new();
        shop.create(IMAGE, size, options, &[]).unwrap();
        let mut args = words("-f qcow2 -d unmap");
        for step in steps.split("; ") {
            args.extend(["-c".to_owned(), step.to_owned()]);
        }
        args.push(IMAGE.to_owned());
        shop.run("qemu-io", &args).unwrap();
        images.push((format!("{options}: {steps}"), shop.read(IMAGE)));
    }
    let mut damaged = Vec::new();
    for (name, bytes) in images {
        let l2 = number(&bytes, number(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
        for place in [0, l2] {
            let mut bytes = bytes.clone();
            forget(&mut bytes, place);
            damaged.push((format!("{name}, {place:#x}"), bytes));
        }
    }
    damaged
}

#[test]
fn structures_lie_where_qemu_makes_them() {
    if !oracle::is_available(18, "refcounts made anew") {
        return;
    }
    for (name, bytes) in damaged() {
        let shop = Workshop::new();
        shop.write(IMAGE, &bytes);
        assert_eq!(shop.repair(IMAGE, Access::Plain).exit, Some(0), "{name}");
        let theirs = shop.read(IMAGE);

        let image = Memory::from(bytes.clone());
        let made = plan(&image, &options()).unwrap();
        assert_eq!(made.after().verdict(), Verdict::Sound, "{name}\n{made}");
        made.apply(None).unwrap();
        let ours = image.to_vec().unwrap();
        assert_eq!(structures(&ours), structures(&theirs), "{name}\n{made}");
        assert_ne!(structures(&ours).0, structures(&bytes).0, "{name}");
        assert_eq!(ours.len(), theirs.len(), "{name}\n{made}");
        shop.write(IMAGE, &ours);
        assert_eq!(shop.check(IMAGE, Access::Plain).exit, Some(0), "{name}");
    }
}

#[test]
fn refcounts_that_are_only_wrong_are_put_right_in_place() {
    if !oracle::is_available(1, "refcounts in place") {
        return;
    }
    let bytes = bases::named("snapshots").bytes;
    let block = number(&bytes, number(&bytes, 48));
    let shared = (0..number(&bytes, 40) >> 12).find(|cluster| {
        let at = usize::try_from(block + cluster * 2).unwrap();
        bytes[at + 1] > 1
    });
    let mut damaged = bytes.clone();
    // Too low where there is one, and too high for the header.
    if let Some(cluster) = shared {
        damaged[usize::try_from(block + cluster * 2).unwrap() + 1] = 1;
    }
    damaged[usize::try_from(block).unwrap() + 1] = 7;
    let image = Memory::from(damaged);
    let made = plan(&image, &options()).unwrap();
    made.apply(None).unwrap();
    assert_eq!(
        structures(&image.to_vec().unwrap()),
        structures(&bytes),
        "{made}"
    );
    let report = check(&image, &Options::default());
    assert_eq!(report.verdict(), Verdict::Sound);
}

#[test]
fn freed_references_take_their_flags_along() {
    if !oracle::is_available(1, "flags of leaks") {
        return;
    }
    // As a snapshot leaves them whose deletion was cut short: two references counted where there is one, and no flag.
    let mut bytes = bases::named("64k").bytes;
    let block = number(&bytes, number(&bytes, 48));
    let l1 = usize::try_from(number(&bytes, 40)).unwrap();
    let l2 = number(&bytes, number(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    bytes[l1] &= 0x7f;
    bytes[usize::try_from(block + (l2 >> 16) * 2).unwrap() + 1] = 2;
    let image = Memory::from(bytes);
    let leaks = RepairOptions {
        level: Level::Leaks,
        ..RepairOptions::default()
    };
    plan(&image, &leaks).unwrap().apply(None).unwrap();
    let report = check(&image, &Options::default());
    assert_eq!(report.verdict(), Verdict::Sound, "{:?}", report.findings);
    let shop = Workshop::new();
    shop.write(IMAGE, &image.to_vec().unwrap());
    assert_eq!(shop.check(IMAGE, Access::Plain).exit, Some(0));
}

#[test]
fn a_crash_leaves_a_way_back_and_a_way_on() {
    if !oracle::is_available(18, "crashes of refcounts made anew") {
        return;
    }
    let mut random = Random(3);
    for (name, bytes) in damaged() {
        let image = Trace::new(Memory::from(bytes.clone()));
        let saved = Memory::new();
        let made = plan(&image, &options()).unwrap();
        made.apply(Some(&saved)).unwrap();
        let whole = saved.to_vec().unwrap();
        let sealed = &whole[..whole.len() - 56];
        for state in states(&image.events(), &mut random) {
            let crashed = Memory::from(bytes.clone());
            replay(&state, &crashed).unwrap();
            let left = crashed.to_vec().unwrap();
            undo(&crashed, &Memory::from(sealed.to_vec()), false).unwrap();
            assert!(
                crashed.to_vec().unwrap() == bytes,
                "{name}: not the way back"
            );

            // What is written to free places has harmed nobody: references are what they were.
            let crashed = Memory::from(left);
            let again = plan(&crashed, &options()).unwrap();
            again.apply(None).unwrap();
            let report = check(&crashed, &Options::default());
            assert_eq!(report.verdict(), Verdict::Sound, "{name}\n{again}");
        }
    }
}

#[test]
fn where_references_may_be_hidden_nothing_is_written_to_what_looks_free() {
    if !oracle::is_available(classes::ALL.len(), "hidden references") {
        return;
    }
    for class in classes::ALL {
        let bytes = class.damaged();
        let options = RepairOptions {
            level: class.level,
            orphans: Orphans::Leave,
            ..options()
        };
        let image = Memory::from(bytes);
        let made: Plan<'_> = plan(&image, &options).unwrap();
        if made.keeps_orphans() {
            let in_place = RepairOptions {
                refcounts: RefcountRepair::InPlace,
                ..options
            };
            let other = plan(&image, &in_place).unwrap();
            assert_eq!(made.writes(), other.writes(), "{}\n{made}", class.name);
        }
        made.apply(None).unwrap();
        let report = check(&image as &dyn Storage, &Options::default());
        assert!(report.verdict() <= Verdict::Leaks, "{}", class.name);
    }
}
