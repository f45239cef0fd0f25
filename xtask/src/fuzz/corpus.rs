//! The folders of a fuzz target: corpus (what it starts from and learns), artifacts (what libFuzzer leaves), and
//! regressions (what once broke it; committed, and replayed by the tests of `qcow2-fuzz`).

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use qcow2_fuzz::Target;

use crate::cargo::{has_program, workspace_root};

/// Options of small images that qemu-img makes, each for one structure that the others lack.
const QEMU_IMAGES: [(&str, &str); 6] = [
    ("v2", "compat=0.10,cluster_size=512"),
    ("v3", "compat=1.1,cluster_size=512"),
    ("lazy", "compat=1.1,cluster_size=1k,lazy_refcounts=on"),
    ("narrow", "compat=1.1,cluster_size=1k,refcount_bits=1"),
    (
        "wide",
        "compat=1.1,cluster_size=1k,refcount_bits=64,preallocation=metadata",
    ),
    (
        "extended",
        "compat=1.1,cluster_size=16k,extended_l2=on,preallocation=metadata",
    ),
];

/// What the targets `check_image` and `repair` take from the end of their inputs; the other one does not look there.
const SETTINGS: [u8; 8] = [0; 8];

/// Where the corpus lies.
pub(crate) fn folder(target: &Target) -> PathBuf {
    workspace_root().join("fuzz/corpus").join(target.name)
}

/// Writes the target's seeds into its corpus; how many.
///
/// With qemu-img at hand, the targets that read from a file's start get images made by it, too.
pub(crate) fn write_seeds(target: &Target) -> Result<usize> {
    let folder = folder(target);
    fs::create_dir_all(&folder)
        .with_context(|| format!("{} could not be made", folder.display()))?;
    let seeds = (target.seeds)();
    for seed in &seeds {
        fs::write(folder.join(format!("seed-{}", seed.name)), &seed.bytes)?;
    }
    let from_qemu =
        if matches!(target.name, "header" | "check_image" | "repair") && has_program("qemu-img") {
            write_qemu_images(target, &folder)?
        } else {
            0
        };
    Ok(seeds.len() + from_qemu)
}

/// Adds images that qemu-img makes; how many.
fn write_qemu_images(target: &Target, folder: &Path) -> Result<usize> {
    let scratch = tempfile::tempdir()?;
    for (name, options) in QEMU_IMAGES {
        let image = scratch.path().join(name);
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", options])
            .arg(&image)
            .arg("64k")
            .stdin(Stdio::null())
            .status()?;
        ensure!(
            made.success(),
            "qemu-img could not make an image with {options}"
        );
        let mut bytes = fs::read(&image)?;
        bytes.truncate(target.max_len_bytes - SETTINGS.len());
        bytes.extend(SETTINGS);
        fs::write(folder.join(format!("seed-qemu-{name}")), bytes)?;
    }
    Ok(QEMU_IMAGES.len())
}

/// How many inputs the corpus has.
pub(crate) fn count(target: &Target) -> Result<usize> {
    Ok(files(&folder(target))?.len())
}

/// What libFuzzer left, without the inputs that were merely slow; sorted.
pub(crate) fn artifacts(target: &Target) -> Result<Vec<PathBuf>> {
    let mut paths = files(&workspace_root().join("fuzz/artifacts").join(target.name))?;
    paths.retain(|path| !file_name(path).starts_with("slow-unit-"));
    Ok(paths)
}

/// The inputs that once broke the target; sorted.
pub(crate) fn reproducers(target: &Target) -> Result<Vec<PathBuf>> {
    files(&regressions(target))
}

/// Copies an artifact to where the tests replay it; the path from the workspace root.
pub(crate) fn save_reproducer(target: &Target, artifact: &Path) -> Result<PathBuf> {
    let folder = regressions(target);
    fs::create_dir_all(&folder)?;
    let saved = folder.join(hash_of(&file_name(artifact)));
    fs::copy(artifact, &saved)
        .with_context(|| format!("{} could not be saved", artifact.display()))?;
    Ok(saved
        .strip_prefix(workspace_root())
        .unwrap_or(&saved)
        .to_owned())
}

/// libFuzzer names a file by what happened and the input's hash (`crash-0123…`); the hash.
fn hash_of(name: &str) -> &str {
    name.rsplit('-').next().unwrap_or(name)
}

fn regressions(target: &Target) -> PathBuf {
    workspace_root().join("fuzz/regressions").join(target.name)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// The files of a folder, sorted; none where there is no such folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error).with_context(|| format!("{} could not be listed", folder.display()));
        }
    };
    let mut paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.is_file() && !file_name(path).starts_with('.'));
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reproducer_is_named_by_its_hash_alone() {
        assert_eq!(hash_of("crash-d7ea533a"), "d7ea533a");
        assert_eq!(hash_of("minimized-from-d7ea533a"), "d7ea533a");
        assert_eq!(hash_of("d7ea533a"), "d7ea533a");
    }
}
