//! A deflate encoder that knows literals and runs, so that demo images can have real compressed clusters.

/// Shortest and longest run of a byte that is written as a repetition of the byte before, in one of the two lengths
/// that need no extra bits and are worth having.
const SHORT: usize = 10;
const LONG: usize = 258;

/// Compresses `data` to a raw deflate stream: one final block with the fixed codes. Long runs of one byte become short,
/// anything else grows a little.
///
/// Distances never exceed 1, so any reader's window is large enough.
pub fn deflate(data: &[u8]) -> Vec<u8> {
    let mut out = Bits::default();
    out.push(1, 1); // the last block
    out.push(1, 2); // with fixed codes
    for run in data.chunk_by(|a, b| a == b) {
        let Some((byte, rest)) = run.split_first() else {
            continue;
        };
        out.literal(*byte);
        let mut left = rest.len();
        for (length, code, bits) in [(LONG, 0b1100_0101, 8), (SHORT, 0b000_1000, 7)] {
            while left >= length {
                out.code(code, bits);
                out.code(0, 5); // distance 1
                left -= length;
            }
        }
        for _ in 0..left {
            out.literal(*byte);
        }
    }
    out.code(0, 7); // end of block
    out.finish()
}

/// Bits in the order of deflate: the first one is the lowest of its byte.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    pending: u32,
    count: u32,
}

impl Bits {
    /// Appends the `bits` low bits of a number, lowest first.
    fn push(&mut self, value: u32, bits: u32) {
        self.pending |= value << self.count;
        self.count += bits;
        while self.count >= 8 {
            let [.., byte] = self.pending.to_be_bytes();
            self.bytes.push(byte);
            self.pending >>= 8;
            self.count -= 8;
        }
    }

    /// Appends a code of `bits` bits, highest first.
    fn code(&mut self, code: u32, bits: u32) {
        self.push(code.reverse_bits() >> (32 - bits), bits);
    }

    fn literal(&mut self, byte: u8) {
        match u32::from(byte) {
            low @ 0..=143 => self.code(0x30 + low, 8),
            high => self.code(0x190 + high - 144, 9),
        }
    }

    fn finish(mut self) -> Vec<u8> {
        self.push(0, 7);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_what_zlib_would_write() {
        // The end of an empty block, and one literal: both known from the format's description.
        assert_eq!(deflate(&[]), [0x03, 0x00]);
        assert_eq!(deflate(b"a"), [0x4b, 0x04, 0x00]);
    }

    #[test]
    fn a_cluster_of_one_byte_becomes_small() {
        assert!(deflate(&vec![7; 65536]).len() < 512);
        assert_eq!(
            deflate(&[1, 200].repeat(100)).len(),
            (200_usize * 17 / 2 + 10).div_ceil(8)
        );
    }
}
