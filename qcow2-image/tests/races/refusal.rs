use std::sync::Arc;

use qcow2_check::synth;
use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{Memory, Storage, Trace};

/// A plain image with one cluster of data.
fn plain() -> Vec<u8> {
    let memory = Arc::new(Memory::new());
    Image::create(&*memory, &CreateOptions::new(1 << 20)).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    image.write_at(&[1; 4096], 0).unwrap();
    image.close().unwrap();
    memory.to_vec().unwrap()
}

fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = plain();
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
    image
}

/// Refused for writing and for reading, and left as it is.
fn assert_refused(bytes: &[u8], what: &str) {
    for read_only in [false, true] {
        let storage = Arc::new(Trace::new(Memory::from(bytes.to_vec())));
        let options = Image::options().read_only(read_only);
        let error = options.open(storage.clone()).expect_err(what);
        assert!(!error.to_string().is_empty());
        assert!(
            storage.events().is_empty(),
            "{what}: {:?}",
            storage.events()
        );
    }
}

#[test]
fn encrypted_images_are_not_opened_as_plain_data() {
    let luks = Memory::new();
    synth::demo_luks(&luks).unwrap();
    assert_refused(&luks.to_vec().unwrap(), "LUKS");
    for method in 1..=3_u32 {
        let bytes = method.to_be_bytes();
        assert_refused(&patched(32, &bytes), "an encryption method");
    }
}

#[test]
fn unknown_incompatible_features_are_refused() {
    for bit in 5..64 {
        let bytes = (1_u64 << bit).to_be_bytes();
        assert_refused(&patched(72, &bytes), "an unknown feature");
    }
}

#[test]
fn data_in_another_file_is_not_looked_for_in_this_one() {
    assert_refused(&patched(72, &4_u64.to_be_bytes()), "an external data file");
}

#[test]
fn a_compression_type_that_the_features_deny_is_refused() {
    // The bit without the type, the type without the bit, and a type that no one knows.
    assert_refused(&patched(72, &8_u64.to_be_bytes()), "the bit alone");
    assert_refused(&patched(104, &[1]), "the type alone");
    let mut image = patched(72, &8_u64.to_be_bytes());
    image[104] = 2;
    assert_refused(&image, "an unknown type");
}

#[test]
fn versions_and_sizes_that_no_image_has_are_refused() {
    assert_refused(&patched(0, b"QFJ\xfb"), "another magic");
    for version in [0_u32, 1, 4, u32::MAX] {
        assert_refused(&patched(4, &version.to_be_bytes()), "a version");
    }
    for bits in [8_u32, 22, 64] {
        assert_refused(&patched(20, &bits.to_be_bytes()), "a cluster size");
    }
    assert_refused(&patched(96, &7_u32.to_be_bytes()), "a refcount width");
}

#[test]
fn a_corrupt_image_is_only_read() {
    let bytes = patched(72, &2_u64.to_be_bytes());
    let storage = Arc::new(Trace::new(Memory::from(bytes)));
    Image::options().open(storage.clone()).unwrap_err();
    let image = Image::options().read_only(true);
    let image = image.open(storage.clone()).unwrap();
    let mut found = [0; 512];
    image.read_at(&mut found, 0).unwrap();
    assert_eq!(found, [1; 512]);
    image.write_at(&[2; 512], 0).unwrap_err();
    drop(image);
    assert!(storage.events().is_empty());
}

#[test]
fn unknown_autoclear_features_are_cleared_by_writers_only() {
    let bytes = patched(88, &(1_u64 << 40).to_be_bytes());
    let storage = Arc::new(Trace::new(Memory::from(bytes)));
    let open = |read_only| Image::options().read_only(read_only).open(storage.clone());
    drop(open(true).unwrap());
    assert!(storage.events().is_empty());
    drop(open(false).unwrap());
    let mut bits = [0xff; 8];
    storage.read_at(&mut bits, 88).unwrap();
    assert_eq!(bits, [0; 8]);
}
