//! Compressed clusters written here: read back by both, and checked by both.

use qcow2_check::{Options, check};
use qcow2_format::header::{CompressionType, Version};
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, References};
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{Storage, ZeroFlags};

use crate::oracle::{
    Folder, Plain, assert_sound, guest_bytes, header_of, in_memory, is_available, noise, words,
};

const LEN: usize = (3 << 20) + 1536;

fn recipes() -> Vec<(&'static str, CreateOptions)> {
    let new = || CreateOptions::new(LEN as u64);
    let zstd = || new().compression_type(CompressionType::Zstd);
    let mut recipes = Vec::new();
    if Codec::Zlib.is_available() {
        recipes.extend([
            ("zlib", new()),
            ("zlib 4k", new().cluster_size(4096)),
            ("zlib 2M", new().cluster_size(2 << 20)),
            ("one bit", new().refcount_bits(1).cluster_size(8192)),
            ("two bits", new().refcount_bits(2)),
            ("old", new().version(Version::V2).cluster_size(512)),
        ]);
    }
    if Codec::Zstd.is_available() {
        recipes.extend([
            ("zstd", zstd()),
            ("zstd 512", zstd().cluster_size(512).refcount_bits(64)),
            ("zstd extended", zstd().extended_l2(true)),
        ]);
    }
    recipes
}

/// Something of each kind: packs well, packs badly, doesn't pack, zeros.
fn content(salt: u64) -> Plain {
    let mut plain = Plain(noise(LEN, salt));
    let mut state = salt | 1;
    for byte in &mut plain.0[1 << 20..(1 << 20) + 300_000] {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(99);
        *byte = state.to_be_bytes()[0];
    }
    plain.clear(2 << 20..(2 << 20) + 200_000);
    plain.0[(2 << 20) + 200_000..][..300_000].fill(7);
    plain
}

#[test]
fn what_is_packed_here_is_read_by_both() {
    if !is_available("compressed images") {
        return;
    }
    for (name, options) in recipes() {
        let folder = Folder::new();
        folder.create("image", &options);
        let image = Image::options().open_path(folder.path("image")).unwrap();
        let plain = content(5);
        image
            .write_compressed(&plain.0, 0, Level::default())
            .unwrap();
        plain.assert_is(&guest_bytes(&image));
        image.close().unwrap();
        folder.assert_sound("image");
        plain.assert_is(&folder.guest_bytes_by_qemu("image"));
        let len = folder.open("image").len().unwrap();
        assert_eq!(len % 512, 0, "{name}");
        let map = folder.img("map --output=json -f qcow2 image");
        assert!(map.contains("\"compressed\": true"), "{name}: {map}");
    }
}

#[test]
fn a_packed_image_lives_on() {
    for (name, options) in recipes() {
        let memory = in_memory(&options);
        let image = Image::options().open(memory.clone()).unwrap();
        let unit = image.geometry().cluster_size();
        let mut plain = content(1);
        image
            .write_compressed(&plain.0, 0, Level::default())
            .unwrap();
        // Parts of packed clusters, whole ones, packed ones over them, and nothing.
        for step in 0..60_usize {
            let offset = step * 7_919_003 % (LEN - 70_000);
            match step % 5 {
                0 => plain.write(&image, offset, &noise(700, step as u64)),
                1 => plain.write(&image, offset, &noise(70_000, step as u64)),
                2 => {
                    let start = offset as u64 / unit * unit;
                    let end = (start + 3 * unit).min(LEN as u64);
                    let [from, to] = [start, end].map(|at| usize::try_from(at).unwrap());
                    let bytes = noise(to - from, step as u64);
                    image
                        .write_compressed(&bytes, start, Level::default())
                        .unwrap();
                    plain.0[from..to].copy_from_slice(&bytes);
                }
                3 => {
                    let range = offset as u64..offset as u64 + 50_000;
                    image.write_zeroes(range, ZeroFlags::MAY_UNMAP).unwrap();
                    plain.clear(offset..offset + 50_000);
                }
                _ => {
                    image
                        .discard(offset as u64..offset as u64 + 60_000)
                        .unwrap();
                    plain.clear(offset..offset + 60_000);
                }
            }
            if step % 7 == 0 {
                image.flush().unwrap();
            }
        }
        plain.assert_is(&guest_bytes(&image));
        image.close().unwrap();
        assert_sound(&memory);
        let image = Image::options().open(memory).unwrap();
        plain.assert_is(&guest_bytes(&image));
        drop(image);
        println!("{name}");
    }
}

