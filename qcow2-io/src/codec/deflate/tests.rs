//! Streams are read by zlib-rs, and by a reader made for these tests that looks at each distance.

use proptest::prelude::*;
use zlib_rs::{Inflate, InflateFlush, Status};

use super::Encoder;
use super::huffman::lengths;

/// What a stream is made of.
#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    stored: usize,
    fixed: usize,
    dynamic: usize,
    matches: usize,
    longest: usize,
    farthest: usize,
    /// Bytes of the stream.
    len: usize,
}

/// Reads deflate bit by bit, and refuses what isn't as it should be.
struct Reader<'s> {
    stream: &'s [u8],
    at: usize,
}

/// For each length of a code: how many there are, and which symbols have them, in order.
struct Prefixes {
    counts: [usize; 16],
    symbols: Vec<usize>,
}

impl Prefixes {
    fn new(lengths: &[usize]) -> Self {
        let mut counts = [0; 16];
        let mut symbols = Vec::new();
        let mut shares = 0;
        for (bits, count) in counts.iter_mut().enumerate().skip(1) {
            let before = symbols.len();
            symbols.extend((0..lengths.len()).filter(|symbol| lengths[*symbol] == bits));
            *count = symbols.len() - before;
            shares += *count << (15 - bits);
        }
        assert_eq!(shares, 1 << 15, "a complete code: {lengths:?}");
        Self { counts, symbols }
    }
}

impl Reader<'_> {
    fn bits(&mut self, count: usize) -> usize {
        let mut bits = 0;
        for bit in 0..count {
            bits |= usize::from(self.stream[self.at / 8] >> (self.at % 8) & 1) << bit;
            self.at += 1;
        }
        bits
    }

    fn symbol(&mut self, prefixes: &Prefixes) -> usize {
        let (mut code, mut first, mut index) = (0, 0, 0);
        for count in &prefixes.counts[1..] {
            code = code << 1 | self.bits(1);
            first <<= 1;
            if code - first < *count {
                return prefixes.symbols[index + code - first];
            }
            index += count;
            first += count;
        }
        panic!("no such code");
    }

    fn tables(&mut self) -> (Prefixes, Prefixes) {
        let literals = 257 + self.bits(5);
        let distances = 1 + self.bits(5);
        assert!(literals <= 286 && distances <= 30);
        let told = 4 + self.bits(4);
        let mut lengths = [0; 19];
        let order = [
            16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15,
        ];
        for symbol in &order[..told] {
            lengths[*symbol] = self.bits(3);
        }
        let prefixes = Prefixes::new(&lengths);
        let mut lengths = Vec::new();
        while lengths.len() < literals + distances {
            match self.symbol(&prefixes) {
                16 => {
                    let last = *lengths.last().unwrap();
                    let count = 3 + self.bits(2);
                    lengths.extend(vec![last; count]);
                }
                17 => lengths.extend(vec![0; 3 + self.bits(3)]),
                18 => lengths.extend(vec![0; 11 + self.bits(7)]),
                length => lengths.push(length),
            }
        }
        assert_eq!(lengths.len(), literals + distances);
        assert_ne!(lengths[256], 0);
        let (literals, distances) = lengths.split_at(literals);
        (Prefixes::new(literals), Prefixes::new(distances))
    }

    fn block(&mut self, literals: &Prefixes, distances: &Prefixes, seen: &mut Seen) {
        loop {
            let symbol = self.symbol(literals);
            if symbol < 256 {
                seen.bytes.push(symbol.to_be_bytes()[7]);
                continue;
            }
            if symbol == 256 {
                return;
            }
            let length = match symbol - 257 {
                class @ 0..8 => 3 + class,
                28 => 258,
                class => 3 + ((4 + class % 4) << (class / 4 - 1)) + self.bits(class / 4 - 1),
            };
            let distance = match self.symbol(distances) {
                class @ 0..4 => 1 + class,
                class => 1 + ((2 + class % 2) << (class / 2 - 1)) + self.bits(class / 2 - 1),
            };
            assert!(distance <= seen.bytes.len(), "{distance} bytes back");
            seen.matches += 1;
            seen.longest = seen.longest.max(length);
            seen.farthest = seen.farthest.max(distance);
            for _ in 0..length {
                seen.bytes.push(seen.bytes[seen.bytes.len() - distance]);
            }
        }
    }
}

