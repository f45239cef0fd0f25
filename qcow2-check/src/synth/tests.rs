use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2_format::GuestCluster;
use qcow2_io::{File, FileOptions, Memory, Storage as _};
use tempfile::TempDir;

use super::*;
use crate::{Code, Counts, Options, Report, Severity, audit, check};

/// Writes an image to a file of this name, in a directory of its own.
fn written(name: &str, write: impl FnOnce(&File) -> Result<(), SynthError>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    write(&create(&path)).unwrap();
    (dir, path)
}

fn create(path: &Path) -> File {
    let options = FileOptions::new().write(true).create_new(true);
    options.open(path).unwrap()
}

fn checked(path: &Path) -> Report {
    let report = check(&File::open(path).unwrap(), &Options::default());
    let bad: Vec<_> = report.findings.iter().collect();
    for severity in [
        Severity::Hazard,
        Severity::Leak,
        Severity::Corruption,
        Severity::Error,
    ] {
        assert_eq!(report.total_of(severity), 0, "{bad:#?}");
    }
    report
}

/// Whether QEMU is there; where it is required, it must be.
fn has_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    let required = ["QCOW2_REQUIRE_QEMU", "CI"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    assert!(
        found || !required,
        "qemu-img not found, but required by the environment"
    );
    if !found {
        eprintln!("skipped: qemu-img not found");
    }
    found
}

fn qemu(tool: &str, dir: &Path, args: &[&str]) -> String {
    let output = Command::new(tool)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && errors.is_empty(),
        "{tool} {args:?}: {said}{errors}"
    );
    assert!(!said.contains("failed"), "{tool} {args:?}: {said}");
    said
}

/// What `qemu-img check` counts in an image in which it must find nothing wrong.
fn qemu_counts(path: &Path, options: &[&str]) -> Counts {
    let args = [&["check", "--output=json"], options].concat();
    let json = qemu("qemu-img", path.parent().unwrap(), &args);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let field = |name: &str| json.get(name).map_or(0, |n| n.as_u64().unwrap());
    Counts {
        check_errors: field("check-errors"),
        corruptions: field("corruptions"),
        leaks: field("leaks"),
        image_end_offset: field("image-end-offset"),
        total_clusters: field("total-clusters"),
        allocated_clusters: field("allocated-clusters"),
        fragmented_clusters: field("fragmented-clusters"),
        compressed_clusters: field("compressed-clusters"),
    }
}

#[test]
fn the_demo_is_small_and_shows_everything() {
    let (_dir, path) = written("demo.qcow2", |file| demo(file));
    assert!(fs::metadata(&path).unwrap().len() < 4 << 20);
    let report = checked(&path);
    assert_eq!(report.counts.compressed_clusters, 4);
    assert_eq!(report.total(Code::BitmapInUse), 1);
    let report = audit(&File::open(&path).unwrap(), &Options::default());
    assert_eq!(report.total(Code::BackingReference), 1);
    assert_eq!(report.total_of(Severity::Hazard), 0, "{report:#?}");
}

#[test]
fn leaked_clusters_are_all_that_is_wrong() {
    for (clusters, cluster_bits) in [(0, 16), (1, 9), (70_000, 9), (100_000, 16)] {
        let memory = qcow2_io::Memory::new();
        super::leaked(&memory, clusters, cluster_bits).unwrap();
        let report = crate::check(&memory, &Options::default());
        assert_eq!(report.counts.leaks, clusters);
        let worst = if clusters > 0 {
            crate::Verdict::Leaks
        } else {
            crate::Verdict::Sound
        };
        assert_eq!(report.verdict(), worst);
    }
}

#[test]
fn the_other_demos_are_sound() {
    for write in [demo_extended, demo_luks, demo_base] {
        let (_dir, path) = written("demo.qcow2", |file| write(file));
        assert!(fs::metadata(&path).unwrap().len() < 4 << 20);
        checked(&path);
    }
}

#[test]
fn a_demo_replaces_what_the_storage_held() {
    let old = Memory::from(vec![0xee; 8 << 20]);
    let new = Memory::new();
    demo(&old).unwrap();
    demo(&new).unwrap();
    assert_eq!(old.to_vec().unwrap(), new.to_vec().unwrap());
}

