//! What is done to bitmaps, cut short: by a crash at any moment, and by any single fault.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use qcow2_image::copy::copy_bitmaps;
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::{Overlay, Random, Record, damage, strike_everywhere};
use qcow2_image::{
    BitmapOptions, BitmapRecovery, BitmapState, Image, ImageError, ImageOptions, ResizeOptions,
    SnapshotKey, SnapshotOptions,
};
use qcow2_io::{Faulty, Memory, Storage};

use super::model::{Model, extents};

pub(super) const LEN: u64 = 2_600_448;

/// How an image is opened for what is cut short.
pub(super) type Way = fn() -> ImageOptions;

/// What is done to an image with the bitmaps `on`, `off`, `coarse` and `stale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    Create,
    Remove,
    RemoveAll,
    Clear,
    ClearOff,
    Enable,
    Disable,
    Merge,
    MergeOn,
    MergeFrom,
    CopyFrom,
    RecoverAll,
    RecoverStored,
    Grow,
    Shrink,
    Apply,
}

const DEEDS: [Deed; 16] = [
    Deed::Create,
    Deed::Remove,
    Deed::RemoveAll,
    Deed::Clear,
    Deed::ClearOff,
    Deed::Enable,
    Deed::Disable,
    Deed::Merge,
    Deed::MergeOn,
    Deed::MergeFrom,
    Deed::CopyFrom,
    Deed::RecoverAll,
    Deed::RecoverStored,
    Deed::Grow,
    Deed::Shrink,
    Deed::Apply,
];

fn do_it(deed: Deed, image: &Image) -> Result<(), ImageError> {
    let resize = |size| {
        let options = ResizeOptions {
            shrink: true,
            ..ResizeOptions::default()
        };
        image.resize(size, options)
    };
    match deed {
        Deed::Create => image.create_bitmap(b"new", &BitmapOptions::new()),
        Deed::Remove => image.remove_bitmap(b"on"),
        Deed::RemoveAll => {
            let all = image.bitmaps()?;
            all.iter()
                .try_for_each(|one| image.remove_bitmap(&one.name))
        }
        Deed::Clear => image.clear_bitmap(b"on"),
        Deed::ClearOff => image.clear_bitmap(b"off"),
        Deed::Enable => image.enable_bitmap(b"off"),
        Deed::Disable => image.disable_bitmap(b"on"),
        Deed::Merge => image.merge_bitmap(b"off", image, b"coarse"),
        Deed::MergeOn => image.merge_bitmap(b"on", image, b"coarse"),
        Deed::MergeFrom => image.merge_bitmap(b"on", &another(), b"second"),
        Deed::CopyFrom => copy_bitmaps(&another(), image, false).map(drop),
        Deed::RecoverAll => image.recover_bitmap(b"stale", BitmapRecovery::AllChanged),
        Deed::RecoverStored => image.recover_bitmap(b"stale", BitmapRecovery::AsStored),
        Deed::Grow => resize(LEN * 2),
        Deed::Shrink => resize(LEN / 3 / 512 * 512),
        Deed::Apply => image.apply_snapshot(&SnapshotKey::any("one")),
    }
}

/// Another image with two bitmaps, one of which records.
fn another() -> Image {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, &CreateOptions::new(LEN)).unwrap();
    let image = Image::options().open(memory).unwrap();
    for (name, granularity) in [("first", 512), ("second", 2048)] {
        let options = BitmapOptions::new().granularity(granularity);
        image.create_bitmap(name.as_bytes(), &options).unwrap();
        image.write_at(&[1; 3000], granularity * 700).unwrap();
        image
            .write_at(&vec![1; 70_000], granularity * 1000)
            .unwrap();
    }
    image.disable_bitmap(b"first").unwrap();
    image
}

pub(super) fn recipes() -> [CreateOptions; 3] {
    let new = || CreateOptions::new(LEN);
    [
        new().cluster_size(512),
        new().cluster_size(4096).lazy_refcounts(true),
        new().cluster_size(16384).extended_l2(true),
    ]
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    name: String,
    auto: bool,
    extents: Vec<Range<u64>>,
}

/// All bitmaps, and the size of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    size: u64,
    bitmaps: Vec<Seen>,
}