fn read(stream: &[u8]) -> Seen {
    let mut seen = Seen::default();
    let mut reader = Reader { stream, at: 0 };
    loop {
        let is_last = reader.bits(1) == 1;
        match reader.bits(2) {
            0 => {
                seen.stored += 1;
                reader.at = reader.at.next_multiple_of(8);
                let len = reader.bits(16);
                assert_eq!(reader.bits(16), len ^ 0xffff);
                for _ in 0..len {
                    seen.bytes.push(reader.bits(8).to_be_bytes()[7]);
                }
            }
            1 => {
                seen.fixed += 1;
                let mut lengths = [8; 288];
                lengths[144..256].fill(9);
                lengths[256..280].fill(7);
                let (literals, distances) = (Prefixes::new(&lengths), Prefixes::new(&[5; 32]));
                reader.block(&literals, &distances, &mut seen);
            }
            2 => {
                seen.dynamic += 1;
                let (literals, distances) = reader.tables();
                reader.block(&literals, &distances, &mut seen);
            }
            _ => panic!("no such block"),
        }
        if is_last {
            seen.len = reader.at.div_ceil(8);
            return seen;
        }
    }
}

/// Stored blocks are always a way out; there is one at least for each 16 KiB.
fn bound(len: usize) -> usize {
    len + 5 * (len / (16 << 10) + 1)
}

fn encode(encoder: &mut Encoder, level: i32, data: &[u8]) -> Vec<u8> {
    let mut out = vec![0xaa; bound(data.len())];
    let len = encoder.compress(level, data, &mut out).unwrap();
    out.truncate(len);
    out
}

/// Compresses, has both readers read the stream, and tells what is in it.
fn check(encoder: &mut Encoder, level: i32, data: &[u8]) -> Seen {
    let stream = encode(encoder, level, data);
    let seen = read(&stream);
    assert!(seen.bytes == data, "{} bytes at level {level}", data.len());
    assert_eq!(seen.len, stream.len());
    assert!(seen.farthest <= 4096, "{seen:?}");
    let mut back = vec![0x55; data.len() + 1];
    let mut inflate = Inflate::new(false, 12);
    let status = inflate.decompress(&stream, &mut back, InflateFlush::Finish);
    assert_eq!(status, Ok(Status::StreamEnd));
    assert_eq!(inflate.total_in(), stream.len() as u64);
    assert!(inflate.total_out() == data.len() as u64 && back.starts_with(data));
    seen
}

/// Numbers by chance, the same ones each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let high = (self.0 ^ self.0 >> 29) >> 33;
        usize::try_from(high).unwrap() % end
    }

    fn byte(&mut self) -> u8 {
        self.below(256).to_be_bytes()[7]
    }

    fn noise(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.byte()).collect()
    }

    fn words(&mut self, len: usize) -> Vec<u8> {
        let words: Vec<Vec<u8>> = (0..300)
            .map(|_| {
                let len = 2 + self.below(9);
                (0..len).map(|_| b'a' + self.byte() % 20).collect()
            })
            .collect();
        let mut text = Vec::new();
        while text.len() < len {
            let word = self.below(300).min(self.below(300));
            text.extend(&words[word]);
            text.push(b' ');
        }
        text.truncate(len);
        text
    }
}

fn periodic(period: usize, len: usize) -> Vec<u8> {
    let unit = Chance(period as u64).noise(period);
    unit.into_iter().cycle().take(len).collect()
}

