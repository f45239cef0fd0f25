//! Compressed clusters, and clusters to compress.

use qcow2_io::codec::{Codec, Level};

use crate::Seed;

/// Streams of both codecs at some levels and lengths, and the clusters they give. The target takes what to do, the length
/// of a cluster and the level from the first three bytes.
pub(crate) fn decompress() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (bit, codec) in [(0, Codec::Zlib), (1, Codec::Zstd)] {
        for (bits, level) in [(9u8, 1), (12, 4), (13, 6), (14, 9), (16, 3)] {
            let cluster = lines(1 << bits);
            let mut stream = vec![0; cluster.len()];
            let chosen = Level::new(codec, level).expect("a level that both codecs have");
            let len = codec.compress(chosen, &cluster, &mut stream);
            let len = len.expect("both codecs").expect("lines that repeat");
            stream.truncate(len);
            let settings = |how| vec![bit | how, bits - 9, level.to_be_bytes()[3] - 1];
            let name = |what| format!("{codec}-{what}-{bits}-{level}");
            let streams = [settings(0), stream].concat();
            seeds.push(Seed::new(name("stream"), streams));
            let cluster = [settings(2), cluster.into_iter().take(3000).collect()].concat();
            seeds.push(Seed::new(name("cluster"), cluster));
        }
        let cycle = [vec![bit | 6, 12, 0], b"cycle".to_vec()].concat();
        seeds.push(Seed::new(format!("{codec}-cycle"), cycle));
    }
    // A stored block, its end and its last block missing; an empty Zstandard frame and a skippable one.
    let stored = [0, 0, 0, 0, 0, 2, 255, 253, 1, 2, 3];
    seeds.push(Seed::new("stored", stored.to_vec()));
    let frames = [
        &[1, 0, 0][..],
        &[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0],
        &[0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9],
        &[0x28, 0xb5, 0x2f, 0xfd, 0x60, 0, 1, 3, 0x10, 0, 7],
    ];
    seeds.push(Seed::new("frames", frames.concat()));
    seeds
}

/// Text that compresses, with a number in each line.
fn lines(len: usize) -> Vec<u8> {
    let lines = (0..).flat_map(|number: u32| {
        let line = format!("{number}: {:x}\n", number.wrapping_mul(0x9e37_79b9));
        line.into_bytes()
    });
    lines.take(len).collect()
}
