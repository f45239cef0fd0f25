//! Streams made by hand, by the encoders of the same libraries, and by chance.

use proptest::prelude::*;
use zlib_rs::{Deflate, DeflateFlush, Status};

use super::{Codec, CodecError, Level, fuzzing};

const CLUSTER: usize = 4096;
/// Asks `deflate` for a stream without a final block.
const OPEN_END: DeflateFlush = DeflateFlush::SyncFlush;

fn decode(codec: Codec, input: &[u8], cluster: usize) -> Result<Vec<u8>, CodecError> {
    let mut out = vec![0xaa; cluster];
    codec.decompress(input, &mut out).map(|()| out)
}

/// Bytes that compress to some degree, with repeats both near and far.
fn text(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    (0..len)
        .map(|i| {
            if i % 97 == 0 {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            }
            (state >> (i % 5 * 5)).to_be_bytes()[3]
        })
        .collect()
}

fn deflate(bytes: &[u8], window_bits: u8, end: DeflateFlush) -> Vec<u8> {
    let mut out = vec![0; bytes.len() * 2 + 100];
    let mut encoder = Deflate::new(6, false, window_bits);
    let status = encoder.compress(bytes, &mut out, end).unwrap();
    assert_eq!(status == Status::StreamEnd, end == DeflateFlush::Finish);
    out.truncate(usize::try_from(encoder.total_out()).unwrap());
    out
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; bytes.len() * 2 + 100];
    let len = zstd_safe::compress(&mut out[..], bytes, 3).unwrap();
    out.truncate(len);
    out
}

/// A block of deflate that holds its bytes as they are.
fn stored(is_final: bool, bytes: &[u8]) -> Vec<u8> {
    let len = u16::try_from(bytes.len()).unwrap();
    let [low, high] = [len.to_be_bytes()[1], len.to_be_bytes()[0]];
    [&[u8::from(is_final), low, high, !low, !high], bytes].concat()
}

/// A frame without content size whose window has 2 to the power of `window_log` bytes, of blocks that repeat one byte.
fn frame(window_log: u8, blocks: &[(u8, u32)]) -> Vec<u8> {
    let mut bytes = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (window_log - 10) << 3];
    for (index, (byte, len)) in blocks.iter().enumerate() {
        let is_last = u32::from(index + 1 == blocks.len());
        let header = (len << 3 | 1 << 1 | is_last).to_be_bytes();
        bytes.extend([header[3], header[2], header[1], *byte]);
    }
    bytes
}

fn skippable(len: u8) -> Vec<u8> {
    let mut bytes = vec![0x5e, 0x2a, 0x4d, 0x18, len, 0, 0, 0];
    bytes.resize(8 + usize::from(len), 0x77);
    bytes
}

#[test]
fn a_stream_with_padding_behind_it_gives_its_cluster() {
    let cluster = text(CLUSTER);
    for (codec, mut stream) in [
        (Codec::Zlib, deflate(&cluster, 12, DeflateFlush::Finish)),
        (Codec::Zstd, zstd(&cluster)),
    ] {
        assert!(codec.is_available());
        assert!(stream.len() < CLUSTER);
        assert_eq!(decode(codec, &stream, CLUSTER).unwrap(), cluster);
        stream.extend([0xd5; 511]);
        assert_eq!(decode(codec, &stream, CLUSTER).unwrap(), cluster);
    }
}

#[test]
fn deflate_may_refer_back_32_kib() {
    // The second half repeats what lies exactly a full window back.
    let half: Vec<u8> = (0..1u32 << 15)
        .map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24).to_be_bytes()[3])
        .collect();
    let cluster = [&half[..], &half[..]].concat();
    let wide = deflate(&cluster, 15, DeflateFlush::Finish);
    let narrow = deflate(&cluster, 12, DeflateFlush::Finish);
    assert!(wide.len() * 3 < narrow.len() * 2, "the far repeat was used");
    for stream in [wide, narrow] {
        assert_eq!(decode(Codec::Zlib, &stream, 1 << 16).unwrap(), cluster);
    }
}

#[test]
fn deflate_past_the_cluster_is_cut() {
    let bytes = text(3 * CLUSTER);
    let stream = deflate(&bytes, 15, DeflateFlush::Finish);
    assert_eq!(
        decode(Codec::Zlib, &stream, CLUSTER).unwrap(),
        bytes[..CLUSTER]
    );
    let stream = [
        stored(false, &bytes[..CLUSTER]),
        stored(true, &bytes[CLUSTER..]),
    ]
    .concat();
    assert_eq!(
        decode(Codec::Zlib, &stream, CLUSTER).unwrap(),
        bytes[..CLUSTER]
    );
}

