//! Images made to stall or exhaust a checker: each is judged in the memory that its file deserves.
//!
//! Every case runs in a process of its own, so that its peak memory can be read from `/proc`.

use std::env;
use std::process::Command;

use qcow2_check::{Code, Options, Report, Verdict, audit};
use qcow2_io::{Memory, Storage};

/// Peak memory of a case, the image itself included; bytes.
const MEMORY: u64 = 256 << 20;
/// Names the case that a child process is to run.
const CASE: &str = "QCOW2_CHECK_HOSTILE_CASE";
const COPIED: u64 = 1 << 63;

/// Runs `case` in a process of its own. `test` is the path of the calling test.
fn alone(test: &str, case: impl FnOnce()) {
    if env::var(CASE).is_ok_and(|name| name == test) {
        case();
        if let Some(peak) = crate::oracle::peak_memory_kib() {
            eprintln!("peak memory {} MiB", peak >> 10);
            assert!(peak << 10 < MEMORY, "peak memory of {peak} KiB");
        }
        return;
    }
    let output = Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(CASE, test)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(
        stdout.contains("1 passed"),
        "the case did not run: {stdout}"
    );
}

fn judge(image: &Memory) -> Report {
    audit(
        image,
        &Options {
            threads: 2,
            ..Options::default()
        },
    )
}

/// An image under construction.
struct Draft {
    memory: Memory,
    cluster: u64,
}

impl Draft {
    /// An image with its header, in which only what is given differs from an empty one.
    fn new(cluster_bits: u32, refcount_order: u32, size: u64) -> Self {
        let draft = Self {
            memory: Memory::new(),
            cluster: 1 << cluster_bits,
        };
        draft.u32(0, 0x5146_49fb);
        draft.u32(4, 3);
        draft.u32(20, cluster_bits);
        draft.u64(24, size);
        draft.u32(96, refcount_order);
        draft.u32(100, 112);
        draft
    }

    fn u16(&self, offset: u64, value: u16) {
        self.memory.write_at(&value.to_be_bytes(), offset).unwrap();
    }

    fn u32(&self, offset: u64, value: u32) {
        self.memory.write_at(&value.to_be_bytes(), offset).unwrap();
    }

    fn u64(&self, offset: u64, value: u64) {
        self.memory.write_at(&value.to_be_bytes(), offset).unwrap();
    }

    /// Writes a table of 64-bit entries.
    fn table(&self, offset: u64, entries: impl Iterator<Item = u64>) {
        let mut bytes = Vec::new();
        let mut at = offset;
        for entry in entries {
            bytes.extend(entry.to_be_bytes());
            if bytes.len() == 1 << 20 {
                self.memory.write_at(&bytes, at).unwrap();
                at += 1 << 20;
                bytes.clear();
            }
        }
        self.memory.write_at(&bytes, at).unwrap();
    }

    fn l1(&self, offset: u64, size: u32) {
        self.u32(36, size);
        self.u64(40, offset);
    }

    fn refcount_table(&self, offset: u64, clusters: u32) {
        self.u64(48, offset);
        self.u32(56, clusters);
    }

    /// Sets the file's length to whole clusters.
    fn end(&self, clusters: u64) {
        self.memory.set_len(clusters * self.cluster).unwrap();
    }
}

#[test]
fn two_million_l1_entries_share_one_l2_table() {
    alone("hostile::two_million_l1_entries_share_one_l2_table", || {
        const ENTRIES: u32 = 2_000_000;
        // 0 header, 1 refcount table, 2 refcount block, 3 L2 table, 4-13 data, 16.. L1 table
        let draft = Draft::new(16, 5, u64::from(ENTRIES) << 29);
        draft.refcount_table(1 << 16, 1);
        draft.u64(1 << 16, 2 << 16);
        draft.l1(16 << 16, ENTRIES);
        draft.table(16 << 16, (0..ENTRIES).map(|_| 3 << 16));
        draft.table(3 << 16, (4..14).map(|cluster| cluster << 16));
        let l1_clusters = (u64::from(ENTRIES) * 8).div_ceil(1 << 16);
        for cluster in (0..14).chain(16..16 + l1_clusters) {
            let count = if (3..14).contains(&cluster) {
                ENTRIES
            } else {
                1
            };
            draft.u32((2 << 16) + 4 * cluster, count);
        }
        draft.end(16 + l1_clusters);

        let report = judge(&draft.memory);
        assert_eq!(report.verdict(), Verdict::Corrupt);
        assert_eq!(report.counts.leaks, 0);
        assert_eq!(report.total(Code::RefcountLow), 0);
        assert!(report.total(Code::L2Shared) > 0, "{:?}", report.totals);
        assert!(report.total(Code::FanIn) > 0, "{:?}", report.totals);
        assert_eq!(report.counts.allocated_clusters, 10 * u64::from(ENTRIES));
    });
}

