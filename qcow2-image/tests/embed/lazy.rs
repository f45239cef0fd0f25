//! Lazy refcounts: the dirty bit while they are behind, and recovery where nobody came to write them.

use std::sync::Arc;

use qcow2_check::{Options, Verdict, check};
use qcow2_format::header::AutoclearFeatures;
use qcow2_image::create::CreateOptions;
use qcow2_image::{CacheOptions, Image};
use qcow2_io::{Memory, Storage, ZeroFlags};

use crate::oracle::{
    Folder, Plain, assert_sound, copy_of, edit_header, guest_bytes, header_of, in_memory,
    is_available, noise, refusal,
};

const SIZE: u64 = 8 << 20;

fn lazy() -> CreateOptions {
    CreateOptions::new(SIZE).lazy_refcounts(true)
}

fn is_dirty(storage: &dyn Storage) -> bool {
    header_of(storage).incompatible.dirty()
}

/// Writes, overwrites, zeroes, discards; flushed at the end.
fn change(image: &Image, plain: &mut Plain) {
    for number in 0..20 {
        let offset = number * 393_216 + number * 511;
        plain.write(image, offset, &noise(70_000, number as u64));
    }
    image
        .write_zeroes(100_000..900_000, ZeroFlags::MAY_UNMAP)
        .unwrap();
    plain.clear(100_000..900_000);
    image.discard(3 << 20..4 << 20).unwrap();
    plain.clear(3 << 20..4 << 20);
    plain.write(image, 400_000, &noise(200_000, 99));
    image.flush().unwrap();
}

