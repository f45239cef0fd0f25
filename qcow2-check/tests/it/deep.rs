//! Deep checks of compressed images that QEMU makes. Where one is damaged, reading each cluster by QEMU tells what is lost.

use std::collections::BTreeSet;
use std::process::Command;

use qcow2_check::{Code, Options, Report, Severity, Verdict, audit, check};
use qcow2_io::{File, Memory};

use crate::oracle::{self, Access, Workshop, words};

const RAW: &str = "raw";
const IMAGE: &str = "image.qcow2";
/// Guest clusters of every image.
const CLUSTERS: usize = 24;

struct Case {
    compression: &'static str,
    cluster: usize,
    extended: bool,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for compression in ["zlib", "zstd"] {
        for cluster in [512, 4096, 65536, 2 << 20] {
            for extended in [false, true] {
                // Half a minute of work each, so large ones are few.
                let large = cluster > 65536 && (extended || compression == "zstd");
                if (!extended || cluster > 4096) && !large {
                    cases.push(Case {
                        compression,
                        cluster,
                        extended,
                    });
                }
            }
        }
    }
    cases
}

impl Case {
    fn name(&self) -> String {
        let Self {
            compression,
            cluster,
            extended,
        } = self;
        format!("{compression}/{cluster}/{extended}")
    }

    /// Makes the image: a disk of compressed clusters. A snapshot has them all; the first third is then written anew.
    fn make(&self, shop: &Workshop) {
        shop.write(RAW, &content(CLUSTERS * self.cluster, 1));
        let options = format!(
            "compression_type={},cluster_size={},extended_l2={}",
            self.compression,
            self.cluster,
            if self.extended { "on" } else { "off" }
        );
        let mut convert = words("convert -c -f raw -O qcow2 -o");
        convert.extend([options, RAW.to_owned(), IMAGE.to_owned()]);
        shop.run("qemu-img", &convert).unwrap();
        shop.run("qemu-img", &words(&format!("snapshot -c a {IMAGE}")))
            .unwrap();
        let mut write = words("-f qcow2");
        for cluster in 0..CLUSTERS / 3 {
            let (at, len) = (cluster * self.cluster, self.cluster);
            // QEMU compresses nothing over what is there.
            for command in [
                format!("discard {at} {len}"),
                format!("write -c -P {} {at} {len}", cluster + 1),
            ] {
                write.extend(["-c".to_owned(), command]);
            }
        }
        write.push(IMAGE.to_owned());
        shop.run("qemu-io", &write).unwrap();
    }
}

/// Bytes of which a third compresses away.
fn content(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    (0..len)
        .map(|at| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if at % 3 == 0 {
                0
            } else {
                state.to_be_bytes()[0]
            }
        })
        .collect()
}

/// A deep audit by one thread and by four, which must agree.
fn deep(shop: &Workshop) -> Report {
    let file = File::open(shop.path(IMAGE)).unwrap();
    let options = |threads| Options {
        threads,
        deep: true,
        ..Options::default()
    };
    let report = audit(&file, &options(1));
    let again = audit(&file, &options(4));
    assert_eq!(report.findings, again.findings);
    assert_eq!(report.totals, again.totals);
    assert_eq!(report.decoded, again.decoded);
    report
}

/// The clusters that are told to be lost: of the active disk, and of the snapshot alone.
fn told(report: &Report, cluster: usize) -> [BTreeSet<usize>; 2] {
    let mut lost = [BTreeSet::new(), BTreeSet::new()];
    for finding in &report.findings {
        if finding.code == Code::CompressedUndecodable {
            let guest = finding.place.guest.unwrap();
            assert_eq!(guest.end - guest.start, cluster as u64);
            let number = usize::try_from(guest.start).unwrap() / cluster;
            lost[usize::from(finding.place.snapshot.is_some())].insert(number);
        }
    }
    lost
}

/// The clusters that QEMU can't read.
fn unreadable(shop: &Workshop, cluster: usize) -> BTreeSet<usize> {
    let can_read = |number: &usize| {
        let command = format!("read {} {cluster}", number * cluster);
        let output = Command::new("qemu-io")
            .args(["-r", "-f", "qcow2", "-c", &command, IMAGE])
            .current_dir(shop.path(""))
            .output()
            .unwrap();
        output.status.success()
    };
    (0..CLUSTERS).filter(|number| !can_read(number)).collect()
}

