//! A guest at work, cut short: no change that it made is missing in the bitmaps that recorded.

use std::sync::Arc;
use std::time::Duration;

use qcow2_image::testing::{Overlay, Random, Record, damage};
use qcow2_image::{BitmapRecovery, BitmapState, Image, ImageOptions};
use qcow2_io::{Fault, Faulty, Memory, Operation, Storage, ZeroFlags};

use super::cut_short::{Deed, LEN, Way, open, prepare, recipes};
use super::model::{Model, extents};

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
        let record = Record::of(&start, |storage| {
            let image = options(&mut random).open(storage).unwrap();
            play(&image, &mut random);
            image.close().unwrap();
        });
        record.crash_everywhere(&mut Random::new(round), |crash| {
            let storage = &crash.files[0];
            let how = format!("{round}: {}", crash.how);
            let mut image = open(storage);
            if random.one_in(3) {
                // Nobody recovers it at first, and the guest goes on.
                play(&image, &mut random);
                image.close().unwrap();
                image = open(storage);
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
            assert_eq!(damage(storage, true), [], "{how}");
        });
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
                assert_eq!(damage(&storage, true), [], "{how}");
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
