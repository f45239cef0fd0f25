use std::path::Path;
use std::sync::Arc;

use qcow2_check::{Options, Severity, check};
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::Random;
use qcow2_image::{
    AmendOptions, BitmapOptions, BitmapRecovery, BitmapState, Image, ImageError, ImageOptions,
};
use qcow2_io::{Memory, Slice, Storage, StorageErrorKind};

use super::cut_short::{crash_deeds, fail_deeds};
use super::guests::{crash_guests, fail_guests};
use super::model::{Model, extents};
use super::oracle::Tools;
use crate::qemu::is_available;

const SIZE: u64 = 4 << 20;
const CLUSTER: u64 = 4096;

fn places() -> ImageOptions {
    Image::options().qemu_places(true)
}

#[test]
fn a_crash_leaves_the_bitmaps_before_or_after_the_deed() {
    crash_deeds(places);
}

#[test]
fn a_fault_leaves_the_bitmaps_before_or_after_the_deed() {
    fail_deeds(places);
}

#[test]
fn whatever_a_crash_leaves_no_change_is_missing() {
    let partly = crash_guests(|_: &mut Random| places());
    assert!(partly > 0, "{partly}");
}

#[test]
fn whatever_fails_no_change_is_missing() {
    let (consistent, inconsistent) = fail_guests(places);
    assert!(
        consistent > 5 && inconsistent > 20,
        "{consistent} {inconsistent}"
    );
}

fn fresh() -> Arc<Memory> {
    let memory = Arc::new(Memory::new());
    let options = CreateOptions::new(SIZE).cluster_size(CLUSTER);
    Image::create(&memory, &options).unwrap();
    memory
}

/// An image with a bitmap of each of these names, made one after the other.
fn with_bitmaps(names: &[&str]) -> Arc<Memory> {
    let memory = fresh();
    for name in names {
        let image = places().open(memory.clone()).unwrap();
        let options = BitmapOptions::new().granularity(512);
        image.create_bitmap(name.as_bytes(), &options).unwrap();
        image.close().unwrap();
    }
    memory
}

/// Where a bitmap lies; places are clusters.
#[derive(Debug, PartialEq, Eq)]
struct Lies {
    name: String,
    flags: u32,
    table: u64,
    /// 0 where it has none.
    data: Vec<u64>,
}

/// Where their directory lies, and the bitmaps.
type Layout = (u64, Vec<Lies>);

fn layout(storage: &dyn Storage) -> Layout {
    let image = Image::options().read_only(true);
    let image = image.open(Arc::new(copy(storage))).unwrap();
    let header = image.header();
    let extension = header.bitmaps().unwrap();
    let read = |offset: u64, len: u32| {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        storage.read_at(&mut bytes, offset).unwrap();
        bytes
    };
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let mut at = extension.directory_offset.get();
    let mut all = Vec::new();
    for _ in 0..extension.count {
        let entry = read(at, 24);
        let entries = u32::try_from(number(&entry[8..12])).unwrap();
        let table = number(&entry[..8]);
        let content = read(table, 8 * entries);
        let name_len = u32::try_from(number(&entry[18..20])).unwrap();
        all.push(Lies {
            name: String::from_utf8(read(at + 24, name_len)).unwrap(),
            flags: u32::try_from(number(&entry[12..16])).unwrap(),
            table: table / CLUSTER,
            data: content
                .chunks(8)
                .map(|entry| number(entry) / CLUSTER)
                .collect(),
        });
        at += (24 + u64::from(name_len)).next_multiple_of(8);
    }
    (extension.directory_offset.get() / CLUSTER, all)
}

fn copy(storage: &dyn Storage) -> Memory {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    storage.read_at(&mut bytes, 0).unwrap();
    Memory::from(bytes)
}

fn assert_sound(storage: &dyn Storage) {
    let report = check(storage, &Options::default());
    let totals = report.totals.iter();
    let bad: Vec<_> = totals
        .filter(|(code, count)| {
            let counts = [Severity::Corruption, Severity::Error, Severity::Leak];
            *count > 0 && counts.contains(&code.severity())
        })
        .collect();
    assert!(bad.is_empty(), "{bad:?}");
}

fn states(image: &Image) -> Vec<BitmapState> {
    let infos = image.bitmaps().unwrap().into_iter();
    infos.map(|info| info.state).collect()
}

