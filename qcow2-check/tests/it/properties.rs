//! What holds for any bytes and any failure of the storage.

use std::ops::ControlFlow;

use proptest::prelude::*;
use qcow2_check::{Code, Options, Report, Severity, Verdict, audit, check, recount};
use qcow2_io::{Fault, Faulty, Memory, Operation};

/// Findings kept of each kind.
const KEPT: usize = 5;

fn options(threads: usize) -> Options<'static> {
    Options {
        threads,
        max_findings: KEPT,
        ..Options::default()
    }
}

/// All of a report that may not depend on the threads.
fn facts(report: &Report) -> impl PartialEq + std::fmt::Debug + use<'_> {
    let flags = (report.fatal, report.cancelled, report.complete);
    (report.counts, &report.findings, &report.totals, flags)
}

/// A pointer as a damaged table may hold one: some flags, and a cluster in the file, near its end or far away.
fn pointer(cluster_bits: u32) -> impl Strategy<Value = u64> {
    let flags = prop_oneof![
        6 => Just(0_u64),
        6 => Just(1 << 63),
        2 => Just(1_u64),
        1 => Just(1 << 62),
        1 => Just(512),
        1 => (0..64_u32).prop_map(|bit| 1 << bit),
    ];
    let cluster = prop_oneof![8 => 0..24_u64, 1 => 24..4096_u64, 1 => any::<u64>()];
    (flags, cluster).prop_map(move |(flags, cluster)| flags | cluster << cluster_bits)
}

/// A small image with a plausible header, and tables of random pointers.
fn image() -> impl Strategy<Value = Vec<u8>> {
    let shape = (9..=14_u32, 0..=6_u32, 2..=3_u32, prop::bool::weighted(0.3));
    shape.prop_flat_map(|(bits, order, version, extended)| {
        let pointers = prop::collection::vec(pointer(bits), 0..64);
        let tables = prop::collection::vec((1..20_u64, pointers), 0..12);
        let snapshots = prop::collection::vec((1..20_u64, 0..8_u32), 0..4);
        let roots = (1..20_u64, 0..40_u32, 1..20_u64, 0..3_u32, 0..20_u64);
        (tables, snapshots, roots, 0..24_u64, any::<u16>()).prop_map(
            move |(tables, snapshots, roots, clusters, fill)| {
                let mut bytes = vec![0; usize::try_from(24 << bits).unwrap()];
                let mut put = |offset: u64, value: &[u8]| {
                    let at = usize::try_from(offset).unwrap();
                    if let Some(field) = bytes.get_mut(at..at + value.len()) {
                        field.copy_from_slice(value);
                    }
                };
                let extended = extended && bits == 14 && version == 3;
                for (cluster, pointers) in tables {
                    for (at, pointer) in (cluster << bits..).step_by(8).zip(pointers) {
                        put(at, &pointer.to_be_bytes());
                    }
                }
                for at in (3_u64 << bits..4 << bits).step_by(2) {
                    put(at, &fill.to_be_bytes());
                }
                let (l1, l1_size, refcounts, refcount_clusters, table) = roots;
                for (number, (l1, l1_size)) in (0..).zip(&snapshots) {
                    let entry = (table << bits) + 56 * number;
                    put(entry, &(l1 << bits).to_be_bytes());
                    put(entry + 8, &l1_size.to_be_bytes());
                    put(entry + 36, &16_u32.to_be_bytes());
                }
                put(0, &[0x51, 0x46, 0x49, 0xfb]);
                put(4, &version.to_be_bytes());
                put(20, &bits.to_be_bytes());
                put(24, &(200_u64 << bits).to_be_bytes());
                put(36, &l1_size.to_be_bytes());
                put(40, &(l1 << bits).to_be_bytes());
                put(48, &(refcounts << bits).to_be_bytes());
                put(56, &refcount_clusters.to_be_bytes());
                put(60, &u32::try_from(snapshots.len()).unwrap().to_be_bytes());
                put(64, &(table << bits).to_be_bytes());
                if version == 3 {
                    put(72, &(u64::from(extended) << 4).to_be_bytes());
                    put(96, &order.to_be_bytes());
                    put(100, &112_u32.to_be_bytes());
                    put(112, &[0; 16]);
                }
                bytes.truncate(usize::try_from(clusters << bits).unwrap().max(512));
                bytes
            },
        )
    })
}

/// Recounts an image: that many refcounts differ as the check says, in the order of the clusters.
fn recounted(bytes: Vec<u8>, report: &Report) -> Result<(), TestCaseError> {
    let memory = Memory::from(bytes);
    let Ok(count) = recount(&memory, &options(2)) else {
        prop_assert_eq!(report.verdict(), Verdict::Incomplete);
        return Ok(());
    };
    prop_assert_eq!(count.is_complete(), report.complete);
    for code in Code::ALL {
        let told = count.totals().iter().find(|(c, _)| c == code);
        if let Some((_, told)) = told {
            prop_assert!(*told <= report.total(*code), "{}", code);
        }
    }
    let mut last = None;
    let (mut low, mut high) = (0, 0);
    let end = count.refcount_differences(|difference| {
        if last >= Some(difference.cluster) || difference.found == difference.expected {
            return ControlFlow::Break(difference);
        }
        last = Some(difference.cluster);
        if difference.found < difference.expected {
            low += 1;
        } else {
            high += 1;
        }
        ControlFlow::Continue(())
    });
    prop_assert_eq!(end, Ok(ControlFlow::Continue(())));
    let total = |codes: [Code; 2]| codes.map(|code| report.total(code)).iter().sum::<u64>();
    prop_assert_eq!(low, total([Code::RefcountMissing, Code::RefcountLow]));
    prop_assert_eq!(high, total([Code::Leak, Code::RefcountPastEnd]));
    Ok(())
}

