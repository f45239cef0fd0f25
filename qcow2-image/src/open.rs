//! Opening: all reasons to refuse come before the first write.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use qcow2_alloc::{Allocator, Order};
use qcow2_cache::sync::Mutex;
use qcow2_cache::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use qcow2_cache::{Metadata, MetadataOptions};
use qcow2_check::chain::{MAX_LAYERS, References, Resolved, Resolver};
use qcow2_format::header::{CryptMethod, Version};
use qcow2_format::raw;
use qcow2_format::{Header, HeaderError, HostOffset};
#[cfg(feature = "encryption")]
use qcow2_io::cipher::{Secret, SectorCipher};
use qcow2_io::{File, FileIdentity, FileOptions, MAX_LEN, Storage};

use crate::bitmap::Bitmaps;
use crate::cache::CacheSizes;
use crate::chain::Lower;
use crate::compressed::Unpacked;
use crate::crypt::Crypt;
use crate::gate::Gate;
use crate::l1::L1Table;
#[cfg(feature = "encryption")]
use crate::luks::{self, LuksArea, WorkLimit};
use crate::mapping::Shape;
use crate::options::Backing;
use crate::pack::Packer;
use crate::ready::{read_snapshots, snapshot_l1_len};
use crate::stripes::Stripes;
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

/// Reads and proves the first cluster.
fn read_header(storage: &dyn Storage) -> Result<Header, ImageError> {
    let mut prefix = [0; raw::Header::LEN as usize];
    storage.read_at(&mut prefix, 0)?;
    let mut cluster = vec![0; Header::probe(&prefix)?];
    storage.read_at(&mut cluster, 0)?;
    match Header::decode(&cluster) {
        Err(error) if is_of_bitmaps(&error) => {
            // The disk is readable without them.
            let (header, defects) = Header::decode_for_check(&cluster)?;
            let mut others = defects.into_iter();
            match others.find(|defect| defect.is_refused() && !is_of_bitmaps(defect)) {
                Some(defect) => Err(defect.into()),
                None => Ok(header),
            }
        }
        result => Ok(result?),
    }
}

/// Whether what is wrong with a header is where it says that the bitmaps are.
fn is_of_bitmaps(error: &HeaderError) -> bool {
    matches!(
        error,
        HeaderError::BitmapsLength { .. }
            | HeaderError::BitmapsReserved { .. }
            | HeaderError::BitmapsCount { .. }
            | HeaderError::BitmapsDirectoryTooLarge { .. }
            | HeaderError::BitmapsDirectoryUnaligned { .. }
    )
}

/// An image whose backing file is still to be opened.
struct Opening {
    header: Header,
    sizes: CacheSizes,
    root: Root,
    l1: L1Table,
    data: Option<DataFile>,
}

impl Opening {
    #[inline(never)]
    fn begin(
        options: &ImageOptions,
        storage: &dyn Storage,
        context: &Context,
    ) -> Result<Box<Self>, ImageError> {
        let header = read_header(storage)?;
        refuse(&header, options)?;
        let sizes = CacheSizes::new(&options.cache, header.geometry, header.virtual_size())?;
        let root = Root::of(storage, &header, options)?;
        let mut bytes = vec![0; usize::try_from(u64::from(root.l1_entries) * 8).unwrap_or(0)];
        storage.read_at(&mut bytes, root.l1_table.get())?;
        let l1 = L1Table::new(&bytes);
        drop(bytes);
        let data = open_data_file(options, &header, context)?;
        Ok(Box::new(Self {
            header,
            sizes,
            root,
            l1,
            data,
        }))
    }
}

impl Image {
    /// Opens an image and what lies below. Chains are long and stacks short, so what calls itself here keeps nothing large.
    pub(crate) fn open_in(
        options: &ImageOptions,
        storage: Arc<dyn Storage>,
        context: Context,
    ) -> Result<Box<Self>, ImageError> {
        let opening = Opening::begin(options, &*storage, &context)?;
        let identity = context.seen.last().copied();
        let path = options.path.as_deref();
        let lower = open_backing(options, &opening.header, context, path)?;
        Self::assemble(options, storage, *opening, identity, lower)
    }

