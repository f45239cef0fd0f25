//! What the fuzz target of the codecs calls. It panics only where a promise of [`Codec`] is broken.

use super::{Codec, CodecError, Level};

/// Clusters longer than this are compressed at low levels only: the highest take seconds for 2 MiB.
const SLOW_LEN: usize = 64 << 10;
/// The highest of the low levels.
const FAST_LEVEL: i32 = 6;
/// Put behind a stream, as the next cluster would be.
const PADDING: [u8; 37] = [0xd5; 37];

/// Decodes the input as a stream, or takes it for a cluster, which must survive both directions.
///
/// The first byte chooses the codec (bit 0), what is done (bit 1) and what a short cluster is filled with (bit 2); the second
/// the length of a cluster, from 512 bytes to 2 MiB; the third the level. The rest is the stream or the cluster.
pub fn decompress(data: &[u8]) {
    let [how, bits, level, bytes @ ..] = data else {
        return;
    };
    let codec = if how & 1 == 0 {
        Codec::Zlib
    } else {
        Codec::Zstd
    };
    let mut cluster = vec![0; 1 << (9 + u32::from(bits % 13))];
    if how & 2 == 0 {
        if stream(codec, bytes, &mut cluster) {
            round_trip(codec, *level, &cluster);
        }
        return;
    }
    if how & 4 == 0 {
        for (byte, value) in cluster.iter_mut().zip(bytes) {
            *byte = *value;
        }
    } else {
        for (byte, value) in cluster.iter_mut().zip(bytes.iter().cycle()) {
            *byte = *value;
        }
    }
    round_trip(codec, *level, &cluster);
}

/// Whether the stream gives a cluster; the same whatever was decoded before.
fn stream(codec: Codec, stream: &[u8], cluster: &mut [u8]) -> bool {
    let result = codec.decompress(stream, cluster);
    match result {
        Ok(()) => {}
        Err(CodecError::EndsEarly {
            found, expected, ..
        }) => assert!(found < expected && expected == cluster.len()),
        Err(CodecError::TooLong { expected, .. }) => assert_eq!(expected, cluster.len()),
        Err(error) => assert!(matches!(error, CodecError::Damaged { .. }), "{error}"),
    }
    let mut again = vec![0xff; cluster.len()];
    assert_eq!(codec.decompress(stream, &mut again), result);
    assert!(result.is_err() || again == *cluster);
    result.is_ok()
}

/// Compresses a cluster and decodes what came out, also with something behind it and with a byte less.
fn round_trip(codec: Codec, level: u8, cluster: &[u8]) {
    let (min, max) = codec.levels();
    let max = if cluster.len() > SLOW_LEN {
        FAST_LEVEL
    } else {
        max
    };
    let level = min + i32::from(level) % (max - min + 1);
    let level = Level::new(codec, level).expect("within the codec's range");
    let mut out = vec![0; cluster.len()];
    let Some(len) = codec
        .compress(level, cluster, &mut out)
        .expect("memory for an encoder")
    else {
        return;
    };
    assert!(len < cluster.len());
    let stream = out.get(..len).expect("a stream inside its buffer");
    let mut found = vec![0xff; cluster.len()];
    assert_eq!(codec.decompress(stream, &mut found), Ok(()));
    assert!(found == cluster);
    found.fill(0xff);
    let padded = [stream, &PADDING].concat();
    assert_eq!(codec.decompress(&padded, &mut found), Ok(()));
    assert!(found == cluster);
    // The last byte of a deflate stream may hold nothing but the end of its last block.
    let cut = stream.get(..len.saturating_sub(1)).unwrap_or_default();
    let result = codec.decompress(cut, &mut found);
    assert!(result.is_err() || codec == Codec::Zlib && found == cluster);
    // Too little room harms nothing.
    let mut less = vec![0; len.saturating_sub(1)];
    assert_eq!(codec.compress(level, cluster, &mut less), Ok(None));
    assert_eq!(codec.compress(level, cluster, &mut less), Ok(None));
}
