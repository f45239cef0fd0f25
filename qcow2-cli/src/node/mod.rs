//! Block nodes: what a file name or a list of options stands for, opened.
//!
//! A description is [`NodeOptions`]: dotted keys and values, from a plain name, a `json:` name or `--image-opts`. [`open`] makes a tree of
//! [`Node`]s from it: a format on top of a protocol, filters where they are asked for, the backing chain below. Each driver is a
//! file of its own here.

mod bitmaps;
mod blkdebug;
mod compress;
mod concat;
mod cor;
mod corruption;
mod error;
mod file;
mod name;
mod null;
mod open;
mod options;
mod overlay;
mod qcow2;
mod quorum;
mod raw;

use std::sync::Arc;

use qcow2_image::chain::Chain;
use qcow2_image::{Image, ImageError, References, SnapshotKey};
use qcow2_io::cipher::Secret;
use qcow2_io::{Operation, Storage, StorageError};

pub(crate) use bitmaps::lost as lost_bitmaps;
pub use blkdebug::Blkdebug;
pub(crate) use concat::Concat;
pub use error::OpenError;
pub(crate) use error::snapshot_l1_text;
pub(crate) use name::{resolve, without_protocol};
pub use open::{Opener, open};
pub use options::{NodeOptions, Value};
pub(crate) use qcow2::{SnapshotRefusal, snapshot_refusal};

/// How a tree is to be used.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of its own"
)]
#[derive(Default)]
pub struct Access {
    /// For reading and writing.
    pub write: bool,
    /// Beside a writer in another program.
    pub force_share: bool,
    /// Past the page cache.
    pub direct: bool,
    /// With the system's own asynchronous requests, which go past the page cache only.
    pub native: bool,
    /// Without the backing chain: what an image does not have itself reads as zeros.
    pub no_backing: bool,
    /// Discards, and zero writes that may unmap, give space back.
    pub unmap: bool,
    /// Without the keys of encrypted images: for what is known about them.
    pub locked: bool,
    /// For a check, which needs no snapshots: an image whose snapshot table is refused is opened, too, though perhaps as nothing
    /// but its file.
    pub for_check: bool,
    /// What is read from the backing chain is kept.
    pub copy_on_read: bool,
    /// Writes go to an overlay that is gone afterwards.
    pub temporary_overlay: bool,
    /// A snapshot instead of the present state, for reading.
    pub snapshot: Option<SnapshotKey>,
    /// The backing chain, too, is opened for writing, down to this depth; 0: none of it.
    pub writable_layers: usize,
    /// Which files are opened that only images name; `None`: whatever they name, protocols among them.
    pub references: Option<References>,
    /// What opens encrypted layers that nothing else is said of, the top one being 0.
    pub secrets: Vec<(usize, Arc<Secret>)>,
}

impl Access {
    /// For reading only.
    pub fn read() -> Self {
        Self::default()
    }

    /// For reading and writing.
    pub fn write() -> Self {
        Self {
            write: true,
            ..Self::default()
        }
    }
}

/// What a node's bytes come from.
#[derive(Debug, Clone)]
pub enum Content {
    /// A qcow2 image, with all that it can do besides.
    Image(Arc<Image>),
    /// An image behind a filter, through which requests go.
    Filtered(Arc<Image>, Arc<dyn Storage>),
    /// Any other disk.
    Plain(Arc<dyn Storage>),
}

/// An open node of a tree.
#[derive(Debug)]
pub struct Node {
    /// The driver's name: `qcow2`, `raw`, `file`, ...
    pub driver: &'static str,
    /// The name that stands for the node in messages: a plain name where one says it all, else a `json:` description.
    pub filename: String,
    /// What it was described by, for who opens it again.
    pub options: NodeOptions,
    /// Its bytes.
    pub content: Content,
    /// Nodes below by their roles: `file`, `data-file`, `backing`.
    pub children: Vec<(&'static str, Node)>,
    /// Whether writes are allowed.
    pub writable: bool,
    /// The fault injector, if it is one.
    pub debug: Option<Arc<Blkdebug>>,
}

impl Node {
    /// The disk that it shows.
    pub fn storage(&self) -> Arc<dyn Storage> {
        match &self.content {
            Content::Image(image) => Arc::clone(image) as Arc<dyn Storage>,
            Content::Filtered(_, storage) | Content::Plain(storage) => Arc::clone(storage),
        }
    }

    /// The image, if it is one.
    pub fn image(&self) -> Option<&Arc<Image>> {
        match &self.content {
            Content::Image(image) | Content::Filtered(image, _) => Some(image),
            Content::Plain(_) => None,
        }
    }

    /// Its layers; `storage` is what it [shows](Self::storage). Behind a filter there is one.
    pub(crate) fn chain_of<'a>(&'a self, storage: &'a dyn Storage) -> Chain<'a> {
        match &self.content {
            Content::Image(image) => image.chain(),
            Content::Filtered(..) | Content::Plain(_) => Chain::raw(storage),
        }
    }

    /// The node that holds the image, below filters.
    pub fn unfiltered(&self) -> &Node {
        match (&self.content, self.child("image")) {
            (Content::Filtered(..), Some(below)) => below.unfiltered(),
            _ => self,
        }
    }

    /// The name of the file that it lies in: names in it are meant from that file's directory.
    pub fn path(&self) -> &str {
        self.child("file").map_or(&self.filename, Node::path)
    }

    /// The node in this role below.
    pub fn child(&self, role: &str) -> Option<&Node> {
        let mut children = self.children.iter();
        children
            .find(|(found, _)| *found == role)
            .map(|(_, node)| node)
    }

    /// The fault injector in the tree below, the uppermost if there are several.
    pub fn injector(&self) -> Option<&Arc<Blkdebug>> {
        let mut children = self.children.iter();
        self.debug
            .as_ref()
            .or_else(|| children.find_map(|(_, node)| node.injector()))
    }

    /// The image itself, for what needs it as a whole (amend, commit, close): the node is gone then. `None` where it is no image, or
    /// somebody else holds it, too.
    pub fn into_image(mut self) -> Option<(Image, Vec<(&'static str, Node)>)> {
        match self.content {
            Content::Filtered(image, filter) => {
                // They hold the image, too.
                drop((filter, self.debug));
                if let Some(at) = self.children.iter().position(|(role, _)| *role == "image") {
                    drop(image);
                    return self.children.swap_remove(at).1.into_image();
                }
                Some((Arc::try_unwrap(image).ok()?, self.children))
            }
            Content::Image(image) => Some((Arc::try_unwrap(image).ok()?, self.children)),
            Content::Plain(_) => None,
        }
    }
}

/// A failure of an image, for those who know storages only.
pub(crate) fn storage_error(operation: Operation, error: &ImageError) -> StorageError {
    StorageError::new(operation, error.kind()).with_detail(error.to_string())
}

/// A raw disk whose guest writes an image header to its start would be opened as that image the next time.
pub(crate) fn warn_of_guess(name: &str) {
    crate::Console::warn(format_args!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions.\n"
    ));
}