#[test]
fn sixty_thousand_snapshots_share_one_l1_table() {
    alone(
        "hostile::sixty_thousand_snapshots_share_one_l1_table",
        || {
            const SNAPSHOTS: u32 = 60_000;
            // 0 header, 1 refcount table, 2 refcount block, 3 active L1, 4 snapshots' L1, 5 L2, 6 data, 16.. snapshot table
            let draft = Draft::new(16, 4, 1 << 20);
            draft.refcount_table(1 << 16, 1);
            draft.u64(1 << 16, 2 << 16);
            draft.l1(3 << 16, 1);
            draft.u64(4 << 16, 5 << 16);
            draft.u64(5 << 16, 6 << 16);
            draft.u32(60, SNAPSHOTS);
            draft.u64(64, 16 << 16);
            // An entry is 64 bytes: 40, 16 of extra data, 5 of id, none of name, padding.
            for number in 0..SNAPSHOTS {
                let mut entry = [0; 64];
                entry[..8].copy_from_slice(&(4_u64 << 16).to_be_bytes());
                entry[8..12].copy_from_slice(&1_u32.to_be_bytes());
                entry[12..14].copy_from_slice(&5_u16.to_be_bytes());
                entry[36..40].copy_from_slice(&16_u32.to_be_bytes());
                entry[48..56].copy_from_slice(&(1_u64 << 20).to_be_bytes());
                entry[56..61].copy_from_slice(format!("{number:05}").as_bytes());
                draft
                    .memory
                    .write_at(&entry, (16 << 16) + 64 * u64::from(number))
                    .unwrap();
            }
            let table_clusters = (64 * u64::from(SNAPSHOTS)).div_ceil(1 << 16);
            for cluster in (0..7).chain(16..16 + table_clusters) {
                let count = if (4..7).contains(&cluster) { 60_000 } else { 1 };
                draft.u16((2 << 16) + 2 * cluster, count);
            }
            draft.end(16 + table_clusters);

            let report = judge(&draft.memory);
            assert_eq!(report.verdict(), Verdict::Corrupt);
            assert_eq!(report.total(Code::RefcountLow) + report.counts.leaks, 0);
            assert!(
                report.total(Code::MetadataOverlap) > 0,
                "{:?}",
                report.totals
            );
            assert!(report.total(Code::ManySnapshots) > 0, "{:?}", report.totals);
        },
    );
}

#[test]
fn a_sparse_file_of_four_tebibytes_with_small_clusters_is_sound() {
    alone(
        "hostile::a_sparse_file_of_four_tebibytes_with_small_clusters_is_sound",
        || {
            const CLUSTERS: u64 = 1 << 30;
            // 0 header, 1-1024 refcount table, 1025 and 1028 refcount blocks, 1026 L1, 1027 L2; data in the last cluster
            let draft = Draft::new(12, 4, 1 << 20);
            let far = CLUSTERS - 1;
            draft.refcount_table(1 << 12, 1024);
            draft.u64(1 << 12, 1025 << 12);
            draft.u64((1 << 12) + 8 * (far / 2048), 1028 << 12);
            draft.l1(1026 << 12, 1);
            draft.u64(1026 << 12, COPIED | 1027 << 12);
            draft.u64(1027 << 12, COPIED | far << 12);
            for cluster in 0..=1028 {
                draft.u16((1025 << 12) + 2 * cluster, 1);
            }
            draft.u16((1028 << 12) + 2 * (far % 2048), 1);
            draft.end(CLUSTERS);

            let report = judge(&draft.memory);
            assert_eq!(report.verdict(), Verdict::Sound, "{:?}", report.findings);
            assert_eq!(report.counts.image_end_offset, CLUSTERS << 12);
        },
    );
}