    #[inline(never)]
    fn assemble(
        options: &ImageOptions,
        storage: Arc<dyn Storage>,
        opening: Opening,
        identity: Option<FileIdentity>,
        lower: Option<Lower>,
    ) -> Result<Box<Self>, ImageError> {
        let Opening {
            header,
            sizes,
            root,
            l1,
            data,
        } = opening;
        let path = options.path.clone();
        let (data, data_path) = data.unzip();
        let (backing, below) = lower.map(Lower::into_parts).unzip();

        // It may take seconds.
        let crypt = unlock(&*storage, &header, options)?;

        let lazy_refcounts = options
            .lazy_refcounts
            .unwrap_or(header.compatible.lazy_refcounts());
        let index = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let meta = Arc::new(
            Metadata::new(
                storage,
                data,
                header.clone(),
                &MetadataOptions {
                    read_only: options.read_only,
                    lazy_refcounts,
                    overlap_checks: options.overlap_checks,
                    l2_slice_bytes: index(sizes.l2_slice_bytes),
                    l2_slices: index(sizes.l2_slices),
                    refcount_slice_bytes: index(sizes.refcount_slice_bytes),
                    refcount_slices: index(sizes.refcount_slices),
                    rules: options.rules,
                },
            )
            .watched(options.watcher.clone())
            .probed(options.probe.clone()),
        );
        let alloc = if options.read_only {
            None
        } else {
            let order = if options.qemu_places {
                Order::Forward
            } else {
                Order::Lowest
            };
            Some(Allocator::open(Arc::clone(&meta), options.pass_discard)?.ordered(order))
        };
        let image = Self {
            geometry: header.geometry,
            rules: header.entry_rules(),
            shape: Shape::new(header.entry_rules(), crypt.is_some()),
            raw_data: header.autoclear.raw_external_data(),
            compression: header.compression_type,
            size: AtomicU64::new(root.size),
            meta,
            alloc,
            l1,
            backing,
            below,
            path,
            data_path: data_path.flatten(),
            identity,
            gate: Gate::new(),
            stripes: Stripes::new(),
            tables: Stripes::new(),
            unpacked: Unpacked::new(),
            maps_holes: OnceLock::new(),
            crypt,
            packer: Packer::default(),
            bitmaps: Bitmaps::new(options.bitmap_interval, options.qemu_places),
            ends_in_sector: AtomicBool::new(false),
            discard: options.discard,
            discard_no_unref: options.discard_no_unref,
            pass_over_snapshots: options.pass_over_snapshots,
            pass_request: options.pass_discard.request,
            clean_interval: sizes.clean_interval,
            cleaned: Mutex::default(),
            ready: AtomicBool::new(false),
            getting_ready: Mutex::new(()),
            // Until it is known to be fit for writing: dropping it must not touch the file.
            closed: AtomicBool::new(true),
        };
        if !options.read_only {
            image.begin_writing(&header)?;
            image.closed.store(false, Ordering::Release);
            image.occupy_bitmaps();
        }
        Ok(Box::new(image))
    }
}

/// What the disk is read from.
struct Root {
    /// Bytes of the disk.
    size: u64,
    l1_table: HostOffset,
    /// At most 2^22.
    l1_entries: u32,
}

