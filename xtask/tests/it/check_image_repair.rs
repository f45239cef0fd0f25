use std::fs;

use qcow2_io::{File, Storage as _};

use crate::workbench::Workbench;

#[test]
fn each_level_is_planned_applied_and_undone() {
    let bench = Workbench::new();
    for (image, level, found, mended) in [
        ("leaky", "leaks", 3, 0),
        ("leaky", "all", 3, 0),
        ("corrupt", "leaks", 2, 2),
        ("corrupt", "all", 2, 0),
        ("corrupt", "salvage", 2, 0),
    ] {
        let case = format!("{image} {level}");
        fs::remove_file(bench.path(image)).ok();
        if image == "leaky" {
            bench.leaky(image);
        } else {
            bench.corrupt(image);
        }
        let before = fs::read(bench.path(image)).unwrap();

        let plan = bench.check(["--repair", level, "--plan", image]);
        assert_eq!(plan.code, found, "{case}: {}", plan.stdout);
        let asked = bench.check(["--repair", level, image]);
        assert!(
            asked.code == 1 || mended != 0,
            "{case}: nobody can have said yes: {}",
            asked.stdout
        );
        assert!(fs::read(bench.path(image)).unwrap() == before, "{case}");

        let done = bench.check(["--repair", level, "--yes", "--undo-file", "back", image]);
        assert_eq!(done.code, mended, "{case}: {} {}", done.stdout, done.stderr);
        assert_eq!(bench.check([image]).code, mended, "{case}");
        if mended != 0 {
            continue;
        }
        assert!(fs::read(bench.path(image)).unwrap() != before, "{case}");
        let undone = bench.check(["--undo", "back", image]);
        assert_eq!(undone.code, 0, "{case}: {}", undone.stderr);
        assert!(fs::read(bench.path(image)).unwrap() == before, "{case}");
        fs::remove_file(bench.path("back")).unwrap();
    }
}

#[test]
fn the_way_back_is_beside_the_image_and_is_not_written_over() {
    let bench = Workbench::new();
    bench.leaky("disk");
    let before = fs::read(bench.path("disk")).unwrap();
    let done = bench.check(["--repair", "all", "--yes", "disk"]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.stdout
            .contains("cargo xtask check-image --undo disk.undo disk"),
        "{}",
        done.stdout
    );
    let kept = fs::read(bench.path("disk.undo")).unwrap();
    bench.corrupt("other");
    let refused = bench.check([
        "--repair",
        "all",
        "--yes",
        "--undo-file",
        "disk.undo",
        "other",
    ]);
    assert_eq!(refused.code, 1, "{}", refused.stdout);
    assert!(refused.stderr.contains("disk.undo"), "{}", refused.stderr);
    assert!(fs::read(bench.path("disk.undo")).unwrap() == kept);
    // It is of another image.
    let undone = bench.check(["--undo", "disk.undo", "other"]);
    assert_eq!(undone.code, 1, "{}", undone.stdout);
    assert_eq!(bench.check(["--undo", "disk.undo", "disk"]).code, 0);
    assert!(fs::read(bench.path("disk")).unwrap() == before);
}

#[test]
fn a_salvage_leaves_the_old_image_alone() {
    let bench = Workbench::new();
    bench.corrupt("disk");
    let before = fs::read(bench.path("disk")).unwrap();
    let answer = bench.check(["--repair", "salvage", "--salvage-to", "saved", "disk"]);
    assert!(matches!(answer.code, 0 | 2), "{}", answer.stderr);
    assert!(fs::read(bench.path("disk")).unwrap() == before);
    assert_eq!(bench.check(["saved"]).code, 0);
    assert!(File::open(bench.path("saved")).unwrap().len().unwrap() > 0);
    let again = bench.check(["--repair", "salvage", "--salvage-to", "saved", "disk"]);
    assert_eq!(again.code, 1, "{}", again.stdout);
    assert!(again.stderr.contains("saved"), "{}", again.stderr);
}

#[test]
fn switches_that_contradict_each_other_are_refused() {
    let bench = Workbench::new();
    bench.leaky("disk");
    bench.leaky("second");
    let before = fs::read(bench.path("disk")).unwrap();
    for words in [
        &["--plan", "disk"][..],
        &["--yes", "disk"],
        &["--repair", "all", "--plan", "--yes", "disk"],
        &["--repair", "all", "--chain", "disk"],
        &["--repair", "most", "disk"],
        &["--repair", "all", "--undo", "disk.undo", "disk"],
        &["--repair", "all", "--yes"],
        &["--repair", "all", "--yes", "disk", "second"],
        &["--undo", "missing.undo", "disk"],
    ] {
        let answer = bench.check(words);
        assert_eq!(answer.code, 1, "{words:?}: {}", answer.stdout);
        assert!(!answer.stderr.is_empty(), "{words:?}");
        assert!(fs::read(bench.path("disk")).unwrap() == before, "{words:?}");
    }
}
