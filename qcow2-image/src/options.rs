//! How an image is to be opened.

#[cfg(feature = "encryption")]
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qcow2_alloc::PassDiscard;
use qcow2_cache::{OverlapChecks, Probe, Rules, Watcher};
use qcow2_check::chain::References;
#[cfg(feature = "encryption")]
use qcow2_io::cipher::Secret;
use qcow2_io::{File, FileIdentity, FileOptions, Storage};

use crate::chain::{BackingFile, Lower};
#[cfg(feature = "encryption")]
use crate::luks::WorkLimit;
use crate::named::Context;
use crate::{CacheOptions, Image, ImageError, SnapshotKey};

/// How often a flush stores what bitmaps have recorded, unless told otherwise.
const BITMAP_INTERVAL: Duration = Duration::from_secs(30);

/// How an image is to be opened: a builder.
///
/// Unless told otherwise it is opened for reading and writing, follows no reference, and tests each write against all
/// metadata.
#[derive(Clone, Debug)]
#[must_use = "it opens nothing by itself"]
pub struct ImageOptions {
    pub(crate) read_only: bool,
    pub(crate) cache: CacheOptions,
    pub(crate) references: References,
    pub(crate) path: Option<PathBuf>,
    pub(crate) backing: Backing,
    /// Which layer of the chain below is opened for writing; 1 is the backing file.
    pub(crate) writable_layer: Option<usize>,
    pub(crate) data_file: Option<Arc<dyn Storage>>,
    pub(crate) lazy_refcounts: Option<bool>,
    pub(crate) overlap_checks: OverlapChecks,
    pub(crate) discard: bool,
    pub(crate) pass_discard: PassDiscard,
    pub(crate) discard_no_unref: bool,
    pub(crate) pass_over_snapshots: bool,
    #[cfg(feature = "encryption")]
    pub(crate) secrets: Secrets,
    pub(crate) snapshot: Option<SnapshotKey>,
    pub(crate) bitmap_interval: Duration,
    pub(crate) qemu_places: bool,
    pub(crate) watcher: Option<Watcher>,
    pub(crate) probe: Option<Probe>,
    pub(crate) rules: Rules,
}

/// Where what an image does not have itself comes from.
#[derive(Clone, Debug)]
pub(crate) enum Backing {
    /// From the file that it names.
    Named,
    /// From this.
    Given(Arc<dyn Storage>),
    /// From this file.
    File(Arc<File>),
    /// From this, which is known to be an image.
    Image(Arc<Image>),
    /// From nowhere: it reads as zeros.
    None,
}

/// What opens encrypted images.
#[cfg(feature = "encryption")]
#[derive(Clone, Debug, Default)]
pub(crate) struct Secrets {
    pub(crate) by_layer: BTreeMap<usize, Arc<Secret>>,
    /// Without a secret, too, for what is not the guest's data.
    pub(crate) locked: bool,
    pub(crate) work: WorkLimit,
}

#[cfg(feature = "encryption")]
impl Secrets {
    /// Those of the backing file.
    pub(crate) fn below(&self) -> Self {
        let by_layer = self.by_layer.iter();
        Self {
            by_layer: by_layer
                .filter_map(|(layer, secret)| Some((layer.checked_sub(1)?, Arc::clone(secret))))
                .collect(),
            locked: self.locked,
            work: self.work,
        }
    }
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            cache: CacheOptions::default(),
            references: References::Deny,
            path: None,
            backing: Backing::Named,
            writable_layer: None,
            data_file: None,
            lazy_refcounts: None,
            overlap_checks: OverlapChecks::default(),
            discard: true,
            pass_discard: PassDiscard::default(),
            discard_no_unref: false,
            pass_over_snapshots: false,
            #[cfg(feature = "encryption")]
            secrets: Secrets::default(),
            snapshot: None,
            bitmap_interval: BITMAP_INTERVAL,
            qemu_places: false,
            watcher: None,
            probe: None,
            rules: Rules::ALL,
        }
    }
}