#[test]
fn clusters_of_all_lengths_come_back() {
    let mut encoder = Encoder::new();
    let mut chance = Chance(1);
    let lens = [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 257, 258, 259, 260, 261, 262, 511, 512, 513,
    ];
    for len in lens.into_iter().chain([4095, 4096, 4097, 65536, 70_001]) {
        for level in 1..=9 {
            check(&mut encoder, level, &chance.words(len));
            check(&mut encoder, level, &chance.noise(len));
            let zeros = check(&mut encoder, level, &vec![0; len]);
            let most = len.div_ceil(258);
            assert!(
                (most.saturating_sub(1)..=most).contains(&zeros.matches),
                "{zeros:?}"
            );
        }
    }
}

#[test]
fn the_longest_clusters_come_back() {
    let mut encoder = Encoder::new();
    let mut chance = Chance(2);
    let mut mixed = Vec::new();
    while mixed.len() < 2 << 20 {
        let len = chance.below(100_000);
        mixed.extend(match chance.below(3) {
            0 => chance.noise(len),
            1 => chance.words(len),
            _ => periodic(1 + chance.below(5000), len),
        });
    }
    mixed.truncate(2 << 20);
    for level in [1, 4, 6] {
        let seen = check(&mut encoder, level, &mixed);
        assert!(seen.stored > 0 && seen.dynamic > 10, "{seen:?}");
        check(&mut encoder, level, &chance.noise(2 << 20));
        check(&mut encoder, level, &vec![7; 2 << 20]);
    }
}

#[test]
fn repeats_are_found_up_to_4096_bytes_back_and_no_further() {
    let mut encoder = Encoder::new();
    for level in 1..=9 {
        for period in [
            1, 2, 3, 4, 5, 7, 8, 255, 256, 257, 258, 259, 4093, 4094, 4095, 4096,
        ] {
            let seen = check(&mut encoder, level, &periodic(period, 20_000));
            assert!(
                seen.farthest >= period && seen.longest == 258,
                "{period} {seen:?}"
            );
        }
        for period in [4097, 4098, 8192, 32768, 65536, 65537] {
            let seen = check(&mut encoder, level, &periodic(period, 4 * period));
            assert!(seen.longest < 8, "{period} at level {level}");
        }
    }
}

#[test]
fn each_kind_of_block_is_used_where_it_is_shortest() {
    let mut encoder = Encoder::new();
    let mut chance = Chance(3);
    for level in 1..=9 {
        let seen = check(&mut encoder, level, b"abcabcabcabcabcabcabcabc");
        assert_eq!((seen.stored, seen.fixed, seen.dynamic), (0, 1, 0));
        let seen = check(&mut encoder, level, &chance.words(4096));
        assert!(
            seen.stored == 0 && seen.fixed == 0 && seen.dynamic > 0,
            "{seen:?}"
        );
        let seen = check(&mut encoder, level, &chance.noise(65536));
        assert!(seen.stored > 0 && seen.fixed == 0 && seen.dynamic == 0);
        // What needs other codes gets them.
        let words = chance.words(20_000);
        let halves = [&words[..], &chance.noise(20_000)].concat();
        let seen = check(&mut encoder, level, &halves);
        assert!(seen.dynamic > 0 && seen.dynamic + seen.stored > 1);
        let alone = encode(&mut encoder, level, &words).len();
        assert!(seen.len < alone + 20_000 + 400, "level {level}");
    }
}

#[test]
fn bytes_without_any_match_come_back() {
    // Two bytes, then all others, so that no three repeat.
    let mut encoder = Encoder::new();
    for used in [2u8, 3, 15, 200] {
        let mut bytes = Vec::new();
        for one in 0..used {
            for other in 0..=one {
                bytes.extend([one, other]);
            }
        }
        for level in 1..=9 {
            check(&mut encoder, level, &bytes);
        }
    }
    let once: Vec<u8> = (0..=255).collect();
    let seen = check(&mut encoder, 6, &once);
    assert_eq!((seen.matches, seen.stored), (0, 1));
}

