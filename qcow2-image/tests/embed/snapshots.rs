//! Internal snapshots: taken, applied and deleted here and by qemu-img, in turn.

use std::collections::BTreeMap;

use qcow2_format::header::{CompressionType, Version};
use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_image::{Image, ResizeOptions, SnapshotKey, SnapshotOptions};
use qcow2_io::codec::Level;
use qcow2_io::{Storage, ZeroFlags};

use crate::oracle::{
    Folder, Plain, assert_sound, guest_bytes, header_of, in_memory, is_available, noise, words,
};

const LEN: usize = (2 << 20) + 512;

fn recipes() -> Vec<(&'static str, CreateOptions)> {
    let new = || CreateOptions::new(LEN as u64);
    let full = Preallocation::Metadata;
    vec![
        ("plain", new()),
        ("small", new().cluster_size(512)),
        ("old", new().version(Version::V2).cluster_size(4096)),
        ("extended", new().extended_l2(true)),
        (
            "zstd",
            new()
                .compression_type(CompressionType::Zstd)
                .cluster_size(8192),
        ),
        ("preallocated", new().preallocation(full).cluster_size(1024)),
        ("wide", new().refcount_bits(64).cluster_size(4096)),
        ("narrow", new().refcount_bits(4).cluster_size(4096)),
        ("lazy", new().lazy_refcounts(true).cluster_size(4096)),
    ]
}

fn open(folder: &Folder) -> Image {
    Image::options().open_path(folder.path("image")).unwrap()
}

fn work(image: &Image, plain: &mut Plain, salt: usize) {
    let unit = image.geometry().cluster_size();
    for step in 0..25_usize {
        let offset = (step + salt) * 7_919_003 % (LEN - 90_000);
        let range = |len: u64| offset as u64..offset as u64 + len;
        match step % 5 {
            0 | 1 => plain.write(image, offset, &noise(40_000, (step + salt) as u64)),
            2 => {
                image
                    .write_zeroes(range(50_000), ZeroFlags::MAY_UNMAP)
                    .unwrap();
                plain.clear(offset..offset + 50_000);
            }
            3 => {
                let start = offset as u64 / unit * unit;
                let from = usize::try_from(start).unwrap();
                let len = usize::try_from(unit).unwrap();
                let bytes = noise(len, step as u64);
                image
                    .write_compressed(&bytes, start, Level::default())
                    .unwrap();
                plain.0[from..from + len].copy_from_slice(&bytes);
            }
            _ => {
                image.discard(range(30_000)).unwrap();
                plain.clear(offset..offset + 30_000);
            }
        }
    }
}

#[test]
fn snapshots_taken_here_are_qemus_too() {
    if !is_available("snapshots") {
        return;
    }
    for (name, recipe) in recipes() {
        println!("{name}");
        let folder = Folder::new();
        folder.create("image", &recipe);
        let mut states: BTreeMap<String, Plain> = BTreeMap::new();
        let mut plain = Plain::zeros(LEN);
        let image = open(&folder);
        for number in 1..4 {
            work(&image, &mut plain, number);
            let id = image
                .create_snapshot(&SnapshotOptions::new(format!("s{number}")))
                .unwrap();
            assert_eq!(id, number.to_string().into_bytes());
            states.insert(format!("s{number}"), plain.clone());
        }
        work(&image, &mut plain, 9);
        plain.assert_is(&guest_bytes(&image));
        let list = image.snapshots().unwrap();
        assert_eq!(list.len(), 3);
        assert!(list.iter().all(|one| one.disk_size == LEN as u64));
        image.close().unwrap();
        folder.assert_sound("image");
        plain.assert_is(&folder.guest_bytes_by_qemu("image"));
        for (name, state) in &states {
            folder.img(&format!("convert -l {name} -O raw image found"));
            state.assert_is(&folder.read("found"));
            let key = SnapshotKey::any(name.as_bytes());
            let image = Image::options()
                .snapshot(key)
                .open_path(folder.path("image"));
            state.assert_is(&guest_bytes(&image.unwrap()));
        }
        // Both go on with what the other did.
        folder.img("snapshot -a s2 image");
        plain = states["s2"].clone();
        folder.img("snapshot -d s2 image");
        folder.img("snapshot -c q image");
        let image = open(&folder);
        plain.assert_is(&guest_bytes(&image));
        work(&image, &mut plain, 4);
        image
            .apply_snapshot(&SnapshotKey::Name(b"s3".to_vec()))
            .unwrap();
        plain = states["s3"].clone();
        plain.assert_is(&guest_bytes(&image));
        work(&image, &mut plain, 5);
        plain.assert_is(&guest_bytes(&image));
        image
            .delete_snapshot(&SnapshotKey::any(b"s3".to_vec()))
            .unwrap();
        work(&image, &mut plain, 6);
        image.close().unwrap();
        folder.assert_sound("image");
        plain.assert_is(&folder.guest_bytes_by_qemu("image"));
        let image = open(&folder);
        for name in ["s1", "q"] {
            image.delete_snapshot(&SnapshotKey::any(name)).unwrap();
            plain.assert_is(&guest_bytes(&image));
        }
        work(&image, &mut plain, 7);
        assert!(image.snapshots().unwrap().is_empty());
        image.close().unwrap();
        assert_eq!(header_of(&folder.open("image")).snapshot_count, 0);
        folder.assert_sound("image");
        plain.assert_is(&folder.guest_bytes_by_qemu("image"));
    }
}

