use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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