#[test]
fn small_streams_share_a_cluster_until_its_refcount_is_full() {
    for (bits, clusters) in [(1, 6), (2, 2), (16, 1)] {
        let options = CreateOptions::new(6 << 16).refcount_bits(bits);
        let memory = in_memory(&options);
        let image = Image::options().open(memory.clone()).unwrap();
        let before = memory.len().unwrap().next_multiple_of(65536);
        image
            .write_compressed(&vec![9; 6 << 16], 0, Level::default())
            .unwrap();
        image.close().unwrap();
        assert_sound(&memory);
        // One more is the L2 table.
        let after = memory.len().unwrap().next_multiple_of(65536);
        assert_eq!((after - before) >> 16, clusters + 1, "{bits} bits");
    }
}

#[test]
fn packed_space_that_is_free_again_gets_no_more_data() {
    let memory = in_memory(&CreateOptions::new(1 << 20));
    let image = Image::options().open(memory.clone()).unwrap();
    let mut plain = Plain::zeros(1 << 20);
    let pack = |plain: &mut Plain, at: usize, byte: u8| {
        image
            .write_compressed(&vec![byte; 65536], at as u64, Level::default())
            .unwrap();
        plain.0[at..at + 65536].fill(byte);
    };
    for round in 0..20_usize {
        pack(
            &mut plain,
            (round % 8) << 16,
            u8::try_from(round).unwrap() + 1,
        );
        // The cluster that the next stream would go to becomes free, and others take it.
        image.discard(0..8 << 16).unwrap();
        plain.clear(0..8 << 16);
        if round % 3 == 0 {
            image.flush().unwrap();
        }
        let place = (8 + round % 8) << 16;
        plain.write(&image, place, &noise(65536, round as u64));
        pack(
            &mut plain,
            (round % 8) << 16,
            100 + u8::try_from(round).unwrap(),
        );
    }
    plain.assert_is(&guest_bytes(&image));
    image.close().unwrap();
    assert_sound(&memory);
}

#[test]
fn many_threads_pack_at_once() {
    let memory = in_memory(&CreateOptions::new(64 << 16));
    let image = Image::options().open(memory.clone()).unwrap();
    let plain = noise(64 << 16, 3);
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (image, plain) = (&image, &plain);
            scope.spawn(move || {
                for round in 0..3 {
                    for number in (thread..64).step_by(4) {
                        let bytes = &plain[number << 16..(number + 1) << 16];
                        let at = (number as u64) << 16;
                        image.write_compressed(bytes, at, Level::default()).unwrap();
                        if (number + round) % 5 == 0 {
                            image.flush().unwrap();
                        }
                    }
                }
            });
        }
    });
    Plain(plain).assert_is(&guest_bytes(&image));
    image.close().unwrap();
    assert_sound(&memory);
}

#[test]
fn a_snapshot_keeps_its_packed_clusters() {
    if !is_available("compressed images with snapshots") {
        return;
    }
    for (name, options) in recipes() {
        // Full refcounts leave no room for one.
        if name.ends_with("bit") || name.ends_with("bits") {
            continue;
        }
        let folder = Folder::new();
        folder.create("image", &options);
        let open = || Image::options().open_path(folder.path("image")).unwrap();
        let (old, new) = (content(1), content(2));
        let image = open();
        image.write_compressed(&old.0, 0, Level::default()).unwrap();
        image.close().unwrap();
        folder.img("snapshot -c s image");
        let image = open();
        image.write_compressed(&new.0, 0, Level::default()).unwrap();
        image.close().unwrap();
        folder.assert_sound("image");
        new.assert_is(&folder.guest_bytes_by_qemu("image"));
        folder.img("snapshot -a s image");
        old.assert_is(&folder.guest_bytes_by_qemu("image"));
        folder.img("snapshot -d s image");
        folder.assert_sound("image");
    }
}