impl ImageOptions {
    /// Opens for reading only: nothing is written, not even to recover an image that was not closed.
    pub fn read_only(mut self, on: bool) -> Self {
        self.read_only = on;
        self
    }

    /// How much metadata is kept in memory.
    pub fn cache(mut self, cache: CacheOptions) -> Self {
        self.cache = cache;
        self
    }

    /// Which files named by the image, and by its backing files, may be opened. The default is none: an image that names
    /// one is refused then, unless the file is [given](Self::backing).
    pub fn references(mut self, references: References) -> Self {
        self.references = references;
        self
    }

    /// Where the image lies: names in it are resolved from its directory. [`open_path`](Self::open_path) sets it.
    pub fn path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Uses this storage, the guest's view of a disk, instead of the backing file that the image names.
    pub fn backing(mut self, storage: Arc<dyn Storage>) -> Self {
        self.backing = Backing::Given(storage);
        self
    }

    /// As [`backing`](Self::backing), for an image: its [layers](Image::chain) are known then, and it can be
    /// [committed to](Image::commit) if it is open for writing.
    pub fn backing_image(mut self, image: Arc<Image>) -> Self {
        self.backing = Backing::Image(image);
        self
    }

    /// Uses a backing file that is open already, whatever the image names.
    pub fn backing_file(mut self, backing: &BackingFile) -> Self {
        self.backing = match &backing.lower {
            Lower::Image(image) => Backing::Image(Arc::clone(image)),
            Lower::File(file) => Backing::File(Arc::clone(file)),
            Lower::Storage(storage) => Backing::Given(Arc::clone(storage)),
        };
        self
    }

    /// Opens a layer of the chain below for writing, so that it can be [committed to](Image::commit): 1 is the backing
    /// file, 2 the backing file of that, and so on. No other program may have it open then. Without effect on layers that are given
    /// and not named.
    pub fn writable_layer(mut self, depth: usize) -> Self {
        self.writable_layer = Some(depth);
        self
    }

    /// Uses no backing file: what the image does not have itself reads as zeros.
    pub fn no_backing(mut self) -> Self {
        self.backing = Backing::None;
        self
    }

    /// Uses this storage as external data file, whatever the image names.
    pub fn data_file(mut self, storage: Arc<dyn Storage>) -> Self {
        self.data_file = Some(storage);
        self
    }

    /// Whether refcounts are written at the end only; if not set, as the image says. Version 2 can't.
    pub fn lazy_refcounts(mut self, on: bool) -> Self {
        self.lazy_refcounts = Some(on);
        self
    }

    /// Which metadata each write is tested against. The default is all.
    pub fn overlap_checks(mut self, checks: OverlapChecks) -> Self {
        self.overlap_checks = checks;
        self
    }

    /// Whether discards, and permission to unmap in zero writes, have an effect. The default is that they have; off,
    /// discards are refused as unsupported.
    pub fn discard(mut self, on: bool) -> Self {
        self.discard = on;
        self
    }

    /// For which reasons freed clusters are punched out of the image file.
    pub fn pass_discard(mut self, pass_discard: PassDiscard) -> Self {
        self.pass_discard = pass_discard;
        self
    }

    /// Whether discarded clusters stay where they are, marked as zeros, so that the file does not get fragmented. Version 2
    /// can't.
    pub fn discard_no_unref(mut self, on: bool) -> Self {
        self.discard_no_unref = on;
        self
    }

    /// Whether an image may be written to in which the L1 table of a snapshot can't be one, by its size or its place. The default is
    /// that this is refused: nobody can say then whether a write would go to one of the snapshot's own tables. On, such a snapshot is
    /// passed over, and only refcounts protect what it has.
    pub fn pass_over_snapshots(mut self, on: bool) -> Self {
        self.pass_over_snapshots = on;
        self
    }

    /// The passphrase of an encrypted image.
    #[cfg(feature = "encryption")]
    pub fn secret(self, secret: impl Into<Arc<Secret>>) -> Self {
        self.layer_secret(0, secret)
    }

