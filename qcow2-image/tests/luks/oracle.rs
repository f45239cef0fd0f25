//! `qemu-img` and `qemu-io`, run in a folder of their own.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use qcow2_format::Header;
use qcow2_image::luks::LuksArea;
use qcow2_io::{File, FileOptions, LockMode, Storage};
use tempfile::TempDir;

/// Where a host offset is in an entry of L1 or L2.
const OFFSET_BITS: u64 = 0x00ff_ffff_ffff_fe00;

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
            .prefix("qcow2-luks-")
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
    pub(crate) fn open(&self, name: &str) -> File {
        let options = FileOptions::new().write(true).lock(LockMode::None);
        options.open(self.path(name)).unwrap()
    }

    /// Makes an encrypted image; `options` are those behind `encrypt.`.
    pub(crate) fn create(
        &self,
        name: &str,
        passphrase: &str,
        options: &[(&str, &str)],
    ) -> Result<(), String> {
        let mut all = vec!["encrypt.format=luks,encrypt.key-secret=key".to_owned()];
        for (key, value) in options {
            all.push(format!("encrypt.{key}={value}"));
        }
        let all = all.join(",");
        let object = object("key", passphrase);
        let args = [
            "create", "-q", "-f", "qcow2", "--object", &object, "-o", &all, name, "1M",
        ];
        self.run("qemu-img", &args).map(drop)
    }

    /// Changes key slots of an image that `passphrase` opens. `options` are those behind `encrypt.`; a secret in them is
    /// given as its passphrase.
    pub(crate) fn amend(
        &self,
        name: &str,
        passphrase: &str,
        options: &[(&str, &str)],
        force: bool,
    ) -> Result<(), String> {
        let mut args = vec!["amend".to_owned()];
        args.extend(force.then(|| "--force".to_owned()));
        args.extend(["--object".to_owned(), object("key", passphrase)]);
        let mut all = Vec::new();
        for (key, value) in options {
            if key.ends_with("-secret") {
                args.extend(["--object".to_owned(), object(key, value)]);
                all.push(format!("encrypt.{key}={key}"));
            } else {
                all.push(format!("encrypt.{key}={value}"));
            }
        }
        args.extend(["--image-opts".to_owned(), image(name)]);
        args.extend(["-o".to_owned(), all.join(",")]);
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        self.run("qemu-img", &args).map(drop)
    }

    /// Whether a passphrase opens an image.
    pub(crate) fn opens(&self, name: &str, passphrase: &str) -> bool {
        self.io(name, passphrase, "read 0 512").is_ok()
    }

    /// Does something to the disk.
    pub(crate) fn io(&self, name: &str, passphrase: &str, command: &str) -> Result<String, String> {
        let (object, image) = (object("key", passphrase), image(name));
        let args = ["--object", &object, "--image-opts", &image, "-c", command];
        self.run("qemu-io", &args)
    }

    /// What is told about an image, as JSON.
    pub(crate) fn info(&self, name: &str) -> String {
        let args = ["info", "--output=json", "-f", "qcow2", name];
        self.run("qemu-img", &args).unwrap()
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String, String> {
        let output = Command::new(program)
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let words = [output.stdout, output.stderr].concat();
        let words = String::from_utf8_lossy(&words).into_owned();
        if output.status.success() {
            Ok(words)
        } else {
            Err(words)
        }
    }
}

fn object(id: &str, passphrase: &str) -> String {
    format!("secret,id={id},data={passphrase}")
}

fn image(name: &str) -> String {
    format!("driver=qcow2,file.filename={name},encrypt.key-secret=key")
}

/// Where an image says that its LUKS area is.
pub(crate) fn area_of(file: &File) -> LuksArea {
    (*header_of(file).crypto().unwrap()).into()
}

/// Where the first cluster of the disk lies.
pub(crate) fn first_cluster(file: &File) -> u64 {
    let entry = |offset: u64| {
        let mut bytes = [0; 8];
        file.read_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes) & OFFSET_BITS
    };
    entry(entry(header_of(file).l1_table_offset.get()))
}

fn header_of(file: &File) -> Header {
    let mut cluster = vec![0; 65536];
    file.read_at(&mut cluster, 0).unwrap();
    Header::decode(&cluster).unwrap()
}

/// Calls `work` for each item, on all cores.
pub(crate) fn on_all_cores<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, Into::into) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}
