use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::workbench::Workbench;

/// Whether the tools are there. If not, says so; where QEMU is required, fails.
fn has_qemu(test: &str) -> bool {
    let works = |tool| Command::new(tool).arg("--version").output().is_ok();
    if works("qemu-img") && works("qemu-io") {
        return true;
    }
    let required = ["QCOW2_REQUIRE_QEMU", "CI"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    assert!(!required, "qemu-img or qemu-io not found, but required");
    eprintln!("skipped {test}: qemu-img or qemu-io not found");
    false
}

impl Workbench {
    fn qemu(&self, tool: &str, args: &[&str]) {
        let dir = self.path("");
        let output = Command::new(tool)
            .args(args)
            .current_dir(dir)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{tool} {args:?}: {said}");
    }

    /// The exit code and the JSON of `qemu-img check`.
    fn qemu_check(&self, image: &str) -> (i32, Value) {
        let output = Command::new("qemu-img")
            .args(["check", "--output=json", image])
            .current_dir(self.path(""))
            .output()
            .unwrap();
        let json = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code().unwrap(), json)
    }
}

/// Every key that QEMU prints has the same value here, and one that it leaves out is left out.
fn assert_same(bench: &Workbench, image: &str, exit_code: i32) {
    const KEYS: [&str; 10] = [
        "filename",
        "format",
        "check-errors",
        "corruptions",
        "leaks",
        "image-end-offset",
        "total-clusters",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
    ];
    let (code, theirs) = bench.qemu_check(image);
    assert_eq!(code, exit_code, "{image}");
    assert_eq!(bench.check([image]).code, exit_code, "{image}");
    let ours = bench.json([image]).remove(0);
    for key in theirs.as_object().unwrap().keys() {
        assert!(KEYS.contains(&key.as_str()), "QEMU has a new key {key}");
    }
    for key in KEYS {
        assert_eq!(ours.get(key), theirs.get(key), "{image}: {key}");
    }
}

#[test]
fn json_has_the_fields_of_qemu_img_check() {
    if !has_qemu("json_has_the_fields_of_qemu_img_check") {
        return;
    }
    let bench = Workbench::new();
    let create = |name, options, size| {
        bench.qemu(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, name, size],
        );
    };
    create("empty", "compat=1.1", "0");
    create("plain", "cluster_size=4k", "1M");
    bench.qemu(
        "qemu-io",
        &["-c", "write 0 64k", "-c", "write 512k 4k", "plain"],
    );
    bench.qemu("qemu-img", &["snapshot", "-c", "before", "plain"]);
    bench.qemu("qemu-io", &["-c", "write 4k 8k", "plain"]);
    bench.qemu(
        "qemu-img",
        &["convert", "-q", "-c", "-O", "qcow2", "plain", "compressed"],
    );
    for image in ["empty", "plain", "compressed"] {
        assert_same(&bench, image, 0);
    }
    bench.leaky("leaky");
    assert_same(&bench, "leaky", 3);
    bench.corrupt("corrupt");
    assert_same(&bench, "corrupt", 2);
}

#[test]
fn a_locked_image_is_checked_only_if_that_is_asked_for_qemu() {
    if !has_qemu("a_locked_image_is_checked_only_if_that_is_asked_for_qemu") {
        return;
    }
    let bench = Workbench::new();
    bench.sound("disk");
    let mut writer = Command::new("qemu-io")
        .args(["-f", "qcow2", "disk"])
        .current_dir(bench.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The answer to a command shows that the image is open.
    let mut stdin = writer.stdin.take().unwrap();
    writeln!(stdin, "write 0 4k").unwrap();
    let mut answer = BufReader::new(writer.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("wrote") {
        line.clear();
        assert!(
            answer.read_line(&mut line).unwrap() > 0,
            "qemu-io ended early"
        );
    }

    let locked = bench.check(["disk"]);
    assert_eq!(locked.code, 1);
    assert!(locked.stdout.contains("another process uses the image"));
    assert!(locked.stdout.contains("\"write\"") && locked.stdout.contains("--online"));
    let online = bench.check(["--online", "disk"]);
    assert_eq!(online.code, 0, "{}", online.stdout);
    assert!(online.stdout.contains("beside a writer"));

    drop(stdin);
    writer.wait().unwrap();
    assert_eq!(bench.check(["disk"]).code, 0);
}
