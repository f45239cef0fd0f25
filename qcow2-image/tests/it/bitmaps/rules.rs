use std::sync::Arc;
use std::time::Duration;

use qcow2_check::{Options, Severity, check};
use qcow2_format::header::Version;
use qcow2_image::create::CreateOptions;
use qcow2_image::{
    AmendOptions, BitmapOptions, BitmapRecovery, BitmapState, CompactOptions, Image, ImageError,
    ResizeOptions, SnapshotKey, SnapshotOptions,
};
use qcow2_io::cipher::Secret;
use qcow2_io::{Memory, Op, Storage};

use super::model::{Model, extents};
use super::oracle::Tools;
use crate::qemu::is_available;

const SIZE: u64 = 4 << 20;

fn create(options: &CreateOptions) -> (Arc<Memory>, Image) {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, options).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    (memory, image)
}

fn fresh() -> (Arc<Memory>, Image) {
    create(&CreateOptions::new(SIZE).cluster_size(4096))
}

fn sectors() -> BitmapOptions {
    BitmapOptions::new().granularity(512)
}

fn names(image: &Image) -> Vec<(String, BitmapState)> {
    let infos = image.bitmaps().unwrap().into_iter();
    infos
        .map(|info| (String::from_utf8(info.name).unwrap(), info.state))
        .collect()
}

#[test]
fn what_the_format_does_not_allow_is_refused_before_anything_is_written() {
    let (memory, image) = fresh();
    image.create_bitmap(b"there", &sectors()).unwrap();
    image.flush().unwrap();
    let before = memory.to_vec().unwrap();
    for name in [b"".to_vec(), vec![b'x'; 1024], b"there".to_vec()] {
        let error = image.create_bitmap(&name, &sectors()).unwrap_err();
        assert!(
            matches!(error, ImageError::Option { option: "name", .. }),
            "{error}"
        );
    }
    for granularity in [0, 100, 256, 513, 4 << 30] {
        let options = BitmapOptions::new().granularity(granularity);
        let error = image.create_bitmap(b"new", &options).unwrap_err();
        assert!(
            matches!(
                error,
                ImageError::Option {
                    option: "granularity",
                    ..
                }
            ),
            "{error}"
        );
    }
    let no_such = |result: Result<(), ImageError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, ImageError::NoBitmap { .. }), "{error}");
    };
    no_such(image.remove_bitmap(b"none"));
    no_such(image.clear_bitmap(b"none"));
    no_such(image.enable_bitmap(b"none"));
    no_such(image.disable_bitmap(b"none"));
    no_such(image.merge_bitmap(b"there", &image, b"none"));
    no_such(image.recover_bitmap(b"none", BitmapRecovery::AllChanged));
    let error = image.recover_bitmap(b"there", BitmapRecovery::AllChanged);
    assert!(matches!(error, Err(ImageError::BitmapUnusable { .. })));
    assert!(
        image
            .resize(
                0,
                ResizeOptions {
                    shrink: true,
                    ..ResizeOptions::default()
                }
            )
            .is_err()
    );
    assert_eq!(memory.to_vec().unwrap(), before);

    // 2 TiB is what 512 MiB of bits can tell of.
    let (_, image) = create(&CreateOptions::new((2 << 40) + 512));
    let error = image.create_bitmap(b"fine", &sectors()).unwrap_err();
    assert!(
        matches!(error, ImageError::BitmapUnusable { .. }),
        "{error}"
    );
    image
        .create_bitmap(b"plain", &BitmapOptions::new())
        .unwrap();
    let (_, image) = create(&CreateOptions::new(2 << 40));
    image.create_bitmap(b"fine", &sectors()).unwrap();
    assert!(
        image
            .resize((2 << 40) + 512, ResizeOptions::default())
            .is_err()
    );
    let (_, image) = create(&CreateOptions::new(0));
    assert!(image.create_bitmap(b"empty", &sectors()).is_err());
    let (_, image) = create(&CreateOptions::new(SIZE).version(Version::V2));
    let error = image.create_bitmap(b"old", &sectors()).unwrap_err();
    assert!(matches!(error, ImageError::Unsupported { .. }), "{error}");

    let long = CreateOptions::new(SIZE)
        .cluster_size(512)
        .backing_file(vec![b'b'; 372], "raw");
    let memory = Arc::new(Memory::new());
    Image::create(&memory, &long).unwrap();
    let image = Image::options().no_backing().open(memory).unwrap();
    assert!(
        image
            .create_bitmap(b"no room in the header", &sectors())
            .is_err()
    );
    image.write_at(&[1; 5000], 7000).unwrap();
    assert_eq!(names(&image), []);
    image.close().unwrap();
}

