//! The program under its own name: each command on real images, what it says, and how it ends.

/// What each command does to an image.
mod commands;
/// Completions and man pages.
mod generated;
/// What can be copied and looked at: several files, descriptions, damaged files.
mod inputs;
/// Answers in JSON have the keys that docs/json.md tells of.
mod json;
/// Damage: checks, audits and repairs.
mod mend;
/// What is refused, and what is said then.
mod wrong;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A folder of its own to work in.
struct Bench(TempDir);

/// What the program said.
#[derive(Debug)]
struct Answer {
    code: i32,
    out: String,
    err: String,
}

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// With a disk of 16 MiB whose first and ninth megabyte hold something.
    fn with_disk() -> Self {
        let bench = Self::new();
        bench.ok(&["create", "disk.qcow2", "16M"]);
        bench.io("disk.qcow2", "write -P 1 0 1M");
        bench.io("disk.qcow2", "write -P 2 8M 1M");
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn folder(&self) -> &Path {
        self.0.path()
    }

    /// Runs the program; nobody is there to be asked.
    fn run(&self, words: &[&str]) -> Answer {
        let output = Command::new(env!("CARGO_BIN_EXE_qcow2"))
            .args(words)
            .current_dir(self.folder())
            .env("TZ", "UTC")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Answer {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// What it says when it has to succeed.
    fn ok(&self, words: &[&str]) -> String {
        let answer = self.run(words);
        assert_eq!(answer.code, 0, "{words:?}: {answer:?}");
        assert_eq!(answer.err, "", "{words:?}");
        answer.out
    }

    /// The objects that it answers in JSON, whatever its exit code.
    fn objects(&self, words: &[&str]) -> Vec<Value> {
        let mut all = words.to_vec();
        all.push("--json");
        let answer = self.run(&all);
        let lines = answer.out.lines();
        let objects: Vec<Value> = lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert!(!objects.is_empty(), "{words:?}: {answer:?}");
        objects
    }

    /// The one object that it answers.
    fn object(&self, words: &[&str]) -> Value {
        let mut objects = self.objects(words);
        assert_eq!(objects.len(), 1, "{words:?}");
        objects.remove(0)
    }

    /// How it fails, and that it does.
    fn fails(&self, code: i32, words: &[&str]) -> String {
        let answer = self.run(words);
        assert_eq!(answer.code, code, "{words:?}: {answer:?}");
        answer.err
    }

    /// A request of a guest.
    fn io(&self, image: &str, request: &str) {
        self.ok(&["io", "-c", request, image]);
    }

    fn same(&self, first: &str, second: &str) {
        assert_eq!(
            self.run(&["compare", first, second]).code,
            0,
            "{first} {second}"
        );
    }

    fn len(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().len()
    }
}
