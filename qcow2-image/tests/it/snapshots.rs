//! Snapshot operations that are cut short: by a crash at any moment, and by any single fault.

use std::sync::Arc;

use qcow2_check::Code;
use qcow2_format::header::Version;
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::{Overlay, Random, Record, damage, strike_everywhere};
use qcow2_image::{Image, ImageError, SnapshotKey, SnapshotOptions};
use qcow2_io::codec::Level;
use qcow2_io::{Faulty, Storage};

const LEN: usize = 300 << 10;
/// Bytes of a machine's state.
const STATE: usize = 60_001;

/// What is done to an image with the snapshots `one` and `two`.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Create,
    Delete,
    DeleteLast,
    Apply,
    /// A machine's state is written, over the one that the disk shares with `one`.
    WriteState,
    /// The same, and a snapshot takes it over.
    CreateWithState,
}

const DEEDS: [Deed; 6] = [
    Deed::Create,
    Deed::Delete,
    Deed::DeleteLast,
    Deed::Apply,
    Deed::WriteState,
    Deed::CreateWithState,
];

/// The disk, and the snapshots by name with the disks and machine states that they hold.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    disk: Vec<u8>,
    snapshots: Vec<(Vec<u8>, Vec<u8>, Vec<u8>)>,
}

fn recipes() -> Vec<CreateOptions> {
    let new = || CreateOptions::new(LEN as u64);
    vec![
        new().cluster_size(512),
        new().cluster_size(4096).refcount_bits(64),
        new().cluster_size(16384).extended_l2(true),
        new().cluster_size(1024).lazy_refcounts(true),
        new().cluster_size(4096).version(Version::V2),
    ]
}

fn do_it(deed: Deed, image: &Image) -> Result<(), ImageError> {
    match deed {
        Deed::Create => image
            .create_snapshot(&SnapshotOptions::new("three"))
            .map(drop),
        Deed::Delete => image.delete_snapshot(&SnapshotKey::any("one")),
        Deed::DeleteLast => image.delete_snapshot(&SnapshotKey::any("two")),
        Deed::Apply => image.apply_snapshot(&SnapshotKey::any("one")),
        Deed::WriteState => write_state(image, 21),
        Deed::CreateWithState => {
            write_state(image, 21)?;
            image.create_snapshot(&with_state("three")).map(drop)
        }
    }
}

/// Writes a machine's state in pieces that end anywhere.
fn write_state(image: &Image, seed: u64) -> Result<(), ImageError> {
    let state = bytes(seed, STATE);
    let mut pieces = (0_u64..).step_by(7013).zip(state.chunks(7013));
    pieces.try_for_each(|(at, piece)| image.write_vm_state(piece, at))
}

fn with_state(name: &str) -> SnapshotOptions {
    SnapshotOptions {
        vm_state_size: STATE as u64,
        ..SnapshotOptions::new(name)
    }
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let word = random.draw().to_be_bytes();
        bytes.extend(word.repeat(usize::from(word[0] % 8) + 1));
    }
    bytes.truncate(len);
    bytes
}

/// An image with two snapshots, written to before, between and after.
fn prepare(recipe: &CreateOptions, deed: Deed) -> Vec<u8> {
    let memory = Arc::new(qcow2_io::Memory::new());
    Image::create(&memory, recipe).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    let unit = image.geometry().cluster_len();
    for (number, name) in ["one", "two", ""].into_iter().enumerate() {
        let seed = number as u64;
        for part in 0..6 {
            let at = ((number * 31 + part * 47) % 250) << 10;
            image
                .write_at(&bytes(seed + part as u64, 9000), at as u64)
                .unwrap();
        }
        let packed = bytes(seed, unit);
        let at = ((200 << 10) + number * unit) / unit * unit;
        image
            .write_compressed(&packed, at as u64, Level::default())
            .unwrap();
        image
            .write_zeroes(5000 * seed..5000 * seed + 20_000, qcow2_io::ZeroFlags::NONE)
            .unwrap();
        if name == "one" {
            write_state(&image, 11).unwrap();
            image.create_snapshot(&with_state(name)).unwrap();
        } else if !name.is_empty() {
            image.create_snapshot(&SnapshotOptions::new(name)).unwrap();
        }
    }
    if matches!(deed, Deed::WriteState | Deed::CreateWithState) {
        image.apply_snapshot(&SnapshotKey::any("one")).unwrap();
    }
    image.close().unwrap();
    memory.to_vec().unwrap()
}