pub(super) fn prepare(recipe: &CreateOptions, deed: Deed) -> Vec<u8> {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, recipe).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    for (name, granularity) in [("on", 512), ("off", 512), ("coarse", 4096)] {
        let options = BitmapOptions::new().granularity(granularity);
        image.create_bitmap(name.as_bytes(), &options).unwrap();
    }
    image.write_at(&vec![1; 70_000], 100_000).unwrap();
    image.create_snapshot(&SnapshotOptions::new("one")).unwrap();
    image.clear_bitmap(b"coarse").unwrap();
    image.write_at(&[2; 9000], 170_000).unwrap();
    image.write_at(&[3; 700], LEN - 700).unwrap();
    image.disable_bitmap(b"off").unwrap();
    image.discard(1_000_000..1_100_000).unwrap();
    image.write_at(&[4; 5000], LEN / 3 - 2000).unwrap();
    if deed == Deed::Apply {
        image.clear_bitmap(b"on").unwrap();
    }
    if matches!(deed, Deed::RecoverAll | Deed::RecoverStored) {
        let options = BitmapOptions::new().granularity(1024);
        image.create_bitmap(b"stale", &options).unwrap();
        image.write_at(&[5; 5000], 2_000_000).unwrap();
    }
    image.close().unwrap();
    let bytes = memory.to_vec().unwrap();
    if !matches!(deed, Deed::RecoverAll | Deed::RecoverStored) {
        return bytes;
    }
    // Open, and never closed: now all that record are inconsistent.
    let crashed = Arc::new(Memory::from(bytes));
    let image = Image::options()
        .bitmap_interval(Duration::ZERO)
        .open(crashed.clone())
        .unwrap();
    image.write_at(&[6; 5000], 700_000).unwrap();
    image.flush().unwrap();
    let bytes = crashed.to_vec().unwrap();
    drop(image);
    let crashed = Arc::new(Memory::from(bytes));
    let image = Image::options().open(crashed.clone()).unwrap();
    for name in [b"on".as_slice(), b"coarse"] {
        image
            .recover_bitmap(name, BitmapRecovery::AsStored)
            .unwrap();
    }
    image.close().unwrap();
    crashed.to_vec().unwrap()
}

/// Recovers all bitmaps as they are stored, and tells what they have.
fn state(image: &Image, except: Option<&str>) -> State {
    for info in image.bitmaps().unwrap() {
        let name = std::str::from_utf8(&info.name).unwrap().to_owned();
        if info.state == BitmapState::Inconsistent && except != Some(&name) {
            image
                .recover_bitmap(&info.name, BitmapRecovery::AsStored)
                .unwrap();
        }
    }
    let infos = image.bitmaps().unwrap();
    let seen = infos.into_iter().map(|info| {
        let name = String::from_utf8(info.name).unwrap();
        let extents = match info.state {
            BitmapState::Consistent => extents(image, &name),
            BitmapState::Inconsistent => Vec::new(),
            other => panic!("{name}: {other:?}"),
        };
        Seen {
            extents,
            auto: info.auto,
            name,
        }
    });
    State {
        bitmaps: seen.collect(),
        size: image.virtual_size(),
    }
}

pub(super) fn open(storage: &Arc<dyn Storage>) -> Image {
    Image::options().open(Arc::clone(storage)).unwrap()
}

struct Case {
    name: String,
    deed: Deed,
    start: Vec<u8>,
    before: State,
    after: State,
}

impl Case {
    fn new(recipe: &CreateOptions, deed: Deed, way: Way) -> Self {
        let start = prepare(recipe, deed);
        let memory = || Arc::new(Memory::from(start.clone())) as Arc<dyn Storage>;
        let except = (deed == Deed::RecoverAll).then_some("stale");
        let before = state(&open(&memory()), except);
        let storage = memory();
        let image = way().open(Arc::clone(&storage)).unwrap();
        do_it(deed, &image).unwrap();
        image.close().unwrap();
        assert_eq!(damage(&storage, true), []);
        let after = state(&open(&storage), None);
        if deed == Deed::RecoverStored {
            assert_eq!(before, after);
        } else {
            assert_ne!(before, after, "{deed:?}");
        }
        let text = format!("{recipe:?}");
        Self {
            name: format!(
                "{deed:?} with {}",
                text.chars().take(90).collect::<String>()
            ),
            deed,
            start,
            before,
            after,
        }
    }