#[test]
fn a_small_file_claims_the_largest_tables() {
    alone("hostile::a_small_file_claims_the_largest_tables", || {
        let draft = Draft::new(21, 4, 1 << 56);
        draft.refcount_table(1 << 21, 4);
        draft.l1(16 << 21, 1 << 22);
        draft.u32(60, 65_536);
        draft.u64(64, 64 << 21);
        draft.memory.set_len(1 << 20).unwrap();

        let report = judge(&draft.memory);
        assert!(report.verdict() >= Verdict::Corrupt);
        assert!(report.total(Code::HugeTable) > 0, "{:?}", report.totals);
        assert!(report.total(Code::HugeDisk) > 0, "{:?}", report.totals);
    });
}

#[test]
fn a_million_refcount_table_entries_lead_to_one_block() {
    alone(
        "hostile::a_million_refcount_table_entries_lead_to_one_block",
        || {
            // 0 header, 1-128 refcount table, 129 refcount block
            let draft = Draft::new(16, 4, 0);
            draft.refcount_table(1 << 16, 128);
            draft.table(1 << 16, (0..1 << 20).map(|_| 129 << 16));
            for cluster in 0..130 {
                draft.u16((129 << 16) + 2 * cluster, 1);
            }
            draft.end(130);

            let report = judge(&draft.memory);
            assert!(report.verdict() >= Verdict::Corrupt);
            assert!(
                report.total(Code::RefcountBlockShared) > 0,
                "{:?}",
                report.totals
            );
        },
    );
}

#[test]
fn l1_tables_of_thousands_of_snapshots_overlap() {
    alone(
        "hostile::l1_tables_of_thousands_of_snapshots_overlap",
        || {
            const SNAPSHOTS: u32 = 5_000;
            let draft = Draft::new(12, 4, 1 << 20);
            draft.refcount_table(1 << 12, 1);
            draft.u64(1 << 12, 2 << 12);
            draft.u32(60, SNAPSHOTS);
            draft.u64(64, 16 << 12);
            draft.l1(3 << 12, 1);
            // Each table has 16 MiB and begins a cluster after the one before; entries lead to each other's clusters.
            for number in 0..SNAPSHOTS {
                let mut entry = [0; 64];
                let l1 = (1000 + u64::from(number)) << 12;
                entry[..8].copy_from_slice(&l1.to_be_bytes());
                entry[8..12].copy_from_slice(&(1_u32 << 21).to_be_bytes());
                entry[36..40].copy_from_slice(&16_u32.to_be_bytes());
                entry[48..56].copy_from_slice(&(1_u64 << 20).to_be_bytes());
                draft
                    .memory
                    .write_at(&entry, (16 << 12) + 56 * u64::from(number))
                    .unwrap();
                draft.u64(l1, l1);
            }
            draft.end(20_000);

            let report = judge(&draft.memory);
            assert!(report.verdict() >= Verdict::Corrupt);
            assert!(report.total(Code::ManySnapshots) > 0, "{:?}", report.totals);
        },
    );
}

#[test]
fn a_million_l2_tables_lie_in_holes() {
    alone("hostile::a_million_l2_tables_lie_in_holes", || {
        const TABLES: u32 = 1 << 20;
        let draft = Draft::new(16, 4, u64::from(TABLES) << 29);
        draft.refcount_table(1 << 16, 1);
        draft.u64(1 << 16, 2 << 16);
        draft.l1(16 << 16, TABLES);
        draft.table(
            16 << 16,
            (1000..1000 + u64::from(TABLES)).map(|cluster| cluster << 16),
        );
        draft.end(1000 + u64::from(TABLES));

        let report = judge(&draft.memory);
        assert_eq!(report.verdict(), Verdict::Corrupt);
        assert!(report.total(Code::RefcountMissing) > u64::from(TABLES));
    });
}