#[test]
fn packed_clusters_hide_the_backing_file() {
    let base = in_memory(&CreateOptions::new(1 << 20));
    let below = Image::options().open(base).unwrap();
    below.write_at(&noise(1 << 20, 8), 0).unwrap();
    let options = CreateOptions::new(1 << 20).backing_file("base", "qcow2");
    let memory = in_memory(&options);
    let image = Image::options().backing(std::sync::Arc::new(below));
    let image = image.open(memory.clone()).unwrap();
    let mut plain = Plain(noise(1 << 20, 8));
    image
        .write_compressed(&vec![0; 65536], 0, Level::default())
        .unwrap();
    image
        .write_compressed(&vec![1; 65536], 65536, Level::default())
        .unwrap();
    plain.0[..65536].fill(0);
    plain.0[65536..131072].fill(1);
    plain.write(&image, 65536 + 5, b"some");
    plain.assert_is(&guest_bytes(&image));
    image.close().unwrap();
    assert_sound(&memory);
}

#[test]
fn only_whole_clusters_of_an_image_that_can_hold_them_are_packed() {
    let memory = in_memory(&CreateOptions::new((2 << 16) + 512));
    let image = Image::options().open(memory.clone()).unwrap();
    let pack = |len: usize, offset: u64| {
        let result = image.write_compressed(&vec![1; len], offset, Level::default());
        result.map_err(|error| words(&error))
    };
    pack(512, 2 << 16).unwrap();
    pack((1 << 16) + 512, 1 << 16).unwrap();
    pack(0, 0).unwrap();
    let error = pack(512, 0).unwrap_err();
    assert_eq!(
        error,
        "512 bytes at 0x0 are not whole clusters of 65536 bytes"
    );
    assert!(pack(65536, 512).is_err());
    let error = pack(1024, 2 << 16).unwrap_err();
    assert!(error.contains("beyond the disk"), "{error}");
    let level = Level::new(Codec::Zstd, 22).unwrap();
    let error = image
        .write_compressed(&vec![1; 65536], 0, level)
        .unwrap_err();
    assert!(words(&error).contains("level"), "{}", words(&error));
    image.close().unwrap();
    assert_sound(&memory);

    let folder = Folder::new();
    let data = std::sync::Arc::new(qcow2_io::Memory::new());
    let options = CreateOptions::new(1 << 20)
        .data_file("data")
        .data_file_storage(data.clone());
    folder.create("image", &options);
    let image = Image::options()
        .data_file(data)
        .references(References::Deny);
    let image = image.open_path(folder.path("image")).unwrap();
    let error = image
        .write_compressed(&vec![1; 65536], 0, Level::default())
        .unwrap_err();
    assert!(
        words(&error).contains("external data file"),
        "{}",
        words(&error)
    );

    let image = Image::options().read_only(true).open(memory).unwrap();
    let error = image
        .write_compressed(&vec![1; 65536], 0, Level::default())
        .unwrap_err();
    assert!(words(&error).contains("read"), "{}", words(&error));
}

#[test]
fn the_header_stays_as_it_is() {
    let options = CreateOptions::new(1 << 20).compression_type(CompressionType::Zstd);
    let memory = in_memory(&options);
    let before = header_of(&memory);
    let image = Image::options().open(memory.clone()).unwrap();
    image
        .write_compressed(&vec![1; 1 << 20], 0, Level::default())
        .unwrap();
    image.close().unwrap();
    assert_eq!(header_of(&memory), before);
    let report = check(&memory, &Options::default());
    assert!(report.findings.is_empty(), "{:#?}", report.findings);
}