#[test]
fn a_snapshot_of_another_size_brings_its_size_back() {
    let memory = in_memory(&CreateOptions::new(LEN as u64));
    let image = Image::options().open(memory.clone()).unwrap();
    let mut plain = Plain::zeros(LEN);
    work(&image, &mut plain, 1);
    image
        .create_snapshot(&SnapshotOptions::new("small"))
        .unwrap();
    image.resize(64 << 20, ResizeOptions::default()).unwrap();
    image.write_at(&[5; 4096], 63 << 20).unwrap();
    image
        .create_snapshot(&SnapshotOptions::new("large"))
        .unwrap();
    image.apply_snapshot(&SnapshotKey::any("small")).unwrap();
    assert_eq!(image.virtual_size(), LEN as u64);
    plain.assert_is(&guest_bytes(&image));
    image.apply_snapshot(&SnapshotKey::any("large")).unwrap();
    assert_eq!(image.virtual_size(), 64 << 20);
    let mut found = [0; 4096];
    image.read_at(&mut found, 63 << 20).unwrap();
    assert_eq!(found, [5; 4096]);
    image.close().unwrap();
    assert_sound(&memory);
}

#[test]
fn what_no_refcount_can_count_is_refused_before_anything_changes() {
    let memory = in_memory(&CreateOptions::new(1 << 20).refcount_bits(1));
    let image = Image::options().open(memory.clone()).unwrap();
    image.write_at(&[1; 4096], 0).unwrap();
    image.flush().unwrap();
    let error = image
        .create_snapshot(&SnapshotOptions::new("s"))
        .unwrap_err();
    assert!(words(&error).contains("refcount"), "{}", words(&error));
    assert!(image.snapshots().unwrap().is_empty());
    image.write_at(&[2; 4096], 0).unwrap();
    image.close().unwrap();
    assert_sound(&memory);

    let memory = in_memory(&CreateOptions::new(1 << 20).refcount_bits(2));
    let image = Image::options().open(memory.clone()).unwrap();
    image.write_at(&[1; 4096], 0).unwrap();
    for name in ["a", "b"] {
        image.create_snapshot(&SnapshotOptions::new(name)).unwrap();
    }
    image
        .create_snapshot(&SnapshotOptions::new("c"))
        .unwrap_err();
    assert_eq!(image.snapshots().unwrap().len(), 2);
    image.delete_snapshot(&SnapshotKey::any("a")).unwrap();
    image.create_snapshot(&SnapshotOptions::new("c")).unwrap();
    image.close().unwrap();
    assert_sound(&memory);
}

#[test]
fn names_and_ids() {
    let memory = in_memory(&CreateOptions::new(1 << 20));
    let image = Image::options().open(memory.clone()).unwrap();
    let options = |name: &str, id: &str| SnapshotOptions {
        id: Some(id.into()),
        ..SnapshotOptions::new(name)
    };
    image.create_snapshot(&options("2", "7")).unwrap();
    image.create_snapshot(&options("7", "x")).unwrap();
    let id = image.create_snapshot(&SnapshotOptions::new("7")).unwrap();
    assert_eq!(id, b"8");
    let error = image.create_snapshot(&options("n", "x")).unwrap_err();
    assert!(
        words(&error).contains("another snapshot"),
        "{}",
        words(&error)
    );
    assert!(image.create_snapshot(&options("n", "")).is_err());
    assert!(
        image
            .create_snapshot(&SnapshotOptions::new("n".repeat(256)))
            .is_err()
    );
    let error = image
        .delete_snapshot(&SnapshotKey::any("none\n"))
        .unwrap_err();
    assert_eq!(words(&error), "there is no snapshot 'none\\n'");
    // An id before a name.
    image.delete_snapshot(&SnapshotKey::any("7")).unwrap();
    image
        .delete_snapshot(&SnapshotKey::Id(b"7".to_vec()))
        .unwrap_err();
    image
        .delete_snapshot(&SnapshotKey::Name(b"7".to_vec()))
        .unwrap();
    let left = image.snapshots().unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(
        (left[0].id.as_slice(), left[0].name.as_slice()),
        (&b"8"[..], &b"7"[..])
    );
    let writing = Image::options()
        .snapshot(SnapshotKey::any("8"))
        .read_only(false);
    assert!(writing.open(memory.clone()).is_err());
    image.close().unwrap();
    assert_sound(&memory);
}

#[test]
fn it_works_beside_threads_that_write() {
    let memory = in_memory(&CreateOptions::new(4 << 20).cluster_size(4096));
    let image = Image::options().open(memory.clone()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let image = &image;
            scope.spawn(move || {
                for round in 0..200_u64 {
                    let at = (round * 37 % 256) * 4096 + thread * (1 << 20);
                    let byte = u8::try_from(round % 250 + 1).unwrap();
                    image.write_at(&[byte; 5000], at).unwrap();
                    let mut found = [0; 5000];
                    image.read_at(&mut found, at).unwrap();
                    assert_eq!(found, [byte; 5000]);
                    if round % 50 == 0 {
                        image.flush().unwrap();
                    }
                }
            });
        }
        for number in 0..10 {
            let name = format!("s{number}");
            image
                .create_snapshot(&SnapshotOptions::new(name.as_str()))
                .unwrap();
            if number % 3 == 2 {
                let old = format!("s{}", number - 2);
                image
                    .delete_snapshot(&SnapshotKey::any(old.as_str()))
                    .unwrap();
            }
        }
    });
    image.close().unwrap();
    assert_sound(&memory);
}
