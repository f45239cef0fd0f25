//! What the guest writes: bytes that tell where they came from.

/// Multiplier of the mix; odd, so that it can be undone.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
/// Bits of a word's number below the tag.
const POSITION_BITS: u32 = 40;

/// Bytes for any place of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Zeros.
    Zeros,
    /// One byte, as other tools can write it.
    Byte(u8),
    /// Noise that only this tag has, and that is different at each place: stale or misplaced bytes can't pass for it.
    Tagged(u32),
}

impl Content {
    /// Fills `buf` with what belongs at `offset` and after.
    pub fn fill(self, offset: u64, buf: &mut [u8]) {
        match self {
            Self::Zeros => buf.fill(0),
            Self::Byte(byte) => buf.fill(byte),
            Self::Tagged(tag) => {
                let mut position = offset;
                let mut rest = buf;
                while !rest.is_empty() {
                    let skip = (position % 8) as usize;
                    let word =
                        mix((u64::from(tag) << POSITION_BITS) | (position / 8)).to_be_bytes();
                    let len = (8 - skip).min(rest.len());
                    let (part, tail) = rest.split_at_mut(len);
                    part.copy_from_slice(&word[skip..skip + len]);
                    position += len as u64;
                    rest = tail;
                }
            }
        }
    }

    /// The byte that belongs at `offset`.
    pub fn byte(self, offset: u64) -> u8 {
        match self {
            Self::Zeros => 0,
            Self::Byte(byte) => byte,
            Self::Tagged(tag) => {
                let word = mix((u64::from(tag) << POSITION_BITS) | (offset / 8)).to_be_bytes();
                word[(offset % 8) as usize]
            }
        }
    }

    /// The bytes from `offset` on.
    pub fn bytes(self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(offset, &mut bytes);
        bytes
    }
}

/// Tag and disk offset of eight bytes that were written as [`Content::Tagged`] at a multiple of 8, if they look like it.
pub fn origin_of(word: [u8; 8]) -> Option<(u32, u64)> {
    let number = unmix(u64::from_be_bytes(word));
    let tag = u32::try_from(number >> POSITION_BITS).ok()?;
    let offset = (number & ((1 << POSITION_BITS) - 1)) * 8;
    // Noise of other origin decodes to absurd places.
    (tag < 1 << 16 && offset < 1 << 30).then_some((tag, offset))
}

fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 32)).wrapping_mul(FACTOR);
    number ^ (number >> 32)
}

fn unmix(word: u64) -> u64 {
    let word = (word ^ (word >> 32)).wrapping_mul(inverse(FACTOR));
    word ^ (word >> 32)
}

/// What undoes a multiplication by an odd number.
const fn inverse(odd: u64) -> u64 {
    let mut guess = odd;
    let mut round = 0;
    // Each round doubles the bits that are right, from three on.
    while round < 5 {
        guess = guess.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(guess)));
        round += 1;
    }
    guess
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tagged_bytes_tell_their_origin() {
        let bytes = Content::Tagged(77).bytes(4093, 40);
        assert_eq!(bytes[2], Content::Tagged(77).byte(4095));
        let word: [u8; 8] = bytes[3..11].try_into().unwrap();
        assert_eq!(origin_of(word), Some((77, 4096)));
        assert_eq!(origin_of([0xff; 8]), None);
        let other = Content::Tagged(78).bytes(4093, 40);
        assert!(bytes.iter().zip(&other).filter(|(a, b)| a == b).count() < 5);
    }
}
