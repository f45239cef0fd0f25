//! Writes a block in the shortest of three ways.

use super::alphabet::{
    DISTANCES, END, LENGTH_CLASS, LITERALS, MIN_MATCH, distance_class, distance_extra, length_extra,
};
use super::bits::BitWriter;
use super::huffman::{Code, MAX_BITS, MAX_LENGTH_BITS, codes, lengths};
use super::parse::{Part, Sequence};

/// Symbols of the code that code lengths are written in.
const LENGTHS: usize = 19;
/// The order in which the lengths of that code are written.
const LENGTHS_ORDER: [usize; LENGTHS] = [
    16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15,
];
/// Bytes of one stored block.
const MOST_STORED: usize = 0xffff;
/// The lengths of the codes nobody needs to tell. Two of them stand for symbols that never occur.
const FIXED_LITERALS: [u8; 288] = {
    let mut lengths = [8; 288];
    let mut symbol = 144;
    while symbol < 280 {
        lengths[symbol] = if symbol < 256 { 9 } else { 7 };
        symbol += 1;
    }
    lengths
};
const FIXED_DISTANCES: [u8; 32] = [5; 32];

/// The codes of a block.
struct Codes {
    literals: [Code; 256],
    end: Code,
    /// Of lengths from [`MIN_MATCH`] on, with the bits that follow.
    lengths: [Code; 256],
    distances: [Code; DISTANCES],
}

/// Writes a part of the data as one block; several when it is stored. `false`, and nothing is written, when there is no
/// room.
pub(super) fn write(
    writer: &mut BitWriter<'_>,
    part: &Part,
    sequences: &[Sequence],
    data: &[u8],
    is_last: bool,
) -> bool {
    let histogram = &part.histogram;
    let mut counts = histogram.literals;
    counts[END] = 1;
    let literals = lengths(&counts, MAX_BITS);
    let distances = lengths(&histogram.distances, MAX_BITS);
    let header = Header::new(&literals, &distances);

    let sum = |counts: &[u16], lengths: &[u8]| -> usize {
        let products = counts.iter().zip(lengths);
        products
            .map(|(count, length)| usize::from(*count) * usize::from(*length))
            .sum()
    };
    let extra: usize = (0..29)
        .map(|class| usize::from(counts[END + 1 + class]) * length_extra(class) as usize)
        .chain(
            histogram
                .distances
                .iter()
                .enumerate()
                .map(|(class, count)| usize::from(*count) * distance_extra(class) as usize),
        )
        .sum();
    let dynamic =
        3 + header.bits() + sum(&counts, &literals) + sum(&histogram.distances, &distances) + extra;
    let fixed =
        3 + sum(&counts, &FIXED_LITERALS) + sum(&histogram.distances, &FIXED_DISTANCES) + extra;
    let bytes = &data[part.bytes.clone()];
    let stored = stored_bits(writer, bytes.len());

    let shortest = dynamic.min(fixed).min(stored);
    if shortest > writer.room() {
        return false;
    }
    if stored == shortest {
        write_stored(writer, bytes, is_last);
        return true;
    }
    writer.put(is_last.into(), 1);
    let sequences = &sequences[part.sequences.clone()];
    let codes = if fixed == shortest {
        writer.put(1, 2);
        Codes::new(&codes(&FIXED_LITERALS), &codes(&FIXED_DISTANCES))
    } else {
        writer.put(2, 2);
        header.write(writer);
        Codes::new(&codes(&literals), &codes(&distances))
    };
    codes.write(writer, sequences, bytes);
    true
}

/// Bits of stored blocks with so many bytes.
fn stored_bits(writer: &BitWriter<'_>, len: usize) -> usize {
    let blocks = len.div_ceil(MOST_STORED).max(1);
    // Three bits, filled to a byte. Only the first block may start inside one.
    let first = (writer.padding() + 5) % 8 + 3;
    first + 32 + (blocks - 1) * 40 + len * 8
}

fn write_stored(writer: &mut BitWriter<'_>, bytes: &[u8], is_last: bool) {
    let mut rest = bytes;
    loop {
        let (block, behind) = rest.split_at(rest.len().min(MOST_STORED));
        rest = behind;
        writer.put((is_last && rest.is_empty()).into(), 3);
        writer.align();
        let len = block.len() as u16;
        writer.put(u32::from(len) | u32::from(!len) << 16, 32);
        writer.bytes(block);
        if rest.is_empty() {
            break;
        }
    }
}

impl Codes {
    fn new(literals: &[Code], distances: &[Code]) -> Self {
        let of_length = |length: usize| {
            let class = usize::from(LENGTH_CLASS[length]);
            let code = literals[END + 1 + class];
            let extra = length_extra(class);
            let low = length as u32 & ((1 << extra) - 1);
            Code {
                bits: code.bits | low << code.count,
                count: code.count + extra,
            }
        };
        let mut codes = Self {
            literals: [Code::default(); _],
            end: literals[END],
            lengths: std::array::from_fn(of_length),
            distances: [Code::default(); _],
        };
        codes.literals.copy_from_slice(&literals[..256]);
        codes.distances.copy_from_slice(&distances[..DISTANCES]);
        codes
    }