#[test]
fn deflate_that_ends_early_is_an_error_that_says_where() {
    let early = |stream: &[u8], found| {
        let error = decode(Codec::Zlib, stream, CLUSTER).unwrap_err();
        let expected = CLUSTER;
        let codec = Codec::Zlib;
        assert_eq!(
            error,
            CodecError::EndsEarly {
                codec,
                found,
                expected
            }
        );
    };
    let cluster = text(CLUSTER);
    early(&deflate(&cluster[..4000], 12, DeflateFlush::Finish), 4000);
    early(&stored(false, &cluster[..1000]), 1000);
    early(&stored(true, &cluster)[..5 + 77], 77);
    early(&[], 0);
}

#[test]
fn deflate_without_a_final_block_must_be_followed_by_nothing_broken() {
    let cluster = text(CLUSTER);
    let mut stream = stored(false, &cluster);
    assert_eq!(decode(Codec::Zlib, &stream, CLUSTER).unwrap(), cluster);
    assert_eq!(
        decode(Codec::Zlib, &deflate(&cluster, 12, OPEN_END), CLUSTER).unwrap(),
        cluster
    );
    // Zeros are a stored block whose length and its complement agree.
    stream.extend([0; 512]);
    let error = decode(Codec::Zlib, &stream, CLUSTER).unwrap_err();
    assert!(matches!(error, CodecError::Damaged { .. }), "{error}");
}

#[test]
fn a_block_that_declares_codes_beyond_the_alphabet_is_refused() {
    // One block of 512 zero bytes. Its literals and lengths have 286 codes, all there are, or one more, which no symbol uses:
    // QEMU refuses that, while more lenient decoders don't.
    let stream = |count: u8| {
        let mut bytes = vec![0; 77];
        bytes[..5].copy_from_slice(&[0x05 | (count - 1) << 3, 0xc0, 0x81, 0x08, 0]);
        bytes[8..13].copy_from_slice(&[0xa0, 0xfd, 0xa9, 0x07 | (count - 28) << 4, 0x09]);
        bytes[76] = 0x20;
        bytes
    };
    assert_eq!(decode(Codec::Zlib, &stream(30), 512).unwrap(), [0; 512]);
    let error = decode(Codec::Zlib, &stream(31), 512).unwrap_err();
    assert!(matches!(error, CodecError::Damaged { .. }), "{error}");
}

#[test]
fn a_zlib_header_is_no_raw_deflate() {
    let mut stream = vec![0x78, 0x9c];
    stream.extend(deflate(&text(CLUSTER), 15, DeflateFlush::Finish));
    decode(Codec::Zlib, &stream, CLUSTER).unwrap_err();
}

#[test]
fn zstd_frames_are_joined_and_skippable_ones_skipped() {
    let cluster = text(CLUSTER);
    let stream = [
        skippable(9),
        zstd(&cluster[..1000]),
        zstd(&[]),
        skippable(0),
        zstd(&cluster[1000..]),
        vec![1, 2, 3],
    ]
    .concat();
    assert_eq!(decode(Codec::Zstd, &stream, CLUSTER).unwrap(), cluster);
}

#[test]
fn zstd_needs_no_content_size_and_may_claim_any_window() {
    let whole = u32::try_from(CLUSTER).unwrap();
    for window_log in [10, 17, 27, 31] {
        let stream = frame(window_log, &[(7, 1000), (9, whole - 1000), (0, 0)]);
        let found = decode(Codec::Zstd, &stream, CLUSTER).unwrap();
        assert_eq!(found, [vec![7; 1000], vec![9; CLUSTER - 1000]].concat());
    }
}

#[test]
fn zstd_must_end_where_the_cluster_does() {
    let (codec, expected) = (Codec::Zstd, CLUSTER);
    let long = CodecError::TooLong { codec, expected };
    let early = |found| CodecError::EndsEarly {
        codec,
        found,
        expected,
    };
    let decode = |stream: &[u8]| decode(codec, stream, CLUSTER).unwrap_err();
    let bytes = text(CLUSTER + 1);
    assert_eq!(decode(&zstd(&bytes)), long);
    assert_eq!(decode(&frame(20, &[(1, 4096), (2, 1)])), long);
    assert_eq!(decode(&[zstd(&bytes[..96]), zstd(&bytes)].concat()), long);
    assert_eq!(decode(&zstd(&bytes[..4095])), early(4095));
    assert_eq!(decode(&skippable(255)), early(0));
    assert_eq!(decode(&[]), early(0));
    // Complete but for its last, empty block: the frame goes on.
    let open = frame(20, &[(1, 4096), (2, 0)]);
    assert_eq!(decode(&open[..open.len() - 4]), early(0));
}

