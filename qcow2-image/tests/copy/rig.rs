//! Content, sources, targets, and QEMU's tools.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use qcow2_check::{Options, Verdict, check};
use qcow2_format::header::CompressionType;
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::Random;
use qcow2_image::{Image, ImageOptions};
use qcow2_io::codec::Level;
use qcow2_io::{FileOptions, Memory, Storage, ZeroFlags};
use tempfile::TempDir;

/// The passphrase of encrypted images.
#[cfg(feature = "encryption")]
pub(crate) const PASSPHRASE: &str = "correct-horse";

/// Whether the tools are there. If not, says what a test leaves out; where they are required, fails.
pub(crate) fn is_available(what: &str) -> bool {
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        return true;
    }
    let required = ["QCOW2_REQUIRE_QEMU", "CI"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    assert!(
        !required,
        "qemu-img not found, but required by the environment"
    );
    eprintln!("skipped {what}: qemu-img not found");
    false
}

/// A folder of its own, in memory where the system has a place for that.
pub(crate) struct Folder {
    dir: TempDir,
}

impl Folder {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("qcow2-copy-")
            .tempdir_in("/dev/shm");
        let dir = dir.or_else(|_| tempfile::tempdir()).unwrap();
        fs::write(dir.path().join("secret"), "correct-horse").unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes what a storage has to a file.
    pub(crate) fn save(&self, name: &str, memory: &Memory) {
        fs::write(self.path(name), memory.to_vec().unwrap()).unwrap();
    }

    /// Runs `qemu-img` in the folder, with the secret at hand as `s`; it must work.
    pub(crate) fn img(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let output = Command::new("qemu-img")
            .arg(words.next().unwrap())
            .args(["--object", "secret,id=s,file=secret"])
            .args(words)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = [output.stdout.as_slice(), &output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(output.status.success(), "qemu-img {line}: {said}");
        said
    }

    /// Runs `qemu-img` in the folder and gives what it says; it must not find what it was asked to confirm.
    pub(crate) fn img_fails(&self, line: &str) -> String {
        let output = Command::new("qemu-img")
            .args(line.split_whitespace())
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "qemu-img {line}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs commands of `qemu-io` on an image of the folder.
    pub(crate) fn io(&self, commands: &[&str], name: &str) {
        let output = Command::new("qemu-io")
            .args(commands.iter().flat_map(|command| ["-c", command]))
            .args(["-f", "qcow2", name])
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        let worked = output.status.success() && !said.contains("failed");
        assert!(worked, "qemu-io {commands:?} {name}: {said}");
    }

    /// As [`io`](Self::io), but the program is killed instead of closing the image.
    pub(crate) fn io_killed(&self, commands: &[&str], name: &str) {
        let output = Command::new("qemu-io")
            .args(commands.iter().flat_map(|command| ["-c", command]))
            .args(["-c", "abort", "-f", "qcow2", name])
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), None, "qemu-io went on");
    }

    pub(crate) fn len(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().len()
    }
}

/// Bytes as disks have them: texts, noise, long and short zeros.
pub(crate) fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let piece = random.within(1..70_000) as usize;
        match random.below(5) {
            0 => bytes.resize(bytes.len() + piece, 0),
            1 => bytes.resize(bytes.len() + piece * 4, 0),
            2 => bytes.extend((0..piece).map(|_| random.draw().to_be_bytes()[0])),
            3 => {
                let word = random.draw().to_be_bytes();
                bytes.extend(word.iter().cycle().take(piece));
            }
            _ => {
                let words: Vec<[u8; 8]> = (0..32).map(|_| random.draw().to_be_bytes()).collect();
                let picks = (0..piece / 8).flat_map(|_| random.pick(&words));
                bytes.extend(picks);
            }
        }
    }
    bytes.truncate(len);
    bytes
}

/// A disk of zeros, told as holes, with data where there is some.
pub(crate) fn fill(disk: &dyn Storage, bytes: &[u8]) {
    for (number, piece) in (0_u64..).zip(bytes.chunks(4096)) {
        if piece.iter().any(|byte| *byte != 0) {
            disk.write_at(piece, number * 4096).unwrap();
        }
    }
}

pub(crate) fn memory(bytes: &[u8]) -> Memory {
    let memory = Memory::with_len(bytes.len() as u64).unwrap();
    fill(&memory, bytes);
    memory
}

