//! A deed done to an image, cut short by a crash at any moment and by any single fault.

use std::fmt::Debug;
use std::sync::Arc;

use qcow2_check::{Options, Verdict, check};
use qcow2_format::header::Version;
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::{Overlay, Random, Record, damage, strike_everywhere};
use qcow2_image::{Image, ImageOptions, SnapshotKey, SnapshotOptions};
use qcow2_io::codec::Level;
use qcow2_io::{Faulty, Memory, Storage, ZeroFlags};

/// Bytes of the disk.
pub(crate) const LEN: usize = 300 << 10;

type Act = dyn Fn(&mut Image) -> Result<(), String>;

/// What is done, and to which image.
pub(crate) struct Deed {
    pub(crate) name: String,
    pub(crate) recipe: CreateOptions,
    /// There is a backing file of this content.
    pub(crate) backing: Option<Arc<Memory>>,
    pub(crate) snapshots: bool,
    pub(crate) act: Box<Act>,
}

impl Deed {
    pub(crate) fn new<E: Debug>(
        name: impl Into<String>,
        recipe: CreateOptions,
        act: impl Fn(&mut Image) -> Result<(), E> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            recipe,
            backing: None,
            snapshots: true,
            act: Box::new(move |image| act(image).map_err(|error| format!("{error:?}"))),
        }
    }

    pub(crate) fn without_snapshots(mut self) -> Self {
        self.snapshots = false;
        self
    }

    pub(crate) fn over(mut self, bytes: Vec<u8>) -> Self {
        self.backing = Some(Arc::new(Memory::from(bytes)));
        self.recipe = self.recipe.backing_file("base", "raw");
        self
    }

    fn options(&self) -> ImageOptions {
        match &self.backing {
            Some(storage) => Image::options().backing(storage.clone()),
            None => Image::options().no_backing(),
        }
    }
}

/// The disk, the snapshots by name with what they hold, and what the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) disk: Vec<u8>,
    pub(crate) snapshots: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) facts: String,
}

pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let word = random.draw().to_be_bytes();
        bytes.extend(word.repeat(usize::from(word[0] % 8) + 1));
    }
    bytes.truncate(len);
    bytes
}

/// An image that was written to, with two snapshots or none: data, compressed clusters, zeros, and holes from what was
/// given up.
pub(crate) fn prepare(deed: &Deed) -> Vec<u8> {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, &deed.recipe).unwrap();
    let image = deed.options().open(memory.clone()).unwrap();
    let unit = image.geometry().cluster_len();
    for (number, name) in ["one", "two", ""].into_iter().enumerate() {
        let seed = number as u64;
        for part in 0..6 {
            let at = ((number * 31 + part * 47) % 250) << 10;
            let bytes = noise(seed + part as u64, 9000);
            image.write_at(&bytes, at as u64).unwrap();
        }
        for part in 0..3 {
            let packed = noise(seed + part as u64, unit);
            let at = ((200 << 10) + (number + part) * unit) / unit * unit;
            image
                .write_compressed(&packed, at as u64, Level::default())
                .unwrap();
        }
        let zeros = 5000 * seed..5000 * seed + 20_000;
        image.write_zeroes(zeros, ZeroFlags::NONE).unwrap();
        if image.header().version == Version::V3 || deed.backing.is_none() {
            image.discard(120_000 + 9000 * seed..150_000).unwrap();
        }
        if deed.snapshots && !name.is_empty() {
            image.create_snapshot(&SnapshotOptions::new(name)).unwrap();
        }
    }
    image.close().unwrap();
    memory.to_vec().unwrap()
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut disk = vec![0; usize::try_from(image.virtual_size()).unwrap()];
    image.read_at(&mut disk, 0).unwrap();
    disk
}

pub(crate) fn state(options: impl Fn() -> ImageOptions, storage: &Arc<dyn Storage>) -> State {
    let open = || options().read_only(true);
    let image = open().open(Arc::clone(storage)).unwrap();
    let snapshots = image.snapshots().unwrap().into_iter().map(|snapshot| {
        let key = SnapshotKey::Id(snapshot.id);
        let view = open().snapshot(key).open(Arc::clone(storage)).unwrap();
        (snapshot.name, read_all(&view))
    });
    let header = image.header();
    State {
        snapshots: snapshots.collect(),
        disk: read_all(&image),
        facts: format!(
            "{:?} {} {} {:?} {:?} {:?} {}",
            header.version,
            header.geometry.refcount_bits(),
            header.compatible.lazy_refcounts(),
            header.backing_name,
            header.backing_format(),
            header.data_file_name(),
            header.autoclear.bits(),
        ),
    }
}

