use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use qcow2_check::{Code, Options, Severity, check};
use qcow2_image::copy::copy_bitmaps;
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::{Moment, Overlay, Random, Tape};
use qcow2_image::{
    BitmapOptions, BitmapRecovery, BitmapState, Image, ImageError, ImageOptions, ResizeOptions,
    SnapshotKey, SnapshotOptions,
};
use qcow2_io::{Fault, Faulty, Memory, Operation, Storage, StorageErrorKind, ZeroFlags};

use super::model::{Model, extents};

pub(super) const LEN: u64 = 2_600_448;

/// How an image is opened for what is cut short.
pub(super) type Way = fn() -> ImageOptions;

/// What is done to an image with the bitmaps `on`, `off`, `coarse` and `stale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
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

fn recipes() -> [CreateOptions; 3] {
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

fn prepare(recipe: &CreateOptions, deed: Deed) -> Vec<u8> {
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

/// What is wrong with an image that was cut short; leaks may be, and what the dirty bit announces.
fn damage(storage: &dyn Storage) -> Vec<(Code, u64)> {
    let report = check(storage, &Options::default());
    let dirty = report.total(Code::FeatureDirty) > 0;
    let behind = [Code::RefcountLow, Code::RefcountMissing, Code::CopiedWrong];
    let totals = report.totals.iter().copied();
    totals
        .filter(|(code, count)| {
            let bad = matches!(code.severity(), Severity::Corruption | Severity::Error);
            *count > 0 && bad && !(dirty && behind.contains(code))
        })
        .collect()
}

fn open(storage: &Arc<dyn Storage>) -> Image {
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
        assert_eq!(damage(&storage), []);
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
        assert_eq!(damage(storage), [], "{name}, {how}");
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
        assert_eq!(damage(storage), [], "{name}, {how}, written to");
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
            let tape = Tape::new();
            let base = Arc::new(case.start.clone());
            let storage = tape.record(0, Arc::new(Overlay::new(base)));
            let image = way().open(storage).unwrap();
            do_it(deed, &image).unwrap();
            image.close().unwrap();
            let entries = tape.take();
            let mut moment = Moment::new(vec![case.start.clone()]);
            for (number, entry) in entries.iter().enumerate() {
                moment.advance(entry);
                let (storages, loss) = moment.crash(&mut random).unwrap();
                case.look(&storages[0], &format!("crash after {number}, {loss}"));
            }
        }
    }
}

#[test]
fn a_fault_leaves_the_bitmaps_before_or_after_the_deed() {
    fail_deeds(Image::options);
}

pub(super) fn fail_deeds(way: Way) {
    const FAULTS: [(Operation, StorageErrorKind, bool); 6] = [
        (Operation::Read, StorageErrorKind::Io, false),
        (Operation::Write, StorageErrorKind::NoSpace, false),
        (Operation::Write, StorageErrorKind::Io, true),
        (Operation::Flush, StorageErrorKind::Io, false),
        (Operation::Len, StorageErrorKind::Io, false),
        (Operation::Extents, StorageErrorKind::Io, false),
    ];
    let mut met = 0;
    for recipe in recipes() {
        for deed in DEEDS {
            let case = Case::new(&recipe, deed, way);
            let base = Arc::new(case.start.clone());
            for (operation, kind, after_effect) in FAULTS {
                for nth in 1.. {
                    let storage = Arc::new(Faulty::new(Overlay::new(Arc::clone(&base))));
                    let image = way().open(storage.clone()).unwrap();
                    let fault = Fault::on(operation).nth(nth).kind(kind);
                    storage.add(if after_effect {
                        fault.after_effect()
                    } else {
                        fault
                    });
                    let result = do_it(deed, &image);
                    let closed = image.close();
                    let told_as = format!("{result:?} {closed:?}");
                    let struck = storage.struck();
                    storage.clear();
                    let how =
                        format!("{operation} {nth} fails ({kind:?}, {after_effect}): {told_as}");
                    if struck == 0 {
                        assert!(result.is_ok() && closed.is_ok(), "{}: {how}", case.name);
                        break;
                    }
                    met += 1;
                    if matches!(operation, Operation::Write | Operation::Flush) {
                        let told = result.is_err() || closed.is_err();
                        assert!(told, "{}: {how}: nobody was told", case.name);
                    }
                    let storage: Arc<dyn Storage> = storage;
                    case.look(&storage, &how);
                }
            }
        }
    }
    assert!(met > 500, "{met}");
}

