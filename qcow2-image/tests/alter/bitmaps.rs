//! Bitmaps keep their bits, whatever happens to the image around them.

use std::ops::Range;
use std::sync::Arc;

use qcow2_format::header::Version;
use qcow2_image::amend::{AmendError, AmendOptions};
use qcow2_image::compact::{CompactMode, CompactOptions};
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::Random;
use qcow2_image::{BitmapOptions, BitmapState, Image, SnapshotKey, SnapshotOptions};
use qcow2_io::{Memory, Storage};

use crate::compact_random::usage;
use crate::oracle::{Folder, is_available};
use crate::rig::{Case, Deed, assert_sound, noise, state};

const SIZE: u64 = 2 << 20;

/// Bitmaps with bits, behind data most of which is then gone.
fn prepare(image: &Image) {
    for part in 0..20_u64 {
        image.write_at(&noise(part, 40_000), part * 50_000).unwrap();
    }
    image.create_snapshot(&SnapshotOptions::new("s")).unwrap();
    for part in 0..10_u64 {
        let at = part * 90_000;
        image.write_at(&noise(part + 50, 50_000), at).unwrap();
    }
    let fine = BitmapOptions::new().granularity(512);
    image.create_bitmap(b"fine", &fine).unwrap();
    image
        .create_bitmap(b"coarse", &BitmapOptions::new())
        .unwrap();
    image.create_bitmap(b"still", &fine).unwrap();
    for part in 0..30_u64 {
        let at = part * part * 2000;
        image.write_at(&noise(part, 1000), at).unwrap();
    }
    image.disable_bitmap(b"still").unwrap();
    image.write_at(&noise(1, 5000), 1_900_000).unwrap();
    image.delete_snapshot(&SnapshotKey::any("s")).unwrap();
    image.discard(300_000..600_000).unwrap();
}

type Bits = Vec<(Vec<u8>, BitmapState, Vec<Range<u64>>)>;

fn bits(storage: &Arc<dyn Storage>) -> Bits {
    let image = Image::options().read_only(true).no_backing();
    let image = image.open(Arc::clone(storage)).unwrap();
    let all = image.bitmaps().unwrap().into_iter().map(|info| {
        // Nobody says what is in one that is inconsistent.
        let ranges = match info.state {
            BitmapState::Consistent => image
                .dirty_ranges(&info.name, 0..image.virtual_size())
                .map(Result::unwrap)
                .collect(),
            _ => Vec::new(),
        };
        (info.name, info.state, ranges)
    });
    all.collect()
}

fn new_image(recipe: &CreateOptions) -> Arc<Memory> {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, recipe).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    prepare(&image);
    image.close().unwrap();
    memory
}

#[test]
fn bitmaps_move_and_keep_their_bits() {
    let available = is_available(4, "compacted images with bitmaps");
    for recipe in [
        CreateOptions::new(SIZE).cluster_size(512),
        CreateOptions::new(SIZE)
            .cluster_size(4096)
            .refcount_bits(32),
    ] {
        let memory: Arc<dyn Storage> = new_image(&recipe);
        let before = bits(&memory);
        assert_eq!(before.len(), 3);
        assert!(
            before.iter().all(|(_, state, ranges)| {
                *state == BitmapState::Consistent && ranges.len() > 3
            })
        );
        let disk = state(Image::options, &memory);
        for mode in [CompactMode::Truncate, CompactMode::Sequential] {
            let mut bytes = vec![0; usize::try_from(memory.len().unwrap()).unwrap()];
            memory.read_at(&mut bytes, 0).unwrap();
            let copy: Arc<dyn Storage> = Arc::new(Memory::from(bytes));
            let image = Image::options().open(Arc::clone(&copy)).unwrap();
            let report = image.compact(&CompactOptions::new().mode(mode)).unwrap();
            assert!(report.bytes_after < report.bytes_before);
            image.close().unwrap();
            assert_sound(&copy);
            assert!(bits(&copy) == before, "{mode:?}");
            assert!(state(Image::options, &copy) == disk, "{mode:?}");
            let (used, end) = usage(&copy);
            assert_eq!(used, end, "{mode:?}");
            // They go on recording.
            let image = Image::options().open(Arc::clone(&copy)).unwrap();
            image.write_at(&[1; 512], 1_024_000).unwrap();
            image.compact(&CompactOptions::new().mode(mode)).unwrap();
            image.write_at(&[1; 512], 1_228_800).unwrap();
            image.close().unwrap();
            let after = bits(&copy);
            let has = |at: u64| after[0].2.iter().any(|range| range.contains(&at));
            assert!(has(1_024_000) && has(1_228_800), "{mode:?}");
            assert_eq!(after[2], before[2]);
            if available {
                let folder = Folder::new();
                let mut bytes = vec![0; usize::try_from(copy.len().unwrap()).unwrap()];
                copy.read_at(&mut bytes, 0).unwrap();
                std::fs::write(folder.path("a"), bytes).unwrap();
                folder.assert_sound("a");
                let info = folder.img("info a");
                assert!(
                    info.contains("coarse") && !info.contains("in-use"),
                    "{info}"
                );
            }
        }
    }
}