/// Asserts that the checker finds nothing, not even a leak.
pub(crate) fn assert_sound(storage: &dyn Storage) {
    let report = check(storage, &Options::default());
    assert_eq!(report.verdict(), Verdict::Sound, "{:#?}", report.findings);
}

/// An image before and after a deed.
pub(crate) struct Case {
    pub(crate) deed: Deed,
    pub(crate) start: Vec<u8>,
    before: State,
    after: State,
}

impl Case {
    pub(crate) fn new(deed: Deed) -> Self {
        Self::after_work(deed, |_| {})
    }

    /// With more work before the deed.
    pub(crate) fn after_work(deed: Deed, work: impl FnOnce(&Image)) -> Self {
        let memory = Arc::new(Memory::from(prepare(&deed)));
        let image = deed.options().open(memory.clone()).unwrap();
        work(&image);
        image.close().unwrap();
        let start = memory.to_vec().unwrap();
        let memory = || Arc::new(Memory::from(start.clone())) as Arc<dyn Storage>;
        assert_sound(&memory());
        let before = state(|| deed.options(), &memory());
        let end = memory();
        let mut image = deed.options().open(Arc::clone(&end)).unwrap();
        (deed.act)(&mut image).unwrap_or_else(|error| panic!("{}: {error}", deed.name));
        // The image goes on as what it has become.
        assert!(read_all(&image) == state(|| deed.options(), &end).disk);
        image.write_at(&noise(9, 3000), 70_000).unwrap();
        image.close().unwrap();
        assert_sound(&end);
        let image = memory();
        let mut opened = deed.options().open(Arc::clone(&image)).unwrap();
        (deed.act)(&mut opened).unwrap();
        opened.close().unwrap();
        assert_sound(&image);
        let after = state(|| deed.options(), &image);
        Self {
            deed,
            start,
            before,
            after,
        }
    }

    pub(crate) fn before(&self) -> &State {
        &self.before
    }

    pub(crate) fn after(&self) -> &State {
        &self.after
    }

    /// The image must be before or after the deed, and take writes.
    fn look(&self, storage: &Arc<dyn Storage>, how: &str) {
        let name = &self.deed.name;
        let options = || self.deed.options();
        assert_eq!(damage(storage, true), [], "{name}, {how}");
        let now = state(options, storage);
        let is_known = now == self.before || now == self.after;
        assert!(is_known, "{name}, {how}: neither before nor after");
        let opened = options().open(Arc::clone(storage));
        let image = opened.unwrap_or_else(|error| panic!("{name}, {how}: {error:?}"));
        let mut disk = now.disk.clone();
        for (number, at) in [700_usize, 90_000, 150_000].into_iter().enumerate() {
            let new = noise(number as u64 + 50, 3000);
            image.write_at(&new, at as u64).unwrap();
            disk.splice(at..at + 3000, new);
        }
        image.close().unwrap();
        assert_eq!(damage(storage, false), [], "{name}, {how}, written to");
        let later = state(options, storage);
        assert_eq!(later.snapshots, now.snapshots, "{name}, {how}");
        assert!(later.disk == disk, "{name}, {how}");
    }

    /// Crashes after every `step`th operation of the storage.
    pub(crate) fn crash_everywhere(&self, random: &mut Random, step: usize) {
        self.crash_everywhere_and(random, step, |_| {});
    }

    /// The same, with one more look at what the crash leaves.
    pub(crate) fn crash_everywhere_and(
        &self,
        random: &mut Random,
        step: usize,
        also: impl Fn(&Arc<dyn Storage>),
    ) {
        let record = Record::of(&self.start, |storage| {
            let mut image = self.deed.options().open(storage).unwrap();
            (self.deed.act)(&mut image).unwrap();
            image.close().unwrap();
        });
        record.crash_after(random, step, |crash| {
            also(&crash.files[0]);
            self.look(&crash.files[0], &crash.how);
        });
    }

    /// Each `step`th operation of the storage fails once; tells how many did.
    pub(crate) fn fail_everywhere(&self, step: usize) -> u64 {
        let base = Arc::new(self.start.clone());
        strike_everywhere(
            |_| step,
            |strike| {
                let storage = Arc::new(Faulty::new(Overlay::new(Arc::clone(&base))));
                let mut image = self.deed.options().open(storage.clone()).unwrap();
                storage.add(strike.fault());
                let result = (self.deed.act)(&mut image);
                let closed = image.close();
                let struck = storage.struck() > 0;
                storage.clear();
                let is_done = result.is_ok() && closed.is_ok();
                let how = format!("{strike}: {result:?} {closed:?}");
                assert!(struck || is_done, "{}: {how}", self.deed.name);
                if struck {
                    strike.assert_told(!is_done, &self.deed.name);
                    let storage: Arc<dyn Storage> = storage;
                    self.look(&storage, &how);
                }
                struck
            },
        )
    }
}
