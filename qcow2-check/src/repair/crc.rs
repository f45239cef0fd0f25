//! CRC-64 (the one of XZ), by which undo records prove themselves whole.

const POLYNOMIAL: u64 = 0xc96c_5795_d787_0f42;

const TABLES: [[u64; 256]; 8] = tables();

#[expect(
    clippy::indexing_slicing,
    reason = "evaluated by the compiler, which would refuse an index out of bounds"
)]
const fn tables() -> [[u64; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut step = 1;
    while step < 8 {
        let mut byte = 0;
        while byte < 256 {
            let crc = tables[step - 1][byte];
            tables[step][byte] = crc >> 8 ^ tables[0][(crc & 0xff) as usize];
            byte += 1;
        }
        step += 1;
    }
    tables
}

/// A checksum in the making.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crc(u64);

impl Crc {
    pub(super) const fn new() -> Self {
        Self(u64::MAX)
    }

    #[expect(
        clippy::indexing_slicing,
        clippy::little_endian_bytes,
        reason = "a byte indexes 256 entries; the first byte of eight goes through the register first"
    )]
    pub(super) fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            let mixed = (u64::from_le_bytes(*word) ^ self.0).to_le_bytes();
            self.0 = (0..8).fold(0, |crc, at| crc ^ TABLES[7 - at][usize::from(mixed[at])]);
        }
        for byte in rest {
            let index = (self.0.to_le_bytes()[0] ^ byte) as usize;
            self.0 = self.0 >> 8 ^ TABLES[0][index];
        }
    }

    pub(super) const fn finish(self) -> u64 {
        !self.0
    }
}

/// The checksum of these bytes.
pub(super) fn crc(bytes: &[u8]) -> u64 {
    let mut crc = Crc::new();
    crc.add(bytes);
    crc.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_is_the_published_one() {
        assert_eq!(crc(b"123456789"), 0x995d_c9bb_df19_39fa);
        assert_eq!(crc(b""), 0);
    }

    #[test]
    fn pieces_sum_up_to_the_whole() {
        let bytes: Vec<u8> = (0..=255).collect();
        for cut in [0, 1, 7, 8, 100] {
            let mut sum = Crc::new();
            sum.add(&bytes[..cut]);
            sum.add(&bytes[cut..]);
            assert_eq!(sum.finish(), crc(&bytes));
        }
    }
}
