use std::fs;
use std::process::{Command, Stdio};

use super::Bench;

/// Everything that loses data asks, and does nothing where nobody answers.
#[test]
fn what_loses_data_needs_leave() {
    let bench = Bench::with_disk();
    bench.ok(&["snapshot", "create", "disk.qcow2", "one"]);
    bench.ok(&["bitmap", "add", "disk.qcow2", "b"]);
    bench.ok(&["convert", "disk.qcow2", "copy.qcow2"]);
    let before = fs::read(bench.path("disk.qcow2")).unwrap();
    for words in [
        &["create", "disk.qcow2", "1M"][..],
        &["convert", "copy.qcow2", "disk.qcow2"],
        &["convert", "-n", "copy.qcow2", "disk.qcow2"],
        &["compact", "--into", "disk.qcow2", "copy.qcow2"],
        &["snapshot", "apply", "disk.qcow2", "one"],
        &["snapshot", "delete", "disk.qcow2", "one"],
        &["bitmap", "remove", "disk.qcow2", "b"],
    ] {
        let err = bench.fails(1, words);
        assert!(err.contains("nobody is there to be asked"), "{err}");
        assert!(err.contains("--yes"), "{err}");
    }
    let err = bench.fails(1, &["resize", "disk.qcow2", "1M"]);
    assert!(err.contains("--shrink"), "{err}");
    let after = bench.ok(&["snapshot", "list", "disk.qcow2"]);
    assert!(after.contains("one"));
    // Opening for writing may mark a bitmap as in use and back, but the disk and its states are as they were.
    assert_eq!(before.len() as u64, bench.len("disk.qcow2"));
    bench.same("disk.qcow2", "copy.qcow2");
}

#[test]
fn errors_name_the_file_and_what_to_do() {
    let bench = Bench::with_disk();
    fs::write(bench.path("some.raw"), vec![7; 4096]).unwrap();
    for (words, told) in [
        (
            &["info", "gone"][..],
            "gone: it can't be opened: No such file",
        ),
        (&["resize", "some.raw", "1M"], "-f raw"),
        (&["snapshot", "list", "some.raw"], "qcow2 convert"),
        (&["check", "some.raw"], "does not start as a qcow2 image"),
        (
            &["snapshot", "diff", "disk.qcow2", "x"],
            "qcow2 snapshot list",
        ),
        (&["bitmap", "clear", "disk.qcow2", "x"], "qcow2 bitmap list"),
        (
            &["amend", "-o", "cluster_size=4k", "disk.qcow2"],
            "qcow2 convert",
        ),
        (&["amend", "disk.qcow2"], "nothing is to be changed"),
        (&["commit", "disk.qcow2"], "there is no layer 1"),
        (&["rebase", "disk.qcow2"], "--no-backing"),
        (
            &["convert", "-c", "-O", "raw", "disk.qcow2", "x"],
            "-O qcow2",
        ),
        (&["convert", "disk.qcow2", "./disk.qcow2"], "the same file"),
        (&["create", "new.qcow2"], "the size is missing"),
        (&["measure"], "--size"),
        (&["explain", "LEEK"], "LEAK"),
        (&["map", "--passphrase-file", "gone", "disk.qcow2"], "gone"),
        (
            &["create", "--encrypt", "luks", "x.qcow2", "1M"],
            "--new-passphrase-file",
        ),
    ] {
        let err = bench.fails(1, words);
        assert!(err.contains(told), "{words:?}: {err}");
        assert!(err.starts_with("error: "), "{err}");
    }
    for name in ["x", "x.qcow2", "new.qcow2"] {
        assert!(!bench.path(name).exists(), "{name}");
    }
}

#[test]
fn a_wrong_command_line_ends_with_one_but_a_comparison_with_two() {
    let bench = Bench::new();
    for words in [
        &["create"][..],
        &["frobnicate"],
        &[],
        &["create", "a.qcow2", "12Q"],
        &["resize", "a.qcow2", "1x"],
        &["audit"],
        &["map", "--references", "some", "a"],
        &["repair", "--undo", "a", "--plan", "b"],
    ] {
        let err = bench.fails(1, words);
        assert!(err.contains("Usage") || err.contains("--help"), "{err}");
    }
    bench.fails(2, &["compare", "a"]);
    bench.ok(&["compare", "--help"]);
}

