//! What a recount tells is what has to be put right: done as told, both checkers find nothing more.

use std::ops::ControlFlow;

use qcow2_check::{
    Code, CopiedDifference, Options, RefcountDifference, Report, Structure, Verdict, check, recount,
};
use qcow2_format::{HostCluster, RefcountBlock, RefcountTableEntry, set_refcount};
use qcow2_io::{Fault, Faulty, Memory, Operation, Storage};

use crate::oracle::{self, Access, Workshop, words};

const IMAGE: &str = "image.qcow2";
const COPIED: u64 = 1 << 63;

/// Work before a crash and up to it; `c` are clusters.
struct Work {
    name: &'static str,
    before: &'static [&'static str],
    crash: &'static [&'static str],
    snapshot: bool,
}

const WORKS: &[Work] = &[
    Work {
        name: "data",
        before: &["write -P 1 0 9c", "write -P 1 70c 3c"],
        crash: &["write -P 2 6c 60c", "discard 0 3c", "write -z -u 70c 2c"],
        snapshot: false,
    },
    Work {
        name: "first-writes",
        before: &[],
        crash: &["write -P 2 0 100c", "flush", "write -P 3 120c 70c"],
        snapshot: false,
    },
    Work {
        name: "snapshot",
        before: &["write -P 1 0 9c"],
        crash: &["write -P 2 3c 20c", "discard 0 1c"],
        snapshot: true,
    },
    Work {
        name: "compressed",
        before: &[
            "write -c -P 1 0 1c",
            "write -c -P 2 1c 1c",
            "write -c -P 3 2c 1c",
        ],
        // Refcounts of new compressed data are not postponed by themselves.
        crash: &[
            "write -c -P 5 9c 1c",
            "write -c -P 6 2c 1c",
            "flush",
            "write -P 4 1c 1c",
            "write -P 7 20c 5c",
            "discard 9c 1c",
        ],
        snapshot: false,
    },
    Work {
        name: "compressed-snapshot",
        before: &[
            "write -c -P 1 0 1c",
            "write -c -P 2 1c 1c",
            "write -P 3 2c 2c",
        ],
        crash: &["write -P 4 1c 1c", "write -P 5 3c 9c"],
        snapshot: true,
    },
];

/// An image whose writer crashed.
struct Case {
    work: &'static Work,
    cluster: u64,
    refcount_bits: u32,
}

impl Case {
    fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        for work in WORKS {
            for cluster in [512, 65536] {
                for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
                    let needed = match (work.snapshot, work.name.starts_with("compressed")) {
                        (false, false) => 1,
                        // Pieces of compressed data share clusters, and a snapshot doubles them.
                        (true, true) => 4,
                        _ => 2,
                    };
                    if refcount_bits >= needed {
                        cases.push(Self {
                            work,
                            cluster,
                            refcount_bits,
                        });
                    }
                }
            }
        }
        cases
    }

    fn new(work: &str, cluster: u64, refcount_bits: u32) -> Self {
        let mut all = Self::all().into_iter();
        all.find(|case| {
            (case.work.name, case.cluster, case.refcount_bits) == (work, cluster, refcount_bits)
        })
        .unwrap()
    }

    fn name(&self) -> String {
        format!("{}/{}/{}", self.work.name, self.cluster, self.refcount_bits)
    }

    /// Makes the image. QEMU is aborted with refcounts postponed.
    fn make(&self, shop: &Workshop) -> Vec<u8> {
        let options = format!(
            "cluster_size={},refcount_bits={},lazy_refcounts=on",
            self.cluster, self.refcount_bits
        );
        let size = (256 * self.cluster).to_string();
        shop.create(IMAGE, &size, &options, &[]).unwrap();
        if !self.work.before.is_empty() {
            shop.run("qemu-io", &self.commands(self.work.before, &[]))
                .unwrap();
        }
        if self.work.snapshot {
            let snapshot = words(&format!("snapshot -c a {IMAGE}"));
            shop.run("qemu-img", &snapshot).unwrap();
        }
        let crash = self.commands(self.work.crash, &["flush", "abort"]);
        shop.run("qemu-io", &crash).unwrap_err();
        let bytes = shop.read(IMAGE);
        assert_eq!(bytes[79] & 1, 1, "{}: not dirty", self.name());
        bytes
    }

    fn commands(&self, commands: &[&str], more: &[&str]) -> Vec<String> {
        let clusters = |word: &str| {
            let count = word.strip_suffix('c').and_then(|n| n.parse::<u64>().ok());
            count.map_or_else(|| word.to_owned(), |n| (n * self.cluster).to_string())
        };
        let mut args = words("-f qcow2");
        for command in commands.iter().chain(more) {
            let command: Vec<_> = command.split_whitespace().map(clusters).collect();
            args.extend(["-c".to_owned(), command.join(" ")]);
        }
        args.push(IMAGE.to_owned());
        args
    }
}

