//! Two copies of one folder: the real program runs in one, ours in the other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// Whether the tools are there. If not, says how many cases that leaves out; where they are required, fails.
pub(crate) fn is_available(cases: usize, what: &str) -> bool {
    let there = |name: &str| Command::new(name).arg("--version").output().is_ok();
    if there("qemu-img") && there("qemu-io") {
        return true;
    }
    let required = ["QCOW2_REQUIRE_QEMU", "CI"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    assert!(
        !required,
        "qemu-img or qemu-io not found, but required by the environment"
    );
    eprintln!("skipped {cases} {what}: qemu-img or qemu-io not found");
    false
}

/// A folder with our program under the other tools' names.
pub(crate) struct Ours {
    folder: TempDir,
}

impl Ours {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["qemu-img", "qemu-io"] {
            let link = folder.path().join(name);
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_qcow2"), link).unwrap();
        }
        Self { folder }
    }

    /// The program under one of the names.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Runs a program in a folder.
pub(crate) fn run(program: &Path, words: &[&str], folder: &Path) -> Output {
    Command::new(program)
        .args(words)
        .current_dir(folder)
        .env("TZ", "UTC")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// What a program said, and how it ended, as far as it does not depend on when and where.
#[derive(Debug, PartialEq, Eq)]
struct Heard {
    out: String,
    err: String,
    code: Option<i32>,
}

impl Heard {
    fn new(output: &Output) -> Self {
        Self {
            out: filtered(&output.stdout),
            err: filtered(&output.stderr),
            code: output.status.code(),
        }
    }
}

/// Without times, rates, dates, names of programs, and sizes that only the file system knows.
fn filtered(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text).replace('\r', "\n");
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.contains("disk size: ") || line.contains("\"actual-size\": ") {
            continue;
        }
        if let Some((before, _)) = line.split_once(" ops; ") {
            lines.push(format!("{before} ops"));
            continue;
        }
        if line.starts_with("Run completed in ") {
            lines.push("Run completed".to_owned());
            continue;
        }
        if line.starts_with("Try '") {
            lines.push("Try --help".to_owned());
            continue;
        }
        let words: Vec<_> = line
            .split(' ')
            .map(|word| match word.rsplit_once('/') {
                Some((_, name)) if word.contains("qemu-i") => name.to_owned(),
                _ if is_date(word) => "DATE".to_owned(),
                _ => word.to_owned(),
            })
            .collect();
        let line = words.join(" ").replace("'/usr/bin/", "'");
        if line.contains("\"date-") {
            continue;
        }
        lines.push(line);
    }
    lines.join("\n")
}

/// A day, or a time of it.
fn is_date(word: &str) -> bool {
    let parts: Vec<_> = word.split(['-', ':']).collect();
    parts.len() == 3
        && parts
            .iter()
            .all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}

fn copy_folder(from: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

/// Runs each command line with both programs, each time in fresh copies of the scene, and collects the differences.
pub(crate) fn compare(tool: &str, scene: &Path, lines: &[&[&str]]) {
    let ours = Ours::new();
    let mut differences = Vec::new();
    for words in lines {
        let (one, other) = (copy_folder(scene), copy_folder(scene));
        let real = Heard::new(&run(Path::new(tool), words, one.path()));
        let here = Heard::new(&run(&ours.program(tool), words, other.path()));
        if real != here {
            differences.push(format!(
                "{tool} {}\n  real {real:?}\n  here {here:?}",
                words.join(" ")
            ));
        }
    }
    assert!(
        differences.is_empty(),
        "{} of {} differ:\n{}",
        differences.len(),
        lines.len(),
        differences.join("\n")
    );
}

/// Runs each command line with both programs. The image `made` must then have the size of the real tool's, read alike, and be
/// sound, and the same places must be allocated.
pub(crate) fn compare_disks(scene: &Path, made: &str, lines: &[&[&str]]) {
    let ours = Ours::new();
    for words in lines {
        let (one, other) = (copy_folder(scene), copy_folder(scene));
        let real = run(Path::new("qemu-img"), words, one.path());
        let here = run(&ours.program("qemu-img"), words, other.path());
        assert!(
            real.status.success() && here.status.success(),
            "{words:?}: {here:?}"
        );
        let tool =
            |words: &[&str], folder: &TempDir| run(Path::new("qemu-img"), words, folder.path());
        let theirs = one.path().join(made);
        let theirs = theirs.to_str().unwrap();
        let same = tool(&["compare", "-s", theirs, made], &other);
        let text = String::from_utf8_lossy(&same.stdout);
        assert_eq!(
            text,
            "Images are identical.
",
            "{words:?}: {same:?}"
        );
        let check = tool(&["check", made], &other);
        assert!(check.status.success(), "{words:?}: {check:?}");
    }
}

/// A folder of images that the real tools made: plain, overlay, encrypted, compressed, with a snapshot and a bitmap, with one that leaves no place for another, leaking, damaged, raw.
pub(crate) fn scene() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let make = |tool: &str, words: &[&str]| {
        let output = run(Path::new(tool), words, folder.path());
        assert!(output.status.success(), "{tool} {words:?}: {output:?}");
    };
    let img = |line: &str| make("qemu-img", &line.split(' ').collect::<Vec<_>>());
    img("create -q -f qcow2 base.qcow2 1M");
    img("create -q -f qcow2 c.qcow2 1M");
    make(
        "qemu-io",
        &[
            "-c",
            "write 0 64k",
            "-c",
            "write -z 128k 64k",
            "-c",
            "write -c 256k 64k",
            "c.qcow2",
        ],
    );
    // With a bitmap, and two clusters behind it.
    img("create -q -f qcow2 full.qcow2 10M");
    img("bitmap --add full.qcow2 b1");
    img("resize -q -f raw full.qcow2 448k");
    img("create -q -f qcow2 -b c.qcow2 -F qcow2 d.qcow2");
    make("qemu-io", &["-c", "write 512k 64k", "d.qcow2"]);
    img("create -q -f qcow2 -o data_file=ext.raw ext.qcow2 1M");
    img(
        "create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 l.qcow2 1M",
    );
    img("create -q -f qcow2 s.qcow2 1M");
    img("snapshot -c one s.qcow2");
    img("bitmap --add s.qcow2 b");
    img("create -q -f raw r.raw 1M");
    img("create -q -f qcow2 leak.qcow2 1M");
    make("qemu-io", &["-c", "write 0 128k", "leak.qcow2"]);
    // The refcount of a cluster behind those in use.
    let path = folder.path().join("leak.qcow2");
    let sound = fs::read(&path).unwrap();
    let mut bytes = sound.clone();
    bytes[0x20000 + 2 * 6 + 1] = 3;
    fs::write(path, bytes).unwrap();
    // One in use has none; then the image was not closed, too; then two references are counted for a table, and its flag says so.
    let mut bytes = sound.clone();
    bytes[0x20000 + 2 * 6 + 1] = 0;
    fs::write(folder.path().join("lost.qcow2"), &bytes).unwrap();
    bytes[79] |= 1;
    fs::write(folder.path().join("dirty.qcow2"), &bytes).unwrap();
    let mut bytes = sound;
    bytes[0x20000 + 2 * 4 + 1] = 2;
    bytes[0x30000] &= 0x7f;
    fs::write(folder.path().join("flag.qcow2"), &bytes).unwrap();
    folder
}

