//! Files that are made, and take the place of old ones once they are complete.
//!
//! Until then a file has no name at all, where the file system can do that: then nothing of it is left, however the program ends. Else
//! it lies beside its place under a name that begins with `.qcow2-`.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use qcow2_io::{File, FileOptions};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use tempfile::TempPath;

use super::failure::Failure;

/// A file that is being made. Dropped before it is [kept](keep), it is gone, and what was in its place is as before.
#[derive(Debug)]
pub(crate) struct Fresh {
    /// Where it goes, links followed.
    path: PathBuf,
    draft: Draft,
    /// What it replaces. Held, so that no other program uses it meanwhile.
    old: Option<File>,
}

/// Where a file is before it is in its place.
#[derive(Debug)]
enum Draft {
    /// Nowhere; this leads to it.
    Nameless(OwnedFd),
    /// Beside its place.
    Named(TempPath),
    /// In its place already: a device.
    InPlace,
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
            // As any new file: the user's mask takes its part.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Self::draft(path.to_owned(), 0o666)
            }
            Err(error) => Err(Failure::making(&error, folder(path))),
        }
        .map_err(|failure| failure.about(path))
    }

    fn instead(path: PathBuf) -> Result<(Self, File), Failure> {
        let old = FileOptions::new()
            .write(true)
            .open(&path)
            .map_err(|error| Failure::opening(&error))?;
        let known = fs::metadata(&path)?;
        if !known.is_file() {
            let fresh = Self {
                path,
                draft: Draft::InPlace,
                old: None,
            };
            return Ok((fresh, old));
        }
        let (mut fresh, file) = Self::draft(path, 0o600)?;
        // Who may not give files away keeps this one. The mode comes last: a change of owner takes some of it.
        let mode = Permissions::from_mode(known.mode() & 0o7777);
        match &fresh.draft {
            Draft::Nameless(fd) => {
                let _ = fchown(fd, Some(known.uid()), Some(known.gid()));
                fs::File::from(fd.try_clone()?).set_permissions(mode)?;
            }
            Draft::Named(path) => {
                let _ = std::os::unix::fs::chown(path, Some(known.uid()), Some(known.gid()));
                fs::set_permissions(path, mode)?;
            }
            Draft::InPlace => {}
        }
        fresh.old = Some(old);
        Ok((fresh, file))
    }

    /// An empty file for a place.
    fn draft(path: PathBuf, mode: u32) -> Result<(Self, File), Failure> {
        let failed = |error: io::Error| Failure::making(&error, folder(&path));
        let nameless = nameless(folder(&path), mode).map_err(failed)?;
        let (draft, file) = if let Some(file) = nameless {
            (Draft::Nameless(file.try_clone()?.into()), file)
        } else {
            let named = tempfile::Builder::new()
                .prefix(PREFIX)
                .permissions(Permissions::from_mode(mode))
                .tempfile_in(folder(&path))
                .map_err(failed)?;
            let (file, path) = named.into_parts();
            (Draft::Named(path), file)
        };
        let file = File::from_std(file)?;
        let fresh = Self {
            path,
            draft,
            old: None,
        };
        Ok((fresh, file))
    }

    /// Puts the file, which is complete and durable, in its place.
    fn put(self) -> Result<(), Failure> {
        let beside = match self.draft {
            Draft::InPlace => return Ok(()),
            Draft::Named(beside) => beside,
            Draft::Nameless(fd) if self.old.is_none() => {
                give_name(&fd, &self.path)
                    .map_err(|error| Failure::from(error).about(&self.path))?;
                sync(&self.path);
                return Ok(());
            }
            // Only a file with a name takes the place of another at once.
            Draft::Nameless(fd) => tempfile::Builder::new()
                .prefix(PREFIX)
                .make_in(folder(&self.path), |beside| give_name(&fd, beside))
                .map_err(|error| Failure::making(&error, folder(&self.path)))?
                .into_temp_path(),
        };
        let put = match &self.old {
            Some(_) => beside.persist(&self.path),
            // One that has come meanwhile is somebody's.
            None => beside.persist_noclobber(&self.path),
        };
        put.map_err(|error| Failure::from(error.error).about(&self.path))?;
        sync(&self.path);
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

/// How names of files begin that are not complete.
const PREFIX: &str = ".qcow2-";

fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// A folder that can't be synced has the file all the same.
fn sync(path: &Path) {
    let _ = fs::File::open(folder(path)).and_then(|folder| folder.sync_all());
}

/// A file without a name; `None` where there can't be one, or it could not be given a name later.
fn nameless(folder: &Path, mode: u32) -> io::Result<Option<fs::File>> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::from_raw_mode(mode)) {
        Ok(fd) => Ok(fs::symlink_metadata(descriptor(&fd))
            .ok()
            .map(|_| fd.into())),
        // The file system, or the system itself, has no such files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Where the system shows a descriptor.
fn descriptor(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Fails if there is a file of that name.
fn give_name(fd: &OwnedFd, path: &Path) -> io::Result<()> {
    let flags = AtFlags::SYMLINK_FOLLOW;
    Ok(rustix::fs::linkat(CWD, descriptor(fd), CWD, path, flags)?)
}