fn state(storage: &Arc<dyn Storage>) -> State {
    let read = |image: &Image| {
        let mut disk = vec![0; usize::try_from(image.virtual_size()).unwrap()];
        image.read_at(&mut disk, 0).unwrap();
        disk
    };
    let options = || Image::options().read_only(true);
    let image = options().open(Arc::clone(storage)).unwrap();
    let snapshots = image.snapshots().unwrap();
    let snapshots = snapshots.into_iter().map(|snapshot| {
        let key = SnapshotKey::Id(snapshot.id);
        let view = options().snapshot(key).open(Arc::clone(storage)).unwrap();
        let mut state = vec![0; usize::try_from(snapshot.vm_state_size).unwrap()];
        view.read_vm_state(&mut state, 0).unwrap();
        (snapshot.name, read(&view), state)
    });
    State {
        snapshots: snapshots.collect(),
        disk: read(&image),
    }
}

/// Images before and after a deed.
struct Case {
    name: String,
    old: bool,
    start: Vec<u8>,
    before: State,
    after: State,
}

impl Case {
    fn new(recipe: &CreateOptions, deed: Deed) -> Self {
        let start = prepare(recipe, deed);
        let memory = || Arc::new(qcow2_io::Memory::from(start.clone())) as Arc<dyn Storage>;
        let before = state(&memory());
        let storage = memory();
        let image = Image::options().open(Arc::clone(&storage)).unwrap();
        let old = image.header().version == Version::V2;
        do_it(deed, &image).unwrap();
        image.close().unwrap();
        assert_eq!(damage(&storage, false), []);
        let after = state(&storage);
        if matches!(deed, Deed::WriteState) {
            // Nobody has taken it over.
            assert_eq!(before, after);
        } else {
            assert_ne!(before, after);
        }
        Self {
            name: format!("{deed:?} with {:?}", image_numbers(recipe)),
            old,
            start,
            before,
            after,
        }
    }

    /// The image must be before or after the deed, and take writes.
    fn look(&self, storage: &Arc<dyn Storage>, how: &str) {
        let name = &self.name;
        let mut found = damage(storage, true);
        if self.old {
            // Without a dirty bit nothing announces flags that are clear.
            found.retain(|(code, _)| *code != Code::CopiedWrong);
        }
        assert_eq!(found, [], "{name}, {how}");
        let now = state(storage);
        let is_known = now == self.before || now == self.after;
        assert!(is_known, "{name}, {how}: neither before nor after");
        let opened = Image::options().open(Arc::clone(storage));
        let image = opened.unwrap_or_else(|error| panic!("{name}, {how}: {error:?}"));
        let mut disk = now.disk.clone();
        for (number, at) in [700_usize, 90_000, 250_000].into_iter().enumerate() {
            let new = bytes(number as u64 + 50, 3000);
            image.write_at(&new, at as u64).unwrap();
            disk.splice(at..at + 3000, new);
        }
        image.close().unwrap();
        let mut found = damage(storage, false);
        if self.old {
            found.retain(|(code, _)| *code != Code::CopiedWrong);
        }
        assert_eq!(found, [], "{name}, {how}, written to");
        let later = state(storage);
        assert_eq!(later.snapshots, now.snapshots, "{name}, {how}");
        assert!(later.disk == disk, "{name}, {how}");
    }
}

fn image_numbers(recipe: &CreateOptions) -> String {
    format!("{recipe:?}").chars().take(120).collect()
}

#[test]
fn a_crash_leaves_the_image_before_or_after_the_deed() {
    let mut random = Random::new(77);
    for recipe in recipes() {
        for deed in DEEDS {
            let case = Case::new(&recipe, deed);
            let record = Record::of(&case.start, |storage| {
                let image = Image::options().open(storage).unwrap();
                do_it(deed, &image).unwrap();
                image.close().unwrap();
            });
            for _ in 0..2 {
                record.crash_everywhere(&mut random, |crash| {
                    case.look(&crash.files[0], &crash.how);
                });
            }
        }
    }
}

#[test]
fn a_fault_leaves_the_image_before_or_after_the_deed() {
    let mut met = 0;
    for recipe in recipes() {
        for deed in DEEDS {
            let case = Case::new(&recipe, deed);
            let base = Arc::new(case.start.clone());
            met += strike_everywhere(
                |_| 1,
                |strike| {
                    let storage = Arc::new(Faulty::new(Overlay::new(Arc::clone(&base))));
                    let image = Image::options().open(storage.clone()).unwrap();
                    storage.add(strike.fault());
                    let result = do_it(deed, &image);
                    let closed = image.close();
                    let struck = storage.struck() > 0;
                    storage.clear();
                    let is_done = result.is_ok() && closed.is_ok();
                    let how = format!("{strike}: {result:?} {closed:?}");
                    assert!(struck || is_done, "{}: {how}", case.name);
                    if struck {
                        strike.assert_told(!is_done, &case.name);
                        let storage: Arc<dyn Storage> = storage;
                        case.look(&storage, &how);
                    }
                    struck
                },
            );
        }
    }
    assert!(met > 300, "{met}");
}