#[test]
fn a_zstd_checksum_is_tested() {
    let cluster = text(CLUSTER);
    let mut encoder = zstd_safe::CCtx::create();
    encoder
        .set_parameter(zstd_safe::CParameter::ChecksumFlag(true))
        .unwrap();
    let mut stream = vec![0; 2 * CLUSTER];
    let len = encoder.compress2(&mut stream[..], &cluster).unwrap();
    stream.truncate(len);
    assert_eq!(decode(Codec::Zstd, &stream, CLUSTER).unwrap(), cluster);
    stream[len - 1] ^= 1;
    let error = decode(Codec::Zstd, &stream, CLUSTER).unwrap_err();
    assert!(matches!(error, CodecError::Damaged { .. }), "{error}");
}

#[test]
fn a_failure_leaves_nothing_behind_for_the_next_stream() {
    let cluster = text(CLUSTER);
    for (codec, stream) in [
        (Codec::Zlib, deflate(&cluster, 12, DeflateFlush::Finish)),
        (Codec::Zstd, zstd(&cluster)),
    ] {
        for cut in [1, 10, stream.len() / 2] {
            decode(codec, &stream[..cut], CLUSTER).unwrap_err();
            decode(codec, &[0xff; 100], CLUSTER).unwrap_err();
            assert_eq!(decode(codec, &stream, CLUSTER).unwrap(), cluster);
        }
    }
}

#[test]
fn threads_decode_at_once() {
    let cluster = text(CLUSTER);
    let streams = [
        (Codec::Zlib, deflate(&cluster, 12, DeflateFlush::Finish)),
        (Codec::Zstd, zstd(&cluster)),
    ];
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    for (codec, stream) in &streams {
                        assert_eq!(decode(*codec, stream, CLUSTER).unwrap(), cluster);
                    }
                }
            });
        }
    });
}

