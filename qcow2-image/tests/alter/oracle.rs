//! `qemu-img` and `qemu-io`, run in a folder of their own.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use qcow2_image::{Image, ImageOptions};
use qcow2_io::{File, FileOptions, LockMode};
use tempfile::TempDir;

use crate::rig::assert_sound;

/// Whether the tools are there. If not, says what a test leaves out; where they are required, fails.
pub(crate) fn is_available(cases: usize, what: &str) -> bool {
    let missing: Vec<_> = ["qemu-img", "qemu-io"]
        .into_iter()
        .filter(|tool| Command::new(tool).arg("--version").output().is_err())
        .collect();
    if missing.is_empty() {
        return true;
    }
    let missing = missing.join(", ");
    let required = ["QCOW2_REQUIRE_QEMU", "CI"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    assert!(
        !required,
        "{missing} not found, but required by the environment"
    );
    eprintln!("skipped {cases} {what}: {missing} not found");
    false
}

/// A folder of images, in memory where the system has a place for that.
#[derive(Debug)]
pub(crate) struct Folder {
    dir: TempDir,
}

impl Folder {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("qcow2-alter-")
            .tempdir_in("/dev/shm");
        Self {
            dir: dir.or_else(|_| tempfile::tempdir()).unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn copy(&self, from: &str, to: &str) {
        std::fs::copy(self.path(from), self.path(to)).unwrap();
    }

    /// A file for writing, without locks.
    pub(crate) fn file(&self, name: &str) -> File {
        let options = FileOptions::new().write(true).lock(LockMode::None);
        options.open(self.path(name)).unwrap()
    }

    /// Opens an image, and what it names.
    pub(crate) fn open(&self, name: &str) -> Image {
        self.open_with(name, Image::options())
    }

    pub(crate) fn open_with(&self, name: &str, options: ImageOptions) -> Image {
        let options = options.references(qcow2_image::References::All);
        options.open_path(self.path(name)).unwrap()
    }

    /// Runs a tool in the folder; gives what it said, or as an error why it failed.
    pub(crate) fn run(&self, tool: &str, args: &[&str]) -> Result<String, String> {
        let output = Command::new(tool)
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let words = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(words(&output.stdout))
        } else {
            Err(words(&output.stderr))
        }
    }

    /// Runs `qemu-img`, which must work; `line` is split at spaces.
    pub(crate) fn img(&self, line: &str) -> String {
        let args: Vec<&str> = line.split_whitespace().collect();
        let result = self.run("qemu-img", &args);
        result.unwrap_or_else(|words| panic!("qemu-img {line}: {words}"))
    }

    /// Has `qemu-io` run commands on an image, all of which must work.
    pub(crate) fn io(&self, name: &str, commands: &[&str]) {
        let mut args = vec!["-f", "qcow2", "-d", "unmap"];
        args.extend(commands.iter().flat_map(|command| ["-c", *command]));
        args.push(name);
        let words = self.run("qemu-io", &args).unwrap();
        assert!(!words.contains("failed"), "{commands:?}: {words}");
    }

    /// Asserts that neither checker finds anything, not even a leak.
    pub(crate) fn assert_sound(&self, name: &str) {
        assert_sound(&self.file(name));
        self.img(&format!("check -q -f qcow2 {name}"));
    }

    /// Asserts that two images have the same disk, and the same disk in the snapshots named.
    pub(crate) fn assert_same(&self, one: &str, other: &str, snapshots: &[&str]) {
        self.img(&format!("compare -f qcow2 -F qcow2 {one} {other}"));
        for snapshot in snapshots {
            for name in [one, other] {
                self.img(&format!(
                    "convert -f qcow2 -O raw -l snapshot.name={snapshot} {name} {name}.raw"
                ));
            }
            let read = |name: &str| std::fs::read(self.path(&format!("{name}.raw"))).unwrap();
            assert!(read(one) == read(other), "{snapshot}");
        }
    }
}
