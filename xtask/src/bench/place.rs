//! Where the files of a benchmark are made.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// Memory, if the system has a folder in it: disks are not what is measured.
pub(super) fn default_dir() -> PathBuf {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() {
        shared.to_owned()
    } else {
        env::temp_dir()
    }
}

/// A new folder in `dir`, gone with its content when dropped. Fails if there are not `needed` bytes free.
pub(super) fn folder(dir: &Path, needed: u64) -> Result<TempDir> {
    let free = rustix::fs::statvfs(dir).with_context(|| dir.display().to_string())?;
    let free = free.f_bavail.saturating_mul(free.f_frsize);
    ensure!(
        free >= needed,
        "{} has {} MiB free, {} MiB are needed",
        dir.display(),
        free >> 20,
        needed >> 20
    );
    Ok(tempfile::Builder::new()
        .prefix("qcow2-bench-")
        .tempdir_in(dir)?)
}