/// All that a recount tells.
struct Told {
    refcounts: Vec<RefcountDifference>,
    flags: Vec<CopiedDifference>,
}

fn options() -> Options<'static> {
    Options {
        threads: 2,
        ..Options::default()
    }
}

/// Recounts an image with which nothing is wrong but refcounts and flags.
fn told(image: &Memory) -> Told {
    let recount = recount(image, &options()).unwrap();
    assert!(recount.is_complete(), "{:?}", recount.problems());
    assert_eq!(recount.totals(), []);
    let mut told = Told {
        refcounts: Vec::new(),
        flags: Vec::new(),
    };
    let keep = |difference: RefcountDifference| {
        assert_ne!(difference.found, difference.expected);
        assert_eq!(difference.expected, recount.expected(difference.cluster));
        told.refcounts.push(difference);
        ControlFlow::<()>::Continue(())
    };
    assert!(recount.refcount_differences(keep).unwrap().is_continue());
    let keep = |difference| {
        told.flags.push(difference);
        ControlFlow::<()>::Continue(())
    };
    assert!(recount.copied_differences(keep).unwrap().is_continue());
    assert!(
        told.refcounts
            .is_sorted_by(|a, b| a.cluster.get() < b.cluster.get())
    );
    told
}

fn u64_at(image: &Memory, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    image.read_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

fn put_u64(image: &Memory, offset: u64, value: u64) {
    image.write_at(&value.to_be_bytes(), offset).unwrap();
}

/// Writes what a recount told into the refcount blocks and tables. Gives the number of refcounts for which there is no block.
fn apply(image: &Memory, told: &Told) -> usize {
    let header = recount(image, &options()).unwrap().header().clone();
    let geometry = header.geometry;
    let per_block = geometry.refcounts_per_block();
    let mut without = 0;
    for difference in &told.refcounts {
        let cluster = difference.cluster.get();
        let entry = header.refcount_table_offset.get() + cluster / per_block * 8;
        let block = RefcountTableEntry::from_bits(u64_at(image, entry))
            .block()
            .get();
        if block == 0 {
            assert_eq!(difference.found, 0);
            without += 1;
            continue;
        }
        let mut bytes = vec![0; geometry.cluster_len()];
        image.read_at(&mut bytes, block).unwrap();
        let index = usize::try_from(cluster % per_block).unwrap();
        let found = RefcountBlock::new(&bytes, geometry).get(index);
        assert_eq!(found, Some(difference.found));
        set_refcount(&mut bytes, geometry, index, difference.expected).unwrap();
        image.write_at(&bytes, block).unwrap();
    }
    for difference in &told.flags {
        let entry = u64_at(image, difference.entry.get());
        assert_eq!(entry & COPIED == 0, difference.should_be_set);
        put_u64(image, difference.entry.get(), entry ^ COPIED);
    }
    without
}

fn contents(image: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.len().unwrap()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_crashed_image_is_sound_when_all_is_put_right_as_told() {
    let cases = Case::all();
    if !oracle::is_available(cases.len(), "crashed images") {
        return;
    }
    let differences = oracle::on_all_cores(&cases, |case| {
        let shop = Workshop::new();
        let image = Memory::from(case.make(&shop));
        let before = check(&image, &options());
        let told = told(&image);
        assert_eq!(
            told.refcounts.len() as u64,
            wrong_refcounts(&before),
            "{}",
            case.name()
        );
        assert_eq!(apply(&image, &told), 0, "{}", case.name());
        // The dirty bit.
        image.write_at(&[0], 79).unwrap();
        let after = check(&image, &options());
        assert_eq!(
            after.verdict(),
            Verdict::Sound,
            "{}: {:?}",
            case.name(),
            after.findings
        );
        shop.write(IMAGE, &contents(&image));
        let theirs = shop.check(IMAGE, Access::Plain);
        assert_eq!(theirs.exit, Some(0), "{}: {}", case.name(), theirs.message);
        let raised = told
            .refcounts
            .iter()
            .filter(|d| d.found < d.expected)
            .count();
        (raised, told.refcounts.len() - raised)
    });
    for (case, (raised, lowered)) in cases.iter().zip(differences) {
        assert!(raised > 0, "{}: nothing was postponed", case.name());
        assert!(
            lowered > 0 || case.work.before.is_empty(),
            "{}",
            case.name()
        );
    }
}

/// Refcounts that are not as they should be.
fn wrong_refcounts(report: &Report) -> u64 {
    let codes = [
        Code::RefcountMissing,
        Code::RefcountLow,
        Code::Leak,
        Code::RefcountPastEnd,
    ];
    codes.into_iter().map(|code| report.total(code)).sum()
}

#[test]
fn refcounts_without_a_block_are_told_as_zero() {
    if !oracle::is_available(1, "crashed images") {
        return;
    }
    let case = Case::new("first-writes", 512, 64);
    let image = Memory::from(case.make(&Workshop::new()));
    apply(&image, &told(&image));
    assert!(told(&image).refcounts.is_empty());
    let header = recount(&image, &options()).unwrap().header().clone();
    let per_block = header.geometry.refcounts_per_block();
    let entry = header.refcount_table_offset.get() + 8;
    let block = u64_at(&image, entry) / 512;
    assert!(block > 0, "the second block is not there");
    let used: Vec<u64> = {
        let recount = recount(&image, &options()).unwrap();
        (per_block..2 * per_block)
            .filter(|cluster| *cluster != block)
            .filter(|cluster| recount.expected(HostCluster::new(*cluster)) > 0)
            .collect()
    };
    assert!(used.len() > 10, "{used:?}");

    put_u64(&image, entry, 0);
    let (missing, leaked): (Vec<_>, Vec<_>) = told(&image)
        .refcounts
        .into_iter()
        .partition(|difference| difference.found == 0);
    let missing: Vec<u64> = missing
        .iter()
        .map(|difference| difference.cluster.get())
        .collect();
    assert_eq!(missing, used);
    // The block lies among the clusters it was for, or has lost its owner elsewhere.
    let inside = (per_block..2 * per_block).contains(&block);
    assert_eq!(leaked.len(), usize::from(!inside), "{leaked:?}");
}

#[test]
fn refcounts_behind_the_end_of_the_file_are_told() {
    if !oracle::is_available(1, "crashed images") {
        return;
    }
    let image = Memory::from(Case::new("data", 65536, 16).make(&Workshop::new()));
    apply(&image, &told(&image));
    let end = recount(&image, &options()).unwrap().end();
    assert_eq!(end.get(), image.len().unwrap().div_ceil(65536));
    let behind = [(end, 3), (end.checked_add(70).unwrap(), 1)];
    let behind = behind.map(|(cluster, found)| RefcountDifference {
        cluster,
        found,
        expected: 0,
    });
    // What is to be put right, the other way round.
    let wrong = behind.map(|difference| RefcountDifference {
        found: 0,
        expected: difference.found,
        ..difference
    });
    let wrong = Told {
        refcounts: wrong.to_vec(),
        flags: Vec::new(),
    };
    assert_eq!(apply(&image, &wrong), 0);
    assert_eq!(told(&image).refcounts, behind);
}

/// Active entries that lead to a cluster: what they are, and where they lie. Compressed ones have no flag.
fn flags(image: &Memory) -> Vec<(Structure, u64)> {
    let header = recount(image, &options()).unwrap().header().clone();
    let mut found = Vec::new();
    let offset = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    for index in 0..u64::from(header.l1_entries) {
        let at = header.l1_table_offset.get() + index * 8;
        let table = offset(u64_at(image, at));
        if table == 0 {
            continue;
        }
        found.push((Structure::ActiveL1, at));
        for at in (table..table + header.geometry.cluster_size()).step_by(8) {
            let entry = u64_at(image, at);
            if offset(entry) != 0 && entry & 1 << 62 == 0 {
                found.push((Structure::L2Table, at));
            }
        }
    }
    found
}

#[test]
fn each_wrong_flag_is_told_with_its_place() {
    if !oracle::is_available(1, "crashed images") {
        return;
    }
    let case = Case::new("compressed-snapshot", 65536, 16);
    let image = Memory::from(case.make(&Workshop::new()));
    apply(&image, &told(&image));
    assert!(told(&image).flags.is_empty());
    let flags = flags(&image);
    let mut should = [0; 2];
    for (structure, at) in &flags {
        let entry = u64_at(&image, *at);
        put_u64(&image, *at, entry ^ COPIED);
        let told = told(&image);
        assert_eq!(told.refcounts, []);
        let [flag] = told.flags.as_slice() else {
            panic!("{:?}", told.flags);
        };
        assert_eq!((flag.structure, flag.entry.get()), (*structure, *at));
        assert_eq!(flag.table.get() + flag.index * 8, *at);
        assert_eq!(flag.should_be_set, entry & COPIED != 0);
        should[usize::from(flag.should_be_set)] += 1;
        assert_eq!(apply(&image, &told), 0);
        assert_eq!(u64_at(&image, *at), entry);
    }
    assert!(should[0] > 0 && should[1] > 1, "{flags:?}");
}

#[test]
fn other_damage_is_told_and_makes_the_count_doubtful() {
    if !oracle::is_available(1, "crashed images") {
        return;
    }
    let image = Memory::from(Case::new("data", 512, 16).make(&Workshop::new()));
    let header = recount(&image, &options()).unwrap().header().clone();
    // A reserved bit in the first L1 entry.
    let at = header.l1_table_offset.get();
    let entry = u64_at(&image, at);
    put_u64(&image, at, entry | 1);
    let count = recount(&image, &options()).unwrap();
    assert_eq!(count.totals(), [(Code::L1Reserved, 1)]);
    assert_eq!(count.problems()[0].place.index, Some(0));
    assert!(!count.is_complete());
    put_u64(&image, at, entry);
    // An entry of the refcount table that can't be used.
    let at = header.refcount_table_offset.get();
    put_u64(&image, at, u64_at(&image, at) + 8);
    let count = recount(&image, &options()).unwrap();
    assert_eq!(count.totals(), [(Code::RefcountTableReserved, 1)]);
    assert!(!count.is_complete());
}

#[test]
fn the_sink_ends_the_comparison() {
    if !oracle::is_available(1, "crashed images") {
        return;
    }
    let image = Memory::from(Case::new("data", 512, 16).make(&Workshop::new()));
    let count = recount(&image, &options()).unwrap();
    let mut calls = 0;
    let third = count.refcount_differences(|difference| {
        calls += 1;
        if calls == 3 {
            ControlFlow::Break(difference.cluster)
        } else {
            ControlFlow::Continue(())
        }
    });
    assert_eq!(calls, 3);
    let expected = told(&image).refcounts[2].cluster;
    assert_eq!(third, Ok(ControlFlow::Break(expected)));
}

#[test]
fn every_failed_read_is_told() {
    if !oracle::is_available(1, "crashed images") {
        return;
    }
    let bytes = Case::new("data", 512, 16).make(&Workshop::new());
    let mut failed = 0;
    for nth in 1.. {
        assert!(nth < 1000, "there is no end");
        let faulty = Faulty::new(Memory::from(bytes.clone()));
        faulty.add(Fault::on(Operation::Read).nth(nth));
        let one = Options {
            threads: 1,
            ..Options::default()
        };
        let Ok(count) = recount(&faulty, &one) else {
            failed += 1;
            continue;
        };
        let refcounts = count.refcount_differences(|_| ControlFlow::<()>::Continue(()));
        let flags = count.copied_differences(|_| ControlFlow::<()>::Continue(()));
        if refcounts.is_ok() && flags.is_ok() {
            assert!(count.is_complete());
            break;
        }
        assert!(flags.is_err(), "a failed read stays one");
        failed += 1;
    }
    assert!(failed > 4, "only {failed} reads were failed");
}
