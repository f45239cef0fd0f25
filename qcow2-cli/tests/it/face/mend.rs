use std::fs;
use std::os::unix::fs::FileExt as _;

use super::Bench;

/// Clears the refcounts of the first four clusters: they are in use, and may be handed out again.
fn damage(bench: &Bench, name: &str) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(bench.path(name))
        .unwrap();
    let read = |offset| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = read(read(48));
    file.write_all_at(&[0; 8], block).unwrap();
}

#[test]
fn damage_is_told_mended_and_can_come_back() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "disk.qcow2", "good.qcow2"]);
    damage(&bench, "disk.qcow2");
    let damaged = fs::read(bench.path("disk.qcow2")).unwrap();
    let check = bench.run(&["check", "disk.qcow2"]);
    assert_eq!(check.code, 2);
    assert!(check.out.starts_with("disk.qcow2: corrupt\n"), "{check:?}");
    assert!(check.out.contains("`qcow2 repair` mends it"), "{check:?}");
    let audit = bench.run(&["audit", "disk.qcow2"]);
    assert_eq!(audit.code, 2);
    assert!(audit.out.contains("REFCOUNT-MISSING"), "{audit:?}");

    let plan = bench.run(&["repair", "--plan", "disk.qcow2"]);
    assert_eq!(plan.code, 2);
    assert!(plan.out.contains("RAISE-REFCOUNTS"), "{plan:?}");
    let err = bench.fails(1, &["repair", "disk.qcow2"]);
    assert!(err.contains("--yes applies the plan"), "{err}");
    assert!(fs::read(bench.path("disk.qcow2")).unwrap() == damaged);

    let done = bench.ok(&["repair", "--yes", "disk.qcow2"]);
    assert!(
        done.ends_with("Done. To go back: qcow2 repair --undo disk.qcow2.undo disk.qcow2\n"),
        "{done}"
    );
    bench.ok(&["check", "disk.qcow2"]);
    bench.same("disk.qcow2", "good.qcow2");
    bench.ok(&["repair", "--undo", "disk.qcow2.undo", "disk.qcow2"]);
    assert!(fs::read(bench.path("disk.qcow2")).unwrap() == damaged);

    bench.ok(&["repair", "--salvage-to", "saved.qcow2", "disk.qcow2"]);
    bench.same("saved.qcow2", "good.qcow2");
    assert!(fs::read(bench.path("disk.qcow2")).unwrap() == damaged);
}

#[test]
fn hints_name_this_program() {
    let bench = Bench::new();
    fs::write(bench.path("junk"), vec![1; 65536]).unwrap();
    let err = bench.fails(1, &["repair", "--plan", "junk"]);
    assert!(err.contains("--level salvage searches the file"), "{err}");
    let err = bench.fails(1, &["explain", "nothing-of-the-kind-at-all"]);
    assert!(err.contains("`qcow2 explain list`"), "{err}");
}

#[test]
fn a_folder_is_audited_and_the_worst_image_counts() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "disk.qcow2", "worse.qcow2"]);
    damage(&bench, "worse.qcow2");
    let answer = bench.run(&["audit", "."]);
    assert_eq!(answer.code, 2, "{answer:?}");
    assert!(
        answer.out.contains("2 images: 1 sound; 1 corrupt"),
        "{answer:?}"
    );
    let reports = bench.objects(&["audit", "."]);
    assert_eq!(reports.len(), 2);
    let owner = bench.object(&["audit", "--owner", "0", "disk.qcow2"]);
    assert_eq!(owner["owners"][0]["structure"], "header");
}

#[test]
fn the_page_of_findings_is_what_the_program_prints() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/findings.md");
    let page = Bench::new().ok(&["explain", "--markdown"]);
    assert!(
        fs::read_to_string(path).unwrap() == page,
        "docs/findings.md is out of date: qcow2 explain --markdown > docs/findings.md"
    );
}