/// Checks an image with one, two and four threads; the reports must be one.
fn judge(bytes: Vec<u8>) -> Result<Report, TestCaseError> {
    let memory = Memory::from(bytes);
    let report = audit(&memory, &options(1));
    for threads in [2, 4] {
        let again = audit(&memory, &options(threads));
        prop_assert_eq!(facts(&report), facts(&again), "{} threads", threads);
    }
    for (code, _) in &report.totals {
        let kept = report
            .findings
            .iter()
            .filter(|finding| finding.code == *code)
            .count();
        prop_assert!(kept <= KEPT, "{} findings of {} kept", kept, code);
    }
    Ok(report)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_tables_give_the_same_bounded_report_with_any_number_of_threads(bytes in image()) {
        let report = judge(bytes.clone())?;
        recounted(bytes, &report)?;
    }

    #[test]
    fn any_bytes_give_a_report(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let report = judge(bytes)?;
        prop_assert_eq!(report.verdict(), Verdict::Incomplete);
    }

    #[test]
    fn any_bytes_behind_a_magic_number_give_a_report(
        bytes in prop::collection::vec(any::<u8>(), 0..4096),
        version in 2..=3_u32,
        bits in 9..=16_u32,
    ) {
        let mut image = Vec::new();
        for word in [0x5146_49fb, version, 0, 0, 0, bits] {
            image.extend(u32::to_be_bytes(word));
        }
        image.extend(bytes);
        let report = judge(image.clone())?;
        recounted(image, &report)?;
    }
}

/// A sound image: one snapshot, two L2 tables, data. Clusters of 4 KiB.
fn sound() -> Vec<u8> {
    let mut bytes = vec![0; 12 << 12];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &[0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3]);
    put(20, &12_u32.to_be_bytes());
    put(24, &(4_u64 << 20).to_be_bytes());
    put(36, &2_u32.to_be_bytes());
    put(40, &(3_u64 << 12).to_be_bytes());
    put(48, &(1_u64 << 12).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(60, &1_u32.to_be_bytes());
    put(64, &(8_u64 << 12).to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &112_u32.to_be_bytes());
    put(1 << 12, &(2_u64 << 12).to_be_bytes());
    // The active L1 table has L2 tables of its own; the snapshot's shares none.
    put(3 << 12, &(1 << 63 | 4_u64 << 12).to_be_bytes());
    put((3 << 12) + 8, &(1 << 63 | 5_u64 << 12).to_be_bytes());
    put(4 << 12, &(1 << 63 | 6_u64 << 12).to_be_bytes());
    put(5 << 12, &(1 << 63 | 7_u64 << 12).to_be_bytes());
    put(8 << 12, &(9_u64 << 12).to_be_bytes());
    put((8 << 12) + 8, &2_u32.to_be_bytes());
    put((8 << 12) + 12, &1_u16.to_be_bytes());
    put((8 << 12) + 36, &16_u32.to_be_bytes());
    put((8 << 12) + 48, &(4_u64 << 20).to_be_bytes());
    put((8 << 12) + 56, b"1");
    put(9 << 12, &(10_u64 << 12).to_be_bytes());
    put(10 << 12, &(11_u64 << 12).to_be_bytes());
    for cluster in 0..12 {
        put((2 << 12) + 2 * cluster, &1_u16.to_be_bytes());
    }
    bytes
}

#[test]
fn every_failed_read_is_an_error_in_the_report() {
    let report = check(&Memory::from(sound()), &options(1));
    assert_eq!(report.verdict(), Verdict::Sound, "{:?}", report.findings);
    for nth in 1.. {
        let faulty = Faulty::new(Memory::from(sound()));
        faulty.add(Fault::on(Operation::Read).nth(nth));
        let report = check(&faulty, &options(1));
        if report.verdict() == Verdict::Sound {
            assert!(nth > 4, "only {} reads were failed", nth - 1);
            return;
        }
        assert_eq!(
            report.verdict(),
            Verdict::Incomplete,
            "read {nth}: {:?}",
            report.findings
        );
        assert!(
            report.total_of(Severity::Error) > 0,
            "read {nth}: {:?}",
            report.findings
        );
        assert!(nth < 1000, "there is no end");
    }
}

#[test]
fn a_storage_that_fails_always_gives_a_report() {
    for operation in [Operation::Read, Operation::Len] {
        let faulty = Faulty::new(Memory::from(sound()));
        faulty.add(Fault::on(operation).forever());
        let report = audit(&faulty, &options(2));
        assert_eq!(report.verdict(), Verdict::Incomplete, "{operation}");
    }
}
