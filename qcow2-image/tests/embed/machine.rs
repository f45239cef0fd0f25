//! States of machines in snapshots.

use std::sync::Arc;

use qcow2_image::create::CreateOptions;
use qcow2_image::luks::{KeyCost, LuksOptions};
use qcow2_image::{Image, ImageError, ResizeOptions, SnapshotKey, SnapshotOptions};
use qcow2_io::cipher::Secret;
use qcow2_io::{Memory, Storage};

use crate::oracle::{Folder, assert_sound, in_memory, is_available, noise};

const SIZE: u64 = 200 << 10;

fn state(salt: u64, len: usize) -> Vec<u8> {
    noise(len, salt)
}

/// Writes a state in pieces that end anywhere, out of order.
fn write_state(image: &Image, bytes: &[u8]) {
    let pieces: Vec<(usize, &[u8])> = bytes
        .chunks(7013)
        .enumerate()
        .map(|(number, piece)| (number * 7013, piece))
        .collect();
    let (even, odd): (Vec<_>, Vec<_>) = pieces.into_iter().partition(|(at, _)| at / 7013 % 2 == 0);
    for (at, piece) in odd.into_iter().chain(even) {
        image.write_vm_state(piece, at as u64).unwrap();
    }
}

fn read_state(image: &Image, len: usize) -> Vec<u8> {
    let mut bytes = vec![9; len];
    image.read_vm_state(&mut bytes, 0).unwrap();
    bytes
}

fn with_state(name: &str, len: u64) -> SnapshotOptions {
    SnapshotOptions {
        vm_state_size: len,
        ..SnapshotOptions::new(name)
    }
}

#[test]
fn a_snapshot_keeps_the_state_of_the_machine() {
    if !is_available("a_snapshot_keeps_the_state_of_the_machine") {
        return;
    }
    let new = || CreateOptions::new(SIZE);
    let recipes = [
        ("small clusters", new().cluster_size(512)),
        ("large clusters", new().cluster_size(64 << 10)),
        ("subclusters", new().cluster_size(16384).extended_l2(true)),
        ("lazy", new().cluster_size(1024).lazy_refcounts(true)),
    ];
    for (name, recipe) in recipes {
        let folder = Folder::new();
        folder.create("image", &recipe);
        let image = Image::options().open_path(folder.path("image")).unwrap();
        let disk = state(1, 50_000);
        image.write_at(&disk, 1000).unwrap();
        let (one, two) = (state(2, 100_001), state(3, 60_000));
        write_state(&image, &one);
        image
            .create_snapshot(&with_state("one", one.len() as u64))
            .unwrap();
        // The disk has none now.
        assert!(read_state(&image, one.len()).iter().all(|byte| *byte == 0));
        image.write_at(&state(4, 9000), 20_000).unwrap();
        write_state(&image, &two);
        image
            .create_snapshot(&with_state("two", two.len() as u64))
            .unwrap();
        // Another size, other places.
        image.resize(SIZE * 3, ResizeOptions::default()).unwrap();
        image.apply_snapshot(&SnapshotKey::any("one")).unwrap();
        assert_eq!(image.virtual_size(), SIZE, "{name}");
        assert!(read_state(&image, one.len()) == one, "{name}");
        let mut found = vec![0; disk.len()];
        image.read_at(&mut found, 1000).unwrap();
        assert!(found == disk, "{name}");
        image.close().unwrap();

        let path = folder.path("image");
        let snapshot = Image::options().snapshot(SnapshotKey::any("two"));
        let snapshot = snapshot.read_only(true).open_path(&path).unwrap();
        assert!(read_state(&snapshot, two.len()) == two, "{name}");
        drop(snapshot);
        folder.assert_sound("image");
        let listed = folder.img("snapshot -l image");
        assert!(
            listed.contains("97.7 KiB") && listed.contains("58.6 KiB"),
            "{listed}"
        );
        // QEMU takes the state over into the disk, and gives it up.
        folder.img("snapshot -a two image");
        let image = Image::options().open_path(&path).unwrap();
        assert!(read_state(&image, two.len()) == two, "{name}");
        image.delete_snapshot(&SnapshotKey::any("two")).unwrap();
        // What nobody finished goes when the next is taken without one.
        image
            .create_snapshot(&SnapshotOptions::new("bare"))
            .unwrap();
        assert!(read_state(&image, two.len()).iter().all(|byte| *byte == 0));
        image.close().unwrap();
        folder.assert_sound("image");
    }
}

#[test]
fn states_are_encrypted_as_the_disk_is() {
    let secret = || Secret::new(b"word".to_vec());
    let luks = LuksOptions::new().cost(KeyCost::Iterations(1000));
    let options = CreateOptions::new(SIZE).cluster_size(4096);
    let memory = in_memory(&options.luks(luks, secret()));
    let image = Image::options()
        .secret(secret())
        .open(memory.clone())
        .unwrap();
    let bytes = state(5, 30_001);
    write_state(&image, &bytes);
    image
        .create_snapshot(&with_state("one", bytes.len() as u64))
        .unwrap();
    image.apply_snapshot(&SnapshotKey::any("one")).unwrap();
    assert!(read_state(&image, bytes.len()) == bytes);
    image.close().unwrap();
    let mut raw = vec![0; usize::try_from(memory.len().unwrap()).unwrap()];
    memory.read_at(&mut raw, 0).unwrap();
    assert!(!raw.windows(64).any(|window| window == &bytes[8192..8256]));
}

#[test]
fn a_longer_backing_file_is_no_state_and_states_have_an_end() {
    let options = CreateOptions::new(64 << 10)
        .cluster_size(512)
        .backing_file("below", "raw");
    let memory = in_memory(&options);
    let image = Image::options()
        .backing(Arc::new(Memory::from(vec![7; 1 << 20])))
        .open(memory.clone())
        .unwrap();
    assert!(read_state(&image, 100_000).iter().all(|byte| *byte == 0));
    image.write_vm_state(&[1; 100], 777).unwrap();
    let found = read_state(&image, 2000);
    assert!(found[..777].iter().all(|byte| *byte == 0));
    assert_eq!(found[777..877], [1; 100]);
    assert!(found[877..].iter().all(|byte| *byte == 0));
    // 2^22 tables for 32 KiB each, of which the disk has two.
    let limit = ((1 << 22) - 2) * (32 << 10);
    for (at, len) in [(limit, 1), (limit - 1, 2), (u64::MAX, 1)] {
        let refused = image.write_vm_state(&vec![1; len], at).unwrap_err();
        assert!(
            matches!(refused, ImageError::OutOfRange { size, .. } if size == limit),
            "{refused}"
        );
    }
    let refused = image
        .create_snapshot(&with_state("long", limit + 1))
        .unwrap_err();
    assert!(
        matches!(refused, ImageError::OutOfRange { .. }),
        "{refused}"
    );
    assert!(image.snapshots().unwrap().is_empty());
    image.close().unwrap();
    assert_sound(&*memory);
}