/// An image with the bitmaps `one`, `two` and `six`, of which the second is disabled; and where their directory lies.
fn three() -> (Vec<u8>, usize) {
    let (memory, image) = fresh();
    for name in [b"one", b"two", b"six"] {
        image.create_bitmap(name, &sectors()).unwrap();
    }
    image.write_at(&[1; 1000], 1 << 20).unwrap();
    image.disable_bitmap(b"two").unwrap();
    let directory = image.header().bitmaps().unwrap().directory_offset.get();
    image.close().unwrap();
    (
        memory.to_vec().unwrap(),
        usize::try_from(directory).unwrap(),
    )
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Where the payload of the bitmaps extension is.
fn extension(bytes: &[u8]) -> usize {
    let kind = [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24];
    bytes.windows(8).position(|part| part == kind).unwrap() + 8
}

#[test]
fn broken_bitmaps_are_told_and_removed_and_the_others_go_on() {
    const ENTRY: usize = 32;
    type Damage = fn(&mut Vec<u8>, usize);
    let damages: [(&str, Damage, &[&str]); 12] = [
        ("granularity", |bytes, at| bytes[at + 17] = 40, &["one"]),
        ("type", |bytes, at| bytes[at + 16] = 2, &["one"]),
        ("flags", |bytes, at| bytes[at + 12] = 0x80, &["one"]),
        ("table length", |bytes, at| bytes[at + 11] = 9, &["one"]),
        (
            "table nowhere",
            |bytes, at| bytes[at..at + 8].fill(0),
            &["one"],
        ),
        ("table beyond", |bytes, at| bytes[at + 3] = 1, &["one"]),
        (
            "reserved bits",
            |bytes, at| {
                let table = usize::try_from(word(bytes, at)).unwrap();
                bytes[table + 7] |= 2;
            },
            &["one"],
        ),
        (
            "data beyond",
            |bytes, at| {
                let table = usize::try_from(word(bytes, at)).unwrap();
                bytes[table + 3] = 1;
            },
            &["one"],
        ),
        (
            "one table",
            |bytes, at| bytes.copy_within(at..at + 8, at + ENTRY),
            &["one", "two"],
        ),
        (
            "one name",
            |bytes, at| bytes.copy_within(at + 24..at + 27, at + 24 + ENTRY),
            &["one", "one"],
        ),
        (
            "one more",
            |bytes, _| {
                let at = extension(bytes);
                bytes[at + 3] += 1;
            },
            &[""],
        ),
        (
            "no directory",
            |bytes, _| {
                let at = extension(bytes);
                bytes[at + 23] = 1;
            },
            &[""],
        ),
    ];
    for (what, damage, expected) in damages {
        let (mut bytes, directory) = three();
        damage(&mut bytes, directory);
        let memory = Arc::new(Memory::from(bytes));
        let image = Image::options()
            .read_only(true)
            .open(memory.clone())
            .unwrap();
        let all = names(&image);
        let is_broken = |state: &BitmapState| matches!(state, BitmapState::Broken { .. });
        let broken: Vec<&str> = all
            .iter()
            .filter(|(_, state)| is_broken(state))
            .map(|(name, _)| &**name)
            .collect();
        assert_eq!(broken, expected, "{what}");
        for name in &broken {
            assert!(
                image.bitmap_extents(name.as_bytes(), 0..SIZE, 9).is_err(),
                "{what}"
            );
        }
        let sound: Vec<String> = all
            .iter()
            .filter(|(_, state)| *state == BitmapState::Consistent)
            .map(|(name, _)| name.clone())
            .collect();
        drop(image);

        let image = Image::options().open(memory.clone()).unwrap();
        image.write_at(&[2; 512], 3 << 20).unwrap();
        image.close().unwrap();
        let image = Image::options().open(memory.clone()).unwrap();
        for name in &sound {
            let mut model = Model::new(512, SIZE);
            model.set(1 << 20..(1 << 20) + 1000);
            if name == "six" || name == "one" {
                model.set(3 << 20..(3 << 20) + 512);
            }
            assert_eq!(extents(&image, name), model.ranges(), "{what}: {name}");
        }
        let mut expected = expected.to_vec();
        expected.dedup();
        for name in expected {
            image.remove_bitmap(name.as_bytes()).unwrap();
        }
        let left: Vec<String> = names(&image).into_iter().map(|(name, _)| name).collect();
        assert_eq!(left, sound, "{what}");
        image.create_bitmap(b"new", &sectors()).unwrap();
        image.close().unwrap();
        let report = check(&memory, &Options::default());
        let found: Vec<_> = report
            .totals
            .iter()
            .filter(|(code, count)| *count > 0 && code.severity() > Severity::Leak)
            .collect();
        assert!(found.is_empty(), "{what}: {found:?}");
    }
}

#[test]
fn without_the_feature_bit_bitmaps_are_ignored() {
    let (mut bytes, _) = three();
    bytes[95] = 0;
    let memory = Arc::new(Memory::from(bytes));
    let image = Image::options().open(memory.clone()).unwrap();
    assert_eq!(names(&image), []);
    image.write_at(&[2; 512], 3 << 20).unwrap();
    image.create_bitmap(b"new", &sectors()).unwrap();
    image.write_at(&[2; 512], 2 << 20).unwrap();
    image.close().unwrap();
    let image = Image::options().open(memory).unwrap();
    assert_eq!(names(&image), [("new".to_owned(), BitmapState::Consistent)]);
    let range = 2 << 20..(2 << 20) + 512;
    assert_eq!(extents(&image, "new").first(), Some(&range));
}

#[test]
fn looking_changes_nothing() {
    let (bytes, _) = three();
    for read_only in [true, false] {
        let memory = Arc::new(Memory::from(bytes.clone()));
        let image = Image::options()
            .read_only(read_only)
            .open(memory.clone())
            .unwrap();
        assert_eq!(names(&image).len(), 3);
        assert_eq!(extents(&image, "two").len(), 1);
        let mut buf = [0; 512];
        image.read_at(&mut buf, 1 << 20).unwrap();
        image.close().unwrap();
        assert_eq!(memory.to_vec().unwrap(), bytes);
    }
}

#[test]
fn bitmaps_of_other_images_are_added() {
    let (_, target) = fresh();
    let (_, source) = create(&CreateOptions::new(SIZE).cluster_size(512));
    let (_, other) = create(&CreateOptions::new(SIZE * 2));
    target.create_bitmap(b"fine", &sectors()).unwrap();
    let coarse = BitmapOptions::new().granularity(1 << 20).enabled(false);
    target.create_bitmap(b"coarse", &coarse).unwrap();
    for image in [&source, &other] {
        image
            .create_bitmap(b"s", &BitmapOptions::new().granularity(2048))
            .unwrap();
        image.write_at(&[1; 3000], 5000).unwrap();
        image.write_at(&[1; 3000], SIZE - 3000).unwrap();
    }
    target.write_at(&[3; 512], 1024).unwrap();
    for name in ["fine", "coarse"] {
        target.merge_bitmap(name.as_bytes(), &source, b"s").unwrap();
        assert!(target.merge_bitmap(name.as_bytes(), &other, b"s").is_err());
    }
    let mut fine = Model::new(512, SIZE);
    fine.set(1024..1536);
    fine.set(4096..8192);
    fine.set(SIZE - 4096..SIZE);
    assert_eq!(extents(&target, "fine"), fine.ranges());
    assert_eq!(extents(&target, "coarse"), [0..1 << 20, 3 << 20..4 << 20]);
    // It goes on recording.
    target.write_at(&[3; 512], 1 << 20).unwrap();
    fine.set(1 << 20..(1 << 20) + 512);
    assert_eq!(extents(&target, "fine"), fine.ranges());
}

#[test]
fn many_threads_record_and_a_crash_misses_nothing() {
    const THREADS: u64 = 4;
    let (memory, image) = create(&CreateOptions::new(64 << 20));
    for (name, granularity) in [("fine", 512), ("plain", 65536)] {
        let options = BitmapOptions::new().granularity(granularity);
        image.create_bitmap(name.as_bytes(), &options).unwrap();
    }
    image.close().unwrap();
    let image = Image::options()
        .bitmap_interval(Duration::ZERO)
        .open(memory.clone())
        .unwrap();
    let mut models = [Model::new(512, 64 << 20), Model::new(65536, 64 << 20)];
    let place = |thread: u64, number: u64| ((number * 37 + thread * 7919) % (64 << 11)) << 9;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let image = &image;
            scope.spawn(move || {
                for number in 0..400 {
                    image.write_at(&[7; 700], place(thread, number)).unwrap();
                    if number % 9 == thread {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    for thread in 0..THREADS {
        for number in 0..400 {
            let start = place(thread, number);
            for model in &mut models {
                model.set(start..start + 700);
            }
        }
    }
    // As if the program had ended here.
    let crashed = Arc::new(Memory::from(memory.to_vec().unwrap()));
    let after = Image::options().open(crashed).unwrap();
    for (name, model) in ["fine", "plain"].into_iter().zip(&models) {
        assert_eq!(extents(&image, name), model.ranges());
        assert!(after.bitmap_extents(name.as_bytes(), 0..1, 1).is_err());
        after
            .recover_bitmap(name.as_bytes(), BitmapRecovery::AsStored)
            .unwrap();
        assert!(model.is_within(&extents(&after, name)), "{name}");
    }
    image.close().unwrap();
    let image = Image::options().open(memory).unwrap();
    for (name, model) in ["fine", "plain"].into_iter().zip(&models) {
        assert_eq!(extents(&image, name), model.ranges());
    }
}

#[test]
fn whatever_way_data_is_written_it_is_recorded() {
    let data = Arc::new(Memory::new());
    let external = CreateOptions::new(SIZE)
        .data_file("data")
        .data_file_storage(data.clone())
        .data_file_raw(true);
    let memory = Arc::new(Memory::new());
    Image::create(&memory, &external).unwrap();
    let external = Image::options().data_file(data).open(memory).unwrap();
    let secret = || Secret::new(b"secret".to_vec());
    let memory = Arc::new(Memory::new());
    Image::create(&memory, &CreateOptions::new(SIZE).legacy_aes(secret())).unwrap();
    let encrypted = Image::options().secret(secret()).open(memory).unwrap();
    for image in [fresh().1, external, encrypted] {
        image.create_bitmap(b"all", &sectors()).unwrap();
        let mut model = Model::new(512, SIZE);
        for start in [512, 70_000, 1_000_001] {
            image.write_at(&[1; 1000], start).unwrap();
            model.set(start..start + 1000);
        }
        // In place now, alone and as a batch.
        image.clear_bitmap(b"all").unwrap();
        let mut model_in_place = Model::new(512, SIZE);
        image.write_at(&[2; 512], 1024).unwrap();
        model_in_place.set(1024..1536);
        let mut ops = [Op::write(&[3; 512], 70_144), Op::discard(2 << 20..3 << 20)];
        image.submit(&mut ops);
        model_in_place.set(70_144..70_656);
        model_in_place.set(2 << 20..3 << 20);
        assert_eq!(extents(&image, "all"), model_in_place.ranges());
        assert!(!model.ranges().is_empty());
    }
}

#[test]
fn a_disk_that_goes_back_to_another_size_has_changed_there() {
    for (first, second) in [(SIZE, SIZE / 2), (SIZE / 2, SIZE), (SIZE - 512, SIZE * 40)] {
        let (memory, image) = create(&CreateOptions::new(first).cluster_size(512));
        image.create_bitmap(b"on", &sectors()).unwrap();
        let off = BitmapOptions::new().granularity(4096).enabled(false);
        image.create_bitmap(b"off", &off).unwrap();
        image.write_at(&[1; 4000], first - 4000).unwrap();
        image.write_at(&[1; 4000], 9000).unwrap();
        image.create_snapshot(&SnapshotOptions::new("s")).unwrap();
        let options = ResizeOptions {
            shrink: true,
            ..ResizeOptions::default()
        };
        image.resize(second, options).unwrap();
        image.write_at(&[2; 4000], 100_000).unwrap();
        image.clear_bitmap(b"on").unwrap();
        image.apply_snapshot(&SnapshotKey::any("s")).unwrap();
        let mut model = Model::new(512, first);
        model.set(100_000..104_000);
        if second < first {
            model.set(second - 512..first);
        } else {
            // What the longer disk had there is gone; the last bit of both tells of both.
            model.set(first - 512..first);
        }
        image.write_at(&[3; 512], 0).unwrap();
        model.set(0..512);
        assert_eq!(extents(&image, "on"), model.ranges());
        assert_eq!(extents(&image, "off"), []);
        image.close().unwrap();
        let report = check(&memory, &Options::default());
        let found: Vec<_> = report
            .totals
            .iter()
            .filter(|(code, count)| *count > 0 && code.severity() >= Severity::Leak)
            .collect();
        assert!(found.is_empty(), "{found:?}");
        let image = Image::options().open(memory).unwrap();
        assert_eq!(extents(&image, "on"), model.ranges());
    }
}

#[test]
fn what_was_not_closed_is_inconsistent_on_both_sides() {
    if !is_available("bitmaps in use") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let tools = Tools::new(folder.path());
    tools.create("cluster_size=64k", "8M");
    tools.bitmap(&["--add"], "qemu");
    tools.bitmap(&["--add", "--disable"], "kept");
    // The tool ends by a signal.
    let _ = std::process::Command::new("qemu-io")
        .args(["-c", "write 0 64k", "-c", "abort"])
        .arg(&tools.image)
        .output()
        .unwrap();
    let image = Image::options().open_path(&tools.image).unwrap();
    let expected = ["qemu", "kept"].map(|name| (name.to_owned(), BitmapState::Inconsistent));
    assert_eq!(names(&image), expected);
    assert!(image.resize(16 << 20, ResizeOptions::default()).is_err());
    image
        .recover_bitmap(b"qemu", BitmapRecovery::AllChanged)
        .unwrap();
    image
        .recover_bitmap(b"kept", BitmapRecovery::AsStored)
        .unwrap();
    image.close().unwrap();
    tools.check();
    assert_eq!(tools.dirty("qemu"), [0..8 << 20]);
    assert_eq!(tools.dirty("kept"), []);
    tools.bitmap(&["--clear"], "qemu");

    let image = Image::options().open_path(&tools.image).unwrap();
    image.write_at(&[1; 512], 1 << 20).unwrap();
    let crashed = Tools::new(&folder.path().join("crashed"));
    std::fs::create_dir(folder.path().join("crashed")).unwrap();
    std::fs::copy(&tools.image, &crashed.image).unwrap();
    let info = crashed.run("qemu-img", &["info"]);
    assert!(info.contains("in-use"), "{info}");
    assert_eq!(crashed.dirty("kept"), []);
    crashed.bitmap(&["--remove"], "qemu");
    crashed.check();
    image.close().unwrap();
    assert_eq!(tools.dirty("qemu"), [1 << 20..(1 << 20) + 65536]);
}

#[test]
fn bitmaps_go_on_when_the_image_is_amended() {
    let (memory, mut image) = fresh();
    image.create_bitmap(b"on", &sectors()).unwrap();
    image
        .create_bitmap(b"off", &sectors().enabled(false))
        .unwrap();
    let mut model = Model::new(512, SIZE);
    for (number, bits) in (0..).zip([64, 1, 16]) {
        image.write_at(&[1; 512], number << 20).unwrap();
        model.set(number << 20..(number << 20) + 512);
        let options = AmendOptions::new()
            .refcount_bits(bits)
            .lazy_refcounts(number == 1);
        image.amend(&options).unwrap();
        assert_eq!(extents(&image, "on"), model.ranges());
        assert_eq!(names(&image).len(), 2);
    }
    image.amend(&AmendOptions::new().size(SIZE * 2)).unwrap();
    model.resize(SIZE * 2);
    image.write_at(&[1; 512], SIZE + 512).unwrap();
    model.set(SIZE + 512..SIZE + 1024);
    assert_eq!(extents(&image, "on"), model.ranges());
    let old = AmendOptions::new().version(Version::V2);
    assert!(image.amend(&old).is_err());
    image.close().unwrap();
    let image = Image::options().open(memory).unwrap();
    assert_eq!(extents(&image, "on"), model.ranges());
    assert_eq!(extents(&image, "off"), []);
}

#[test]
fn a_compacted_copy_has_the_bitmaps_and_the_image_goes_on_recording() {
    let (memory, image) = fresh();
    image.create_bitmap(b"on", &sectors()).unwrap();
    let mut model = Model::new(512, SIZE);
    let mut write = |image: &Image, start: u64| {
        image.write_at(&[1; 512], start).unwrap();
        model.set(start..start + 512);
        model.clone()
    };
    write(&image, 1 << 20);
    image.discard(0..4096).unwrap();
    write(&image, 0);
    let mut expected = write(&image, 8192);
    expected.set(0..4096);
    let target = Arc::new(Memory::new());
    let options = CompactOptions::new();
    image
        .compact_into(target.clone(), Image::options(), &options)
        .unwrap();
    let copy = Image::options().open(target).unwrap();
    assert_eq!(extents(&copy, "on"), expected.ranges());
    image.compact(&options).unwrap();
    image.write_at(&[1; 512], 3 << 20).unwrap();
    expected.set(3 << 20..(3 << 20) + 512);
    let crashed = Arc::new(Memory::from(memory.to_vec().unwrap()));
    let crashed = Image::options().open(crashed).unwrap();
    assert_eq!(
        names(&crashed),
        [("on".to_owned(), BitmapState::Inconsistent)]
    );
    crashed
        .recover_bitmap(b"on", BitmapRecovery::AsStored)
        .unwrap();
    assert!(expected.is_within(&extents(&crashed, "on")));
    image.close().unwrap();
    let image = Image::options().open(memory).unwrap();
    assert_eq!(extents(&image, "on"), expected.ranges());
}