#[test]
fn skewed_counts_give_codes_of_limited_length() {
    // Each byte is as frequent as the two next ones together: without a limit the code of the rarest has 19 bits.
    let mut chance = Chance(4);
    let mut bytes = Vec::new();
    let (mut count, mut next) = (1, 1);
    for byte in 0..20 {
        bytes.extend(vec![byte; count]);
        (count, next) = (next, count + next);
    }
    for at in (1..bytes.len()).rev() {
        bytes.swap(at, chance.below(at + 1));
    }
    let mut encoder = Encoder::new();
    for level in 1..=9 {
        let seen = check(&mut encoder, level, &bytes);
        assert!(seen.dynamic > 0);
    }
}

/// Bits that symbols take, and how much of the code's space is used, in units of its smallest share.
fn measure<const N: usize>(counts: &[u16; N], limit: usize) -> (u64, usize) {
    let found = lengths(counts, limit);
    let mut shares = 0;
    let mut bits = 0;
    for (count, length) in counts.iter().zip(found) {
        assert!(usize::from(length) <= limit);
        assert!(length > 0 || *count == 0);
        bits += u64::from(*count) * u64::from(length);
        shares += if length > 0 {
            1 << (limit - usize::from(length))
        } else {
            0
        };
    }
    (bits, shares)
}

#[test]
fn code_lengths_are_complete_within_any_limit() {
    let mut fibonacci = [1u16; 19];
    for at in 2..19 {
        fibonacci[at] = fibonacci[at - 1] + fibonacci[at - 2];
    }
    for limit in [5, 6, 7, 10, 15] {
        let (bits, shares) = measure(&fibonacci, limit);
        assert_eq!(shares, 1 << limit);
        // All with the same length would take 5 bits each.
        assert!(bits <= 5 * fibonacci.iter().map(|count| u64::from(*count)).sum::<u64>());
    }
    assert_eq!(lengths(&[0; 24], 15)[..3], [1, 1, 0]);
    assert_eq!(lengths(&[5, 0, 0], 15), [1, 1, 0]);
    assert_eq!(lengths(&[0, 0, 9], 15), [1, 0, 1]);
    assert_eq!(lengths(&[1, 2, 4, 8], 15), [3, 3, 2, 1]);
    assert_eq!(lengths(&[1, 2, 4, 8], 2), [2, 2, 2, 2]);
    assert_eq!(measure(&[1; 286], 15).1, 1 << 15);
    assert_eq!(measure(&[u16::MAX; 286], 9).1, 1 << 9);
}

#[test]
fn a_stream_fits_exactly_where_it_is_no_longer_than_the_room() {
    let mut encoder = Encoder::new();
    let mut chance = Chance(5);
    let mixed = [chance.words(9000), chance.noise(3000), vec![3; 500]].concat();
    let clusters = [
        vec![],
        vec![9],
        b"banana banana banana".to_vec(),
        vec![0; 512],
        chance.words(512),
        chance.noise(700),
        mixed,
    ];
    for cluster in clusters {
        for level in [1, 4, 6, 9] {
            let stream = encode(&mut encoder, level, &cluster);
            let near = stream.len().saturating_sub(40)..stream.len() + 20;
            for room in (0..stream.len()).step_by(97).chain(near) {
                let mut out = vec![0x11; room];
                let found = encoder.compress(level, &cluster, &mut out);
                if room < stream.len() {
                    assert_eq!(found, None, "{room} bytes for {}", stream.len());
                } else {
                    assert_eq!(found, Some(stream.len()));
                    assert!(out.starts_with(&stream));
                }
            }
        }
    }
}

#[test]
fn a_stream_depends_on_nothing_before_it() {
    let mut chance = Chance(6);
    let clusters: Vec<Vec<u8>> = (0..6)
        .map(|at| match at % 3 {
            0 => chance.words(30_000),
            1 => chance.noise(3000),
            _ => periodic(100 * at, 66_000),
        })
        .collect();
    let mut used = Encoder::new();
    for level in 1..=9 {
        for cluster in &clusters {
            let alone = encode(&mut Encoder::new(), level, cluster);
            assert!(encode(&mut used, level, cluster) == alone);
            let mut small = vec![0; alone.len() / 2];
            assert_eq!(used.compress(level, cluster, &mut small), None);
        }
    }
}

