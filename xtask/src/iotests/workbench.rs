//! What the suite wants around it: folders, links to the programs, and stand-ins for programs that are not under test.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// Answers what tests ask the emulator before they begin: machines, formats, devices.
const EMULATOR: &str = r#"#!/bin/sh
case " $* " in
    *" -machine help "*) printf 'Supported machines are:\npc-stand-in (default)\n' ;;
    *" format=help "*) echo "Supported formats: blkdebug blkverify bochs compress copy-on-read file host_cdrom host_device luks nbd null-aio null-co qcow2 quorum raw throttle" ;;
    *" -device help "*) printf 'name "virtio-blk-pci", bus PCI\nname "virtio-scsi-pci", bus PCI\n' ;;
    *) echo "no emulator here: $*" >&2; exit 1 ;;
esac
"#;
/// For programs that no test of the list needs.
const ABSENT: &str = "#!/bin/sh\necho \"${0##*/}: not provided\" >&2\nexit 1\n";

/// Folders and programs for the suite.
#[derive(Debug)]
pub(super) struct Workbench {
    folder: PathBuf,
    suite: PathBuf,
    /// Paths of sockets are short.
    sockets: TempDir,
}

impl Workbench {
    pub(super) fn new(folder: &Path, suite: &Path, img: &Path, io: &Path) -> Result<Self> {
        let bench = Self {
            folder: folder.to_owned(),
            suite: suite
                .canonicalize()
                .with_context(|| suite.display().to_string())?,
            sockets: tempfile::tempdir()?,
        };
        for folder in [
            bench.programs(),
            bench.logs(),
            bench.build(),
            bench.folder.join("scratch"),
        ] {
            fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        link(img, &bench.program("qemu-img"))?;
        link(io, &bench.program("qemu-io"))?;
        link(&bench.suite.join("check"), &bench.build().join("check"))?;
        for (name, text) in [
            ("qemu-system-x86_64", EMULATOR),
            ("qemu-nbd", ABSENT),
            ("qemu-storage-daemon", ABSENT),
        ] {
            let path = bench.program(name);
            fs::write(&path, text).with_context(|| path.display().to_string())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(bench)
    }

    fn programs(&self) -> PathBuf {
        self.folder.join("programs")
    }

    /// A program by the name that the suite knows.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    /// Where the suite takes itself to have been built.
    pub(super) fn build(&self) -> PathBuf {
        self.folder.join("build/tests/qemu-iotests")
    }

    /// What tests printed.
    pub(super) fn logs(&self) -> PathBuf {
        self.folder.join("logs")
    }

    /// Where the suite's tests and their expected outputs lie.
    pub(super) fn suite(&self) -> &Path {
        &self.suite
    }

    /// An empty folder for a test's images.
    pub(super) fn scratch(&self, key: &str) -> Result<PathBuf> {
        let path = self.folder.join("scratch").join(key);
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| path.display().to_string())?;
        }
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// A folder for a test's sockets.
    pub(super) fn sockets(&self, key: &str) -> PathBuf {
        self.sockets.path().join(key)
    }
}

/// A link in place of whatever was there.
fn link(target: &Path, path: &Path) -> Result<()> {
    // On PATH, or somewhere.
    let found = match target.components().count() {
        1 => std::env::var_os("PATH")
            .and_then(|all| {
                std::env::split_paths(&all)
                    .map(|folder| folder.join(target))
                    .find(|path| path.is_file())
            })
            .unwrap_or_else(|| target.to_owned()),
        _ => target.to_owned(),
    };
    let target = found
        .canonicalize()
        .with_context(|| target.display().to_string())?;
    if path.symlink_metadata().is_ok() {
        fs::remove_file(path).with_context(|| path.display().to_string())?;
    }
    symlink(&target, path).with_context(|| path.display().to_string())
}
