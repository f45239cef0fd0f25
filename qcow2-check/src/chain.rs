//! What an image refers to: its backing files, layer by layer, and its external data file.
//!
//! An image is hostile until it is proven otherwise, so a name in it is a request that the caller's [`References`] policy
//! grants or refuses. A target is judged by its canonical path, after all symbolic links, and only that path is opened.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use qcow2_format::header::Header;
use qcow2_format::raw;
use qcow2_io::{File, FileIdentity, FileOptions, Storage};

use crate::audit::BackingName;
use crate::{Code, Finding, Place, Structure};

/// Most layers of a chain that are followed, the first image among them.
pub const MAX_LAYERS: usize = 200;

/// Which of the files that an image names may be opened.
///
/// Names with a protocol prefix and `json:` descriptions are never followed, whatever the policy. The policy trusts whoever
/// can rename files in what it allows while the walk is under way.
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

/// What became of a name in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Link {
    /// Nothing is named.
    None,
    /// It is a qcow2 image, and the next layer of the chain.
    Followed {
        /// Where it lies, without symbolic links.
        path: PathBuf,
        /// Whether the format was recorded; if not, the file starts as qcow2 does, and no more was guessed.
        recorded: bool,
    },
    /// It is there, and the chain ends with it.
    Present {
        /// Where it lies, without symbolic links.
        path: PathBuf,
        /// The format that is recorded for it.
        format: Option<Vec<u8>>,
    },
    /// It can't be opened.
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// Why, in words.
        error: String,
    },
    /// It is a file that was in the chain before.
    Loop {
        /// Where it lies, without symbolic links.
        path: PathBuf,
        /// Which layer it is, counted from 0 for the first image.
        layer: usize,
    },
    /// It would be one layer more than [`MAX_LAYERS`].
    Deep {
        /// Where it lies, without symbolic links.
        path: PathBuf,
    },
    /// It was not looked at.
    Refused(Refusal),
}

impl Link {
    /// What is wrong with a backing file of this kind.
    fn finding(&self) -> Option<Finding> {
        let shown = |path: &Path| format!("backing file {:?}", path.to_string_lossy());
        let (code, detail) = match self {
            Self::Missing { path, error } => {
                (Code::BackingMissing, format!("{}: {error}", shown(path)))
            }
            Self::Loop { path, layer } => (
                Code::BackingLoop,
                format!("{} is layer {layer} of the chain", shown(path)),
            ),
            Self::Deep { path } => (
                Code::BackingDeep,
                format!("{} comes after {MAX_LAYERS} layers", shown(path)),
            ),
            _ => return None,
        };
        Some(Finding::new(code, Place::of(Structure::Header), detail))
    }
}

/// One image of a chain.
#[derive(Debug)]
#[non_exhaustive]
pub struct Layer {
    /// 0 for the first image, 1 for its backing file, and so on.
    pub depth: usize,
    /// The name it was found by.
    pub path: PathBuf,
    /// The image, open for reading.
    pub file: File,
    /// What became of its backing file's name.
    pub backing: Link,
    /// What became of its external data file's name; such a file is never opened.
    pub data_file: Link,
}

impl Layer {
    /// What is wrong with the reference to the backing file: it is missing, closes a loop, or lies too deep.
    pub fn finding(&self) -> Option<Finding> {
        self.backing.finding()
    }
}

/// A walk along a chain, from an image down; each item is a qcow2 layer.
///
/// It ends where nothing more is named, may be followed, can be opened, or is known to be qcow2. Backing files are
/// opened one at a time, as they are reached.
#[derive(Debug)]
pub struct Chain {
    next: Option<(PathBuf, File)>,
    seen: Vec<FileIdentity>,
    policy: Policy,
    options: FileOptions,
}

impl Chain {
    /// A chain that starts with the open image `file`, which has the name `path`. Relative names in it are resolved from the
    /// directory of `path`, as QEMU does. Other layers are opened with `options`.
    pub fn new(
        path: impl Into<PathBuf>,
        file: File,
        references: References,
        options: FileOptions,
    ) -> Self {
        let path = path.into();
        Self {
            policy: Policy::new(references, &path),
            next: Some((path, file)),
            seen: Vec::new(),
            options,
        }
    }