#[test]
fn names_in_images_are_followed_only_where_that_is_allowed() {
    let bench = Bench::with_disk();
    fs::create_dir(bench.path("sub")).unwrap();
    // The name was typed, so it is the user's own.
    let words = [
        "create",
        "-b",
        "../disk.qcow2",
        "-F",
        "qcow2",
        "sub/top.qcow2",
    ];
    bench.ok(&words);
    let err = bench.fails(1, &["map", "sub/top.qcow2"]);
    assert!(err.contains("outside"), "{err}");
    assert!(err.contains("--references"), "{err}");
    bench.ok(&["info", "sub/top.qcow2"]);
    bench.ok(&["map", "--references", "all", "sub/top.qcow2"]);
    let allowed = format!("allow:{}", bench.path("disk.qcow2").display());
    bench.ok(&["map", "--references", &allowed, "sub/top.qcow2"]);
    bench.fails(1, &["map", "--references", "deny", "sub/top.qcow2"]);
    bench.ok(&["create", "--data-file", "d.raw", "data.qcow2", "1M"]);
    bench.ok(&["map", "data.qcow2"]);
    bench.fails(1, &["map", "--references", "deny", "data.qcow2"]);
    bench.ok(&["info", "data.qcow2"]);
}

#[test]
fn an_image_in_use_is_read_beside_its_writer_only_when_asked() {
    let bench = Bench::with_disk();
    let mut writer = Command::new(env!("CARGO_BIN_EXE_qcow2"))
        .args(["io", "disk.qcow2"])
        .current_dir(bench.folder())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The prompt says that the image is open.
    let mut prompt = [0; 8];
    std::io::Read::read_exact(writer.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    let info = bench.fails(1, &["info", "disk.qcow2"]);
    let shared = bench.run(&["info", "--force-share", "disk.qcow2"]);
    let resize = bench.fails(1, &["resize", "disk.qcow2", "1G"]);
    let check = bench.fails(1, &["check", "disk.qcow2"]);
    drop(writer.stdin.take());
    writer.wait().unwrap();
    assert!(info.contains("--force-share (-U)"), "{info}");
    assert_eq!(shared.code, 0, "{shared:?}");
    assert!(resize.contains("close it there first"), "{resize}");
    assert!(!resize.contains("-U"), "{resize}");
    assert!(check.contains("--online"), "{check}");
    bench.ok(&["info", "disk.qcow2"]);
}

#[test]
fn failures_are_json_on_standard_error_when_asked() {
    let bench = Bench::new();
    let answer = bench.run(&["info", "--json", "gone"]);
    assert_eq!((answer.code, answer.out.as_str()), (1, ""));
    let told: serde_json::Value = serde_json::from_str(&answer.err).unwrap();
    assert_eq!(told["exit-code"], 1);
    assert!(told["error"].as_str().unwrap().starts_with("gone: "));
    let answer = bench.run(&["compare", "--json", "gone", "gone"]);
    let told: serde_json::Value = serde_json::from_str(&answer.err).unwrap();
    assert_eq!((answer.code, told["exit-code"].as_u64()), (2, Some(2)));
}

#[test]
fn the_quiet_hear_what_they_asked_for_and_what_is_wrong() {
    let bench = Bench::with_disk();
    assert_eq!(bench.ok(&["resize", "-q", "disk.qcow2", "+1M"]), "");
    assert_eq!(bench.ok(&["check", "-q", "disk.qcow2"]), "");
    assert_ne!(bench.ok(&["info", "-q", "disk.qcow2"]), "");
    assert!(bench.fails(1, &["info", "-q", "gone"]).contains("gone"));
}

#[test]
fn what_was_to_be_replaced_is_there_when_the_work_fails() {
    let bench = Bench::with_disk();
    bench.ok(&["create", "old.qcow2", "1M"]);
    let old = fs::read(bench.path("old.qcow2")).unwrap();
    let mut names = listing(&bench);
    // An L2 table that starts within a cluster.
    let mut image = fs::read(bench.path("disk.qcow2")).unwrap();
    let l1 = usize::try_from(u64::from_be_bytes(image[40..48].try_into().unwrap())).unwrap();
    image[l1 + 6] = 2;
    fs::write(bench.path("broken.qcow2"), image).unwrap();
    names.push("broken.qcow2".to_owned());
    names.sort();
    for words in [
        ["convert", "broken.qcow2", "old.qcow2", "--yes"],
        ["compact", "broken.qcow2", "--into=old.qcow2", "--yes"],
        ["convert", "broken.qcow2", "old.qcow2", "-yOraw"],
        ["convert", "broken.qcow2", "new.qcow2", "--yes"],
    ] {
        let answer = bench.run(&words);
        assert_eq!(answer.code, 1, "{words:?}: {answer:?}");
        assert!(
            fs::read(bench.path("old.qcow2")).unwrap() == old,
            "{words:?}"
        );
        assert_eq!(listing(&bench), names, "{words:?}");
    }
    bench.ok(&["convert", "disk.qcow2", "old.qcow2", "--yes"]);
    bench.ok(&["compare", "disk.qcow2", "old.qcow2"]);
    assert_eq!(listing(&bench), names);
}

#[test]
fn a_replaced_file_keeps_its_mode_and_a_link_to_it_stays() {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    let bench = Bench::with_disk();
    bench.ok(&["create", "old.qcow2", "1M"]);
    let old = bench.path("old.qcow2");
    fs::set_permissions(&old, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("old.qcow2", bench.path("link.qcow2")).unwrap();
    bench.ok(&["convert", "disk.qcow2", "link.qcow2", "--yes"]);
    assert!(
        fs::symlink_metadata(bench.path("link.qcow2"))
            .unwrap()
            .is_symlink()
    );
    assert_eq!(
        fs::metadata(&old).unwrap().permissions().mode() & 0o7777,
        0o640
    );
    bench.ok(&["compare", "disk.qcow2", "old.qcow2"]);
}

#[test]
fn an_answer_that_is_lost_is_an_error_and_one_that_nobody_reads_is_none() {
    let bench = Bench::with_disk();
    let program = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2"));
        command.current_dir(bench.folder()).stdin(Stdio::null());
        command
    };
    for words in [
        ["info", "disk.qcow2"],
        ["map", "disk.qcow2"],
        ["audit", "disk.qcow2"],
    ] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = program().args(words).stdout(full).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}: {err}");
        assert!(err.starts_with("error: "), "{words:?}: {err}");
    }
    for words in [["map", "--json"], ["audit", "--json"], ["info", "--json"]] {
        let mut child = program();
        child.args(words).arg("disk.qcow2");
        let mut child = child
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "{words:?}");
    }
}

