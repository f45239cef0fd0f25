use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use qcow2_io::{File, FileOptions, LockMode, Result, Storage, StorageError, StorageErrorKind};

const LEN: usize = 1 << 20;

fn disk(dir: &tempfile::TempDir) -> std::path::PathBuf {
    let path = dir.path().join("disk.raw");
    fs::write(&path, vec![5; LEN]).unwrap();
    path
}

fn writer(path: &Path) -> Result<File> {
    FileOptions::new().write(true).open(path)
}

fn shared_reader(path: &Path) -> Result<File> {
    FileOptions::new().force_share(true).open(path)
}

fn assert_locked(result: Result<File>, word: &str) {
    let error: StorageError = result.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Locked, "{error}");
    assert!(
        error.to_string().contains("another process uses the image"),
        "{error}"
    );
    assert!(error.to_string().contains(word), "{error}");
}

#[test]
fn readers_share_and_a_writer_excludes() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(&dir);
    {
        let _one = File::open(&path).unwrap();
        let _two = File::open(&path).unwrap();
        assert_locked(writer(&path), "does not share \"write\"");
    }
    {
        let _one = writer(&path).unwrap();
        assert_locked(writer(&path), "\"write\"");
        assert_locked(File::open(&path), "holds \"write\"");
        let beside = shared_reader(&path).unwrap();
        assert_eq!(beside.len().unwrap(), LEN as u64);
        FileOptions::new()
            .write(true)
            .lock(LockMode::None)
            .open(&path)
            .unwrap();
    }
    writer(&path).unwrap();
}

#[test]
fn a_shared_reader_lets_a_writer_come() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(&dir);
    let _reader = shared_reader(&path).unwrap();
    writer(&path).unwrap();
}

#[test]
fn a_refused_writer_has_not_truncated() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(&dir);
    let _reader = File::open(&path).unwrap();
    let error = FileOptions::new()
        .write(true)
        .truncate(true)
        .open(&path)
        .unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Locked);
    assert_eq!(fs::metadata(&path).unwrap().len(), LEN as u64);
}

#[test]
fn closing_another_handle_keeps_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(&dir);
    let _writer = writer(&path).unwrap();
    drop(shared_reader(&path).unwrap());
    drop(fs::File::open(&path).unwrap());
    assert_locked(writer(&path), "write");
}

#[test]
fn a_dropped_file_leaves_no_lock_to_a_process_that_is_being_started() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(&dir);
    std::thread::scope(|scope| {
        // Each start copies the descriptors of this process for a moment.
        let starter = scope.spawn(|| {
            for _ in 0..100 {
                assert!(Command::new("true").status().unwrap().success());
            }
        });
        let mut opened = 0;
        while !starter.is_finished() {
            writer(&path).unwrap();
            opened += 1;
        }
        assert!(opened > 0);
    });
}

/// An image in QEMU's own format: it lets others write to raw files that it reads.
fn qemu_disk(dir: &tempfile::TempDir) -> std::path::PathBuf {
    let path = dir.path().join("disk.qcow2");
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg(LEN.to_string())
        .status();
    assert!(status.unwrap().success());
    path
}

/// A running qemu-io that has the image open; it ends when its input does.
struct QemuIo {
    child: Child,
    input: Option<ChildStdin>,
}

impl QemuIo {
    /// Returns once the image is open, which an answered command proves.
    fn open(path: &Path, options: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .args(options)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"length\n").unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("1 MiB") {
            line.clear();
            assert_ne!(
                output.read_line(&mut line).unwrap(),
                0,
                "qemu-io opened the image"
            );
        }
        Self {
            child,
            input: Some(input),
        }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.input.take());
        // Waiting is for the lock to be gone; a failure shows in the assertions.
        let _ = self.child.wait();
    }
}

fn qemu_opens(path: &Path, options: &[&str]) -> std::result::Result<(), String> {
    let output = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .args(options)
        .args(["-c", "read 0 512"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[test]
fn a_running_qemu_that_writes_keeps_us_out() {
    if !crate::qemu_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = qemu_disk(&dir);
    let qemu = QemuIo::open(&path, &[]);
    assert_locked(writer(&path), "\"write\"");
    assert_locked(File::open(&path), "\"write\"");
    let mut byte = [0];
    shared_reader(&path).unwrap().read_at(&mut byte, 0).unwrap();
    assert_eq!(byte, *b"Q");
    drop(qemu);
    writer(&path).unwrap();
}

#[test]
fn a_running_qemu_that_reads_shares_with_readers() {
    if !crate::qemu_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = qemu_disk(&dir);
    let _qemu = QemuIo::open(&path, &["-r"]);
    File::open(&path).unwrap();
    shared_reader(&path).unwrap();
    assert_locked(writer(&path), "does not share \"write\"");
}

#[test]
fn we_keep_qemu_out() {
    if !crate::qemu_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = qemu_disk(&dir);
    {
        let _writer = writer(&path).unwrap();
        for options in [&[][..], &["-r"]] {
            let refusal = qemu_opens(&path, options).unwrap_err();
            assert!(refusal.contains("lock"), "{refusal}");
        }
        qemu_opens(&path, &["-r", "-U"]).unwrap();
    }
    {
        let _reader = File::open(&path).unwrap();
        let refusal = qemu_opens(&path, &[]).unwrap_err();
        assert!(refusal.contains("lock"), "{refusal}");
        qemu_opens(&path, &["-r"]).unwrap();
    }
    let _beside = shared_reader(&path).unwrap();
    qemu_opens(&path, &[]).unwrap();
}
