//! What lies below an image.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_io::{File, FileIdentity, Storage};

use super::Chain;
use crate::named::{Context, open_named};
use crate::{Image, ImageError, ImageOptions};

/// A backing file that was opened or given.
#[derive(Clone)]
pub(crate) enum Lower {
    File(Arc<File>),
    Storage(Arc<dyn Storage>),
    Image(Arc<Image>),
}

/// What is known of the backing file beside its bytes.
#[derive(Clone, Default)]
pub(crate) struct Below {
    /// It, if it is an image.
    pub(crate) image: Option<Arc<Image>>,
    /// The name of a raw one.
    pub(crate) path: Option<PathBuf>,
    /// Which file a raw one is.
    pub(crate) identity: Option<FileIdentity>,
}

impl Lower {
    pub(crate) fn into_parts(self) -> (Arc<dyn Storage>, Below) {
        match self {
            Self::File(file) => {
                let below = Below {
                    image: None,
                    path: file.path().map(Path::to_owned),
                    identity: Some(file.identity()),
                };
                (file, below)
            }
            Self::Storage(storage) => (storage, Below::default()),
            Self::Image(image) => {
                let below = Below {
                    image: Some(Arc::clone(&image)),
                    ..Below::default()
                };
                (image, below)
            }
        }
    }

    fn storage(&self) -> &dyn Storage {
        match self {
            Self::File(file) => file,
            Self::Storage(storage) => storage,
            Self::Image(image) => image,
        }
    }

    /// Which files it is made of, as far as they are files.
    fn identities(&self) -> Vec<FileIdentity> {
        match self {
            Self::File(file) => vec![file.identity()],
            Self::Storage(_) => Vec::new(),
            Self::Image(image) => identities(image),
        }
    }
}

fn identities(image: &Image) -> Vec<FileIdentity> {
    let mut found = Vec::new();
    let mut next = Some(image);
    while let Some(image) = next {
        found.extend(image.identity);
        let below = image.below.as_ref();
        found.extend(below.and_then(|below| below.identity));
        next = below.and_then(|below| below.image.as_deref());
    }
    found
}

/// A backing file: what an image is to call it, and the disk itself.
#[derive(Clone)]
pub struct BackingFile {
    pub(crate) name: Vec<u8>,
    pub(crate) format: Vec<u8>,
    pub(crate) lower: Lower,
}

impl BackingFile {
    /// Opens the file that an image would name as `name`, of the format `qcow2` or `raw`, for reading, with the chain below it.
    ///
    /// `options` are those of the image above: its path, from whose directory the name is resolved, which references may be
    /// followed, and the secrets of its chain, where this is layer 1.
    ///
    /// # Errors
    ///
    /// As for an image that names it: see [`ImageOptions::open`].
    pub fn open(
        name: impl Into<Vec<u8>>,
        format: impl Into<Vec<u8>>,
        options: &ImageOptions,
    ) -> Result<Self, ImageError> {
        let (name, format) = (name.into(), format.into());
        let path = options.path.clone().unwrap_or_default();
        // The image may be still to come.
        let context = Context::new(options, FileIdentity::of(&path).ok());
        let lower = open_named(options, &name, Some(&format), context, &path)?;
        Ok(Self {
            name,
            format,
            lower,
        })
    }

    /// An image that is open already.
    pub fn image(name: impl Into<Vec<u8>>, image: Arc<Image>) -> Self {
        Self {
            name: name.into(),
            format: b"qcow2".to_vec(),
            lower: Lower::Image(image),
        }
    }

    /// A raw disk that is open already.
    pub fn raw(name: impl Into<Vec<u8>>, storage: Arc<dyn Storage>) -> Self {
        Self {
            name: name.into(),
            format: b"raw".to_vec(),
            lower: Lower::Storage(storage),
        }
    }

    /// The name, as an image has it.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// The name of its format.
    pub fn format(&self) -> &[u8] {
        &self.format
    }

    /// The disk.
    pub fn storage(&self) -> &dyn Storage {
        self.lower.storage()
    }

    /// Its layers.
    pub fn chain(&self) -> Chain<'_> {
        match &self.lower {
            Lower::Image(image) => image.chain(),
            Lower::File(file) => Chain::file(file),
            Lower::Storage(storage) => Chain::raw(&**storage),
        }
    }

    /// Whether `image` is one of its layers.
    pub(crate) fn has(&self, image: &Image) -> bool {
        image
            .identity
            .is_some_and(|identity| self.lower.identities().contains(&identity))
    }
}

impl fmt::Debug for BackingFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackingFile")
            .field("name", &self.name.escape_ascii().to_string())
            .field("format", &self.format.escape_ascii().to_string())
            .field("storage", &self.lower.storage())
            .finish()
    }
}