fn options(random: &mut Random) -> ImageOptions {
    match random.below(2) {
        0 => Image::options().bitmap_interval(Duration::ZERO),
        _ => Image::options(),
    }
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.virtual_size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Requests of a guest.
fn play(image: &Image, random: &mut Random) {
    for number in 0..14 {
        let start = random.below(LEN);
        let len = 1 + random.below((LEN - start).min(60_000));
        let byte = u8::try_from(number + 10).unwrap();
        let bytes = vec![byte; usize::try_from(len).unwrap()];
        match random.below(7) {
            0..3 => image.write_at(&bytes, start).unwrap(),
            3 => image
                .write_zeroes(start..start + len, ZeroFlags::MAY_UNMAP)
                .unwrap(),
            4 => image.discard(start..start + len).unwrap(),
            _ => image.flush().unwrap(),
        }
    }
}

#[test]
fn whatever_a_crash_leaves_no_change_is_missing() {
    let partly = crash_guests(options);
    assert!(partly > 100, "{partly}");
}

/// Tells how often a bitmap was left that says something.
pub(super) fn crash_guests(options: impl Fn(&mut Random) -> ImageOptions) -> u32 {
    let mut random = Random::new(79);
    let mut partly = 0;
    for (recipe, round) in recipes().iter().zip(0..).cycle().take(9) {
        let start = prepare(recipe, Deed::Create);
        let cleared = Arc::new(Memory::from(start));
        let image = Image::options().open(cleared.clone()).unwrap();
        for name in [b"on".as_slice(), b"coarse"] {
            image.clear_bitmap(name).unwrap();
        }
        let old = content(&image);
        image.close().unwrap();
        let start = cleared.to_vec().unwrap();
        let tape = Tape::new();
        let storage = tape.record(0, Arc::new(Overlay::new(Arc::new(start.clone()))));
        let image = options(&mut random).open(storage).unwrap();
        play(&image, &mut random);
        image.close().unwrap();
        let entries = tape.take();
        let mut moment = Moment::new(vec![start]);
        for (number, entry) in entries.iter().enumerate() {
            moment.advance(entry);
            let (storages, loss) = moment.crash(&mut random).unwrap();
            let how = format!("{round}: crash after {number}, {loss}");
            let mut image = open(&storages[0]);
            if random.one_in(3) {
                // Nobody recovers it at first, and the guest goes on.
                play(&image, &mut random);
                image.close().unwrap();
                image = open(&storages[0]);
            }
            let now = content(&image);
            for (name, granularity) in [("on", 512), ("coarse", 4096)] {
                let mut model = Model::new(granularity, LEN);
                for (start, (old, now)) in
                    (0..).step_by(512).zip(old.chunks(512).zip(now.chunks(512)))
                {
                    if old != now {
                        model.set(start..start + 512);
                    }
                }
                let info = image.bitmaps().unwrap();
                let info = info.iter().find(|info| info.name == name.as_bytes());
                if info.unwrap().state == BitmapState::Inconsistent {
                    image
                        .recover_bitmap(name.as_bytes(), BitmapRecovery::AsStored)
                        .unwrap();
                }
                let found = extents(&image, name);
                assert!(model.is_within(&found), "{name}, {how}");
                let sum: u64 = found.iter().map(|range| range.end - range.start).sum();
                partly += u32::from(sum > 0 && sum < LEN);
            }
            image.close().unwrap();
            assert_eq!(damage(&storages[0]), [], "{how}");
        }
    }
    partly
}

/// Requests of a guest that goes on when one fails.
fn play_on(image: &Image, random: &mut Random) {
    for number in 0..8 {
        let start = random.below(LEN);
        let len = 1 + random.below((LEN - start).min(60_000));
        let bytes = vec![number + 10; usize::try_from(len).unwrap()];
        let _ = match random.below(6) {
            0..3 => image.write_at(&bytes, start),
            3 => image.write_zeroes(start..start + len, ZeroFlags::MAY_UNMAP),
            4 => image.discard(start..start + len),
            _ => image.flush(),
        };
    }
}

#[test]
fn whatever_fails_no_change_is_missing() {
    let (consistent, inconsistent) =
        fail_guests(|| Image::options().bitmap_interval(Duration::ZERO));
    assert!(
        consistent > 20 && inconsistent > 20,
        "{consistent} {inconsistent}"
    );
}

/// Tells how often the bitmap was consistent afterwards, and how often not.
pub(super) fn fail_guests(way: Way) -> (u32, u32) {
    let mut consistent = 0;
    let mut inconsistent = 0;
    for (recipe, seed) in recipes().iter().zip(900..) {
        let start = prepare(recipe, Deed::Create);
        let cleared = Arc::new(Memory::from(start));
        let image = Image::options().open(cleared.clone()).unwrap();
        image.clear_bitmap(b"on").unwrap();
        let old = content(&image);
        image.close().unwrap();
        let base = Arc::new(cleared.to_vec().unwrap());
        for operation in [Operation::Read, Operation::Write, Operation::Flush] {
            for nth in 1.. {
                let storage = Arc::new(Faulty::new(Overlay::new(Arc::clone(&base))));
                let image = way().open(storage.clone()).unwrap();
                storage.add(Fault::on(operation).nth(nth));
                play_on(&image, &mut Random::new(seed));
                let closed = image.close();
                let struck = storage.struck();
                storage.clear();
                let how = format!("{operation} {nth} fails: {closed:?}");
                let storage: Arc<dyn Storage> = storage;
                assert_eq!(damage(&storage), [], "{how}");
                let image = open(&storage);
                let mut model = Model::new(512, LEN);
                let now = content(&image);
                let sectors = old.chunks(512).zip(now.chunks(512));
                for (start, _) in (0..)
                    .step_by(512)
                    .zip(sectors)
                    .filter(|(_, (old, now))| old != now)
                {
                    model.set(start..start + 512);
                }
                let infos = image.bitmaps().unwrap();
                let info = infos.iter().find(|info| info.name == b"on");
                if info.unwrap().state == BitmapState::Inconsistent {
                    inconsistent += 1;
                    image
                        .recover_bitmap(b"on", BitmapRecovery::AsStored)
                        .unwrap();
                } else {
                    consistent += 1;
                }
                assert!(model.is_within(&extents(&image, "on")), "{how}");
                if struck == 0 {
                    break;
                }
            }
        }
    }
    (consistent, inconsistent)
}