/// A valid stream with some damage.
fn damaged() -> impl Strategy<Value = (Codec, Vec<u8>)> {
    let flips = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (any::<bool>(), 1..3 * CLUSTER, flips, 0..600usize).prop_map(|(zlib, len, flips, tail)| {
        let (codec, mut stream) = if zlib {
            (Codec::Zlib, deflate(&text(len), 15, DeflateFlush::Finish))
        } else {
            (Codec::Zstd, zstd(&text(len)))
        };
        for (index, byte) in flips {
            let index = index.index(stream.len());
            stream[index] = byte;
        }
        stream.resize(stream.len() + tail, 0);
        (codec, stream)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_encoded_is_decoded(
        bytes in prop::collection::vec(0..8u8, 1..20_000),
        window in 9..=15u8,
    ) {
        let stream = deflate(&bytes, window, DeflateFlush::Finish);
        prop_assert_eq!(&decode(Codec::Zlib, &stream, bytes.len()).unwrap(), &bytes);
        prop_assert_eq!(&decode(Codec::Zstd, &zstd(&bytes), bytes.len()).unwrap(), &bytes);
    }

    #[test]
    fn damage_gives_an_error_or_a_cluster_the_same_each_time((codec, stream) in damaged()) {
        let first = decode(codec, &stream, CLUSTER);
        prop_assert_eq!(first, decode(codec, &stream, CLUSTER));
    }

    #[test]
    fn noise_is_survived(stream in prop::collection::vec(any::<u8>(), 0..2000), magic: bool) {
        for codec in [Codec::Zlib, Codec::Zstd] {
            let stream = if magic && codec == Codec::Zstd {
                [&[0x28, 0xb5, 0x2f, 0xfd], &stream[..]].concat()
            } else {
                stream.clone()
            };
            if let Err(error) = decode(codec, &stream, CLUSTER) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}

/// A cluster of that length through both directions, in whatever room it needs.
fn round_trip(codec: Codec, level: Level, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0x55; cluster.len()];
    let len = codec.compress(level, cluster, &mut out).unwrap()?;
    assert!(len < cluster.len());
    assert_eq!(decode(codec, &out[..len], cluster.len()).unwrap(), cluster);
    out.truncate(len);
    Some(out)
}

fn levels(codec: Codec) -> impl Iterator<Item = Level> {
    let (min, max) = codec.levels();
    (min..=max).map(move |level| Level::new(codec, level).unwrap())
}

/// Bytes that nothing compresses.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(99);
        (state ^ state >> 29).to_be_bytes()[1]
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn clusters_of_each_length_go_both_ways_at_each_level() {
    for codec in [Codec::Zlib, Codec::Zstd] {
        for bits in 9..=21 {
            let bytes = text(1 << bits);
            // The slow levels on the longest clusters are slow indeed.
            for level in levels(codec).step_by(if bits < 18 { 1 } else { 7 }) {
                assert!(
                    round_trip(codec, level, &bytes).is_some(),
                    "{codec} {level:?}"
                );
                round_trip(codec, level, &vec![0; 1 << bits]).unwrap();
            }
        }
    }
}

#[test]
fn a_cluster_that_would_not_get_shorter_gives_none_and_harms_no_later_one() {
    for len in [CLUSTER, 1 << 16] {
        let (good, bad) = (text(len), noise(len));
        for codec in [Codec::Zlib, Codec::Zstd] {
            for level in levels(codec).step_by(if len == CLUSTER { 1 } else { 3 }) {
                let first = round_trip(codec, level, &good).unwrap();
                for _ in 0..2 {
                    assert_eq!(round_trip(codec, level, &bad), None, "{codec} {level:?}");
                }
                assert!(round_trip(codec, level, &good).unwrap() == first);
            }
        }
    }
    for codec in [Codec::Zlib, Codec::Zstd] {
        for tiny in [&[][..], &[7]] {
            assert_eq!(round_trip(codec, Level::default(), tiny), None);
        }
    }
}

#[test]
fn a_stream_needs_no_more_room_than_it_has_bytes() {
    let cluster = text(CLUSTER);
    for codec in [Codec::Zlib, Codec::Zstd] {
        for level in levels(codec) {
            let stream = round_trip(codec, level, &cluster).unwrap();
            for room in [0, 1, 5, stream.len() / 2, stream.len() - 1] {
                let found = codec.compress(level, &cluster, &mut vec![0; room]);
                assert_eq!(found, Ok(None), "{codec} {level:?} in {room} bytes");
            }
            assert_eq!(round_trip(codec, level, &cluster).unwrap(), stream);
        }
    }
}

#[test]
fn a_level_outside_of_the_range_is_an_error_that_names_it() {
    for (codec, level, text) in [
        (
            Codec::Zlib,
            0,
            "zlib has no compression level 0: it goes from 1 to 9",
        ),
        (
            Codec::Zlib,
            10,
            "zlib has no compression level 10: it goes from 1 to 9",
        ),
        (
            Codec::Zstd,
            -1,
            "zstd has no compression level -1: it goes from 1 to 22",
        ),
        (
            Codec::Zstd,
            23,
            "zstd has no compression level 23: it goes from 1 to 22",
        ),
    ] {
        assert_eq!(Level::new(codec, level).unwrap_err().to_string(), text);
    }
    // A level that only the other codec has.
    let level = Level::new(Codec::Zstd, 19).unwrap();
    let error = Codec::Zlib.compress(level, &text(CLUSTER), &mut [0; CLUSTER]);
    let codec = Codec::Zlib;
    let (found, min, max) = (19, 1, 9);
    assert_eq!(
        error,
        Err(CodecError::Level {
            codec,
            found,
            min,
            max
        })
    );
}

#[test]
fn the_default_level_is_the_one_it_says() {
    let numbers = (0..9000u32).map(|i| format!("{} ", i.wrapping_mul(i) % 1999));
    let cluster = numbers.collect::<String>().into_bytes();
    for codec in [Codec::Zlib, Codec::Zstd] {
        let named = Level::new(codec, codec.default_level()).unwrap();
        let stream = round_trip(codec, named, &cluster).unwrap();
        assert!(round_trip(codec, Level::default(), &cluster).unwrap() == stream);
        let other = Level::new(codec, 1).unwrap();
        assert!(round_trip(codec, other, &cluster).unwrap() != stream);
    }
}

#[test]
fn written_deflate_fits_a_window_of_4_kib_and_ends_with_a_final_block() {
    // Each part repeats at a distance that only a larger window would reach.
    let part = noise(5000);
    let far = [&part[..], &part[..]].concat();
    let near = [&part[..3000], &part[..3000]].concat();
    for level in levels(Codec::Zlib) {
        assert_eq!(round_trip(Codec::Zlib, level, &far), None);
        let stream = round_trip(Codec::Zlib, level, &near);
        let Some(stream) = stream else {
            assert_eq!(level, Level::new(Codec::Zlib, 1).unwrap());
            continue;
        };
        let mut found = vec![0; near.len() + 1];
        let mut decoder = zlib_rs::Inflate::new(false, 12);
        let status = decoder.decompress(&stream, &mut found, zlib_rs::InflateFlush::Finish);
        assert_eq!(status, Ok(Status::StreamEnd));
        assert_eq!(decoder.total_in(), stream.len() as u64);
        assert_eq!(decoder.total_out(), near.len() as u64);
    }
}

#[test]
fn written_zstd_is_one_frame_with_its_size_and_without_a_checksum() {
    for bits in 9..=21 {
        let cluster = text(1 << bits);
        let stream = round_trip(Codec::Zstd, Level::default(), &cluster).unwrap();
        assert_eq!(
            zstd_safe::find_frame_compressed_size(&stream),
            Ok(stream.len())
        );
        let size = zstd_safe::get_frame_content_size(&stream).unwrap();
        assert_eq!(size, Some(cluster.len() as u64));
        // In the frame header's descriptor: a checksum follows.
        assert_eq!(stream[4] & 4, 0);
    }
}

#[test]
fn a_bomb_fills_the_cluster_and_nothing_else() {
    // 16 MiB of zeros: cut by one codec, refused by the other, whatever the length of a cluster.
    let zeros = vec![0; 16 << 20];
    for bits in [9, 16, 21] {
        let cluster = 1 << bits;
        let bomb = deflate(&zeros, 15, DeflateFlush::Finish);
        assert!(bomb.len() * 500 < zeros.len());
        let mut out = vec![0xaa; cluster + 64];
        let (head, guard) = out.split_at_mut(cluster);
        assert_eq!(Codec::Zlib.decompress(&bomb, head), Ok(()));
        assert!(head.iter().all(|byte| *byte == 0));
        assert!(guard.iter().all(|byte| *byte == 0xaa));
        let (codec, expected) = (Codec::Zstd, cluster);
        for bomb in [zstd(&zeros), frame(31, &[(0, 128 << 10); 32])] {
            let error = decode(codec, &bomb, cluster).unwrap_err();
            assert_eq!(error, CodecError::TooLong { codec, expected });
        }
        // A frame that claims 2 to the power of 63 bytes and has a few.
        let claim = [
            &[0x28, 0xb5, 0x2f, 0xfd, 0xe0][..],
            &[0, 0, 0, 0, 0, 0, 0, 0x80],
        ]
        .concat();
        decode(codec, &[&claim[..], &[0x09, 0, 0, 7]].concat(), cluster).unwrap_err();
        // Empty blocks and frames without end make no progress, and end with the input.
        let empty: Vec<u8> = stored(false, &[]).repeat(1000);
        decode(Codec::Zlib, &empty, cluster).unwrap_err();
        decode(codec, &zstd(&[]).repeat(1000), cluster).unwrap_err();
        decode(codec, &skippable(0).repeat(1000), cluster).unwrap_err();
    }
}

#[test]
fn a_stream_that_is_cut_anywhere_gives_an_error() {
    let cluster = text(CLUSTER);
    for codec in [Codec::Zlib, Codec::Zstd] {
        for level in [1, 9] {
            let level = Level::new(codec, level).unwrap();
            let stream = round_trip(codec, level, &cluster).unwrap();
            // The last bytes of deflate may hold nothing but the end of the block.
            let end = stream.len() - if codec == Codec::Zlib { 2 } else { 0 };
            for cut in 0..end {
                let error = decode(codec, &stream[..cut], CLUSTER).unwrap_err();
                assert!(
                    matches!(
                        error,
                        CodecError::EndsEarly { .. } | CodecError::Damaged { .. }
                    ),
                    "{codec} cut at {cut}: {error}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_the_fuzz_target_asserts_holds(
        how in 0..8u8,
        bits in 0..8u8,
        level: u8,
        bytes in prop::collection::vec(any::<u8>(), 0..5000),
    ) {
        fuzzing::decompress(&[&[how, bits, level], &bytes[..]].concat());
    }
}