#[test]
fn nothing_half_made_is_left_when_the_user_ends_it() {
    let bench = Bench::with_disk();
    bench.ok(&["create", "old.qcow2", "1M"]);
    let names = listing(&bench);
    let folder = fs::canonicalize(bench.folder()).unwrap();
    for (target, signal) in [
        ("new.qcow2", "INT"),
        ("old.qcow2", "INT"),
        ("new.raw", "TERM"),
    ] {
        let words = ["convert", "--yes", "--rate", "64k", "disk.qcow2", target];
        let child = Command::new(env!("CARGO_BIN_EXE_qcow2"))
            .args(words)
            .current_dir(bench.folder())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The new file is there, with a name or without.
        let descriptors = format!("/proc/{}/fd", child.id());
        while !fs::read_dir(&descriptors).unwrap().flatten().any(|entry| {
            fs::read_link(entry.path()).is_ok_and(|to| {
                let name = to
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                to.starts_with(&folder) && (name.starts_with('#') || name.starts_with(".qcow2-"))
            })
        }) {
            std::thread::yield_now();
        }
        let id = child.id().to_string();
        let kill = Command::new("kill")
            .args(["-s", signal, &id])
            .status()
            .unwrap();
        assert!(kill.success());
        let output = child.wait_with_output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}: {err}");
        assert!(err.contains("nothing of the new file is left"), "{err}");
        assert_eq!(listing(&bench), names, "{words:?}");
    }
    assert_eq!(
        bench.object(&["info", "old.qcow2"])["virtual-size"],
        1 << 20
    );
}

#[test]
fn hints_name_the_file_as_a_shell_takes_it() {
    let bench = Bench::with_disk();
    fs::write(bench.path("it's raw"), [7; 4096]).unwrap();
    let err = bench.fails(1, &["snapshot", "list", "it's raw"]);
    assert!(
        err.contains(r"`qcow2 convert 'it'\''s raw' NEW.qcow2`"),
        "{err}"
    );
    let err = bench.fails(1, &["snapshot", "apply", "disk.qcow2", "x"]);
    assert!(err.contains("`qcow2 snapshot list disk.qcow2`"), "{err}");
    let err = bench.fails(1, &["info", "."]);
    assert!(err.contains("`qcow2 audit .`"), "{err}");
    let err = bench.fails(1, &["create", "nowhere/disk.qcow2", "1M"]);
    assert!(
        err.contains("no file can be made in nowhere: No such file or directory"),
        "{err}"
    );
    for err in [
        err,
        bench.fails(1, &["info", "gone"]),
        bench.fails(1, &["repair", "gone"]),
    ] {
        assert!(
            !err.contains("os error") && !err.contains(".qcow2-"),
            "{err}"
        );
    }
}

#[test]
fn a_name_is_given_to_one_snapshot_only() {
    let bench = Bench::with_disk();
    bench.ok(&["snapshot", "create", "disk.qcow2", "one"]);
    let err = bench.fails(1, &["snapshot", "create", "disk.qcow2", "one"]);
    assert!(err.contains("snapshot 1 has the name one already"), "{err}");
    assert!(err.contains("qcow2 snapshot delete disk.qcow2"), "{err}");
}

fn listing(bench: &Bench) -> Vec<String> {
    let all = fs::read_dir(bench.folder()).unwrap();
    let mut names: Vec<String> = all
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
