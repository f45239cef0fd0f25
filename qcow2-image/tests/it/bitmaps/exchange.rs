use std::collections::BTreeMap;

use qcow2_check::Severity;
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::Random;
use qcow2_image::{BitmapOptions, BitmapState, Image, ResizeOptions, SnapshotKey, SnapshotOptions};
use qcow2_io::codec::Level;
use qcow2_io::{File, FileOptions, Storage, ZeroFlags};

use super::model::{Model, extents};
use super::oracle::Tools;
use crate::qemu::is_available;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

struct Expected {
    bitmaps: BTreeMap<&'static str, (Model, bool)>,
    size: u64,
}

impl Expected {
    fn record(&mut self, start: u64, len: u64) {
        for (model, enabled) in self.bitmaps.values_mut() {
            if *enabled {
                model.set(start..start + len);
            }
        }
    }
}

fn draw_range(random: &mut Random, size: u64) -> (u64, u64) {
    let start = random.below(size);
    let most = if random.one_in(8) { size } else { 200 << 10 };
    let len = 1 + random.below(most.min(size - start));
    (start, len)
}

/// What either side can do; tells whether it did.
fn manage(random: &mut Random, expected: &mut Expected, side: &mut dyn Side) {
    let name = NAMES[usize::try_from(random.below(4)).unwrap()];
    let other = NAMES[usize::try_from(random.below(4)).unwrap()];
    let there = expected.bitmaps.contains_key(name);
    match random.below(7) {
        0 | 1 if !there => {
            let granularity = 512 << random.below(11);
            let enabled = !random.one_in(3);
            side.create(name, granularity, enabled);
            let model = Model::new(granularity, expected.size);
            expected.bitmaps.insert(name, (model, enabled));
        }
        2 if there && random.one_in(2) => {
            side.remove(name);
            expected.bitmaps.remove(name);
        }
        3 if there => {
            side.clear(name);
            expected.bitmaps.get_mut(name).unwrap().0.clear();
        }
        4 if there => {
            let enabled = random.one_in(2);
            side.enable(name, enabled);
            expected.bitmaps.get_mut(name).unwrap().1 = enabled;
        }
        5 | 6 if there && name != other && expected.bitmaps.contains_key(other) => {
            side.merge(name, other);
            let bits = expected.bitmaps[other].0.clone();
            expected.bitmaps.get_mut(name).unwrap().0.merge(&bits);
        }
        _ => {}
    }
}

trait Side {
    fn create(&mut self, name: &str, granularity: u64, enabled: bool);
    fn remove(&mut self, name: &str);
    fn clear(&mut self, name: &str);
    fn enable(&mut self, name: &str, on: bool);
    fn merge(&mut self, name: &str, source: &str);
}

impl Side for &Image {
    fn create(&mut self, name: &str, granularity: u64, enabled: bool) {
        let options = BitmapOptions::new()
            .granularity(granularity)
            .enabled(enabled);
        self.create_bitmap(name.as_bytes(), &options).unwrap();
    }
    fn remove(&mut self, name: &str) {
        self.remove_bitmap(name.as_bytes()).unwrap();
    }
    fn clear(&mut self, name: &str) {
        self.clear_bitmap(name.as_bytes()).unwrap();
    }
    fn enable(&mut self, name: &str, on: bool) {
        if on {
            self.enable_bitmap(name.as_bytes()).unwrap();
        } else {
            self.disable_bitmap(name.as_bytes()).unwrap();
        }
    }
    fn merge(&mut self, name: &str, source: &str) {
        self.merge_bitmap(name.as_bytes(), self, source.as_bytes())
            .unwrap();
    }
}

impl Side for &Tools {
    fn create(&mut self, name: &str, granularity: u64, enabled: bool) {
        let granularity = granularity.to_string();
        let mut args = vec!["--add", "-g", &granularity];
        if !enabled {
            args.push("--disable");
        }
        self.bitmap(&args, name);
    }
    fn remove(&mut self, name: &str) {
        self.bitmap(&["--remove"], name);
    }
    fn clear(&mut self, name: &str) {
        self.bitmap(&["--clear"], name);
    }
    fn enable(&mut self, name: &str, on: bool) {
        self.bitmap(&[if on { "--enable" } else { "--disable" }], name);
    }
    fn merge(&mut self, name: &str, source: &str) {
        self.bitmap(&["--merge", source], name);
    }
}

fn turn_here(tools: &Tools, random: &mut Random, expected: &mut Expected) {
    let mut options = Image::options();
    if random.one_in(2) {
        options = options.bitmap_interval(std::time::Duration::ZERO);
    }
    let image = options.open_path(&tools.image).unwrap();
    for _ in 0..10 {
        let (start, len) = draw_range(random, expected.size);
        let end = start + len;
        match random.below(9) {
            0 | 1 => {
                let bytes = vec![1; usize::try_from(len).unwrap()];
                image.write_at(&bytes, start).unwrap();
                expected.record(start, len);
            }
            2 => {
                image
                    .write_zeroes(start..end, ZeroFlags::MAY_UNMAP)
                    .unwrap();
                expected.record(start, len);
            }
            3 => {
                image.discard(start..end).unwrap();
                expected.record(start, len);
            }
            4 => {
                let unit = image.geometry().cluster_size();
                let start = start / unit * unit;
                let len = unit.min(expected.size - start);
                let bytes = vec![7; usize::try_from(len).unwrap()];
                image
                    .write_compressed(&bytes, start, Level::default())
                    .unwrap();
                expected.record(start, len);
            }
            5 => image.flush().unwrap(),
            6 if random.one_in(3) => {
                let size = (1 + random.below(16 << 10)) * 512;
                let options = ResizeOptions {
                    shrink: true,
                    ..ResizeOptions::default()
                };
                image.resize(size, options).unwrap();
                expected.size = size;
                for (model, _) in expected.bitmaps.values_mut() {
                    model.resize(size);
                }
            }
            7 if random.one_in(3) => go_back(&image, random, expected),
            _ => manage(random, expected, &mut &image),
        }
        compare_here(&image, expected);
    }
    image.close().unwrap();
}

