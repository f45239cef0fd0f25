//! The header: what is not known is kept, cleared or refused, as its place says.

use std::sync::Arc;

use qcow2_format::header::{AutoclearFeatures, CryptMethod, Extension};
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, ImageError, ResizeOptions};
use qcow2_io::{Memory, Storage, StorageErrorKind};

use crate::oracle::{
    Folder, assert_sound, edit_header, header_of, in_memory, is_available, refusal,
};

const SIZE: u64 = 1 << 20;
/// Bits of no known feature.
const UNKNOWN: u64 = 1 << 63 | 1 << 30;

/// Asserts that nobody may write, and a reader only if `readable`, and that neither leaves a trace. Gives the reason.
fn refused(memory: &Arc<Memory>, readable: bool) -> String {
    let before = memory.to_vec().unwrap();
    let words = refusal(Image::options().open(memory.clone()));
    let reader = Image::options().read_only(true).open(memory.clone());
    assert_eq!(reader.is_ok(), readable, "{reader:?}");
    drop(reader);
    assert_eq!(memory.to_vec().unwrap(), before, "{words}");
    words
}

#[test]
fn unknown_autoclear_bits_are_cleared_by_writers_only() {
    let memory = in_memory(&CreateOptions::new(SIZE));
    edit_header(&memory, |header| {
        header.autoclear = AutoclearFeatures::from_bits(UNKNOWN);
    });
    let before = memory.to_vec().unwrap();
    let image = Image::options().read_only(true).open(memory.clone());
    image.unwrap().close().unwrap();
    assert_eq!(memory.to_vec().unwrap(), before);
    let image = Image::options().open(memory.clone()).unwrap();
    assert_eq!(header_of(&memory).autoclear.bits(), 0, "before any write");
    assert_eq!(image.header().autoclear.bits(), 0);
    image.close().unwrap();
    assert_sound(&memory);
}

#[test]
fn unknown_compatible_bits_stay() {
    let memory = in_memory(&CreateOptions::new(SIZE).cluster_size(512));
    edit_header(&memory, |header| {
        let bits = header.compatible.bits() | UNKNOWN;
        header.compatible = qcow2_format::header::CompatibleFeatures::from_bits(bits);
    });
    let image = Image::options().lazy_refcounts(true);
    let image = image.open(memory.clone()).unwrap();
    image.write_at(&[1; 5000], 3).unwrap();
    image.resize(100 * SIZE, ResizeOptions::default()).unwrap();
    image.close().unwrap();
    assert_eq!(header_of(&memory).compatible.unknown(), UNKNOWN);
}

#[test]
fn unknown_incompatible_bits_are_refused_by_name() {
    let memory = in_memory(&CreateOptions::new(SIZE));
    // The encoder would refuse to write it.
    memory.write_at(&(1_u64 << 40).to_be_bytes(), 72).unwrap();
    let words = refused(&memory, false);
    assert!(words.contains("feature"), "{words}");
}