#[test]
fn qemu_finds_the_demo_sound_and_reads_it() {
    if !has_qemu() {
        return;
    }
    let (dir, path) = written("demo.qcow2", |file| demo(file));
    demo_base(&create(&dir.path().join(DEMO_BACKING_NAME))).unwrap();
    let counts = qemu_counts(&path, &["-f", "qcow2", "demo.qcow2"]);
    assert_eq!(checked(&path).counts, counts);
    let reads = |at: &str, byte: &str| {
        let pattern = format!("read -P {byte} {at} 64k");
        qemu("qemu-io", dir.path(), &["-r", "-c", &pattern, "demo.qcow2"]);
    };
    reads("0", "0xd0");
    reads("64k", "0xd2");
    reads("128k", "0");
    reads("192k", "0xd3");
    reads("320k", "0");
    reads("448k", "0xb0"); // from the backing file
    reads("1G", "0xb0");
    for (at, byte) in [
        ("512k", "0xc0"),
        ("576k", "0xc1"),
        ("640k", "0xc2"),
        ("704k", "0xc3"),
    ] {
        let pattern = format!("read -P {byte} {at} 32k");
        qemu("qemu-io", dir.path(), &["-r", "-c", &pattern, "demo.qcow2"]);
    }
    let listed = qemu("qemu-img", dir.path(), &["snapshot", "-l", "demo.qcow2"]);
    assert!(
        listed.contains("installed") && listed.contains("updated"),
        "{listed}"
    );
    // The first snapshot has what the disk has lost since.
    let convert = ["convert", "-l", "installed", "demo.qcow2", "first.raw"];
    qemu("qemu-img", dir.path(), &convert);
    let first = File::open(dir.path().join("first.raw")).unwrap();
    let mut bytes = vec![0; 4 << 16];
    first.read_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0xd0));
}

#[test]
fn qemu_finds_the_other_demos_sound() {
    if !has_qemu() {
        return;
    }
    let (_dir, path) = written("demo.qcow2", |file| demo_extended(file));
    let counts = qemu_counts(&path, &["-f", "qcow2", "demo.qcow2"]);
    assert_eq!(checked(&path).counts, counts);

    let (_dir, path) = written("demo.qcow2", |file| demo_luks(file));
    let secret = format!("secret,id=s,data={DEMO_LUKS_PASSPHRASE}");
    let image = "driver=qcow2,file.filename=demo.qcow2,encrypt.key-secret=s";
    let options = ["--object", secret.as_str(), "--image-opts", image];
    assert_eq!(checked(&path).counts, qemu_counts(&path, &options));
}

