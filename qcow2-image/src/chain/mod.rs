//! The chain: an image, its backing file, the backing file of that, and so on; and which of them holds what.
//!
//! [`Image::chain`] gives the layers from the top down. [`Chain::segments`] tells for each stretch of the disk in which layer
//! it is, what it is there, and where its bytes lie in that layer's file.
//!
//! ```
//! use std::sync::Arc;
//! use qcow2_image::Image;
//! use qcow2_image::chain::SegmentKind;
//! use qcow2_image::create::CreateOptions;
//! use qcow2_io::{Memory, Storage};
//!
//! let base = Arc::new(Memory::from(vec![7; 1 << 20]));
//! let file = Arc::new(Memory::new());
//! let options = CreateOptions::new(1 << 20).backing_file("base.raw", "raw");
//! Image::create(&file, &options)?;
//! let image = Image::options().backing(base).open(file)?;
//! image.write_at(&[1; 65536], 131_072)?;
//! let segments = image.chain().map(0..1 << 20, usize::MAX)?;
//! let depths: Vec<_> = segments.iter().map(|one| (one.offset, one.depth)).collect();
//! assert_eq!(depths, [(0, 1), (131_072, 0), (196_608, 1)]);
//! assert!(segments.iter().all(|one| one.kind == SegmentKind::Data));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod error;
mod local;
mod lower;
mod overlay;
mod segment;
mod walk;

use std::ops::Range;
use std::path::Path;

use qcow2_io::{File, FileIdentity, Storage};

use crate::{Image, ImageError};

pub use self::error::ChainError;
pub(crate) use self::local::Local;
pub use self::lower::BackingFile;
pub(crate) use self::lower::{Below, Lower};
pub use self::segment::{Segment, SegmentKind, Segments};
pub(crate) use self::walk::{Found, Walker};
pub use crate::transfer::Transferred;

/// One layer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    storage: &'a dyn Storage,
    image: Option<&'a Image>,
    path: Option<&'a Path>,
    origin: Origin,
}

/// Which bytes a layer is made of: equal for two layers only if they are made of the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// A file, read as it is (`false`) or as an image.
    File(FileIdentity, bool),
    /// Something in memory, by its place, which nothing else has while it is borrowed; read as it is or as an image.
    Address(Place, bool),
}

impl Origin {
    fn of_image(image: &Image) -> Self {
        // Guest data that lies elsewhere may be given by the caller, so the name of the image says nothing of it.
        if image.rules.external_data {
            return Self::Address(Place::of(&**image.meta.data()), true);
        }
        match image.identity {
            Some(identity) => Self::File(identity, true),
            None => Self::Address(Place::of(&**image.meta.storage()), true),
        }
    }
}

/// Where something lies in memory, and how long it is: a wrapper may begin where what it wraps does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    address: usize,
    len: usize,
}

impl Place {
    fn of(storage: &dyn Storage) -> Self {
        Self {
            address: std::ptr::from_ref(storage).addr(),
            len: size_of_val(storage),
        }
    }
}

impl<'a> Layer<'a> {
    fn of_image(image: &'a Image) -> Self {
        Self {
            storage: image,
            image: Some(image),
            path: image.path.as_deref(),
            origin: Origin::of_image(image),
        }
    }

    /// What a guest would see if this layer were the top one. It may be shorter or longer than the layers above.
    pub fn storage(&self) -> &'a dyn Storage {
        self.storage
    }

    /// The image, if it is one; `None` for a raw disk.
    pub fn image(&self) -> Option<&'a Image> {
        self.image
    }

    /// Where the bytes lie that [`Segment::host`] is about: the external data file, or else the file of the image; a raw disk
    /// itself.
    pub fn data(&self) -> &'a dyn Storage {
        match self.image {
            Some(image) => &**image.meta.data(),
            None => self.storage,
        }
    }

    /// The name that the file was opened by, if it was opened by name: as written in the layer above, resolved from the
    /// directory of that.
    pub fn path(&self) -> Option<&'a Path> {
        self.path
    }

    /// The name of the file that [`data`](Self::data) is, if it was opened by name.
    pub fn data_path(&self) -> Option<&'a Path> {
        match self.image {
            Some(image) if image.meta.has_external_data() => image.data_path.as_deref(),
            _ => self.path,
        }
    }

    /// Bytes of the disk that this layer has.
    fn len(&self) -> Result<u64, ImageError> {
        Ok(self.storage.len()?)
    }
}

