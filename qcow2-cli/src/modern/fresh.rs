//! Files that are made, and take the place of old ones once they are complete.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use qcow2_io::{File, FileOptions};
use tempfile::TempPath;

use super::failure::Failure;

/// A file that is being made. It lies beside the place that it is for until it is [kept](keep); dropped before, it is gone, and
/// what was in that place is as before.
#[derive(Debug)]
pub(crate) struct Fresh {
    /// Where it goes, links followed.
    path: PathBuf,
    /// Where it is now. `None` for a device, which is written in place.
    beside: Option<TempPath>,
    /// What it replaces. Held, so that no other program uses it meanwhile.
    old: Option<File>,
}

impl Fresh {
    /// Begins a file, open for writing.
    ///
    /// # Errors
    ///
    /// When it can't be made there, or another program uses the one that is there.
    pub(crate) fn begin(path: &Path) -> Result<(Self, File), Failure> {
        match fs::canonicalize(path) {
            Ok(found) => Self::instead(found),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::anew(path.to_owned()),
            Err(error) => Err(error.into()),
        }
        .map_err(|failure| failure.about(path))
    }

    fn anew(path: PathBuf) -> Result<(Self, File), Failure> {
        // As any new file: the user's mask takes its part.
        let (beside, file) = beside(&path, 0o666)?;
        let fresh = Self {
            path,
            beside: Some(beside),
            old: None,
        };
        Ok((fresh, file))
    }

    fn instead(path: PathBuf) -> Result<(Self, File), Failure> {
        let old = open(&path)?;
        let known = fs::metadata(&path)?;
        if !known.is_file() {
            let fresh = Self {
                path,
                beside: None,
                old: None,
            };
            return Ok((fresh, old));
        }
        let (beside, file) = beside(&path, 0o600)?;
        // Who may not give files away keeps this one. The mode comes last: a change of owner takes some of it.
        let _ = chown(&beside, Some(known.uid()), Some(known.gid()));
        fs::set_permissions(&beside, Permissions::from_mode(known.mode() & 0o7777))?;
        let fresh = Self {
            path,
            beside: Some(beside),
            old: Some(old),
        };
        Ok((fresh, file))
    }

    /// Puts the file, which is complete and durable, in its place.
    fn put(self) -> Result<(), Failure> {
        let Some(beside) = self.beside else {
            return Ok(());
        };
        let put = match &self.old {
            Some(_) => beside.persist(&self.path),
            // One that has come meanwhile is somebody's.
            None => beside.persist_noclobber(&self.path),
        };
        put.map_err(|error| Failure::from(error.error).about(&self.path))?;
        // A folder that can't be synced has the file all the same.
        let _ = fs::File::open(folder(&self.path)).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

/// Puts files, which are complete and durable, in their places.
///
/// # Errors
///
/// When one can't be put there; those before it are.
pub(crate) fn keep(files: Vec<Fresh>) -> Result<(), Failure> {
    files.into_iter().try_for_each(Fresh::put)
}

fn open(path: &Path) -> Result<File, Failure> {
    let file = FileOptions::new().write(true).open(path);
    file.map_err(|error| Failure::opening(&error))
}

fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// An empty file in the same folder.
fn beside(path: &Path, mode: u32) -> Result<(TempPath, File), Failure> {
    let beside = tempfile::Builder::new()
        .prefix(".qcow2-")
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(folder(path))?
        .into_temp_path();
    let file = open(&beside)?;
    Ok((beside, file))
}
