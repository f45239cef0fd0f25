//! Work as users do it.

use std::fs;
use std::path::Path;
use std::process::Output;

use super::beside::{Ours, run};

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn a_morning_of_work_ends_with_the_same_disk() {
    let ours = Ours::new();
    let folder = tempfile::tempdir().unwrap();
    let step = |tool: &str, words: &[&str]| -> String {
        let output = run(&ours.program(tool), words, folder.path());
        assert!(
            output.status.success(),
            "{tool} {words:?}: {}",
            text(&output)
        );
        text(&output)
    };
    step("qemu-img", &["create", "-f", "qcow2", "base.qcow2", "64M"]);
    step(
        "qemu-io",
        &[
            "-c",
            "write -P 1 0 1M",
            "-c",
            "write -P 2 32M 1M",
            "base.qcow2",
        ],
    );
    step(
        "qemu-img",
        &[
            "create",
            "-f",
            "qcow2",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
        ],
    );
    step("qemu-io", &["-c", "write -P 3 512k 1M", "top.qcow2"]);
    step("qemu-img", &["snapshot", "-c", "before", "top.qcow2"]);
    step(
        "qemu-io",
        &[
            "-c",
            "write -P 4 0 4k",
            "-c",
            "write -z 32M 64k",
            "top.qcow2",
        ],
    );
    step("qemu-img", &["resize", "top.qcow2", "+16M"]);
    step(
        "qemu-img",
        &["convert", "-O", "raw", "top.qcow2", "flat.raw"],
    );
    step(
        "qemu-img",
        &[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            "compression_type=zstd",
            "top.qcow2",
            "small.qcow2",
        ],
    );
    let same = step("qemu-img", &["compare", "flat.raw", "small.qcow2"]);
    assert_eq!(same, "Images are identical.\n");
    step("qemu-img", &["create", "-f", "qcow2", "other.qcow2", "64M"]);
    step(
        "qemu-img",
        &["rebase", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2"],
    );
    step("qemu-img", &["compare", "flat.raw", "top.qcow2"]);
    step("qemu-img", &["commit", "top.qcow2"]);
    step("qemu-img", &["compare", "flat.raw", "other.qcow2"]);
    for name in ["base.qcow2", "top.qcow2", "small.qcow2", "other.qcow2"] {
        let checked = step("qemu-img", &["check", name]);
        assert!(
            checked.starts_with("No errors were found on the image.\n"),
            "{checked}"
        );
    }
    let listed = step("qemu-img", &["snapshot", "-l", "top.qcow2"]);
    assert!(listed.contains("before"), "{listed}");
    step(
        "qemu-io",
        &[
            "-c",
            "read -P 4 0 4k",
            "-c",
            "read -P 3 512k 1M",
            "-c",
            "read -P 0 32M 64k",
            "other.qcow2",
        ],
    );
}

#[test]
fn a_refused_option_leaves_an_image_that_is_there_alone() {
    let ours = Ours::new();
    let folder = tempfile::tempdir().unwrap();
    let img = ours.program("qemu-img");
    assert!(
        run(&img, &["create", "-f", "qcow2", "a", "1M"], folder.path())
            .status
            .success()
    );
    let before = fs::read(folder.path().join("a")).unwrap();
    let output = run(
        &img,
        &["create", "-f", "qcow2", "-o", "cluster_size=3k", "a", "1M"],
        folder.path(),
    );
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(fs::read(folder.path().join("a")).unwrap(), before);
}

#[test]
fn version_and_help_are_told_before_any_command() {
    let ours = Ours::new();
    let folder = tempfile::tempdir().unwrap();
    for tool in ["qemu-img", "qemu-io"] {
        for option in ["--version", "-V"] {
            let output = run(&ours.program(tool), &[option], folder.path());
            assert!(output.status.success());
            assert!(
                text(&output).starts_with(&format!("{tool} version 10.0.")),
                "{}",
                text(&output)
            );
        }
        for option in ["--help", "-h"] {
            let output = run(&ours.program(tool), &[option], folder.path());
            assert!(output.status.success() && text(&output).starts_with("Usage: "));
        }
    }
    let output = run(&ours.program("qemu-img"), &["--help"], folder.path());
    assert!(text(&output).contains("\nSupported formats: "));
    let words = ["-T", "nothing", "create", "-q", "-f", "qcow2", "a", "1M"];
    assert!(
        run(&ours.program("qemu-img"), &words, folder.path())
            .status
            .success()
    );
}

#[test]
fn hostile_files_are_refused_with_a_word() {
    let ours = Ours::new();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    write("magic", b"QFI\xfb");
    write(
        "noise",
        &[b"QFI\xfb\0\0\0\x03".as_slice(), &[0xff; 600]].concat(),
    );
    write("deep.json", b"");
    let deep = format!("json:{}", "{'a':".repeat(10_000));
    for name in ["magic", "noise", &deep] {
        for command in ["info", "check", "map"] {
            let output = run(
                &ours.program("qemu-img"),
                &[command, "-f", "qcow2", name],
                folder.path(),
            );
            assert_eq!(output.status.code(), Some(1), "{command} {}", &name[..5]);
            assert!(text(&output).starts_with("qemu-img: "), "{}", text(&output));
        }
    }
}

#[test]
fn the_program_under_its_own_name_has_both_faces_and_explains_findings() {
    let folder = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_qcow2"));
    let output = run(
        program,
        &["img", "create", "-f", "qcow2", "a", "1M"],
        folder.path(),
    );
    assert!(output.status.success());
    let output = run(program, &["io", "-c", "length", "a"], folder.path());
    assert_eq!(text(&output), "1 MiB\n");
    let output = run(program, &["explain", "leak"], folder.path());
    assert!(
        text(&output).starts_with("LEAK (leak)\n"),
        "{}",
        text(&output)
    );
    let output = run(program, &["explain", "nothing"], folder.path());
    assert_eq!(output.status.code(), Some(1));
    let output = run(program, &["--help"], folder.path());
    assert!(output.status.success() && text(&output).contains("Examples:"));
    let output = run(program, &["frobnicate"], folder.path());
    assert_eq!(output.status.code(), Some(1));
}

/// What a commit says into a layer with a bitmap, of which a sector can't be written once it was flushed so often.
fn commit_beside_a_bitmap(flushes: u64, sector: u64) -> String {
    let ours = Ours::new();
    let folder = tempfile::tempdir().unwrap();
    let step = |tool: &str, words: &[&str]| run(&ours.program(tool), words, folder.path());
    let done = |tool: &str, words: &[&str]| {
        let output = step(tool, words);
        assert!(output.status.success(), "{words:?}: {}", text(&output));
    };
    done("qemu-img", &["create", "-f", "qcow2", "base.qcow2", "1M"]);
    done("qemu-img", &["bitmap", "--add", "base.qcow2", "changes"]);
    let steps = (1..=flushes).map(|state| {
        let next = state + 1;
        format!("{{'event': 'flush_to_disk', 'state': {state}, 'new_state': {next}}}")
    });
    let steps = steps.collect::<Vec<_>>().join(", ");
    let base = format!(
        "json:{{'driver': 'qcow2', 'node-name': 'base', 'file': {{'driver': 'blkdebug', \
           'image': {{'driver': 'file', 'filename': 'base.qcow2'}}, 'set-state': [{steps}], \
           'inject-error': [{{'event': 'none', 'iotype': 'write', 'state': {}, 'errno': 5, \
                             'sector': {sector}}}]}}}}",
        flushes + 1
    );
    let create = ["create", "-f", "qcow2", "-u", "-b", &base, "-F", "qcow2"];
    done("qemu-img", &[&create[..], &["top.qcow2", "1M"]].concat());
    done("qemu-io", &["-c", "write -P 7 0 64k", "top.qcow2"]);
    let output = step("qemu-img", &["commit", "top.qcow2"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    text(&output)
}

#[test]
fn a_commit_into_a_layer_that_can_not_be_closed_fails() {
    // The refcounts, when all that is committed is there already.
    assert_eq!(
        commit_beside_a_bitmap(4, 2 * 128),
        "qemu-img: Error while closing the image: Input/output error\n"
    );
    // The first cluster for what the bitmap has recorded: behind its table and the directory come an L2 table and data.
    let lost = "qemu-img: Lost persistent bitmaps during inactivation of node 'base': \
                Failed to write bitmap 'changes' to file: Input/output error\n";
    assert_eq!(
        commit_beside_a_bitmap(2, 8 * 128),
        format!("{lost}{lost}qemu-img: Error while closing the image: Invalid argument\n")
    );
}