#[test]
fn images_that_qemu_compresses_decode() {
    let cases = cases();
    if !oracle::is_available(cases.len(), "compressed images") {
        return;
    }
    for case in &cases {
        let shop = Workshop::new();
        case.make(&shop);
        let name = case.name();
        let report = deep(&shop);
        assert_eq!(
            report.verdict(),
            Verdict::Sound,
            "{name}: {:?}",
            report.findings
        );
        let pieces = (CLUSTERS + CLUSTERS / 3) as u64;
        assert_eq!(report.decoded, Some(pieces), "{name}");
        let theirs = shop.check(IMAGE, Access::Plain);
        assert_eq!(theirs.counts, Some(report.counts), "{name}");
    }
}

#[test]
fn what_is_told_to_be_lost_is_what_qemu_can_not_read() {
    let cases = cases();
    if !oracle::is_available(cases.len(), "damaged compressed images") {
        return;
    }
    let (mut active, mut inactive) = (0, 0);
    for case in &cases {
        let shop = Workshop::new();
        case.make(&shop);
        let name = case.name();
        let sound = shop.read(IMAGE);
        // Damage all over the pieces: a stretch in each sixteenth of what lies behind the tables in front.
        let mut bytes = sound.clone();
        let len = bytes.len();
        let first = len / 8;
        let metadata = places_of_metadata(&sound);
        for at in (first..len).step_by((len - first) / 16) {
            if metadata
                .iter()
                .all(|range| !range.contains(&at) && !range.contains(&(at + 7)))
            {
                bytes[at..len.min(at + 8)].fill(0xff);
            }
        }
        shop.write(IMAGE, &bytes);
        let report = deep(&shop);
        let [ours, snapshot] = told(&report, case.cluster);
        assert_eq!(ours, unreadable(&shop, case.cluster), "{name}");
        active += ours.len();
        inactive += snapshot.len();
        let memory = Memory::from(bytes);
        let shallow = check(&memory, &Options::default());
        assert_eq!(shallow.counts, report.counts, "{name}");
        assert_eq!(report.total_of(Severity::Error), 0, "{name}");
        // A disk that is the snapshot's again shows what was lost of it.
        let apply = words(&format!("snapshot -a a {IMAGE}"));
        shop.run("qemu-img", &apply).unwrap();
        let both = unreadable(&shop, case.cluster);
        let [ours_now, _] = told(&deep(&shop), case.cluster);
        assert_eq!(ours_now, both, "{name}");
        assert!(snapshot.is_subset(&both), "{name}");
    }
    assert!(
        active > 10 && inactive > 0,
        "{active} and {inactive} clusters lost"
    );
}

/// Clusters that hold no compressed data: everything that a zeroed copy is no longer sound without is metadata, so take the
/// structures by their fields.
fn places_of_metadata(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let at = |offset: usize| u64::from_be_bytes(bytes[offset..offset + 8].try_into().unwrap());
    let place = |offset: usize| usize::try_from(at(offset) & 0x00ff_ffff_ffff_fe00).unwrap();
    let count = |offset: usize| u32::from_be_bytes(bytes[offset..offset + 4].try_into().unwrap());
    let cluster = 1_usize << count(20);
    let mut ranges: Vec<_> = std::iter::once(0..cluster).collect();
    let mut add = |offset: usize, len: usize| {
        if offset > 0 {
            let start = offset / cluster * cluster;
            ranges.push(start..(offset + len).next_multiple_of(cluster));
        }
    };
    let mut tables = vec![(place(40), count(36) as usize)];
    let snapshots = place(64);
    add(snapshots, 1);
    tables.push((place(snapshots), count(snapshots + 8) as usize));
    for (l1, entries) in tables {
        add(l1, entries * 8);
        for entry in 0..entries {
            add(place(l1 + entry * 8), cluster);
        }
    }
    let refcounts = place(48);
    let len = count(56) as usize * cluster;
    add(refcounts, len);
    for entry in (refcounts..refcounts + len).step_by(8) {
        add(place(entry), cluster);
    }
    ranges
}