impl Root {
    fn of(
        storage: &dyn Storage,
        header: &Header,
        options: &ImageOptions,
    ) -> Result<Self, ImageError> {
        let active = Self {
            size: header.virtual_size(),
            l1_table: header.l1_table_offset,
            l1_entries: header.l1_entries,
        };
        let Some(key) = &options.snapshot else {
            return Ok(active);
        };
        if !options.read_only {
            return Err(ImageError::Unsupported {
                what: "a snapshot can't be written to",
            });
        }
        let snapshots = match header.snapshot_count {
            0 => Vec::new(),
            _ => read_snapshots(storage, header)?.0,
        };
        let (_, snapshot) = key.of(&snapshots)?;
        let (l1_table, l1_entries) = (snapshot.l1_table_offset, snapshot.l1_entries);
        let size = snapshot.disk_size().unwrap_or(active.size);
        let geometry = header.geometry;
        let refuse = |detail| ImageError::Refused {
            what: "the L1 table of a snapshot",
            offset: l1_table,
            detail,
        };
        snapshot_l1_len(geometry, l1_table, l1_entries)?;
        if size > MAX_LEN || geometry.l1_entries_for(size) > u64::from(l1_entries) {
            return Err(refuse(format!(
                "{l1_entries} entries are too few for {size} bytes"
            )));
        }
        Ok(Self {
            size,
            l1_table,
            l1_entries,
        })
    }
}

fn refuse(header: &Header, options: &ImageOptions) -> Result<(), ImageError> {
    if header.incompatible.corrupt() && !options.read_only {
        return Err(ImageError::MarkedCorrupt);
    }
    let version2 = header.version == Version::V2;
    if version2 && options.lazy_refcounts == Some(true) {
        return Err(ImageError::Unsupported {
            what: "an image of version 2 can't have lazy refcounts",
        });
    }
    if version2 && options.discard_no_unref {
        return Err(ImageError::Unsupported {
            what: "an image of version 2 can't keep discarded clusters in place",
        });
    }
    if header.autoclear.raw_external_data() && !header.incompatible.external_data() {
        return Err(ImageError::Unsupported {
            what: "the image says that its data file is raw, but has none",
        });
    }
    Ok(())
}

/// The cipher of an encrypted image.
#[cfg(feature = "encryption")]
fn unlock(
    storage: &dyn Storage,
    header: &Header,
    options: &ImageOptions,
) -> Result<Option<Crypt>, ImageError> {
    let method = header.crypt_method;
    let secrets = &options.secrets;
    let Some(secret) = secrets.by_layer.get(&0) else {
        return match method {
            CryptMethod::None => Ok(None),
            method if secrets.locked && options.read_only => Ok(Some(Crypt {
                cipher: None,
                method,
                by_guest: method == CryptMethod::Aes,
            })),
            method => Err(ImageError::SecretMissing { method }),
        };
    };
    match unlock_with(storage, header, secret, secrets.work)? {
        Some(crypt) => Ok(Some(crypt)),
        None => Err(ImageError::NeedlessSecret),
    }
}

/// The cipher that a secret opens; `None` if the image is not encrypted.
#[cfg(feature = "encryption")]
pub(crate) fn unlock_with(
    storage: &dyn Storage,
    header: &Header,
    secret: &Secret,
    work: WorkLimit,
) -> Result<Option<Crypt>, ImageError> {
    let method = header.crypt_method;
    match method {
        CryptMethod::None => Ok(None),
        CryptMethod::Aes => Ok(Some(Crypt {
            cipher: Some(SectorCipher::legacy_aes(secret)),
            method,
            by_guest: true,
        })),
        // Decoding has refused other methods, and a header without its extension.
        CryptMethod::Luks | CryptMethod::Unknown(_) => {
            let area = header.crypto().ok_or(HeaderError::CryptoMissing)?;
            let found = luks::unlock(storage, LuksArea::from(*area), secret, work)?;
            Ok(Some(Crypt {
                cipher: Some(found.into_cipher()),
                method,
                by_guest: false,
            }))
        }
    }
}

/// A build without ciphers has none for an encrypted image.
#[cfg(not(feature = "encryption"))]
fn unlock(
    _storage: &dyn Storage,
    header: &Header,
    _options: &ImageOptions,
) -> Result<Option<Crypt>, ImageError> {
    match header.crypt_method {
        CryptMethod::None => Ok(None),
        method => Err(ImageError::Encrypted { method }),
    }
}

/// The external data file, and its path if it was opened by name.
type DataFile = (Arc<dyn Storage>, Option<PathBuf>);

fn open_data_file(
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

fn open_backing(
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