    fn is_known(&self, now: &State) -> bool {
        if *now == self.before || *now == self.after {
            return true;
        }
        let same_size = |other: &State| other.size == now.size;
        match self.deed {
            // One after the other.
            Deed::RemoveAll => self.before.bitmaps.ends_with(&now.bitmaps),
            Deed::CopyFrom => {
                let before = &self.before.bitmaps;
                now.bitmaps.starts_with(before) && self.after.bitmaps.starts_with(&now.bitmaps)
            }
            // What is to change is announced before it does.
            Deed::Apply if same_size(&self.before) => {
                let pairs = self.before.bitmaps.iter().zip(&now.bitmaps);
                let mut pairs = pairs.zip(&self.after.bitmaps);
                pairs.all(|((before, now), after)| {
                    let mut model = Model::new(512, now_size(self));
                    for range in &before.extents {
                        model.set(range.clone());
                    }
                    let grown = now.extents != before.extents && now.extents != after.extents;
                    model.is_within(&now.extents) && (!grown || now.auto)
                })
            }
            _ => false,
        }
    }

    fn look(&self, storage: &Arc<dyn Storage>, how: &str) {
        let name = &self.name;
        assert_eq!(damage(storage, true), [], "{name}, {how}");
        let except = (self.deed == Deed::RecoverAll).then_some("stale");
        let image = open(storage);
        let mut now = state(&image, except);
        if self.deed == Deed::Apply {
            // Of the snapshot's disk, the bits of what differs are set.
            let mut disk = vec![0; 1];
            image.read_at(&mut disk, 170_000).unwrap();
            if disk == [1] {
                for (now, after) in now.bitmaps.iter().zip(&self.after.bitmaps) {
                    let mut model = Model::new(512, now_size(self));
                    after
                        .extents
                        .iter()
                        .for_each(|range| model.set(range.clone()));
                    assert!(model.is_within(&now.extents), "{name}, {how}: {now:?}");
                }
            }
        }
        assert!(
            self.is_known(&now),
            "{name}, {how}: {now:#?}\nbefore {:#?}\nafter {:#?}",
            self.before,
            self.after
        );
        // And it goes on.
        image.write_at(&[9; 3000], 300_000).unwrap();
        image.close().unwrap();
        assert_eq!(damage(storage, true), [], "{name}, {how}, written to");
        for seen in &mut now.bitmaps {
            let mut model = Model::new(512, now.size);
            if seen.auto {
                model.set(300_000..303_000);
            }
            let image = Image::options().read_only(true);
            let image = image.open(Arc::clone(storage)).unwrap();
            let infos = image.bitmaps().unwrap();
            let info = infos.iter().find(|info| info.name == seen.name.as_bytes());
            if info.unwrap().state == BitmapState::Consistent {
                assert!(
                    model.is_within(&extents(&image, &seen.name)),
                    "{name}, {how}"
                );
            }
        }
    }
}

fn now_size(case: &Case) -> u64 {
    case.before.size
}

#[test]
fn a_crash_leaves_the_bitmaps_before_or_after_the_deed() {
    crash_deeds(Image::options);
}

pub(super) fn crash_deeds(way: Way) {
    let mut random = Random::new(78);
    for recipe in recipes() {
        for deed in DEEDS {
            let case = Case::new(&recipe, deed, way);
            let record = Record::of(&case.start, |storage| {
                let image = way().open(storage).unwrap();
                do_it(deed, &image).unwrap();
                image.close().unwrap();
            });
            record.crash_everywhere(&mut random, |crash| case.look(&crash.files[0], &crash.how));
        }
    }
}

#[test]
fn a_fault_leaves_the_bitmaps_before_or_after_the_deed() {
    fail_deeds(Image::options);
}

pub(super) fn fail_deeds(way: Way) {
    let mut met = 0;
    for recipe in recipes() {
        for deed in DEEDS {
            let case = Case::new(&recipe, deed, way);
            let base = Arc::new(case.start.clone());
            met += strike_everywhere(
                |_| 1,
                |strike| {
                    let storage = Arc::new(Faulty::new(Overlay::new(Arc::clone(&base))));
                    let image = way().open(storage.clone()).unwrap();
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
    assert!(met > 500, "{met}");
}
