//! External data files. A raw one is the disk, byte for byte, to whoever reads it without the image.

use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_image::{Image, References, ResizeOptions};
use qcow2_io::{FileOptions, Storage, ZeroFlags};
use std::sync::Arc;

use crate::oracle::{Folder, Plain, guest_bytes, is_available, noise};

const LEN: usize = (4 << 20) + 512;

fn options() -> CreateOptions {
    CreateOptions::new(LEN as u64).data_file("data")
}

/// Makes an image with a data file in a new folder.
fn make(options: &CreateOptions) -> Folder {
    let folder = Folder::new();
    let file = FileOptions::new().write(true).create(true);
    let data: Arc<dyn Storage> = Arc::new(file.open(folder.path("data")).unwrap());
    folder.create("image", &options.clone().data_file_storage(data));
    folder
}

fn open(folder: &Folder) -> Image {
    let options = Image::options().references(References::SameDirectory);
    options.open_path(folder.path("image")).unwrap()
}

/// Writes, zeroes of both kinds and discards, at and between cluster borders; `step` may look in between.
fn change(image: &Image, plain: &mut Plain, step: impl Fn(&Plain)) {
    for number in 0..10_usize {
        let offset = number * 411_003;
        plain.write(image, offset, &noise(90_001, number as u64));
    }
    step(plain);
    for (range, flags) in [
        (70_000..70_001, ZeroFlags::NONE),
        (131_072..262_144, ZeroFlags::NONE),
        (300_000..700_000, ZeroFlags::MAY_UNMAP),
        (1_048_576..1_114_112, ZeroFlags::MAY_UNMAP),
    ] {
        image
            .write_zeroes(range.start as u64..range.end as u64, flags)
            .unwrap();
        plain.clear(range);
        step(plain);
    }
    for range in [2_000_000..2_500_000, 3_145_728..3_211_264, LEN - 512..LEN] {
        image.discard(range.start as u64..range.end as u64).unwrap();
        plain.clear(range);
        step(plain);
    }
    plain.write(image, 350_000, &noise(300_000, 44));
    plain.write(image, 2_100_000, &[9]);
    plain.write(image, LEN - 700, &noise(700, 45));
    step(plain);
}

#[test]
fn a_raw_data_file_is_the_disk_after_every_request() {
    for preallocation in [Preallocation::Off, Preallocation::Full] {
        for extended in [false, true] {
            let options = options().data_file_raw(true).extended_l2(extended);
            let folder = make(&options.preallocation(preallocation));
            let image = open(&folder);
            let mut plain = Plain::zeros(LEN);
            change(&image, &mut plain, |plain| {
                plain.assert_begins(&folder.read("data"));
            });
            plain.assert_is(&guest_bytes(&image));
            image.resize(6 << 20, ResizeOptions::default()).unwrap();
            plain.0.resize(6 << 20, 0);
            plain.write(&image, LEN - 10, &vec![7; 100_000]);
            let mut raw = folder.read("data");
            raw.resize(raw.len().max(6 << 20), 0);
            plain.assert_begins(&raw);
            image.close().unwrap();
            folder.assert_sound_here("image");
            let image = open(&folder);
            plain.assert_is(&guest_bytes(&image));
        }
    }
}

#[test]
fn what_is_in_a_raw_file_already_shows_in_the_image() {
    let folder = make(&options().data_file_raw(true));
    let mut plain = Plain(noise(LEN, 1));
    folder.write("data", &plain.0);
    let image = open(&folder);
    plain.assert_is(&guest_bytes(&image));
    change(&image, &mut plain, |plain| {
        plain.assert_begins(&folder.read("data"));
    });
    plain.assert_is(&guest_bytes(&image));
}

#[test]
fn a_data_file_holds_what_the_image_maps() {
    for extended in [false, true] {
        let folder = make(&options().extended_l2(extended));
        let image = open(&folder);
        let mut plain = Plain::zeros(LEN);
        change(&image, &mut plain, |_| {});
        plain.assert_is(&guest_bytes(&image));
        image.close().unwrap();
        folder.assert_sound_here("image");
        plain.assert_is(&guest_bytes(&open(&folder)));
    }
}

#[test]
fn qemu_agrees_on_data_files_of_both_kinds() {
    if !is_available("data files beside QEMU") {
        return;
    }
    for (raw, more) in [
        ("off", ""),
        ("on", ""),
        ("on", ",cluster_size=4k"),
        ("off", ",extended_l2=on"),
    ] {
        let folder = Folder::new();
        let options = format!("data_file=data,data_file_raw={raw}{more}");
        folder.img(&format!("create -q -f qcow2 -o {options} image {LEN}"));
        folder.io(
            "image",
            &["write -q -P 5 1000 100000", "write -q -P 6 2M 1M"],
        );
        let mut plain = Plain::zeros(LEN);
        plain.0[1000..101_000].fill(5);
        plain.0[2 << 20..3 << 20].fill(6);
        let image = open(&folder);
        plain.assert_is(&guest_bytes(&image));
        change(&image, &mut plain, |plain| {
            if raw == "on" {
                plain.assert_begins(&folder.read("data"));
            }
        });
        image.close().unwrap();
        folder.assert_sound("image");
        plain.assert_is(&folder.guest_bytes_by_qemu("image"));
        folder.io(
            "image",
            &["write -q -P 8 600k 10k", "write -q -z -u 3M 64k"],
        );
        plain.0[600 << 10..610 << 10].fill(8);
        plain.clear(3 << 20..(3 << 20) + 65536);
        plain.assert_is(&guest_bytes(&open(&folder)));
    }
}