/// Takes a snapshot, or returns to one: then at least what is different has changed in those that record.
fn go_back(image: &Image, random: &mut Random, expected: &mut Expected) {
    let snapshots = image.snapshots().unwrap();
    let Some(snapshot) = snapshots.last().filter(|_| random.one_in(2)) else {
        let options = SnapshotOptions::new("s");
        image.create_snapshot(&options).unwrap();
        return;
    };
    let key = SnapshotKey::Id(snapshot.id.clone());
    let content = |image: &Image| {
        let mut bytes = vec![0; usize::try_from(image.virtual_size()).unwrap()];
        image.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    let old = content(image);
    image.apply_snapshot(&key).unwrap();
    let new = content(image);
    expected.size = new.len() as u64;
    for (name, (model, enabled)) in &mut expected.bitmaps {
        model.resize(expected.size);
        let found = extents(image, name);
        if !*enabled {
            continue;
        }
        for (start, new) in (0..).step_by(512).zip(new.chunks(512)) {
            let at = usize::try_from(start).unwrap();
            if old.get(at..at + new.len()) != Some(new) {
                model.set(start..start + 512);
            }
        }
        assert!(model.is_within(&found), "{name}");
        // Whole clusters have changed, also where they have the same bytes.
        model.clear();
        for range in found {
            model.set(range);
        }
    }
    if random.one_in(2) {
        image.delete_snapshot(&key).unwrap();
    }
}

fn turn_there(mut tools: &Tools, random: &mut Random, expected: &mut Expected) {
    for _ in 0..2 {
        let mut commands = Vec::new();
        for _ in 0..2 {
            let (start, len) = draw_range(random, expected.size);
            let what = ["write", "write -z", "discard"];
            let what = what[usize::try_from(random.below(3)).unwrap()];
            if what == "discard" {
                // QEMU discards whole sectors, and may leave the rest alone.
                let (start, len) = (start / 512 * 512, len.next_multiple_of(512));
                let len = len.min(expected.size - start);
                commands.push(format!("discard {start} {len}"));
                expected.record(start, len);
            } else {
                commands.push(format!("{what} {start} {len}"));
                expected.record(start, len);
            }
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        tools.io(&commands);
        manage(random, expected, &mut tools);
    }
}

fn compare_here(image: &Image, expected: &Expected) {
    let infos = image.bitmaps().unwrap();
    assert_eq!(infos.len(), expected.bitmaps.len());
    for info in infos {
        let name = std::str::from_utf8(&info.name).unwrap();
        let (model, enabled) = &expected.bitmaps[name];
        assert_eq!(info.granularity, model.granularity);
        assert_eq!(info.auto, *enabled);
        assert_eq!(info.state, BitmapState::Consistent);
        let ranges = model.ranges();
        assert_eq!(extents(image, name), ranges, "{name}");
        let sum = ranges.iter().map(|range| range.end - range.start).sum();
        assert_eq!(info.dirty_bytes, Some(sum), "{name}");
    }
}

fn compare_there(tools: &Tools, expected: &Expected) {
    tools.check();
    let report = qcow2_check::check(
        &FileOptions::new().open(&tools.image).unwrap() as &File,
        &qcow2_check::Options::default(),
    );
    let found: Vec<_> = report
        .totals
        .iter()
        .filter(|(code, count)| {
            let bitmap = format!("{code:?}").starts_with("Bitmap");
            *count > 0 && (bitmap || code.severity() >= Severity::Leak)
        })
        .collect();
    assert!(found.is_empty(), "{found:?} {:?}", report.findings);
    for (name, (model, _)) in &expected.bitmaps {
        assert_eq!(tools.dirty(name), model.ranges(), "{name}");
    }
}

#[test]
fn bitmaps_go_back_and_forth_between_qemu_and_here() {
    if !is_available("6 programs on bitmaps beside QEMU") {
        return;
    }
    for seed in 0..6 {
        let mut random = Random::new(seed + 500);
        let folder = tempfile::tempdir().unwrap();
        let tools = Tools::new(folder.path());
        let file = FileOptions::new()
            .write(true)
            .create(true)
            .open(&tools.image)
            .unwrap();
        let cluster = [512, 4096, 65536][usize::try_from(seed % 3).unwrap()];
        let size = 6 << 20;
        let mut options = CreateOptions::new(size).cluster_size(cluster);
        if seed == 4 {
            options = options.lazy_refcounts(true);
        }
        if seed == 5 {
            options = options.extended_l2(true);
        }
        Image::create(&file, &options).unwrap();
        drop(file);
        let mut expected = Expected {
            bitmaps: BTreeMap::new(),
            size,
        };
        for _ in 0..4 {
            turn_here(&tools, &mut random, &mut expected);
            compare_there(&tools, &expected);
            turn_there(&tools, &mut random, &mut expected);
            compare_there(&tools, &expected);
            let image = Image::options()
                .read_only(true)
                .open_path(&tools.image)
                .unwrap();
            compare_here(&image, &expected);
        }
    }
}