/// All clusters that the bitmaps have.
fn clusters((directory, bitmaps): &Layout) -> Vec<u64> {
    let tables = bitmaps.iter().flat_map(|one| {
        let data = one.data.iter().filter(|data| **data != 0);
        std::iter::once(one.table).chain(data.copied())
    });
    std::iter::once(*directory).chain(tables).collect()
}

#[test]
fn bitmaps_are_in_use_from_opening_on_and_get_new_places_at_the_end() {
    let memory = with_bitmaps(&["one", "two", "off"]);
    let image = places().open(memory.clone()).unwrap();
    image.disable_bitmap(b"off").unwrap();
    image.write_at(&[1; 4096], 0).unwrap();
    image.close().unwrap();
    let before = layout(&memory);
    let flags = |layout: &Layout| -> Vec<u32> { layout.1.iter().map(|one| one.flags).collect() };
    assert_eq!(flags(&before), [2, 2, 0]);

    let image = places().open(memory.clone()).unwrap();
    assert_eq!(flags(&layout(&memory)), [3, 3, 1]);
    assert_eq!(clusters(&layout(&memory)), clusters(&before));
    image.close().unwrap();
    let after = layout(&memory);
    assert_eq!(flags(&after), [2, 2, 0]);
    let (old, new) = (clusters(&before), clusters(&after));
    assert_eq!(old.len(), 6);
    assert_eq!(new.len(), old.len());
    assert!(
        new.iter().all(|place| !old.contains(place)),
        "{old:?} {new:?}"
    );
    assert_sound(&memory);
    let image = Image::options().open(memory).unwrap();
    assert_eq!(extents(&image, "one"), [0..4096]);
    assert_eq!(extents(&image, "off"), []);
}

#[test]
fn without_the_option_they_stay_where_they_are() {
    let memory = with_bitmaps(&["one", "two"]);
    let before = layout(&memory);
    let image = Image::options().open(memory.clone()).unwrap();
    assert_eq!(layout(&memory).1[0].flags, 2);
    drop(image);
    assert_eq!(layout(&memory), before);
}

#[test]
fn what_does_not_fit_at_the_end_stays_in_use_with_all_that_was_recorded() {
    let start = with_bitmaps(&["one", "two"]);
    // Without it, the lowest free clusters are taken, until there is none.
    let image = Image::options().open(start.clone()).unwrap();
    image.write_at(&vec![1; 20 << 12], 0).unwrap();
    image.close().unwrap();
    let full = start.len().unwrap().next_multiple_of(CLUSTER);
    let mut lost = Vec::new();
    for spare in 0.. {
        let memory = Arc::new(copy(&*start));
        memory.set_len(full + spare * CLUSTER).unwrap();
        let window = Slice::new(memory.clone(), 0, full + spare * CLUSTER).unwrap();
        let image = places().open(Arc::new(window)).unwrap();
        image.write_at(&[2; 512], 1024).unwrap();
        let closed = image.close();
        assert_sound(&memory);
        let image = Image::options().open(memory).unwrap();
        let Err(error) = closed else {
            assert_eq!(
                states(&image),
                [BitmapState::Consistent, BitmapState::Consistent]
            );
            assert_eq!(extents(&image, "two"), [0..20 << 12]);
            break;
        };
        assert_eq!(error.kind(), StorageErrorKind::NoSpace);
        let ImageError::BitmapsLost { name, .. } = error else {
            panic!("{error}");
        };
        lost.push(name.unwrap_or_default());
        assert_eq!(
            states(&image),
            [BitmapState::Inconsistent, BitmapState::Inconsistent]
        );
        for name in ["one", "two"] {
            let how = BitmapRecovery::AsStored;
            image.recover_bitmap(name.as_bytes(), how).unwrap();
            let mut model = Model::new(512, SIZE);
            model.set(0..20 << 12);
            assert!(model.is_within(&extents(&image, name)));
        }
        image.close().unwrap();
    }
    // Data and a table each, and the directory.
    assert_eq!(lost, ["one", "one", "two", "two", ""]);
}

#[test]
fn a_change_that_does_not_fit_leaves_all_as_it_was() {
    let memory = with_bitmaps(&["one"]);
    let len = memory.len().unwrap().next_multiple_of(CLUSTER);
    memory.set_len(len).unwrap();
    let window = Slice::new(memory.clone(), 0, len + CLUSTER).unwrap();
    let image = places().open(Arc::new(window)).unwrap();
    let error = image.create_bitmap(b"two", &BitmapOptions::new());
    assert!(
        matches!(error, Err(ImageError::BitmapsLost { .. })),
        "{error:?}"
    );
    assert_eq!(states(&image), [BitmapState::Consistent]);
    // Its old place is all there is, and there is one cluster for the table, and none for the directory.
    assert!(image.close().is_err());
    assert_sound(&memory);
}

