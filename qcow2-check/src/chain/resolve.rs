//! Where a name in an image leads, and whether it may be gone there.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::audit::BackingName;

/// What QEMU takes off the front of a backing file's name; what follows is a plain name, whatever it contains.
const PLAIN_PREFIX: &[u8] = b"file:";

/// Which of the files that an image names may be opened.
///
/// Names with a protocol prefix and `json:` descriptions are never followed, whatever the policy. The policy trusts whoever
/// can rename files in what it allows, between the moment a name is resolved and the moment its target is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum References {
    /// None.
    #[default]
    Deny,
    /// Those in the directory of the first image of the chain, or below it.
    SameDirectory,
    /// These files, and those in or below these directories.
    AllowList(Vec<PathBuf>),
    /// Any.
    All,
}

/// Why a name was not followed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The policy allows none.
    Denied,
    /// It is a `json:` description or has a protocol prefix.
    Protocol,
    /// It has a NUL byte; programs would disagree on where it ends.
    Nul,
    /// The policy does not cover where it leads.
    Outside,
    /// It leads to something that is neither a regular file nor a block device.
    NoDisk,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Denied => "no reference may be followed",
            Self::Protocol => "it is no plain file name, and such are never followed",
            Self::Nul => "the name has a NUL byte",
            Self::Outside => "it lies outside of what may be followed",
            Self::NoDisk => "it is neither a regular file nor a block device",
        })
    }
}

/// A name that may be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The path that the name makes. Names in that file are resolved from its directory.
    pub path: PathBuf,
    /// The same path without symbolic links: what was judged, and is to be opened.
    pub canonical: PathBuf,
}

/// Why a name leads nowhere.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unresolved {
    /// It is not to be followed.
    #[error("{name:?} is not opened: {refusal}")]
    Refused {
        /// The name, what is not UTF-8 replaced.
        name: String,
        /// Why.
        refusal: Refusal,
    },
    /// It may be followed, but is not there or can't be reached.
    #[error("{name:?} can't be found as {path:?}")]
    Missing {
        /// The name, what is not UTF-8 replaced.
        name: String,
        /// Where it was looked for.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// A [`References`] policy at work: tells where the names in the images of one chain lead. It opens nothing.
///
/// A relative name is resolved from the directory of the image that has it. For backing files so does QEMU. The name of a
/// data file it resolves from the working directory of its process, as it does a backing file's relative name behind
/// `file:`; what a name means must not depend on where a program was started, so that is not followed here.
#[derive(Clone, Debug)]
pub struct Resolver {
    allowed: Allowed,
}

/// What a policy allows, with canonical paths.
#[derive(Clone, Debug)]
enum Allowed {
    Nothing,
    Below(Vec<PathBuf>),
    All,
}

impl Resolver {
    /// A policy for the chain whose first image has the name `first_image`. Directories and lists are looked up now: what
    /// does not exist allows nothing.
    pub fn new(references: References, first_image: &Path) -> Self {
        let list = match references {
            References::Deny => Vec::new(),
            References::All => {
                return Self {
                    allowed: Allowed::All,
                };
            }
            References::SameDirectory => vec![directory(first_image).to_owned()],
            References::AllowList(list) => list,
        };
        let denied = list.is_empty();
        let canonical = list.iter().filter_map(|path| fs::canonicalize(path).ok());
        let allowed = if denied {
            Allowed::Nothing
        } else {
            Allowed::Below(canonical.collect())
        };
        Self { allowed }
    }

    /// Where the name of a backing file leads that stands in the image named `image`.
    ///
    /// `file:NAME` means the same as `NAME`, in which colons then mean nothing. Any other protocol prefix, and `json:`, is
    /// refused.
    ///
    /// # Errors
    ///
    /// The policy does not allow what it leads to, or it leads nowhere.
    pub fn backing_file(&self, image: &Path, name: &[u8]) -> Result<Resolved, Unresolved> {
        let plain = name.strip_prefix(PLAIN_PREFIX);
        if plain.is_none() && BackingName::of(name) == BackingName::Protocol {
            // Whoever allows nothing is told that first.
            let refusal = match self.allowed {
                Allowed::Nothing => Refusal::Denied,
                _ => Refusal::Protocol,
            };
            return Err(refused(name, refusal));
        }
        self.file(image, name, plain.unwrap_or(name))
    }

    /// Where the name of an external data file leads that stands in the image named `image`.
    ///
    /// It is a plain name whatever it contains: neither a protocol prefix nor `json:` means anything, as in QEMU.
    ///
    /// # Errors
    ///
    /// The policy does not allow what it leads to, or it leads nowhere.
    pub fn data_file(&self, image: &Path, name: &[u8]) -> Result<Resolved, Unresolved> {
        self.file(image, name, name)
    }

    /// Where a plain name leads that stands in `image` as `written`.
    fn file(&self, image: &Path, written: &[u8], name: &[u8]) -> Result<Resolved, Unresolved> {
        if matches!(self.allowed, Allowed::Nothing) {
            return Err(refused(written, Refusal::Denied));
        }
        if name.contains(&0) {
            return Err(refused(written, Refusal::Nul));
        }
        let path = image
            .parent()
            .unwrap_or(Path::new(""))
            .join(OsStr::from_bytes(name));
        let missing = |source| Unresolved::Missing {
            name: shown(written),
            path: path.clone(),
            source,
        };
        let canonical = match fs::canonicalize(&path) {
            Ok(canonical) => canonical,
            Err(error) => {
                // Nobody shall learn of what is missing where nothing may be looked for.
                let reached = path
                    .ancestors()
                    .map(|up| if up == "" { Path::new(".") } else { up })
                    .find_map(|up| fs::canonicalize(up).ok());
                return Err(match reached {
                    Some(reached) if self.allows(&reached) => missing(error),
                    None if matches!(self.allowed, Allowed::All) => missing(error),
                    _ => refused(written, Refusal::Outside),
                });
            }
        };
        if !self.allows(&canonical) {
            return Err(refused(written, Refusal::Outside));
        }
        // Opening anything else can do something: devices and pipes act on it.
        let kind = fs::symlink_metadata(&canonical)
            .map_err(missing)?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(refused(written, Refusal::NoDisk));
        }
        Ok(Resolved { path, canonical })
    }

    fn allows(&self, canonical: &Path) -> bool {
        match &self.allowed {
            Allowed::Nothing => false,
            Allowed::All => true,
            Allowed::Below(list) => list.iter().any(|allowed| canonical.starts_with(allowed)),
        }
    }
}

fn refused(name: &[u8], refusal: Refusal) -> Unresolved {
    Unresolved::Refused {
        name: shown(name),
        refusal,
    }
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// The directory a file is in; `.` for a bare name.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
