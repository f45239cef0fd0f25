//! A folder of images, `qemu-img` and `qemu-io` to work on them, and the judgement of both checkers.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use qcow2_check::{Options, Verdict, check};
use qcow2_format::Header;
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, ImageError};
use qcow2_io::{File, FileOptions, LockMode, Memory, Storage};
use tempfile::TempDir;

/// Whether the tools are there. If not, says what a test leaves out; where they are required, fails.
pub(crate) fn is_available(what: &str) -> bool {
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
    eprintln!("skipped {what}: {missing} not found");
    false
}

/// A folder of its own, in memory where the system has a place for that.
#[derive(Debug)]
pub(crate) struct Folder {
    dir: TempDir,
}

impl Folder {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("qcow2-embed-")
            .tempdir_in("/dev/shm");
        Self {
            dir: dir.or_else(|_| tempfile::tempdir()).unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Makes an image with this crate.
    pub(crate) fn create(&self, name: &str, options: &CreateOptions) {
        let file = FileOptions::new().write(true).create(true);
        Image::create(&file.open(self.path(name)).unwrap(), options).unwrap();
    }

    /// Changes the header of an image in the folder.
    pub(crate) fn edit_header(&self, name: &str, change: impl FnOnce(&mut Header)) {
        edit_header(&self.open(name), change);
    }

    /// A file, without locks.
    pub(crate) fn open(&self, name: &str) -> File {
        let options = FileOptions::new().write(true).lock(LockMode::None);
        options.open(self.path(name)).unwrap()
    }

    /// All files, also those in folders, with their bytes.
    pub(crate) fn content(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        collect(self.dir.path(), &mut found);
        found
    }

    /// Runs a tool in the folder, whatever comes of it.
    pub(crate) fn run(&self, tool: &str, args: &[&str]) -> Output {
        Command::new(tool)
            .args(args)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs `qemu-img`, which must work; `line` is split at spaces.
    pub(crate) fn img(&self, line: &str) -> String {
        let args: Vec<&str> = line.split_whitespace().collect();
        let output = self.run("qemu-img", &args);
        let words = words_of(&output);
        assert!(output.status.success(), "qemu-img {line}: {words}");
        words
    }

    /// Has `qemu-io` run commands on an image, all of which must work.
    pub(crate) fn io(&self, name: &str, commands: &[&str]) {
        let mut args = vec!["-f", "qcow2", "-d", "unmap"];
        args.extend(commands.iter().flat_map(|command| ["-c", *command]));
        args.push(name);
        let output = self.run("qemu-io", &args);
        let words = words_of(&output);
        assert!(
            output.status.success() && !words.contains("failed"),
            "{commands:?}: {words}"
        );
    }

    /// Has `qemu-io` run commands on an image and then die.
    pub(crate) fn io_and_abort(&self, name: &str, commands: &[&str]) {
        let mut args = vec!["-f", "qcow2", "-d", "unmap"];
        args.extend(commands.iter().flat_map(|command| ["-c", *command]));
        args.extend(["-c", "flush", "-c", "abort", name]);
        let output = self.run("qemu-io", &args);
        assert!(!output.status.success(), "{}", words_of(&output));
    }

    /// What the guest sees, as QEMU tells it.
    pub(crate) fn guest_bytes_by_qemu(&self, name: &str) -> Vec<u8> {
        self.img(&format!("convert -f qcow2 -O raw {name} {name}.converted"));
        self.read(&format!("{name}.converted"))
    }

    /// Asserts that this workspace's checker finds nothing, not even a leak.
    pub(crate) fn assert_sound_here(&self, name: &str) {
        assert_sound(&self.open(name));
    }

    /// Asserts that neither checker finds anything, not even a leak.
    pub(crate) fn assert_sound(&self, name: &str) {
        assert_sound(&self.open(name));
        self.img(&format!("check -q -f qcow2 {name}"));
    }
}

fn collect(folder: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else {
            found.insert(path.clone(), fs::read(path).unwrap());
        }
    }
}

fn words_of(output: &Output) -> String {
    let words = [output.stdout.as_slice(), &output.stderr].concat();
    String::from_utf8_lossy(&words).into_owned()
}

/// Asserts that this workspace's checker finds nothing, not even a leak.
pub(crate) fn assert_sound(storage: &dyn Storage) {
    let report = check(storage, &Options::default());
    assert_eq!(report.verdict(), Verdict::Sound, "{:#?}", report.findings);
}

/// The header as it stands in a storage.
pub(crate) fn header_of(storage: &dyn Storage) -> Header {
    let mut prefix = [0; 104];
    storage.read_at(&mut prefix, 0).unwrap();
    let mut cluster = vec![0; Header::probe(&prefix).unwrap()];
    storage.read_at(&mut cluster, 0).unwrap();
    Header::decode(&cluster).unwrap()
}

/// Changes the header in a storage.
pub(crate) fn edit_header(storage: &dyn Storage, change: impl FnOnce(&mut Header)) {
    let mut header = header_of(storage);
    change(&mut header);
    storage.write_at(&header.encode().unwrap(), 0).unwrap();
}

/// A new image in memory.
pub(crate) fn in_memory(options: &CreateOptions) -> Arc<Memory> {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, options).unwrap();
    memory
}

/// What a crash leaves of a storage that writes at once.
pub(crate) fn copy_of(memory: &Memory) -> Arc<Memory> {
    Arc::new(Memory::from(memory.to_vec().unwrap()))
}

/// All that the guest sees.
pub(crate) fn guest_bytes(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(image.virtual_size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// An error and all its causes in one line.
pub(crate) fn words(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        words.push_str(": ");
        words.push_str(&cause.to_string());
        source = cause.source();
    }
    words
}

/// The words of an error that must be there.
pub(crate) fn refusal(result: Result<Image, ImageError>) -> String {
    words(&result.expect_err("the image is refused"))
}

/// Bytes that differ with their place and with `salt`; a part repeats, so that they can be compressed.
pub(crate) fn noise(len: usize, salt: u64) -> Vec<u8> {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = state.to_be_bytes();
        let times = usize::from(word[0] % 16) + 1;
        bytes.extend(word.repeat(times));
    }
    bytes.truncate(len);
    bytes
}

/// A disk of plain bytes that must agree with another one.
#[derive(Clone, Debug)]
pub(crate) struct Plain(pub(crate) Vec<u8>);

impl Plain {
    pub(crate) fn zeros(len: usize) -> Self {
        Self(vec![0; len])
    }

    /// Writes to both.
    pub(crate) fn write(&mut self, disk: &dyn Storage, offset: usize, bytes: &[u8]) {
        disk.write_at(bytes, offset as u64).unwrap();
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Notes that a range reads as zeros now.
    pub(crate) fn clear(&mut self, range: std::ops::Range<usize>) {
        self.0[range].fill(0);
    }

    /// The same of a data file: it may be longer by zeros that no guest sees, as it is for QEMU.
    pub(crate) fn assert_begins(&self, found: &[u8]) {
        assert!(found.len() < self.0.len() + (1 << 16));
        let (disk, rest) = found.split_at(self.0.len());
        self.assert_is(disk);
        assert!(rest.iter().all(|byte| *byte == 0));
    }

    pub(crate) fn assert_is(&self, found: &[u8]) {
        assert_eq!(found.len(), self.0.len());
        let differs = self.0.iter().zip(found).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the first byte that differs");
    }
}