#[test]
fn amending_does_not_end_it() {
    let memory = with_bitmaps(&["one"]);
    let before = layout(&memory);
    let mut image = places().open(memory.clone()).unwrap();
    image
        .amend(&AmendOptions::new().lazy_refcounts(true))
        .unwrap();
    assert_eq!(layout(&memory).1[0].flags, 3);
    image.close().unwrap();
    let after = layout(&memory);
    assert_eq!(after.1[0].flags, 2);
    assert_ne!(clusters(&after), clusters(&before));
    assert_sound(&memory);
}

/// Does something in one go from opening to closing, by the engine and by QEMU; tells what.
fn do_it(random: &mut Random, number: u64, image: Image, tools: &Tools) -> String {
    let names: Vec<String> = image
        .bitmaps()
        .unwrap()
        .into_iter()
        .map(|info| String::from_utf8(info.name).unwrap())
        .collect();
    let Some(name) = (!names.is_empty()).then(|| random.below(names.len() as u64)) else {
        tools.bitmap(&["--add", "-g", "4096"], "first");
        let options = BitmapOptions::new().granularity(4096);
        image.create_bitmap(b"first", &options).unwrap();
        image.close().unwrap();
        return "the first bitmap".to_owned();
    };
    let name = names[usize::try_from(name).unwrap()].as_str();
    let bytes = name.as_bytes();
    let what = random.below(12);
    let mut told = format!("{what} to {name}");
    match what {
        0 => {
            let new = format!("bitmap {number}");
            let granularity = 512 << random.below(12);
            tools.bitmap(&["--add", "-g", &granularity.to_string()], &new);
            let options = BitmapOptions::new().granularity(granularity);
            image.create_bitmap(new.as_bytes(), &options).unwrap();
        }
        1 => {
            tools.bitmap(&["--clear"], name);
            image.clear_bitmap(bytes).unwrap();
        }
        2 => {
            tools.bitmap(&["--disable"], name);
            image.disable_bitmap(bytes).unwrap();
        }
        3 => {
            tools.bitmap(&["--enable"], name);
            image.enable_bitmap(bytes).unwrap();
        }
        4 => {
            tools.bitmap(&["--merge", names[0].as_str()], name);
            let first = names[0].as_bytes();
            image.merge_bitmap(bytes, &image, first).unwrap();
        }
        5 if names.len() > 2 => {
            tools.bitmap(&["--remove"], name);
            image.remove_bitmap(bytes).unwrap();
        }
        6 => tools.io(&["read 0 4k"]),
        _ => {
            let start = random.below(SIZE / CLUSTER) * CLUSTER;
            let len = ((1 + random.below(90)) * CLUSTER).min(SIZE - start);
            told = format!("write {start} {len}");
            tools.io(&[&told]);
            let data = vec![0xcd; usize::try_from(len).unwrap()];
            image.write_at(&data, start).unwrap();
        }
    }
    image.close().unwrap();
    told
}

#[test]
fn everything_lies_where_qemu_puts_it() {
    if !is_available("places of bitmaps beside QEMU") {
        return;
    }
    let mut data = 0;
    for seed in 0..6 {
        let mut random = Random::new(4000 + seed);
        let folder = tempfile::tempdir().unwrap();
        let tools = Tools::new(folder.path());
        tools.create("cluster_size=4k", &SIZE.to_string());
        let own = folder.path().join("own.qcow2");
        std::fs::copy(&tools.image, &own).unwrap();
        for number in 0..25 {
            let image = places().open_path(&own).unwrap();
            let told = do_it(&mut random, number, image, &tools);
            let bytes = |path: &Path| std::fs::read(path).unwrap();
            let (ours, theirs) = (bytes(&own), bytes(&tools.image));
            let (ours, theirs) = (Memory::from(ours), Memory::from(theirs));
            assert_eq!(
                layout(&ours),
                layout(&theirs),
                "seed {seed}, step {number}: {told}"
            );
            assert_eq!(ours.len().unwrap(), theirs.len().unwrap());
            assert_sound(&ours);
            data += layout(&ours).1.iter().filter(|one| one.data != [0]).count();
        }
    }
    assert!(data > 50, "{data}");
}