    fn write(&self, writer: &mut BitWriter<'_>, sequences: &[Sequence], bytes: &[u8]) {
        let mut rest = bytes;
        for sequence in sequences {
            let (run, behind) = rest.split_at(sequence.literals.into());
            let (threes, few) = run.as_chunks::<3>();
            for three in threes {
                for byte in three {
                    self.literal(writer, *byte);
                }
                writer.flush();
            }
            for byte in few {
                self.literal(writer, *byte);
            }
            // 30 bits at most; a match has up to 45, and 7 are left from before.
            let length = usize::from(sequence.length);
            rest = &behind[length..];
            if length == 0 {
                writer.flush();
                continue;
            }
            if !few.is_empty() {
                writer.flush();
            }
            let code = self.lengths[(length - MIN_MATCH) & 0xff];
            writer.add(code.bits.into(), code.count);
            let class = distance_class(sequence.distance).min(DISTANCES - 1);
            let code = self.distances[class];
            let extra = distance_extra(class);
            let low = (u32::from(sequence.distance) - 1) & ((1 << extra) - 1);
            writer.add((code.bits | low << code.count).into(), code.count + extra);
            writer.flush();
        }
        writer.put(self.end.bits, self.end.count);
    }

    #[inline(always)]
    fn literal(&self, writer: &mut BitWriter<'_>, byte: u8) {
        let code = self.literals[usize::from(byte)];
        writer.add(code.bits.into(), code.count);
    }
}

/// A symbol for one or more code lengths, and the bits that follow it.
#[derive(Clone, Copy, Default)]
struct Run {
    symbol: u8,
    extra: u8,
}

impl Run {
    fn extra_bits(self) -> u32 {
        match self.symbol {
            16 => 2,
            17 => 3,
            18 => 7,
            _ => 0,
        }
    }
}

/// What tells the codes of a block.
struct Header {
    runs: [Run; LITERALS + DISTANCES],
    run_count: usize,
    literals: usize,
    distances: usize,
    lengths: [u8; LENGTHS],
    lengths_told: usize,
    bits: usize,
}

impl Header {
    fn new(literals: &[u8; LITERALS], distances: &[u8; DISTANCES]) -> Self {
        let told = |lengths: &[u8], min: usize| {
            let last = lengths.iter().rposition(|length| *length > 0);
            last.map_or(0, |last| last + 1).max(min)
        };
        let mut header = Self {
            runs: [Run::default(); _],
            run_count: 0,
            literals: told(literals, 257),
            distances: told(distances, 1),
            lengths: [0; _],
            lengths_told: 0,
            bits: 0,
        };
        // Runs may reach from the one alphabet to the other.
        let mut all = [0; LITERALS + DISTANCES];
        let count = header.literals + header.distances;
        all[..header.literals].copy_from_slice(&literals[..header.literals]);
        all[header.literals..count].copy_from_slice(&distances[..header.distances]);
        let mut counts = [0; LENGTHS];
        for run in all[..count].chunk_by(|one, other| one == other) {
            header.tell(run[0], run.len(), &mut counts);
        }
        header.lengths = lengths(&counts, MAX_LENGTH_BITS);
        let ordered = LENGTHS_ORDER.map(|symbol| header.lengths[symbol]);
        header.lengths_told = told(&ordered, 4);
        header.bits = 5 + 5 + 4 + 3 * header.lengths_told;
        for run in &header.runs[..header.run_count] {
            let code = header.lengths[usize::from(run.symbol)];
            header.bits += usize::from(code) + run.extra_bits() as usize;
        }
        header
    }

    /// Takes `count` lengths that are the same.
    fn tell(&mut self, length: u8, mut count: usize, counts: &mut [u16; LENGTHS]) {
        let mut push = |symbol: u8, extra: usize| {
            let extra = extra as u8;
            self.runs[self.run_count] = Run { symbol, extra };
            self.run_count += 1;
            counts[usize::from(symbol)] += 1;
        };
        if length == 0 {
            while count >= 11 {
                let run = count.min(138);
                push(18, run - 11);
                count -= run;
            }
            if count >= 3 {
                push(17, count - 3);
                count = 0;
            }
        } else {
            push(length, 0);
            count -= 1;
            while count >= 3 {
                // Seven are better told as 4 and 3 than as 6 and one alone; of eight, 4 and 4.
                let run = if count == 7 || count == 8 {
                    4
                } else {
                    count.min(6)
                };
                push(16, run - 3);
                count -= run;
            }
        }
        for _ in 0..count {
            push(length, 0);
        }
    }

    /// Bits it takes.
    fn bits(&self) -> usize {
        self.bits
    }

    fn write(&self, writer: &mut BitWriter<'_>) {
        writer.put((self.literals - 257) as u32, 5);
        writer.put((self.distances - 1) as u32, 5);
        writer.put((self.lengths_told - 4) as u32, 4);
        for symbol in &LENGTHS_ORDER[..self.lengths_told] {
            writer.put(self.lengths[*symbol].into(), 3);
        }
        let codes = codes(&self.lengths);
        for run in &self.runs[..self.run_count] {
            let code = codes[usize::from(run.symbol)];
            writer.add(code.bits.into(), code.count);
            writer.put(run.extra.into(), run.extra_bits());
        }
    }
}
