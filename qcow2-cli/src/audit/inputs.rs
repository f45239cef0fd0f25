//! From arguments to images: folders give the images in them.

use std::fs;
use std::io::{self, ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use qcow2_format::raw;

use super::text::shown;

/// The images to audit.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Inputs {
    /// In the order in which they are audited.
    pub images: Vec<PathBuf>,
    /// Files in folders that are no qcow2 images.
    pub skipped: u64,
    /// What could not be looked at below the folders, and why.
    pub unreadable: Vec<String>,
    /// Whether any argument was a folder.
    pub from_folder: bool,
}

/// Takes files as they are, and of folders all regular files below them that start as qcow2 does, in the order of their names.
///
/// # Errors
///
/// A folder that can't be read, or without any image.
pub fn expand(arguments: &[PathBuf]) -> Result<Inputs> {
    let mut inputs = Inputs::default();
    for path in arguments {
        if !path.is_dir() {
            inputs.images.push(path.clone());
            continue;
        }
        inputs.from_folder = true;
        let before = inputs.images.len();
        walk(path, &mut inputs)?;
        if inputs.images.len() == before && inputs.unreadable.is_empty() {
            bail!("there is no qcow2 image in {}", shown(path));
        }
    }
    Ok(inputs)
}

/// Depth first, with a list instead of recursion: folders may be nested as deep as they like.
fn walk(folder: &Path, inputs: &mut Inputs) -> Result<()> {
    let failed = |path: &Path| format!("{} can't be read", shown(path));
    let mut waiting = entries(folder).with_context(|| failed(folder))?;
    while let Some(path) = waiting.pop() {
        let kind = fs::symlink_metadata(&path).map(|meta| meta.file_type());
        let below = match kind {
            Ok(kind) if kind.is_dir() => entries(&path),
            Ok(kind) if kind.is_file() && is_candidate(&path) => {
                inputs.images.push(path);
                continue;
            }
            Ok(_) => {
                inputs.skipped += 1;
                continue;
            }
            Err(error) => Err(error),
        };
        match below {
            Ok(mut below) => waiting.append(&mut below),
            // One closed door is no reason to leave the others alone.
            Err(error) => {
                let told = format!("{}: {error}", failed(&path));
                inputs.unreadable.push(told);
            }
        }
    }
    Ok(())
}

/// What is in a folder, the last name first.
fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    entries.sort_unstable_by(|a, b| b.cmp(a));
    Ok(entries)
}

/// Whether a file starts as qcow2 does. One that can't be read is a candidate, too: its audit will say why.
fn is_candidate(path: &Path) -> bool {
    let mut magic = [0; 4];
    match fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) => magic == raw::Header::MAGIC,
        Err(error) => error.kind() != ErrorKind::UnexpectedEof,
    }
}