/// The large images, small: enough of each to go over the end of a refcount block's range.
type Large = (&'static str, fn(&File) -> Result<(), SynthError>);
const LARGE: [Large; 10] = [
    ("contiguous", |file| contiguous(file, 5 << 30, 16, false)),
    ("contiguous, 4 KiB", |file| {
        contiguous(file, 50 << 20, 12, false)
    }),
    ("contiguous, 2 MiB", |file| {
        contiguous(file, 1 << 40, 21, false)
    }),
    // The refcount table takes several clusters, and finds no room before a refcount block.
    ("contiguous, 512 bytes", |file| {
        contiguous(file, 20 << 20, 9, false)
    }),
    ("contiguous, extended", |file| {
        contiguous(file, 3 << 30, 16, true)
    }),
    ("one table", |file| contiguous(file, 1, 16, false)),
    ("random order", |file| random_order(file, 5 << 30, 1)),
    ("compressed", |file| compressed(file, 6 << 30)),
    ("snapshots", |file| snapshots(file, 3 << 30, 8)),
    ("one snapshot", |file| snapshots(file, 1 << 30, 1)),
];

#[test]
fn large_images_are_sound() {
    for (name, write) in LARGE {
        let (_dir, path) = written("large.qcow2", write);
        let report = checked(&path);
        assert_eq!(report.totals, [], "{name}");
        let counts = report.counts;
        assert_eq!(counts.allocated_clusters, counts.total_clusters, "{name}");
        let len = fs::metadata(&path).unwrap().len();
        assert_eq!(counts.image_end_offset, len, "{name}");
    }
}

#[test]
fn qemu_finds_large_images_sound() {
    if !has_qemu() {
        return;
    }
    for (name, write) in LARGE {
        let (_dir, path) = written("large.qcow2", write);
        let counts = qemu_counts(&path, &["-f", "qcow2", "large.qcow2"]);
        assert_eq!(checked(&path).counts, counts, "{name}");
    }
}

#[test]
fn large_images_are_what_their_names_say() {
    let counts = |write: fn(&Memory) -> Result<(), SynthError>| {
        let memory = Memory::new();
        write(&memory).unwrap();
        check(&memory, &Options::default()).counts
    };
    let straight = counts(|memory| contiguous(memory, 1 << 30, 16, false));
    assert_eq!(straight.fragmented_clusters, 0);
    let random = counts(|memory| random_order(memory, 1 << 30, 7));
    assert!(random.fragmented_clusters > 16000);
    let packed = counts(|memory| compressed(memory, 1 << 30));
    assert_eq!(packed.compressed_clusters, 16384);
    // 25 KiB of 64 on average.
    let share = packed.image_end_offset * 100 / (1 << 30);
    assert!((37..42).contains(&share), "{share} %");
}

#[test]
fn seeds_tell_images_apart_and_nothing_else_does() {
    let image = |seed| {
        let memory = Memory::new();
        random_order(&memory, 1 << 29, seed).unwrap();
        let mut bytes = vec![0; 4 << 16];
        memory.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    assert!(image(1) == image(1));
    assert!(image(1) != image(2));
}

#[test]
fn snapshots_share_what_was_not_written_again() {
    let memory = Memory::new();
    snapshots(&memory, 1 << 29, 2).unwrap();
    let references = |cluster: u64| {
        let offset = HostOffset::new(cluster << 16);
        let owners = crate::owners(&memory, offset, &Options::default()).unwrap();
        (owners.refcount, owners.owners.len())
    };
    // Header, refcount block, three L1 tables, snapshot table, and the first L2 table lie before the data.
    assert_eq!(references(6), (Some(1), 1));
    let data = 7;
    assert_eq!(references(data), (Some(1), 1));
    assert_eq!(references(data + 1), (Some(3), 3));
    assert_eq!(references(data + 101), (Some(2), 2));
    // Behind the data: an L2 table and a cluster for each snapshot taken.
    let copies = data + 8192;
    assert_eq!(references(copies), (Some(1), 1));
    assert_eq!(references(copies + 1), (Some(2), 2));
    assert_eq!(references(copies + 2), (Some(1), 1));
    assert_eq!(references(copies + 3), (Some(1), 1));
}

#[test]
fn limits_are_errors() {
    let memory = Memory::new();
    let is_too_large = |result| matches!(result, Err(SynthError::TooLarge { .. }));
    assert!(is_too_large(contiguous(&memory, 1 << 50, 9, false)));
    assert!(is_too_large(snapshots(&memory, 1 << 30, 0)));
    assert!(is_too_large(snapshots(&memory, 1 << 30, 61)));
    assert!(matches!(
        contiguous(&memory, 1 << 30, 12, true),
        Err(SynthError::Geometry(_))
    ));
    let geometry = Geometry::new(9, 4, false).unwrap();
    let mut image = Builder::new(Version::V2, geometry, 1 << 20);
    assert!(is_too_large(
        image.data(GuestCluster::new(0), &[0; 513]).map(|_| ())
    ));
    assert!(is_too_large(
        image.data(GuestCluster::new(u64::MAX), &[]).map(|_| ())
    ));
    assert!(matches!(
        image.zero(GuestCluster::new(0), Zero::Plain),
        Err(SynthError::NotInVersion2 { .. })
    ));
}

/// An image with data, compressed clusters that share one, and a snapshot, as far as the refcounts are wide enough.
fn of_all_kinds(
    file: &File,
    version: Version,
    cluster_bits: u32,
    refcount_order: u32,
) -> Result<(), SynthError> {
    let geometry = Geometry::new(cluster_bits, refcount_order, false)?;
    let size = 3 * geometry.l2_coverage() - geometry.cluster_size();
    let mut image = Builder::new(version, geometry, size);
    let last = geometry.clusters_for(size) - 1;
    for guest in [0, 1, 3, last] {
        image.data(GuestCluster::new(guest), &[0xda; 512])?;
    }
    if version == Version::V3 {
        image.zero(GuestCluster::new(5), Zero::Plain)?;
        image.zero(GuestCluster::new(6), Zero::Allocated)?;
    }
    let payload = deflate(&vec![0xcc; geometry.cluster_len()]);
    image.compressed(GuestCluster::new(8), &payload)?;
    // Two in one cluster, in two trees: four references.
    if refcount_order > 1 {
        image.compressed(GuestCluster::new(9), &payload)?;
    }
    if refcount_order > 0 {
        image.snapshot("first", b"state")?;
        image.data(GuestCluster::new(1), &[0xdb; 512])?;
        image.data(GuestCluster::new(10), &[])?;
    }
    image.finish(file)
}

#[test]
fn qemu_finds_images_of_every_geometry_sound() {
    if !has_qemu() {
        return;
    }
    let cluster_sizes = [9, 10, 12, 16, 21].map(|bits| (Version::V3, bits, 4));
    let refcounts = [0, 1, 2, 3, 5, 6].map(|order| (Version::V3, 12, order));
    let old = [9, 16].map(|bits| (Version::V2, bits, 4));
    let all = cluster_sizes.into_iter().chain(refcounts).chain(old);
    for (version, bits, order) in all {
        let (dir, path) = written("small.qcow2", |file| {
            of_all_kinds(file, version, bits, order)
        });
        let report = checked(&path);
        let counts = qemu_counts(&path, &["-f", "qcow2", "small.qcow2"]);
        assert_eq!(report.counts, counts, "{version:?}, {bits}, {order}");
        let reads = [
            (0, "0xda"),
            (1, if order > 0 { "0xdb" } else { "0xda" }),
            (8, "0xcc"),
        ];
        for (cluster, byte) in reads {
            let read = format!("read -P {byte} {} 512", cluster << bits);
            qemu("qemu-io", dir.path(), &["-r", "-c", &read, "small.qcow2"]);
        }
    }
}