/// The layers of a disk, the top one first.
#[derive(Clone, Debug)]
pub struct Chain<'a> {
    layers: Vec<Layer<'a>>,
}

impl Image {
    /// The layers of the disk: this image, its backing file, and so on. One that was [given](crate::ImageOptions::backing) as a
    /// storage is one layer, whatever it is made of; to see through it, [give](crate::ImageOptions::backing_image) it as an image.
    pub fn chain(&self) -> Chain<'_> {
        let mut layers = vec![Layer::of_image(self)];
        let mut top = self;
        while let (Some(backing), Some(below)) = (&top.backing, &top.below) {
            if let Some(image) = &below.image {
                layers.push(Layer::of_image(image));
                top = image;
                continue;
            }
            layers.push(Layer {
                storage: &**backing,
                image: None,
                path: below.path.as_deref(),
                origin: match below.identity {
                    Some(identity) => Origin::File(identity, false),
                    None => Origin::Address(Place::of(&**backing), false),
                },
            });
            break;
        }
        Chain { layers }
    }

    /// Which file it is, unless it is none or it was opened as a [storage](crate::ImageOptions::open).
    pub fn identity(&self) -> Option<FileIdentity> {
        self.identity
    }

    /// The name that the image was opened by, if it was opened by name.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

impl<'a> Chain<'a> {
    /// A disk that is one layer of plain bytes.
    pub fn raw(storage: &'a dyn Storage) -> Self {
        Self::one(storage, None, Origin::Address(Place::of(storage), false))
    }

    /// A file of plain bytes.
    pub fn file(file: &'a File) -> Self {
        Self::one(file, file.path(), Origin::File(file.identity(), false))
    }

    fn one(storage: &'a dyn Storage, path: Option<&'a Path>, origin: Origin) -> Self {
        let layer = Layer {
            storage,
            image: None,
            path,
            origin,
        };
        Self {
            layers: vec![layer],
        }
    }

    /// The layers, the top one first; their index is the depth.
    pub fn layers(&self) -> &[Layer<'a>] {
        &self.layers
    }

    /// Only the first `depth` layers: what is in none of them counts as unallocated.
    #[must_use]
    pub fn above(mut self, depth: usize) -> Self {
        self.layers.truncate(depth);
        self
    }

    /// The chain without its first `depth` layers.
    #[must_use]
    pub fn below(mut self, depth: usize) -> Self {
        self.layers.drain(..depth.min(self.layers.len()));
        self
    }

    /// The disk as a guest sees it; `None` if there is no layer.
    pub fn storage(&self) -> Option<&'a dyn Storage> {
        self.layers.first().map(Layer::storage)
    }

    /// Bytes of the disk: those of the top layer.
    ///
    /// # Errors
    ///
    /// When the layer can't tell.
    pub fn virtual_size(&self) -> Result<u64, ImageError> {
        self.layers.first().map_or(Ok(0), Layer::len)
    }

    /// What the disk is made of, stretch by stretch, over a range; what is behind the end of the disk is left out.
    ///
    /// A snapshot: whatever writes to the disk meanwhile makes it old.
    ///
    /// # Errors
    ///
    /// When a layer can't tell its length.
    pub fn segments(&self, range: Range<u64>) -> Result<Segments<'a>, ImageError> {
        Segments::new(self, range)
    }

    /// The first `max` [segments](Self::segments) of a range. They follow one another without a gap; if they end before the
    /// range and the disk do, the caller asks again from there.
    ///
    /// # Errors
    ///
    /// What the layers report, and tables that can't be used.
    pub fn map(&self, range: Range<u64>, max: usize) -> Result<Vec<Segment>, ImageError> {
        self.segments(range)?.take(max).collect()
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests;
