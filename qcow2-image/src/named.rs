//! Files that an image names: its backing file and its data file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_check::chain::{MAX_LAYERS, References, Resolved, Resolver};
use qcow2_format::{Header, raw};
use qcow2_io::{File, FileIdentity, FileOptions, Storage};

use crate::chain::Lower;
use crate::options::Backing;
use crate::{Image, ImageError, ImageOptions};

/// What is known of the chain so far.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    resolver: Resolver,
    /// Layers down to this one.
    layers: usize,
    /// Which files they are, as far as they are files.
    seen: Vec<FileIdentity>,
}

impl Context {
    pub(crate) fn new(options: &ImageOptions, identity: Option<FileIdentity>) -> Self {
        let resolver = match &options.path {
            Some(path) => Resolver::new(options.references.clone(), path),
            // Relative to what? Without a place no name means anything.
            None => Resolver::new(References::Deny, Path::new("")),
        };
        Self {
            resolver,
            layers: 1,
            seen: identity.into_iter().collect(),
        }
    }

    /// Which file this layer is, if it is one.
    pub(crate) fn identity(&self) -> Option<FileIdentity> {
        self.seen.last().copied()
    }

    /// Opens a file that an image of the chain names, unless it is in the chain already.
    fn open(
        &self,
        what: &'static str,
        found: &Resolved,
        options: &FileOptions,
    ) -> Result<File, ImageError> {
        let wrap = |error| referenced(what, found.path.clone(), error);
        let file = match self.check_new(&found.canonical) {
            Ok(()) => options.open(&found.canonical).map_err(ImageError::from),
            Err(error) => Err(error),
        };
        let file = file.map_err(wrap)?;
        // Again: the name may lead elsewhere by now.
        if self.seen.contains(&file.identity()) {
            return Err(wrap(ImageError::InChain));
        }
        Ok(file)
    }

    /// Before it is opened, for its lock would be the first to notice, and in other words.
    fn check_new(&self, path: &Path) -> Result<(), ImageError> {
        if self.seen.contains(&FileIdentity::of(path)?) {
            return Err(ImageError::InChain);
        }
        Ok(())
    }

    /// The same chain, one layer down.
    fn below(mut self, file: &File) -> Result<Self, ImageError> {
        if self.layers >= MAX_LAYERS {
            return Err(ImageError::Deep { max: MAX_LAYERS });
        }
        self.layers += 1;
        self.seen.push(file.identity());
        Ok(self)
    }
}

/// The external data file, and its path if it was opened by name.
pub(crate) type DataFile = (Arc<dyn Storage>, Option<PathBuf>);

pub(crate) fn open_data_file(
    options: &ImageOptions,
    header: &Header,
    context: &Context,
) -> Result<Option<DataFile>, ImageError> {
    const WHAT: &str = "data file";
    if !header.incompatible.external_data() {
        return match options.data_file {
            Some(_) => Err(ImageError::NeedlessDataFile),
            None => Ok(None),
        };
    }
    if let Some(storage) = &options.data_file {
        return Ok(Some((Arc::clone(storage), None)));
    }
    let name = header.data_file_name().ok_or(ImageError::NoDataFile)?;
    let image = options.path.clone().unwrap_or_default();
    let found = context
        .resolver
        .data_file(&image, name)
        .map_err(|source| ImageError::Reference { what: WHAT, source })?;
    let file = context.open(WHAT, &found, &FileOptions::new().write(!options.read_only))?;
    Ok(Some((Arc::new(file), Some(found.path))))
}

pub(crate) fn open_backing(
    options: &ImageOptions,
    header: &Header,
    context: Context,
    path: Option<&Path>,
) -> Result<Option<Lower>, ImageError> {
    let name = match (&options.backing, &header.backing_name) {
        (Backing::Given(storage), _) => return Ok(Some(Lower::Storage(Arc::clone(storage)))),
        (Backing::File(file), _) => return Ok(Some(Lower::File(Arc::clone(file)))),
        (Backing::Image(image), _) => return Ok(Some(Lower::Image(Arc::clone(image)))),
        (Backing::None, _) | (_, None) => return Ok(None),
        (Backing::Named, Some(name)) => name,
    };
    let path = path.unwrap_or(Path::new(""));
    open_named(options, name, header.backing_format(), context, path).map(Some)
}

/// Opens the backing file that an image at `path`, opened with `options`, names.
pub(crate) fn open_named(
    options: &ImageOptions,
    name: &[u8],
    format: Option<&[u8]>,
    context: Context,
    path: &Path,
) -> Result<Lower, ImageError> {
    let named = Named::find(options, name, format, context, path)?;
    let Some(below) = named.image else {
        return Ok(Lower::File(named.file));
    };
    match Image::open_in(&below, named.file, named.context) {
        Ok(image) => Ok(Lower::Image(Arc::from(image))),
        Err(error) => Err(referenced(BACKING_FILE, named.path, error)),
    }
}

const BACKING_FILE: &str = "backing file";

/// A backing file that has been found.
struct Named {
    file: Arc<File>,
    path: PathBuf,
    context: Context,
    /// How to open it, if it is an image.
    image: Option<Box<ImageOptions>>,
}

impl Named {
    #[inline(never)]
    fn find(
        options: &ImageOptions,
        name: &[u8],
        format: Option<&[u8]>,
        mut context: Context,
        path: &Path,
    ) -> Result<Self, ImageError> {
        let found = context
            .resolver
            .backing_file(path, name)
            .map_err(|source| ImageError::Reference {
                what: BACKING_FILE,
                source,
            })?;
        let wrap = |error| referenced(BACKING_FILE, found.path.clone(), error);
        let writable = options.writable_layer == Some(1);
        let file = context.open(BACKING_FILE, &found, &FileOptions::new().write(writable))?;
        context = context.below(&file)?;
        let is_qcow2 = match format {
            Some(b"raw") => false,
            Some(b"qcow2") => true,
            Some(other) => {
                return Err(ImageError::BackingFormat {
                    format: String::from_utf8_lossy(other).into_owned(),
                });
            }
            None => {
                // Whoever wrote the content of a raw disk could have made it look like an image that names other files.
                context.resolver = Resolver::new(References::Deny, &found.path);
                let mut magic = [0; 4];
                file.read_at(&mut magic, 0)
                    .map_err(|error| wrap(error.into()))?;
                let is_qcow2 = magic == raw::Header::MAGIC;
                if writable && !is_qcow2 {
                    return Err(wrap(ImageError::Unsupported {
                        what: "a raw disk whose format is not recorded is not written to: what is written could make it pass for an image",
                    }));
                }
                is_qcow2
            }
        };
        let below = || ImageOptions {
            path: Some(found.path.clone()),
            #[cfg(feature = "encryption")]
            secrets: options.secrets.below(),
            writable_layer: options
                .writable_layer
                .and_then(|depth| depth.checked_sub(1)),
            ..ImageOptions::default()
                .read_only(!writable)
                .cache(options.cache)
        };
        Ok(Self {
            image: is_qcow2.then(|| Box::new(below())),
            file: Arc::new(file),
            path: found.path,
            context,
        })
    }
}

fn referenced(what: &'static str, path: PathBuf, source: ImageError) -> ImageError {
    ImageError::Referenced {
        what,
        path,
        source: Box::new(source),
    }
}
