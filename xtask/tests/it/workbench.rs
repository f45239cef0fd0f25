use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};

use qcow2_check::synth::Builder;
use qcow2_format::header::{Extension, Version};
use qcow2_format::{Geometry, GuestCluster, HostOffset};
use qcow2_io::FileOptions;
use serde_json::Value;
use tempfile::TempDir;

/// Cluster size of the images made here.
pub(crate) const CLUSTER: u64 = 4096;

/// A folder of its own to work in.
pub(crate) struct Workbench(TempDir);

/// What the program said.
pub(crate) struct Answer {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Workbench {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `check-image` in the folder.
    pub(crate) fn check<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Answer {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .arg("check-image")
            .args(args)
            .current_dir(self.0.path())
            .env("CARGO_TARGET_DIR", self.path("target"))
            .output()
            .unwrap();
        Answer::from(output)
    }

    /// The objects that `check-image --format json` prints.
    pub(crate) fn json<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Vec<Value> {
        let json = ["--format", "json"].map(|arg| OsStr::new(arg).to_owned());
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
        self.check(json.into_iter().chain(args)).objects()
    }

    /// Makes an image with two clusters of data and what `change` adds. Tells where the first data cluster lies.
    pub(crate) fn image(&self, name: &str, change: impl FnOnce(&mut Builder)) -> HostOffset {
        let geometry = Geometry::new(12, 4, false).unwrap();
        let mut image = Builder::new(Version::V3, geometry, 1 << 20);
        let first = image.data(GuestCluster::new(0), b"first").unwrap();
        image.data(GuestCluster::new(1), b"second").unwrap();
        change(&mut image);
        let options = FileOptions::new().write(true).create(true);
        image
            .finish(&options.open(self.path(name)).unwrap())
            .unwrap();
        first
    }

    pub(crate) fn sound(&self, name: &str) {
        self.image(name, |_| {});
    }

    /// An image with a backing file of format qcow2.
    pub(crate) fn overlay(&self, name: &str, backing: impl AsRef<[u8]>) {
        self.image(name, |image| {
            image.header.backing_name = Some(backing.as_ref().to_vec());
            let format = Extension::BackingFormat(b"qcow2".to_vec());
            image.header.extensions.push(format);
        });
    }

    /// An image whose cluster behind the last one in use has a refcount.
    pub(crate) fn leaky(&self, name: &str) {
        self.sound(name);
        let end = fs::metadata(self.path(name)).unwrap().len();
        self.set_refcount(name, end.div_ceil(CLUSTER), 1);
        self.open(name)
            .set_len(end.next_multiple_of(CLUSTER) + CLUSTER)
            .unwrap();
    }

    /// An image whose first data cluster is in use without a refcount.
    pub(crate) fn corrupt(&self, name: &str) {
        let first = self.image(name, |_| {});
        self.set_refcount(name, first.get() / CLUSTER, 0);
    }

    /// Changes the refcount of a cluster in the first refcount block.
    fn set_refcount(&self, name: &str, cluster: u64, refcount: u16) {
        let file = self.open(name);
        let table = read_u64(&file, 48);
        let block = read_u64(&file, table);
        file.write_all_at(&refcount.to_be_bytes(), block + 2 * cluster)
            .unwrap();
    }

    fn open(&self, name: &str) -> File {
        let mut options = File::options();
        options.read(true).write(true);
        options.open(self.path(name)).unwrap()
    }
}

fn read_u64(file: &File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

impl Answer {
    /// Each line as JSON.
    pub(crate) fn objects(&self) -> Vec<Value> {
        let lines = self.stdout.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}