#[test]
fn a_crash_or_a_fault_while_bitmaps_move_loses_no_bit() {
    let mut random = Random::new(8);
    let recipe = CreateOptions::new(crate::rig::LEN as u64).cluster_size(512);
    let deed = Deed::new("bitmaps", recipe, |image| {
        image.compact(&CompactOptions::new()).map(drop)
    });
    let case = Case::after_work(deed, |image| {
        let fine = BitmapOptions::new().granularity(512);
        image.create_bitmap(b"fine", &fine).unwrap();
        image.create_bitmap(b"more", &fine).unwrap();
        image.write_at(&[7; 3000], 40_000).unwrap();
        image.disable_bitmap(b"more").unwrap();
        image.delete_snapshot(&SnapshotKey::any("one")).unwrap();
        image.delete_snapshot(&SnapshotKey::any("two")).unwrap();
        image.discard(0..30_000).unwrap();
    });
    let memory: Arc<dyn Storage> = Arc::new(Memory::from(case.start.clone()));
    let before = bits(&memory);
    case.crash_everywhere_and(&mut random, 3, |storage| {
        for (old, new) in before.iter().zip(bits(storage)) {
            // One that records says so in the file; the other is as it was.
            if new.1 == BitmapState::Inconsistent {
                assert_eq!(old.0, b"fine");
            } else {
                assert_eq!(*old, new);
            }
        }
    });
    assert!(case.fail_everywhere(5) > 20);
}

#[test]
fn amending_keeps_bitmaps_or_refuses() {
    let recipe = CreateOptions::new(SIZE).cluster_size(4096);
    let memory: Arc<dyn Storage> = new_image(&recipe);
    let before = bits(&memory);
    let mut image = Image::options().open(Arc::clone(&memory)).unwrap();
    image.write_at(&[1; 512], 1_024_000).unwrap();
    let options = AmendOptions::new().refcount_bits(64).lazy_refcounts(true);
    image.amend(&options).unwrap();
    image.write_at(&[1; 512], 1_228_800).unwrap();
    image.amend(&AmendOptions::new().size(3 << 20)).unwrap();
    let down = AmendOptions::new().version(Version::V2).refcount_bits(16);
    let refused = image.amend(&down);
    assert!(
        matches!(refused, Err(AmendError::Refused { .. })),
        "{refused:?}"
    );
    image.close().unwrap();
    assert_sound(&memory);
    let after = bits(&memory);
    assert_eq!(after.len(), 3);
    for (number, (name, state, ranges)) in after.iter().enumerate() {
        assert_eq!(*state, BitmapState::Consistent, "{name:?}");
        let has = |at: u64| ranges.iter().any(|range| range.contains(&at));
        assert_eq!(has(1_024_000) && has(1_228_800), number != 2, "{name:?}");
    }
    assert_eq!(after[2], before[2]);
}