    /// The passphrase of an encrypted image of the chain: layer 0 is the image itself, 1 its backing file, and so on.
    #[cfg(feature = "encryption")]
    pub fn layer_secret(mut self, layer: usize, secret: impl Into<Arc<Secret>>) -> Self {
        self.secrets.by_layer.insert(layer, secret.into());
        self
    }

    /// Who is told when the image is found corrupt.
    pub fn watcher(mut self, watcher: Watcher) -> Self {
        self.watcher = Some(watcher);
        self
    }

    /// Who is asked before steps of the work on metadata, and may let them fail: for tests of what happens then.
    pub fn probe(mut self, probe: Probe) -> Self {
        self.probe = Some(probe);
        self
    }

    /// Opens encrypted images of the chain without a secret, too, if the image is opened for reading only: for what is known about them. Reading
    /// data fails then.
    #[cfg(feature = "encryption")]
    pub fn locked(mut self, on: bool) -> Self {
        self.secrets.locked = on;
        self
    }

    /// How much work may go into deriving keys, for each image of the chain: what an image asks for can be hours.
    #[cfg(feature = "encryption")]
    pub fn key_work(mut self, limit: WorkLimit) -> Self {
        self.secrets.work = limit;
        self
    }

    /// Opens a snapshot of the image instead of its present state, for reading only. It must not be deleted meanwhile.
    pub fn snapshot(mut self, key: SnapshotKey) -> Self {
        self.snapshot = Some(key);
        self.read_only(true)
    }

    /// How often a flush stores what bitmaps have recorded; 30 seconds if not set. In between, the file has more of them than is
    /// true, never less: where the disk was written to, a bitmap that is [recovered](crate::BitmapRecovery::AsStored) after a
    /// crash has 4096 bits instead of one. A short interval costs a sync more each time the guest then writes to where it has not
    /// written before.
    pub fn bitmap_interval(mut self, interval: Duration) -> Self {
        self.bitmap_interval = interval;
        self
    }

    /// Whether what is written goes where QEMU would put it, for who relies upon that: how long the file gets, or whether something
    /// fits. The default is that places are found by what is good for the image.
    ///
    /// Clusters are then taken in one piece, and gaps that are too small are left as they are. Bitmaps are in use from opening on, all that
    /// are consistent, and get new places at each change of one of them, and at the end if there was none, in the order of
    /// the directory and before the old ones are free. Meanwhile none takes a cluster, so what a crash leaves of them is coarser than
    /// usual. Where they don't fit at the end, [closing](Image::close) tells so and they stay in use, with all that they have recorded.
    pub fn qemu_places(mut self, on: bool) -> Self {
        self.qemu_places = on;
        self
    }

    /// Breaks rules of crash safety, for tests that must notice.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }

    /// Opens the image in a storage.
    ///
    /// # Errors
    ///
    /// Whatever makes the image unfit or a reference of it; nothing has been written then.
    pub fn open(self, storage: Arc<dyn Storage>) -> Result<Image, ImageError> {
        let context = Context::new(&self, None);
        Image::open_in(&self, storage, context).map(|image| *image)
    }

    /// Opens the image in a file, with the locks that keep QEMU and others out.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), and when the file can't be opened or another program uses it.
    pub fn open_path(mut self, path: impl AsRef<Path>) -> Result<Image, ImageError> {
        let file = FileOptions::new()
            .write(!self.read_only)
            .open(path.as_ref())?;
        self.path = Some(path.as_ref().to_owned());
        self.open_file(file)
    }

    /// Opens the image in a file that is open already. The file knows what it is, so that a chain that leads back to it is
    /// noticed.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_file(mut self, file: File) -> Result<Image, ImageError> {
        let identity: FileIdentity = file.identity();
        if self.path.is_none() {
            self.path = file.path().map(Path::to_owned);
        }
        let context = Context::new(&self, Some(identity));
        Image::open_in(&self, Arc::new(file), context).map(|image| *image)
    }
}