#[test]
fn what_is_unknown_in_the_header_survives_every_rewrite() {
    // With clusters this small, tables move soon.
    let memory = in_memory(
        &CreateOptions::new(SIZE)
            .cluster_size(512)
            .lazy_refcounts(true),
    );
    edit_header(&memory, |header| {
        header.header_length = 120;
        header.unknown_fields = vec![1, 2, 3, 4, 5, 6, 7, 8];
        for (kind, data) in [(0x7654_3210, b"left".to_vec()), (0x1111_2222, vec![9; 33])] {
            header.extensions.push(Extension::Unknown { kind, data });
        }
        header.autoclear = AutoclearFeatures::from_bits(UNKNOWN);
    });
    let first = header_of(&memory);
    assert_eq!(first.extensions.len(), 2);
    let unchanged = |what: &str| {
        let header = header_of(&memory);
        assert_eq!(header.unknown_fields, first.unknown_fields, "{what}");
        assert_eq!(header.extensions, first.extensions, "{what}");
        assert_eq!(header.header_length, first.header_length, "{what}");
        header
    };
    let image = Image::options().open(memory.clone()).unwrap();
    unchanged("autoclear bits cleared");
    image.write_at(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    assert!(unchanged("dirty bit set").incompatible.dirty());
    image.resize(32 * SIZE, ResizeOptions::default()).unwrap();
    let header = unchanged("L1 table moved");
    assert_ne!(header.l1_table_offset, first.l1_table_offset);
    // One cluster of refcount table covers 8 MiB.
    let data = vec![2; 1 << 20];
    for number in 0..10 {
        image.write_at(&data, number * SIZE).unwrap();
    }
    image.flush().unwrap();
    let header = unchanged("refcount table moved");
    assert_ne!(header.refcount_table_offset, first.refcount_table_offset);
    image.close().unwrap();
    assert!(!unchanged("dirty bit cleared").incompatible.dirty());
    assert_sound(&memory);
}

#[test]
fn an_image_marked_as_corrupt_takes_readers_only() {
    let memory = in_memory(&CreateOptions::new(SIZE));
    edit_header(&memory, |header| header.incompatible.set_corrupt(true));
    let words = refused(&memory, true);
    assert!(words.contains("marked as corrupt"), "{words}");
}

#[test]
fn a_write_that_would_hit_metadata_marks_the_image_once_and_for_all() {
    let memory = in_memory(&CreateOptions::new(SIZE));
    let image = Image::options().open(memory.clone()).unwrap();
    image.write_at(&vec![1; 65536], 0).unwrap();
    image.close().unwrap();
    // Guest cluster 0 lies on the refcount block.
    let header = header_of(&memory);
    let mut word = [0; 8];
    memory
        .read_at(&mut word, header.l1_table_offset.get())
        .unwrap();
    let l2_table = u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00;
    memory
        .write_at(&(1 << 63 | 0x20000_u64).to_be_bytes(), l2_table)
        .unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    let block = |memory: &Memory| memory.to_vec().unwrap()[0x20000..0x30000].to_vec();
    let before = block(&memory);
    image.write_at(&[7; 512], 0).unwrap_err();
    assert!(image.is_poisoned());
    assert!(header_of(&memory).incompatible.corrupt());
    assert_eq!(block(&memory), before);
    image.write_at(&[7; 512], SIZE / 2).unwrap_err();
    image
        .write_zeroes(0..SIZE, qcow2_io::ZeroFlags::NONE)
        .unwrap_err();
    image.discard(0..SIZE).unwrap_err();
    let mut sector = [0; 512];
    image.read_at(&mut sector, SIZE / 2).unwrap();
    drop(image);
    refused(&memory, true);
}

#[test]
fn encrypted_images_are_never_plain_data() {
    let memory = in_memory(&CreateOptions::new(SIZE));
    edit_header(&memory, |header| header.crypt_method = CryptMethod::Aes);
    let words = refused(&memory, false);
    assert!(words.contains("encrypted"), "{words}");
    let error = Image::options().open(memory).unwrap_err();
    if cfg!(feature = "encryption") {
        let method = CryptMethod::Aes;
        assert!(matches!(error, ImageError::SecretMissing { method: found } if found == method));
    } else {
        assert_eq!(error.kind(), StorageErrorKind::Unsupported);
        assert!(words.contains("feature `encryption`"), "{words}");
    }
}

#[test]
fn encrypted_images_of_qemu_are_refused() {
    if !is_available("encrypted images") {
        return;
    }
    let folder = Folder::new();
    let secret = "--object secret,id=s0,data=hello";
    let options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10";
    folder.img(&format!(
        "create -q {secret} -f qcow2 -o {options} image 4M"
    ));
    let before = folder.content();
    for read_only in [true, false] {
        let image = Image::options().read_only(read_only);
        let words = refusal(image.open_path(folder.path("image")));
        assert!(words.contains("encrypted"), "{words}");
    }
    assert_eq!(folder.content(), before);
}

#[test]
fn features_that_contradict_each_other_are_refused() {
    let memory = in_memory(&CreateOptions::new(SIZE));
    edit_header(&memory, |header| {
        header.autoclear.set_raw_external_data(true);
    });
    let words = refused(&memory, false);
    assert!(words.contains("there is no external data file"), "{words}");

    let memory = in_memory(&CreateOptions::new(SIZE));
    edit_header(&memory, |header| {
        header.incompatible.set_external_data(true);
    });
    let words = refused(&memory, false);
    assert!(words.contains("must be given"), "{words}");

    let memory = in_memory(&CreateOptions::new(SIZE));
    let data: Arc<dyn Storage> = Arc::new(Memory::new());
    let words = refusal(Image::options().data_file(data).open(memory));
    assert!(words.contains("the image has none"), "{words}");
}

#[test]
fn version_2_refuses_what_it_has_no_bits_for() {
    let options = CreateOptions::new(SIZE).version(qcow2_format::header::Version::V2);
    let memory = in_memory(&options);
    let words = refusal(Image::options().lazy_refcounts(true).open(memory.clone()));
    assert!(words.contains("version 2"), "{words}");
    let words = refusal(Image::options().discard_no_unref(true).open(memory));
    assert!(words.contains("version 2"), "{words}");
}
