//! What is refused, before anything has changed.

use std::sync::Arc;

use qcow2_format::header::Version;
use qcow2_image::amend::{AmendError, AmendOptions};
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, Monitor, SnapshotOptions};
use qcow2_io::codec::Level;
use qcow2_io::{Memory, Storage};

use crate::rig::{Case, Deed, assert_sound, noise};

fn image(recipe: &CreateOptions, prepare: impl FnOnce(&Image)) -> (Arc<Memory>, Image) {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, recipe).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    prepare(&image);
    image.close().unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    (memory, image)
}

fn new() -> CreateOptions {
    CreateOptions::new(1 << 20).cluster_size(4096)
}

fn snapshot(image: &Image) {
    image.write_at(&[1; 10_000], 0).unwrap();
    image.create_snapshot(&SnapshotOptions::new("s")).unwrap();
}

/// Refuses, with words, and changes no byte.
fn refused((memory, mut image): (Arc<Memory>, Image), options: &AmendOptions<'_>, words: &str) {
    let before = memory.to_vec().unwrap();
    let error = image.amend(options).expect_err(words);
    assert!(matches!(error, AmendError::Refused { .. }), "{error:?}");
    assert!(error.to_string().contains(words), "{error}");
    image.close().unwrap();
    assert!(memory.to_vec().unwrap() == before, "{words}");
}

#[test]
fn what_version_2_can_not_say_is_refused() {
    let down = || AmendOptions::new().version(Version::V2);
    let nothing = |_: &Image| {};
    let wide = new().refcount_bits(8);
    refused(image(&wide, nothing), &down(), "refcount_bits=16");
    refused(
        image(&new(), nothing),
        &down().refcount_bits(8),
        "compat=1.1",
    );
    refused(
        image(&new(), nothing),
        &down().lazy_refcounts(true),
        "compat=1.1",
    );
    let extended = CreateOptions::new(1 << 20).extended_l2(true);
    refused(image(&extended, nothing), &down(), "extended");
    refused(
        image(&new(), snapshot),
        &down().size(2 << 20),
        "another size",
    );
    let resized = |image: &Image| {
        snapshot(image);
        image.set_len(2 << 20).unwrap();
    };
    refused(image(&new(), resized), &down(), "another size");
    let zstd = new().compression_type(qcow2_format::header::CompressionType::Zstd);
    let packed = |image: &Image| {
        let level = Level::default();
        image
            .write_compressed(&noise(1, 4096), 4096, level)
            .unwrap();
    };
    refused(image(&zstd, packed), &down(), "compressed");
    // Without such a cluster nothing speaks against it.
    let (memory, mut image) = image(&zstd, snapshot);
    image.amend(&down()).unwrap();
    image.close().unwrap();
    assert_sound(&memory);
}

#[test]
fn a_downgrade_takes_the_width_along_that_it_needs() {
    for bits in [1, 64] {
        let (memory, mut image) = image(&new().refcount_bits(bits), |image| {
            image.write_at(&[1; 10_000], 0).unwrap();
        });
        let down = AmendOptions::new().version(Version::V2).refcount_bits(16);
        image.amend(&down).unwrap();
        assert_eq!(image.header().version, Version::V2);
        image.close().unwrap();
        assert_sound(&memory);
    }
}

#[test]
fn what_does_not_fit_the_image_is_refused() {
    let nothing = |_: &Image| {};
    let options = AmendOptions::new;
    let v2 = new().version(Version::V2);
    refused(
        image(&v2, nothing),
        &options().refcount_bits(64),
        "compat=1.1",
    );
    refused(
        image(&v2, nothing),
        &options().lazy_refcounts(true),
        "compat=1.1",
    );
    refused(image(&v2, snapshot), &options().size(2 << 20), "version 2");
    refused(
        image(&new(), nothing),
        &options().refcount_bits(24),
        "power of two",
    );
    refused(
        image(&new(), nothing),
        &options().refcount_bits(128),
        "at most 64",
    );
    refused(
        image(&new(), snapshot),
        &options().refcount_bits(1),
        "too narrow",
    );
    refused(
        image(&new(), nothing),
        &options().size(1000),
        "multiple of 512",
    );
    refused(image(&new(), nothing), &options().size(1 << 62), "at most");
    refused(
        image(&new(), nothing),
        &options().data_file("x"),
        "no external data file",
    );
    refused(
        image(&new(), nothing),
        &options().data_file_raw(true),
        "can't be switched on",
    );
    refused(
        image(&new(), nothing),
        &options().backing_format("raw"),
        "no backing file",
    );
    // One bad option among good ones: none is changed.
    let several = options().backing_file("b").lazy_refcounts(true).size(7);
    refused(image(&new(), nothing), &several, "multiple of 512");
}

#[test]
fn a_header_that_does_not_fit_is_refused() {
    let recipe = CreateOptions::new(1 << 20).cluster_size(512);
    let (memory, mut image) = image(&recipe, |_| {});
    let before = memory.to_vec().unwrap();
    let name = "x".repeat(600);
    let error = image
        .amend(&AmendOptions::new().backing_file(name))
        .unwrap_err();
    assert!(matches!(error, AmendError::Image(_)), "{error:?}");
    assert!(memory.to_vec().unwrap() == before);
}

struct Cancel;

impl Monitor for Cancel {
    fn is_cancelled(&self) -> bool {
        true
    }
}

#[test]
fn a_monitor_ends_it_and_the_image_is_as_before() {
    for change in [
        |options: AmendOptions<'static>| options.refcount_bits(64),
        |options: AmendOptions<'static>| options.version(Version::V2),
    ] {
        let deed = Deed::new("cancelled", new(), move |image| {
            let error = image.amend(&change(AmendOptions::new().monitor(&Cancel)));
            match error {
                Err(AmendError::Cancelled) => Ok(()),
                other => Err(other),
            }
        });
        let case = Case::new(deed);
        assert_eq!(case.before(), case.after());
    }
}

#[test]
fn nothing_to_change_changes_nothing() {
    let (memory, mut image) = image(&new(), snapshot);
    let before = memory.to_vec().unwrap();
    let same = AmendOptions::new()
        .version(Version::V3)
        .size(1 << 20)
        .refcount_bits(16)
        .lazy_refcounts(false)
        .data_file_raw(false)
        .backing_file("");
    image.amend(&same).unwrap();
    image.close().unwrap();
    assert!(memory.to_vec().unwrap() == before);
}
