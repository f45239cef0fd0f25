//! Amended options: a crash leaves the image before or after, and so does a fault.

use std::sync::Arc;

use qcow2_format::header::Version;
use qcow2_image::amend::AmendOptions;
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::{Overlay, Random, Record, strike_everywhere};
use qcow2_image::{Image, ImageOptions};
use qcow2_io::{Faulty, Memory, Storage};

use crate::rig::{Case, Deed, LEN, assert_sound, noise, state};

fn new() -> CreateOptions {
    CreateOptions::new(LEN as u64)
}

fn amend(
    name: &str,
    recipe: CreateOptions,
    options: fn(AmendOptions<'static>) -> AmendOptions<'static>,
) -> Deed {
    Deed::new(name, recipe, move |image| {
        image.amend(&options(AmendOptions::new()))
    })
}

fn deeds() -> Vec<Deed> {
    let v2 = || new().version(Version::V2);
    let long = "a/rather/long/name/".repeat(30);
    vec![
        amend("upgrade", v2().cluster_size(512), |options| {
            options.version(Version::V3)
        }),
        amend("downgrade", new().cluster_size(4096), |options| {
            options.version(Version::V2)
        }),
        amend(
            "downgrade lazy",
            new().cluster_size(1024).lazy_refcounts(true),
            |options| options.version(Version::V2),
        ),
        amend("downgrade over", new().cluster_size(2048), |options| {
            options.version(Version::V2)
        })
        .over(noise(33, 200_000)),
        amend("wider", new().cluster_size(512), |options| {
            options.refcount_bits(64)
        }),
        amend(
            "narrower",
            new().cluster_size(512).refcount_bits(64),
            |options| options.refcount_bits(8),
        ),
        amend("to one bit", new().cluster_size(8192), |options| {
            options.refcount_bits(4)
        }),
        amend(
            "from one bit",
            new().cluster_size(512).refcount_bits(1),
            |options| options.refcount_bits(32),
        )
        .without_snapshots(),
        Deed::new("long name", new().cluster_size(4096), move |image| {
            let options = AmendOptions::new().backing_file(long.clone());
            image.amend(&options.backing_format("raw").lazy_refcounts(true))
        }),
        amend(
            "lazy off",
            new().cluster_size(4096).lazy_refcounts(true),
            |options| options.lazy_refcounts(false),
        ),
        amend("lazy on", new().cluster_size(1024), |options| {
            options.lazy_refcounts(true)
        }),
        amend("grow", new().cluster_size(4096), |options| {
            options.size(3 << 20)
        }),
        amend("shrink", new().cluster_size(4096), |options| {
            options.size(200 << 10)
        }),
        amend("shrink over", new().cluster_size(512), |options| {
            options.size(180 << 10)
        })
        .over(noise(35, 250_000)),
        Deed::new("other name", new().cluster_size(512), |image| {
            image.set_backing_name(Some((b"elsewhere/base.raw", b"raw")))
        })
        .over(noise(34, 200_000)),
    ]
}

#[test]
fn a_crash_leaves_the_options_before_or_after() {
    let mut random = Random::new(4711);
    for deed in deeds() {
        let case = Case::new(deed);
        assert_ne!(case.before(), case.after(), "{}", case.deed.name);
        case.crash_everywhere(&mut random, 1);
    }
}

#[test]
fn a_fault_leaves_the_options_before_or_after() {
    let mut met = 0;
    for deed in deeds() {
        met += Case::new(deed).fail_everywhere(1);
    }
    assert!(met > 300, "{met}");
}

#[test]
fn options_go_together_and_the_image_goes_on() {
    let deed = amend(
        "all",
        new().version(Version::V2).cluster_size(1024),
        |options| {
            options
                .version(Version::V3)
                .refcount_bits(2)
                .lazy_refcounts(true)
                .size(1 << 20)
                .backing_file("base.img")
                .backing_format("raw")
        },
    )
    .without_snapshots();
    let case = Case::new(deed);
    let after = case.after();
    assert_eq!(
        after.facts,
        "V3 2 true Some([98, 97, 115, 101, 46, 105, 109, 103]) Some([114, 97, 119]) None 0"
    );
    let len = case.before().disk.len();
    assert!(after.disk[..len] == case.before().disk[..]);
    assert!(after.disk[len..].iter().all(|byte| *byte == 0));
}

#[test]
fn the_disk_reads_the_same_in_the_other_version() {
    for (recipe, over) in [
        (new().cluster_size(1024), false),
        (new().cluster_size(16384), true),
        (new().cluster_size(512).lazy_refcounts(true), true),
    ] {
        let deed = amend("there", recipe, |options| options.version(Version::V2));
        let deed = if over { deed.over(noise(5, LEN)) } else { deed };
        let case = Case::new(deed);
        assert!(case.before().disk == case.after().disk);
        assert_eq!(case.before().snapshots, case.after().snapshots);
        assert!(case.after().facts.starts_with("V2 16 false"));
    }
}

/// An image with a raw data file, or one that is not, and what is in both.
fn beside_data_file(raw: bool) -> (Vec<u8>, Vec<u8>) {
    let (memory, data) = (Arc::new(Memory::new()), Arc::new(Memory::new()));
    let recipe = new()
        .cluster_size(4096)
        .data_file("disk.raw")
        .data_file_raw(raw)
        .data_file_storage(data.clone());
    Image::create(&memory, &recipe).unwrap();
    let options = Image::options().data_file(data.clone());
    let image = options.open(memory.clone()).unwrap();
    image.write_at(&noise(3, 100_000), 4096).unwrap();
    image.close().unwrap();
    (memory.to_vec().unwrap(), data.to_vec().unwrap())
}

#[test]
fn options_of_a_data_file_are_before_or_after_and_its_bytes_stay() {
    type Change = fn(AmendOptions<'static>) -> AmendOptions<'static>;
    let changes: [(bool, Change); 3] = [
        (true, |options| options.data_file("elsewhere/other.raw")),
        (false, |options| {
            options.data_file("a/long/name/".repeat(40))
        }),
        (true, |options| {
            options.data_file_raw(false).data_file("both.img")
        }),
    ];
    let mut random = Random::new(2718);
    for (raw, change) in changes {
        let (start, bytes) = beside_data_file(raw);
        let with_data = |data: &Arc<Memory>| Image::options().data_file(data.clone());
        let data = || Arc::new(Memory::from(bytes.clone()));
        let look = |storage: &Arc<dyn Storage>, how: &str| {
            let data = data();
            let options = || -> ImageOptions { with_data(&data) };
            let found = state(options, storage);
            let image = options().open(Arc::clone(storage)).unwrap();
            image.write_at(&[1; 5000], 200_000).unwrap();
            image.close().unwrap();
            assert_sound(&**storage);
            let later = state(options, storage);
            assert!(later.disk[..200_000] == found.disk[..200_000], "{how}");
            assert_eq!(later.facts, found.facts, "{how}");
            (found, how.to_owned())
        };
        let memory = |bytes: &[u8]| Arc::new(Memory::from(bytes.to_vec())) as Arc<dyn Storage>;
        let (before, _) = look(&memory(&start), "before");

        let mut changed = None;
        let record = Record::of(&start, |storage| {
            let kept = data();
            let mut image = with_data(&kept).open(Arc::clone(&storage)).unwrap();
            image.amend(&change(AmendOptions::new())).unwrap();
            image.close().unwrap();
            assert!(kept.to_vec().unwrap() == bytes);
            changed = Some(storage);
        });
        let (after, _) = look(&changed.unwrap(), "after");
        assert_ne!(before.facts, after.facts);

        record.crash_everywhere(&mut random, |crash| {
            let (found, how) = look(&crash.files[0], &crash.how);
            assert!(found == before || found == after, "{how}");
        });

        let met = strike_everywhere(
            |_| 1,
            |strike| {
                let storage = Arc::new(Faulty::new(Overlay::new(Arc::new(start.clone()))));
                let mut image = with_data(&data()).open(storage.clone()).unwrap();
                storage.add(strike.fault());
                let result = image.amend(&change(AmendOptions::new()));
                let closed = image.close();
                let struck = storage.struck() > 0;
                storage.clear();
                if struck {
                    strike.assert_told(result.is_err() || closed.is_err(), "amend");
                    let storage: Arc<dyn Storage> = storage;
                    let (found, how) = look(&storage, &strike.to_string());
                    assert!(found == before || found == after, "{how}");
                }
                struck
            },
        );
        assert!(met > 1, "{met}");
    }
}
