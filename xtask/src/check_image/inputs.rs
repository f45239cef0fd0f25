//! From arguments to images: folders give the images in them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use qcow2_format::raw;

use super::text::shown;

/// The images to audit.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Inputs {
    pub(crate) images: Vec<PathBuf>,
    /// Files in folders that are no qcow2 images.
    pub(crate) skipped: u64,
    /// Whether any argument was a folder.
    pub(crate) from_folder: bool,
}

/// Takes files as they are, and of folders all regular files below them that start as qcow2 does, in the order of their names.
///
/// # Errors
///
/// A folder that can't be read, or without any image.
pub(crate) fn expand(arguments: &[PathBuf]) -> Result<Inputs> {
    let mut inputs = Inputs::default();
    for path in arguments {
        if !path.is_dir() {
            inputs.images.push(path.clone());
            continue;
        }
        inputs.from_folder = true;
        let before = inputs.images.len();
        walk(path, &mut inputs)?;
        if inputs.images.len() == before {
            bail!("there is no qcow2 image in {}", shown(path));
        }
    }
    Ok(inputs)
}

/// Depth first, with a list instead of recursion: folders may be nested as deep as they like.
fn walk(folder: &Path, inputs: &mut Inputs) -> Result<()> {
    let mut waiting = vec![folder.to_owned()];
    while let Some(path) = waiting.pop() {
        let failed = || format!("{} can't be read", shown(&path));
        let kind = fs::symlink_metadata(&path)
            .with_context(failed)?
            .file_type();
        // The folder that the user named may be a link.
        if kind.is_dir() || path == folder {
            let mut entries = fs::read_dir(&path)
                .and_then(|entries| {
                    entries
                        .map(|entry| entry.map(|entry| entry.path()))
                        .collect::<Result<Vec<_>, _>>()
                })
                .with_context(failed)?;
            entries.sort_unstable_by(|a, b| b.cmp(a));
            waiting.append(&mut entries);
        } else if kind.is_file() && is_candidate(&path) {
            inputs.images.push(path);
        } else {
            inputs.skipped += 1;
        }
    }
    Ok(())
}

/// Whether a file starts as qcow2 does. One that can't be read is a candidate, too: its audit will say why.
fn is_candidate(path: &Path) -> bool {
    use std::io::Read as _;
    let mut magic = [0; 4];
    match fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) => magic == raw::Header::MAGIC,
        Err(error) => error.kind() != std::io::ErrorKind::UnexpectedEof,
    }
}