/// A file whose name is no UTF-8, from both programs: made, named as a backing file, told of, checked.
pub(crate) fn compare_odd_names() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt as _;

    let ours = Ours::new();
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let lines: &[(&str, &[&[u8]])] = &[
        (
            "qemu-img",
            &[b"create", b"-f", b"qcow2", b"b\xe9.qcow2", b"1M"],
        ),
        ("qemu-io", &[b"-c", b"write -P 3 0 64k", b"b\xe9.qcow2"]),
        (
            "qemu-img",
            &[
                b"create",
                b"-f",
                b"qcow2",
                b"-b",
                b"b\xe9.qcow2",
                b"-F",
                b"qcow2",
                b"t\xff\xfe.qcow2",
            ],
        ),
        ("qemu-img", &[b"check", b"t\xff\xfe.qcow2"]),
        ("qemu-img", &[b"map", b"t\xff\xfe.qcow2"]),
        ("qemu-img", &[b"map", b"--output=json", b"t\xff\xfe.qcow2"]),
        (
            "qemu-img",
            &[b"convert", b"-O", b"raw", b"t\xff\xfe.qcow2", b"r\x80.raw"],
        ),
        ("qemu-img", &[b"compare", b"t\xff\xfe.qcow2", b"r\x80.raw"]),
        ("qemu-img", &[b"resize", b"-f", b"raw", b"r\x80.raw", b"2M"]),
        (
            "qemu-img",
            &[
                b"rebase",
                b"-u",
                b"-b",
                b"r\x80.raw",
                b"-F",
                b"raw",
                b"t\xff\xfe.qcow2",
            ],
        ),
        ("qemu-img", &[b"check", b"gone\xff"]),
    ];
    for (tool, words) in lines {
        let words: Vec<OsString> = words
            .iter()
            .map(|word| OsString::from_vec(word.to_vec()))
            .collect();
        let say = |program: &Path, folder: &TempDir| {
            let output = Command::new(program)
                .args(&words)
                .current_dir(folder.path())
                .output()
                .unwrap();
            // The time that a request takes is its own.
            let lines = output.stdout.split(|byte| *byte == b'\n');
            let out: Vec<_> = lines
                .filter(|line| !line.ends_with(b"ops/sec)"))
                .map(<[u8]>::to_vec)
                .collect();
            (output.status.code(), out, output.stderr)
        };
        let real = say(Path::new(tool), &folders[0]);
        let here = say(&ours.program(tool), &folders[1]);
        assert_eq!(here, real, "{tool} {words:?}");
    }
    let backing = |folder: &TempDir| {
        let name = OsString::from_vec(b"t\xff\xfe.qcow2".to_vec());
        let bytes = fs::read(folder.path().join(name)).unwrap();
        let number = |at: usize| {
            let number = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
            usize::try_from(number).unwrap()
        };
        let len = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
        bytes[number(8)..number(8) + len].to_vec()
    };
    assert_eq!(backing(&folders[1]), backing(&folders[0]));
    assert_eq!(backing(&folders[1]), b"r\x80.raw");
}