#[test]
fn tables_that_lead_to_themselves_and_each_other_end() {
    alone(
        "hostile::tables_that_lead_to_themselves_and_each_other_end",
        || {
            // 0 header, 1 refcount table, 2 refcount block, 3 L1, 4 and 5 L2
            let draft = Draft::new(16, 4, 4 << 29);
            draft.refcount_table(1 << 16, 1);
            draft.table(1 << 16, [2 << 16, 1 << 16, 3 << 16].into_iter());
            draft.l1(3 << 16, 4);
            draft.table(3 << 16, [3 << 16, 4 << 16, 5 << 16, 1 << 16].into_iter());
            draft.table(4 << 16, [4 << 16, 3 << 16, 5 << 16, 0x1_0000].into_iter());
            draft.table(5 << 16, [4 << 16, 5 << 16, 2 << 16].into_iter());
            draft.end(6);

            let report = judge(&draft.memory);
            assert!(report.verdict() >= Verdict::Corrupt);
            assert!(
                report.total(Code::DataOnMetadata) > 0,
                "{:?}",
                report.totals
            );
            assert!(
                report.total(Code::RefcountBlockShared) > 0,
                "{:?}",
                report.totals
            );
        },
    );
}

/// A stream of numbers without order.
fn scramble(seed: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(seed), |last| {
        Some(last.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1))
    })
}

#[test]
fn references_are_scattered_over_four_tebibytes() {
    alone(
        "hostile::references_are_scattered_over_four_tebibytes",
        || {
            const TABLES: u64 = 4096;
            const CLUSTERS: u64 = (4 << 40) >> 12;
            // 0 header, 1 refcount table, 2.. L1 table, 1024.. L2 tables
            let draft = Draft::new(12, 4, TABLES << 21);
            draft.refcount_table(1 << 12, 1);
            draft.l1(2 << 12, 4096);
            draft.table(2 << 12, (0..TABLES).map(|table| (1024 + table) << 12));
            let entries = scramble(1).map(|number| ((number >> 20) % CLUSTERS).max(1) << 12);
            draft.table(1024 << 12, entries.take(4096 * 512));
            draft.end(CLUSTERS);

            let report = judge(&draft.memory);
            assert_eq!(report.verdict(), Verdict::Incomplete);
            assert!(report.total(Code::CheckLimited) > 0, "{:?}", report.totals);
        },
    );
}

#[test]
fn l1_entries_are_scattered_over_a_file_of_exbibytes() {
    alone(
        "hostile::l1_entries_are_scattered_over_a_file_of_exbibytes",
        || {
            const ENTRIES: u32 = 4 << 20;
            let draft = Draft::new(9, 4, u64::from(ENTRIES) << 15);
            draft.refcount_table(1 << 9, 1);
            draft.l1(1 << 20, ENTRIES);
            let entries = scramble(2).map(|number| (number >> 9) & ((1 << 55) - 512));
            draft.table(1 << 20, entries.take(4 << 20));
            draft.end(1 << 46);

            let report = judge(&draft.memory);
            assert_eq!(report.verdict(), Verdict::Incomplete);
            assert!(report.total(Code::CheckLimited) > 0, "{:?}", report.totals);
        },
    );
}

#[test]
fn half_a_million_refcount_blocks_of_a_sparse_file_are_one() {
    alone(
        "hostile::half_a_million_refcount_blocks_of_a_sparse_file_are_one",
        || {
            const CLUSTERS: u64 = (4 << 40) >> 12;
            // 0 header, 1 L1 table, 2 refcount block full of ones, 1024.. refcount table
            let draft = Draft::new(12, 4, 1 << 21);
            draft.l1(1 << 12, 1);
            draft
                .memory
                .write_at(&[0, 1].repeat(2048), 2 << 12)
                .unwrap();
            draft.refcount_table(1024 << 12, 1024);
            draft.table(1024 << 12, (0..CLUSTERS / 2048).map(|_| 2 << 12));
            draft.end(CLUSTERS);

            let report = judge(&draft.memory);
            assert_eq!(report.verdict(), Verdict::Incomplete);
            assert!(
                report.total(Code::RefcountBlockShared) > 0,
                "{:?}",
                report.totals
            );
            assert!(report.total(Code::CheckLimited) > 0, "{:?}", report.totals);
        },
    );
}