#[test]
fn higher_levels_give_shorter_streams() {
    let text = Chance(7).words(1 << 17);
    let mut encoder = Encoder::new();
    let lens: Vec<usize> = (1..=9)
        .map(|level| encode(&mut encoder, level, &text).len())
        .collect();
    assert!(lens[3] < lens[0] && lens[8] < lens[3], "{lens:?}");
}

/// A piece of a cluster.
#[derive(Clone, Debug)]
enum Piece {
    Noise(usize, u64),
    Words(usize, u64),
    Run(usize, u8),
    Few(usize, u64),
    Periodic(usize, usize),
    /// What lies so far back, once more.
    Again(usize, usize),
}

fn piece() -> impl Strategy<Value = Piece> {
    let len = || prop_oneof![1..20usize, 1..600usize, 1..9000usize];
    let back = prop_oneof![1..10usize, 250..265usize, 4080..4110usize, 1..4200usize];
    prop_oneof![
        (len(), any::<u64>()).prop_map(|(len, seed)| Piece::Noise(len, seed)),
        (len(), any::<u64>()).prop_map(|(len, seed)| Piece::Words(len, seed)),
        (len(), any::<u8>()).prop_map(|(len, byte)| Piece::Run(len, byte)),
        (len(), any::<u64>()).prop_map(|(len, seed)| Piece::Few(len, seed)),
        (len(), 1..4200usize).prop_map(|(len, period)| Piece::Periodic(len, period)),
        (len(), back).prop_map(|(len, back)| Piece::Again(len, back)),
    ]
}

fn build(pieces: &[Piece]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        match *piece {
            Piece::Noise(len, seed) => bytes.extend(Chance(seed).noise(len)),
            Piece::Words(len, seed) => bytes.extend(Chance(seed).words(len)),
            Piece::Run(len, byte) => bytes.extend(vec![byte; len]),
            Piece::Few(len, seed) => {
                let mut chance = Chance(seed);
                bytes.extend((0..len).map(|_| chance.byte() & 3));
            }
            Piece::Periodic(len, period) => bytes.extend(periodic(period, len)),
            Piece::Again(len, back) => {
                for _ in 0..len {
                    let start = bytes.len().checked_sub(back);
                    bytes.push(start.map_or(0, |start| bytes[start]));
                }
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_written_is_read(pieces in prop::collection::vec(piece(), 1..12), level in 1..=9i32) {
        let bytes = build(&pieces);
        check(&mut Encoder::new(), level, &bytes);
    }

    #[test]
    fn room_is_never_exceeded(
        pieces in prop::collection::vec(piece(), 1..5),
        level in 1..=9i32,
        less in 0..12usize,
    ) {
        let bytes = build(&pieces);
        let mut encoder = Encoder::new();
        let stream = encode(&mut encoder, level, &bytes);
        let mut out = vec![0; stream.len().saturating_sub(less)];
        let found = encoder.compress(level, &bytes, &mut out);
        prop_assert_eq!(found, (less == 0).then_some(stream.len()));
        prop_assert!(less > 0 || out == stream);
    }

    #[test]
    fn code_lengths_are_never_worse_than_equal_ones(
        counts in prop::collection::vec(prop_oneof![0..3u16, 0..3000u16, any::<u16>()], 64),
        limit in 7..=15usize,
    ) {
        let counts: [u16; 64] = counts.try_into().unwrap();
        let (bits, shares) = measure(&counts, limit);
        prop_assert_eq!(shares, 1 << limit);
        prop_assert!(bits <= 6 * counts.iter().map(|count| u64::from(*count)).sum::<u64>());
    }
}
