//! What a disk grows by, preallocated: in one piece, and no more than the disk has.

use qcow2_image::create::{CreateOptions, Preallocation};
use qcow2_image::{Image, ResizeOptions};
use qcow2_io::Storage;

use crate::oracle::{assert_sound, guest_bytes, in_memory, noise};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn word(storage: &dyn Storage, at: u64) -> u64 {
    let mut bytes = [0; 8];
    storage.read_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// Where the data of a guest cluster lies.
fn place(storage: &dyn Storage, size: u64, cluster: u64) -> u64 {
    let per_table = size / 8;
    let table = word(storage, word(storage, 40) + cluster / per_table * 8) & OFFSET;
    word(storage, table + cluster % per_table * 8) & OFFSET
}

#[test]
fn new_data_is_one_piece_whatever_tables_it_needs() {
    for wanted in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        let memory = in_memory(&CreateOptions::new(1 << 20).cluster_size(512));
        let image = Image::options().open(memory.clone()).unwrap();
        let mut expected = noise(1 << 20, 4);
        image.write_at(&expected, 0).unwrap();
        let options = ResizeOptions {
            preallocation: wanted,
            ..ResizeOptions::default()
        };
        // A table is for 32 KiB.
        image.resize((1 << 20) + (80 << 10), options).unwrap();
        expected.resize((1 << 20) + (80 << 10), 0);
        assert!(guest_bytes(&image) == expected);
        image.close().unwrap();
        assert_sound(&*memory);
        let first = (1 << 20) / 512;
        let places: Vec<u64> = (first..first + 160)
            .map(|cluster| place(&*memory, 512, cluster))
            .collect();
        for pair in places.windows(2) {
            assert_eq!(pair[1], pair[0] + 512, "{wanted:?}");
        }
    }
}

#[test]
fn the_rest_of_a_last_cluster_reads_as_zeros_when_the_disk_grows_into_it() {
    let memory = in_memory(&CreateOptions::new(1 << 20));
    let image = Image::options().open(memory.clone()).unwrap();
    // Something that was there before, so that places are used again.
    image.write_at(&noise(1 << 20, 4), 0).unwrap();
    image.discard(0..1 << 20).unwrap();
    image.flush().unwrap();
    let mut size = 1 << 20;
    let options = ResizeOptions {
        preallocation: Preallocation::Falloc,
        ..ResizeOptions::default()
    };
    for more in [80 << 10, 512, 40 << 10, 70 << 10] {
        size += more;
        image.resize(size, options).unwrap();
        let bytes = guest_bytes(&image);
        assert_eq!(bytes.len() as u64, size);
        assert!(bytes[1 << 20..].iter().all(|byte| *byte == 0), "{size}");
    }
    let end = usize::try_from(size).unwrap();
    let written = noise(end - (1 << 20), 6);
    image.write_at(&written, 1 << 20).unwrap();
    assert!(guest_bytes(&image)[1 << 20..] == written);
    image.close().unwrap();
    assert_sound(&*memory);
}