    /// Finds the backing file of the last layer seen; if it is to be followed, it is opened, too.
    fn backing(&self, overlay: &Path, header: &Header) -> (Link, Option<(PathBuf, File)>) {
        let Some(name) = &header.backing_name else {
            return (Link::None, None);
        };
        let (named, path) = match self.policy.resolve(overlay, name) {
            Ok(found) => found,
            Err(link) => return (link, None),
        };
        let format = header.backing_format();
        if format.is_some_and(|format| format != b"qcow2") {
            let format = format.map(<[u8]>::to_vec);
            return (Link::Present { path, format }, None);
        }
        let file = match self.options.open(&path) {
            Ok(file) => file,
            Err(error) => {
                let error = with_causes(&error);
                return (Link::Missing { path, error }, None);
            }
        };
        let mut magic = [0; 4];
        if format.is_none() && (file.read_at(&mut magic, 0).is_err() || magic != raw::Header::MAGIC)
        {
            return (Link::Present { path, format: None }, None);
        }
        let known = self.seen.iter().position(|seen| *seen == file.identity());
        if let Some(layer) = known {
            return (Link::Loop { path, layer }, None);
        }
        if self.seen.len() >= MAX_LAYERS {
            return (Link::Deep { path }, None);
        }
        let recorded = format.is_some();
        (Link::Followed { path, recorded }, Some((named, file)))
    }

    fn data_file(&self, image: &Path, header: &Header) -> Link {
        let Some(name) = header.data_file_name() else {
            return Link::None;
        };
        match self.policy.resolve(image, name) {
            Ok((_, path)) => Link::Present {
                path,
                format: Some(b"raw".to_vec()),
            },
            Err(link) => link,
        }
    }
}

impl Iterator for Chain {
    type Item = Layer;

    fn next(&mut self) -> Option<Layer> {
        let (path, file) = self.next.take()?;
        let depth = self.seen.len();
        self.seen.push(file.identity());
        let (mut backing, mut data_file) = (Link::None, Link::None);
        if let Some(header) = header(&file) {
            (backing, self.next) = self.backing(&path, &header);
            data_file = self.data_file(&path, &header);
        }
        Some(Layer {
            depth,
            path,
            file,
            backing,
            data_file,
        })
    }
}

/// A policy with canonical paths.
#[derive(Debug)]
enum Policy {
    Deny,
    Below(Vec<PathBuf>),
    All,
}

impl Policy {
    fn new(references: References, first: &Path) -> Self {
        let allowed = match references {
            References::Deny => return Self::Deny,
            References::All => return Self::All,
            References::SameDirectory => vec![directory(first).to_owned()],
            References::AllowList(list) => list,
        };
        // What does not exist allows nothing.
        let canonical = allowed
            .iter()
            .filter_map(|path| fs::canonicalize(path).ok());
        Self::Below(canonical.collect())
    }

    fn allows(&self, canonical: &Path) -> bool {
        match self {
            Self::Deny => false,
            Self::All => true,
            Self::Below(list) => list.iter().any(|allowed| canonical.starts_with(allowed)),
        }
    }

    /// Where a name in `image` leads: the path it makes, and that path without symbolic links.
    fn resolve(&self, image: &Path, name: &[u8]) -> Result<(PathBuf, PathBuf), Link> {
        let refused = |refusal| Err(Link::Refused(refusal));
        if matches!(self, Self::Deny) {
            return refused(Refusal::Denied);
        }
        if BackingName::of(name) == BackingName::Protocol {
            return refused(Refusal::Protocol);
        }
        if name.contains(&0) {
            return refused(Refusal::Nul);
        }
        let path = image
            .parent()
            .unwrap_or(Path::new(""))
            .join(OsStr::from_bytes(name));
        let missing = |error: std::io::Error| Link::Missing {
            path: path.clone(),
            error: error.to_string(),
        };
        let canonical = match fs::canonicalize(&path) {
            Ok(canonical) => canonical,
            Err(error) => {
                // Nobody shall learn of what is missing where nothing may be looked for.
                let reached = path
                    .ancestors()
                    .map(|up| if up == "" { Path::new(".") } else { up })
                    .find_map(|up| fs::canonicalize(up).ok());
                return match reached {
                    Some(reached) if self.allows(&reached) => Err(missing(error)),
                    None if matches!(self, Self::All) => Err(missing(error)),
                    _ => refused(Refusal::Outside),
                };
            }
        };
        if !self.allows(&canonical) {
            return refused(Refusal::Outside);
        }
        // Opening anything else can do something: devices and pipes act on it.
        let kind = fs::symlink_metadata(&canonical)
            .map_err(missing)?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return refused(Refusal::NoDisk);
        }
        Ok((path, canonical))
    }
}

/// The header, if it can be read; why not is for a check to say.
fn header(storage: &dyn Storage) -> Option<Header> {
    let mut prefix = [0; raw::Header::LEN as usize];
    storage.read_at(&mut prefix, 0).ok()?;
    let mut cluster = vec![0; Header::probe(&prefix).ok()?];
    storage.read_at(&mut cluster, 0).ok()?;
    let (header, _) = Header::decode_for_check(&cluster).ok()?;
    Some(header)
}

/// The directory a file is in; `.` for a bare name.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
