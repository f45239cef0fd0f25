//! What an image refers to: its backing files, layer by layer, and its external data file.
//!
//! An image is hostile until it is proven otherwise, so a name in it is a request that the caller's [`References`] policy
//! grants or refuses. A target is judged by its canonical path, after all symbolic links, and only that path is opened.
//! [`Resolver`] is that policy at work; [`Chain`] walks along a chain with it.

mod resolve;

use std::path::{Path, PathBuf};

use qcow2_format::header::Header;
use qcow2_format::raw;
use qcow2_io::{File, FileIdentity, FileOptions, Storage};

use crate::{Code, Finding, Place, Structure};

pub use resolve::{References, Refusal, Resolved, Resolver, Unresolved};

/// Most layers of a chain that are followed, the first image among them.
pub const MAX_LAYERS: usize = 200;

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

impl From<Unresolved> for Link {
    fn from(unresolved: Unresolved) -> Self {
        match unresolved {
            Unresolved::Refused { refusal, .. } => Self::Refused(refusal),
            Unresolved::Missing { path, source, .. } => Self::Missing {
                path,
                error: source.to_string(),
            },
        }
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
    resolver: Resolver,
    options: FileOptions,
}

impl Chain {
    /// A chain that starts with the open image `file`, which has the name `path`. Relative names in it are resolved from the
    /// directory of `path`. Other layers are opened with `options`.
    pub fn new(
        path: impl Into<PathBuf>,
        file: File,
        references: References,
        options: FileOptions,
    ) -> Self {
        let path = path.into();
        Self {
            resolver: Resolver::new(references, &path),
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
        let Resolved {
            path: named,
            canonical: path,
        } = match self.resolver.backing_file(overlay, name) {
            Ok(found) => found,
            Err(unresolved) => return (unresolved.into(), None),
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
        match self.resolver.data_file(image, name) {
            Ok(found) => Link::Present {
                path: found.canonical,
                format: Some(b"raw".to_vec()),
            },
            Err(unresolved) => unresolved.into(),
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

/// The header, if it can be read; why not is for a check to say.
fn header(storage: &dyn Storage) -> Option<Header> {
    let mut prefix = [0; raw::Header::LEN as usize];
    storage.read_at(&mut prefix, 0).ok()?;
    let mut cluster = vec![0; Header::probe(&prefix).ok()?];
    storage.read_at(&mut cluster, 0).ok()?;
    let (header, _) = Header::decode_for_check(&cluster).ok()?;
    Some(header)
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