#[test]
fn the_dirty_bit_is_set_by_the_first_allocation_and_cleared_at_the_end() {
    let memory = in_memory(&lazy());
    let image = Image::options().open(memory.clone()).unwrap();
    assert!(!is_dirty(&memory), "opening changes nothing");
    image.flush().unwrap();
    assert!(!is_dirty(&memory), "nor does a flush of nothing");
    image.write_at(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    assert!(is_dirty(&memory));
    image.close().unwrap();
    assert!(!is_dirty(&memory));
    assert_sound(&memory);
    // Dropping is closing, too.
    let image = Image::options().open(memory.clone()).unwrap();
    image.write_at(&[1; 512], SIZE / 2).unwrap();
    image.flush().unwrap();
    assert!(is_dirty(&memory));
    drop(image);
    assert!(!is_dirty(&memory));
    assert_sound(&memory);
}

#[test]
fn the_option_decides_over_the_bit_in_the_header() {
    let memory = in_memory(&lazy());
    let image = Image::options().lazy_refcounts(false);
    let image = image.open(memory.clone()).unwrap();
    image.write_at(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    assert!(!is_dirty(&memory));
    assert_sound(&copy_of(&memory));
    let memory = in_memory(&CreateOptions::new(SIZE));
    let image = Image::options().lazy_refcounts(true);
    let image = image.open(memory.clone()).unwrap();
    image.write_at(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    assert!(is_dirty(&memory));
}

#[test]
fn an_image_that_was_not_closed_is_recovered() {
    let kinds = [
        lazy(),
        lazy().extended_l2(true),
        lazy().cluster_size(512).refcount_bits(1),
        lazy().cluster_size(4096).refcount_bits(64),
    ];
    for options in kinds {
        let memory = in_memory(&options);
        let cache = CacheOptions::new().l2_bytes(65536);
        let image = Image::options().cache(cache).open(memory.clone()).unwrap();
        let mut plain = Plain::zeros(8 << 20);
        change(&image, &mut plain);
        let crashed = copy_of(&memory);
        assert!(is_dirty(&crashed));
        let before = check(&crashed, &Options::default()).verdict();
        assert_eq!(before, Verdict::Corrupt, "refcounts are behind");
        drop(image);

        // A reader leaves it as it is.
        let bytes = crashed.to_vec().unwrap();
        let reader = Image::options().read_only(true);
        let reader = reader.open(crashed.clone()).unwrap();
        plain.assert_is(&guest_bytes(&reader));
        drop(reader);
        assert!(crashed.to_vec().unwrap() == bytes);

        let image = Image::options().open(crashed.clone()).unwrap();
        assert!(!is_dirty(&crashed), "opening for writing recovers");
        assert_sound(&crashed);
        plain.assert_is(&guest_bytes(&image));
        change(&image, &mut plain);
        image.close().unwrap();
        assert_sound(&crashed);
    }
}

#[test]
fn a_crash_during_recovery_is_one_more_recovery() {
    let memory = in_memory(&lazy().cluster_size(4096));
    let image = Image::options().open(memory.clone()).unwrap();
    let mut plain = Plain::zeros(8 << 20);
    change(&image, &mut plain);
    let crashed = copy_of(&memory);
    drop(image);
    // The last write of a recovery clears the bit: without it, all before has happened.
    drop(Image::options().open(crashed.clone()).unwrap());
    edit_header(&crashed, |header| header.incompatible.set_dirty(true));
    let image = Image::options().open(crashed.clone()).unwrap();
    plain.assert_is(&guest_bytes(&image));
    image.close().unwrap();
    assert_sound(&crashed);
}

#[test]
fn what_is_wrong_beyond_refcounts_is_not_recovered() {
    let memory = in_memory(&lazy());
    let image = Image::options().open(memory.clone()).unwrap();
    image.write_at(&vec![1; 65536], 0).unwrap();
    image.flush().unwrap();
    let crashed: Arc<Memory> = copy_of(&memory);
    drop(image);
    let l1 = header_of(&crashed).l1_table_offset.get();
    crashed
        .write_at(&(1 << 63 | 0x123_4567_0200_u64).to_be_bytes(), l1)
        .unwrap();
    edit_header(&crashed, |header| {
        header.autoclear = AutoclearFeatures::from_bits(1 << 40);
    });
    let before = crashed.to_vec().unwrap();
    let words = refusal(Image::options().open(crashed.clone()));
    assert!(words.contains("was not closed"), "{words}");
    let after = crashed.to_vec().unwrap();
    let differs = after.iter().zip(&before).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{words}");
    // It can still be looked at.
    Image::options().read_only(true).open(crashed).unwrap();
}

#[test]
fn a_dirty_bit_without_lazy_refcounts_is_cleared_too() {
    let memory = in_memory(&CreateOptions::new(SIZE));
    edit_header(&memory, |header| header.incompatible.set_dirty(true));
    Image::options()
        .open(memory.clone())
        .unwrap()
        .close()
        .unwrap();
    assert!(!is_dirty(&memory));
    assert_sound(&memory);
}

#[test]
fn images_that_qemu_left_dirty_are_recovered() {
    if !is_available("recovery of images that qemu-io left dirty") {
        return;
    }
    for options in [
        "lazy_refcounts=on",
        "lazy_refcounts=on,cluster_size=4096,refcount_bits=64",
        "lazy_refcounts=on,extended_l2=on,compression_type=zstd",
    ] {
        let folder = Folder::new();
        let mut plain = Plain(noise(8 << 20, 5));
        folder.write("raw", &plain.0);
        folder.img(&format!(
            "convert -c -f raw -O qcow2 -o {options} raw image"
        ));
        folder.img("snapshot -c before image");
        let first = plain.clone();
        folder.io_and_abort(
            "image",
            &[
                "write -q -P 1 1000 300000",
                "write -q -z -u 2M 1M",
                "write -q -P 2 2500k 200k",
                "discard -q 4M 1M",
                "write -q -P 3 7M 1M",
            ],
        );
        plain.0[1000..301_000].fill(1);
        plain.clear(2 << 20..3 << 20);
        plain.0[2500 << 10..2700 << 10].fill(2);
        plain.clear(4 << 20..5 << 20);
        plain.0[7 << 20..].fill(3);
        assert!(is_dirty(&folder.open("image")), "{options}");

        let image = Image::options().open_path(folder.path("image")).unwrap();
        assert!(!is_dirty(&folder.open("image")));
        plain.assert_is(&guest_bytes(&image));
        plain.write(&image, 500_000, &noise(4_000_000, 8));
        image.close().unwrap();
        folder.assert_sound("image");
        plain.assert_is(&folder.guest_bytes_by_qemu("image"));
        folder.img("convert -f qcow2 -l before -O raw image snapshot.raw");
        first.assert_is(&folder.read("snapshot.raw"));
    }
}

#[test]
fn qemu_recovers_images_that_were_not_closed_here() {
    if !is_available("recovery by QEMU") {
        return;
    }
    let folder = Folder::new();
    let memory = in_memory(&lazy().cluster_size(4096));
    let image = Image::options().open(memory.clone()).unwrap();
    let mut plain = Plain::zeros(8 << 20);
    change(&image, &mut plain);
    folder.write("image", &memory.to_vec().unwrap());
    drop(image);
    folder.io("image", &["read -q 0 512"]);
    assert!(!is_dirty(&folder.open("image")));
    folder.assert_sound("image");
    plain.assert_is(&folder.guest_bytes_by_qemu("image"));
}
