//! An image is a storage, so an image can lie in one.

use std::sync::Arc;

use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, ResizeOptions};
use qcow2_io::{Slice, Storage, StorageErrorKind, ZeroFlags};

use crate::oracle::{Folder, Plain, assert_sound, guest_bytes, in_memory, is_available, noise};

const MIB: u64 = 1 << 20;
/// Where the inner image begins in the outer one's disk.
const START: u64 = 3 * MIB;
/// How long its place is.
const ROOM: u64 = 40 * MIB;

/// Writes, zeroes and discards here and there.
fn change(image: &Image, plain: &mut Plain, salt: u64) {
    for number in 0..12 {
        let offset = usize::try_from((number * 777_777 + salt * 4099) % (15 * MIB)).unwrap();
        plain.write(image, offset, &noise(100_000, number + salt));
    }
    image
        .write_zeroes(1_000_001..1_300_000, ZeroFlags::MAY_UNMAP)
        .unwrap();
    plain.clear(1_000_001..1_300_000);
    image.discard(5 * MIB..6 * MIB).unwrap();
    plain.clear(5 << 20..6 << 20);
    image.flush().unwrap();
}

#[test]
fn an_image_in_an_image_in_an_image_works() {
    let memory = in_memory(&CreateOptions::new(64 * MIB).extended_l2(true));
    let mut plain = Plain::zeros(16 << 20);
    for round in 0..3 {
        let outer = Image::options().open(memory.clone()).unwrap();
        let middle = Arc::new(Slice::new(outer, START, ROOM).unwrap());
        if round == 0 {
            let options = CreateOptions::new(38 * MIB).cluster_size(4096);
            Image::create(&middle, &options).unwrap();
        }
        let middle = Image::options().open(middle).unwrap();
        let inner = Arc::new(Slice::new(middle, 12_345, 30 * MIB).unwrap());
        if round == 0 {
            Image::create(&inner, &CreateOptions::new(16 * MIB)).unwrap();
        }
        let inner = Image::options().open(inner).unwrap();
        plain.assert_is(&guest_bytes(&inner));
        change(&inner, &mut plain, round);
        plain.assert_is(&guest_bytes(&inner));
        inner.close().unwrap();
    }
    assert_sound(&memory);
    let outer = Image::options().read_only(true).open(memory).unwrap();
    let middle = Slice::new(outer, START, ROOM).unwrap();
    assert_sound(&middle);
    let middle = Image::options().read_only(true).open(Arc::new(middle));
    let inner = Slice::new(middle.unwrap(), 12_345, 30 * MIB).unwrap();
    assert_sound(&inner);
}

#[test]
fn an_inner_image_that_has_no_room_left_says_so_and_stays_sound() {
    let memory = in_memory(&CreateOptions::new(4 * MIB));
    let outer = Arc::new(Image::options().open(memory.clone()).unwrap());
    let place = Arc::new(Slice::new(outer.clone(), 0, 2 * MIB).unwrap());
    Image::create(&place, &CreateOptions::new(64 * MIB)).unwrap();
    let inner = Image::options().open(place.clone()).unwrap();
    let mut offset = 0;
    let error = loop {
        match inner.write_at(&vec![1; 65536], offset) {
            Ok(()) => offset += 65536,
            Err(error) => break error,
        }
    };
    assert!(offset >= MIB, "only {offset} bytes fit");
    assert_eq!(error.kind(), StorageErrorKind::NoSpace, "{error}");
    // What is there can still be written, and given back for use elsewhere.
    inner.write_at(&[2; 512], 0).unwrap();
    inner.discard(0..65536).unwrap();
    inner.flush().unwrap();
    inner.write_at(&vec![3; 65536], 32 * MIB).unwrap();
    inner.resize(128 * MIB, ResizeOptions::default()).unwrap();
    inner.close().unwrap();
    assert_sound(&place);
    drop(place);
    Arc::into_inner(outer).unwrap().close().unwrap();
    assert_sound(&memory);
}

#[test]
fn qemu_reads_the_inner_image() {
    if !is_available("an image in an image by QEMU") {
        return;
    }
    let folder = Folder::new();
    folder.create("outer.qcow2", &CreateOptions::new(64 * MIB));
    let outer = Image::options().open_path(folder.path("outer.qcow2"));
    let place = Arc::new(Slice::new(outer.unwrap(), START, ROOM).unwrap());
    Image::create(&place, &CreateOptions::new(16 * MIB)).unwrap();
    let inner = Image::options().open(place).unwrap();
    let mut plain = Plain::zeros(16 << 20);
    change(&inner, &mut plain, 9);
    inner.close().unwrap();
    folder.assert_sound("outer.qcow2");
    let file = r#"{"driver":"file","filename":"outer.qcow2"}"#;
    let outer = format!(r#"{{"driver":"qcow2","file":{file}}}"#);
    let window = format!(r#"{{"driver":"raw","offset":{START},"size":{ROOM},"file":{outer}}}"#);
    let inner = format!(r#"json:{{"driver":"qcow2","file":{window}}}"#);
    folder.img(&format!("check -q {inner}"));
    folder.img(&format!("convert -O raw {inner} found.raw"));
    plain.assert_is(&folder.read("found.raw"));
}
