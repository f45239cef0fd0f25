//! Opening: all reasons to refuse come before the first write.

use std::sync::{Arc, OnceLock};

use qcow2_alloc::{Allocator, Order};
use qcow2_cache::sync::Mutex;
use qcow2_cache::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use qcow2_cache::{Metadata, MetadataOptions};
use qcow2_format::header::Version;
use qcow2_format::raw;
use qcow2_format::{Header, HeaderError, HostOffset};
use qcow2_io::{FileIdentity, MAX_LEN, Storage};

use crate::bitmap::Bitmaps;
use crate::cache::CacheSizes;
use crate::chain::Lower;
use crate::compressed::Unpacked;
use crate::gate::Gate;
use crate::l1::L1Table;
use crate::mapping::Shape;
use crate::named::{Context, DataFile, open_backing, open_data_file};
use crate::pack::Packer;
use crate::ready::{read_snapshots, snapshot_l1_len};
use crate::stripes::Stripes;
use crate::unlock::unlock;
use crate::{Image, ImageError, ImageOptions};

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
        let identity = context.identity();
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
