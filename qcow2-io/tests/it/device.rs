use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2_io::{ExtentKind, File, FileOptions, Storage, StorageErrorKind, ZeroFlags, conformance};
use tempfile::NamedTempFile;

const LEN: u64 = 4 << 20;

/// A loop device over a temporary file.
struct LoopDevice {
    path: PathBuf,
    file: NamedTempFile,
}

impl LoopDevice {
    /// `None`, and a word about it, where that isn't allowed.
    fn new() -> Option<Self> {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(LEN).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file.path())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).unwrap().trim_end().into();
                Some(Self { path, file })
            }
            _ => {
                eprintln!("SKIPPED: no loop device can be made on this machine");
                None
            }
        }
    }

    fn open(&self, options: &FileOptions) -> File {
        options.open(&self.path).unwrap()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A device left over would show in the next run's list, no more.
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
    }
}

fn writer() -> FileOptions {
    FileOptions::new().write(true)
}

#[test]
fn block_devices_conform_buffered_and_direct() {
    let Some(device) = LoopDevice::new() else {
        return;
    };
    for options in [writer(), writer().direct(true)] {
        conformance::run(|| {
            let file = device.open(&options);
            file.write_zeroes(0..LEN, ZeroFlags::NONE).unwrap();
            Box::new(file)
        });
    }
}

#[test]
fn a_block_device_knows_its_length_and_keeps_it() {
    let Some(device) = LoopDevice::new() else {
        return;
    };
    let file = device.open(&writer());
    assert_eq!(file.len().unwrap(), LEN);
    file.set_len(LEN).unwrap();
    assert_eq!(
        file.set_len(LEN / 2).unwrap_err().kind(),
        StorageErrorKind::Unsupported
    );
    assert_eq!(
        file.write_at(&[1; 2], LEN - 1).unwrap_err().kind(),
        StorageErrorKind::NoSpace
    );
    assert!(
        file.extents(0..LEN, 9)
            .unwrap()
            .iter()
            .any(|extent| extent.kind == ExtentKind::Data)
    );
    assert_ne!(
        file.identity(),
        File::open(device.file.path()).unwrap().identity()
    );
    drop(file);
    let truncated = device.open(&writer().truncate(true));
    assert_eq!(truncated.len().unwrap(), LEN);
}

#[test]
fn two_nodes_of_a_device_have_one_identity() {
    let Some(device) = LoopDevice::new() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&device.path, &link).unwrap();
    let identity = |path: &Path| File::open(path).unwrap().identity();
    assert_eq!(identity(&device.path), identity(&link));
}

#[test]
fn discarding_between_sectors_spares_the_neighbours() {
    let Some(device) = LoopDevice::new() else {
        return;
    };
    for options in [writer(), writer().direct(true)] {
        let file = device.open(&options);
        file.write_at(&vec![7; 1 << 20], 0).unwrap();
        file.discard(1000..500_001).unwrap();
        file.write_zeroes(600_100..600_200, ZeroFlags::MAY_UNMAP)
            .unwrap();
        file.flush().unwrap();
        let mut found = vec![0; 1 << 20];
        file.read_at(&mut found, 0).unwrap();
        let zeros = |index| (1000..500_001).contains(&index) || (600_100..600_200).contains(&index);
        let wrong = (0..1 << 20).find(|index| found[*index] != if zeros(*index) { 0 } else { 7 });
        assert_eq!(wrong, None);
    }
}