pub(crate) fn create(options: &CreateOptions) -> Arc<Memory> {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, options).unwrap();
    memory
}

pub(crate) fn open(memory: &Arc<Memory>) -> Image {
    options().open(memory.clone()).unwrap()
}

/// How images are opened here, with the secret if there can be one.
pub(crate) fn options() -> ImageOptions {
    Image::options()
}

#[cfg(feature = "encryption")]
pub(crate) fn secret() -> qcow2_io::cipher::Secret {
    qcow2_io::cipher::Secret::new(PASSPHRASE.as_bytes().to_vec())
}

#[cfg(feature = "encryption")]
pub(crate) fn luks(options: CreateOptions) -> CreateOptions {
    use qcow2_image::luks::{KeyCost, LuksOptions};

    options.luks(LuksOptions::new().cost(KeyCost::Iterations(1000)), secret())
}

/// Disks of all kinds with the same bytes.
pub(crate) fn sources(bytes: &[u8]) -> Vec<(&'static str, Arc<dyn Storage>)> {
    let len = bytes.len() as u64;
    let mut sources: Vec<(&'static str, Arc<dyn Storage>)> = vec![
        ("sparse", Arc::new(memory(bytes))),
        ("full", Arc::new(Memory::from(bytes.to_vec()))),
    ];
    let plain = open(&create(&CreateOptions::new(len).cluster_size(4096)));
    fill(&plain, bytes);
    sources.push(("qcow2", Arc::new(plain)));

    // The upper layer has every third piece, and zeros where the lower one has something else.
    let below = open(&create(&CreateOptions::new(len)));
    let upper = create(&CreateOptions::new(len).backing_file("below", "qcow2"));
    let mut wrong = bytes.to_vec();
    for piece in wrong.chunks_mut(100_000).step_by(3) {
        piece.fill(0x55);
    }
    fill(&below, &wrong);
    let upper = options().backing(Arc::new(below)).open(upper).unwrap();
    for (number, piece) in (0..).zip(bytes.chunks(100_000)).step_by(3) {
        let start = number * 100_000;
        let end = start + piece.len() as u64;
        upper.write_zeroes(start..end, ZeroFlags::NONE).unwrap();
        if piece.iter().any(|byte| *byte != 0) {
            upper.write_at(piece, start).unwrap();
        }
    }
    sources.push(("chain", Arc::new(upper)));

    for (name, kind) in [
        ("zlib", CompressionType::Zlib),
        ("zstd", CompressionType::Zstd),
    ] {
        let packed = open(&create(&CreateOptions::new(len).compression_type(kind)));
        if packed.codec().is_available() {
            packed.write_compressed(bytes, 0, Level::default()).unwrap();
            sources.push((name, Arc::new(packed)));
        }
    }
    #[cfg(feature = "encryption")]
    {
        let memory = create(&luks(CreateOptions::new(len)));
        let encrypted = options().secret(secret()).open(memory).unwrap();
        fill(&encrypted, bytes);
        sources.push(("luks", Arc::new(encrypted)));
    }
    sources
}

/// A file of the folder, open for writing and empty.
pub(crate) fn new_file(folder: &Folder, name: &str) -> qcow2_io::File {
    let options = FileOptions::new().write(true).create(true).truncate(true);
    options.open(folder.path(name)).unwrap()
}

/// Asserts that a disk has these bytes, and behind them zeros.
pub(crate) fn assert_reads(disk: &dyn Storage, bytes: &[u8], what: &str) {
    let len = usize::try_from(disk.len().unwrap()).unwrap();
    assert!(len >= bytes.len(), "{what} is short");
    let mut found = vec![0xee; len];
    disk.read_at(&mut found, 0).unwrap();
    let (found, rest) = found.split_at(bytes.len());
    let differs = bytes.iter().zip(found).position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first byte of {what} that differs");
    assert!(rest.iter().all(|byte| *byte == 0), "{what}, behind the end");
}

/// Asserts that this workspace's checker finds nothing, not even a leak.
pub(crate) fn assert_sound(storage: &dyn Storage, what: &str) {
    let report = check(storage, &Options::default());
    assert_eq!(
        report.verdict(),
        Verdict::Sound,
        "{what}: {:#?}",
        report.findings
    );
}
