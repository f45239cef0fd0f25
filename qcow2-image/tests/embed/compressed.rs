//! Compressed clusters: written by qemu-img, read here, in parts too, and overwritten.

use qcow2_image::Image;
use qcow2_io::{Storage, ZeroFlags};

use crate::oracle::{Folder, Plain, guest_bytes, is_available, noise};

const LEN: usize = (6 << 20) + 1536;

fn kinds() -> Vec<&'static str> {
    let mut kinds = Vec::new();
    if cfg!(feature = "zlib") {
        kinds.extend([
            "compression_type=zlib",
            "compat=0.10,cluster_size=512",
            "compression_type=zlib,cluster_size=2M",
        ]);
    }
    if cfg!(feature = "zstd") {
        kinds.extend([
            "compression_type=zstd",
            "compression_type=zstd,cluster_size=4k",
            "compression_type=zstd,extended_l2=on",
        ]);
    }
    kinds
}

/// An image that qemu-img compressed, and its content. A part of it does not compress.
fn compressed(options: &str) -> (Folder, Plain) {
    let folder = Folder::new();
    let mut plain = Plain(noise(LEN, 3));
    plain.clear(1 << 20..2 << 20);
    let mut state = 1_u64;
    for byte in &mut plain.0[2 << 20..3 << 20] {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(99);
        *byte = state.to_be_bytes()[0];
    }
    folder.write("raw", &plain.0);
    folder.img(&format!(
        "convert -c -f raw -O qcow2 -o {options} raw image"
    ));
    let map = folder.img("map --output=json -f qcow2 image");
    assert!(map.contains("\"compressed\": true"), "{options}: {map}");
    (folder, plain)
}

#[test]
fn qemu_compressed_clusters_are_read_whole_and_in_parts() {
    if !is_available("compressed images") {
        return;
    }
    for options in kinds() {
        let (folder, plain) = compressed(options);
        let image = Image::options().read_only(true);
        let image = image.open_path(folder.path("image")).unwrap();
        plain.assert_is(&guest_bytes(&image));
        for number in 0..300 {
            let offset = number * 7_919_003 % (LEN - 5000);
            let len = [1, 3, 511, 512, 700, 4999][number % 6];
            let mut buf = vec![0xaa; len];
            image.read_at(&mut buf, offset as u64).unwrap();
            assert!(
                buf == plain.0[offset..offset + len],
                "{options}: {len} at {offset}"
            );
        }
        // Many readers of the same and of other clusters.
        std::thread::scope(|scope| {
            for thread in 0..4_usize {
                let (image, plain) = (&image, &plain);
                scope.spawn(move || {
                    for number in 0..60 {
                        let offset = (number * 104_729 + thread * 13) % (LEN - 3000);
                        let mut buf = [0; 3000];
                        image.read_at(&mut buf, offset as u64).unwrap();
                        assert!(buf == plain.0[offset..offset + 3000]);
                    }
                });
            }
        });
    }
}

#[test]
fn qemu_compressed_clusters_are_overwritten_zeroed_and_discarded() {
    if !is_available("compressed images") {
        return;
    }
    for options in kinds() {
        let (folder, mut plain) = compressed(options);
        let image = Image::options().open_path(folder.path("image")).unwrap();
        for number in 0..25_usize {
            let offset = number * 5_000_011 % (LEN - 70_000);
            let len = [1, 512, 4097, 65_536, 70_000][number % 5];
            plain.write(&image, offset, &noise(len, number as u64 + 50));
            if number % 6 == 0 {
                image.flush().unwrap();
            }
        }
        image
            .write_zeroes(3_000_000..3_200_001, ZeroFlags::NONE)
            .unwrap();
        plain.clear(3_000_000..3_200_001);
        image
            .write_zeroes(3_300_000..3_500_000, ZeroFlags::MAY_UNMAP)
            .unwrap();
        plain.clear(3_300_000..3_500_000);
        image.discard(4 << 20..5 << 20).unwrap();
        plain.clear(4 << 20..5 << 20);
        plain.write(&image, (5 << 20) - 100, &noise(300, 77));
        plain.assert_is(&guest_bytes(&image));
        image.close().unwrap();
        folder.assert_sound("image");
        plain.assert_is(&folder.guest_bytes_by_qemu("image"));
    }
}

#[test]
fn a_spoiled_stream_is_an_error_of_that_cluster_alone() {
    if !is_available("compressed images") {
        return;
    }
    for options in kinds()
        .into_iter()
        .filter(|options| !options.contains("cluster_size"))
    {
        let (folder, plain) = compressed(options);
        let bytes = folder.read("image");
        // The first compressed cluster lies behind the tables.
        let map = folder.img("map --output=json -f qcow2 image");
        assert!(map.contains("\"compressed\": true"));
        let image = Image::options().open_path(folder.path("image")).unwrap();
        let mut buf = vec![0; 65536];
        image.read_at(&mut buf, 0).unwrap();
        drop(image);
        let mut spoiled = bytes;
        let start = spoiled_place(&folder);
        spoiled[start..start + 64].fill(0xff);
        folder.write("image", &spoiled);
        let image = Image::options().open_path(folder.path("image")).unwrap();
        let error = image.read_at(&mut buf, 0).unwrap_err();
        assert!(error.to_string().contains("compressed cluster"), "{error}");
        assert!(!image.is_poisoned());
        let mut rest = vec![0; LEN - (2 << 20)];
        image.read_at(&mut rest, 2 << 20).unwrap();
        assert!(rest == plain.0[2 << 20..]);
        // A write of the whole cluster needs nothing of it.
        image.write_at(&vec![4; 65536], 0).unwrap();
        image.read_at(&mut buf, 0).unwrap();
        assert_eq!(buf, vec![4; 65536]);
        image.close().unwrap();
        folder.assert_sound("image");
    }
}

/// Where the compressed data of guest cluster 0 begins.
fn spoiled_place(folder: &Folder) -> usize {
    let image = folder.open("image");
    let header = crate::oracle::header_of(&image);
    let word = |offset: u64| {
        let mut word = [0; 8];
        image.read_at(&mut word, offset).unwrap();
        u64::from_be_bytes(word)
    };
    let l2_table = word(header.l1_table_offset.get()) & 0x00ff_ffff_ffff_fe00;
    let entry = word(l2_table);
    assert_eq!(entry >> 62, 1, "a compressed cluster");
    // With clusters of 64 KiB the offset has 54 bits.
    usize::try_from(entry & ((1 << 54) - 1)).unwrap()
}
