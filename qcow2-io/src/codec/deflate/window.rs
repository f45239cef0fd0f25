//! The bytes that matches are looked for in.

use super::alphabet::{MAX_MATCH, WINDOW};

/// Bytes that are looked at before the next ones come, behind as many from before as matches reach back. Low 16 bits of a
/// place mean the same byte in the next strip.
pub(super) const STRIP: usize = 1 << 16;
/// Places are taken modulo this: none is ever outside, and none is tested.
const SPAN: usize = 1 << 17;
/// The longest word that is read.
const LONGEST_WORD: usize = 8;
const _: () = assert!(WINDOW + STRIP + LONGEST_WORD + MAX_MATCH < SPAN);

/// A strip of the data. It starts at the place [`WINDOW`].
pub(super) struct Window {
    bytes: [u8; SPAN + LONGEST_WORD],
    end: usize,
}

impl Window {
    #[expect(
        clippy::large_stack_arrays,
        reason = "goes to the heap at once; a box of its own would cost a tenth of the speed"
    )]
    pub(super) fn new() -> Self {
        Self {
            bytes: [0; _],
            end: WINDOW,
        }
    }

    /// Goes on to the next strip, or to the first of other data.
    pub(super) fn fill(&mut self, strip: &[u8]) {
        self.end = WINDOW + strip.len();
        self.bytes.copy_within(STRIP..STRIP + WINDOW, 0);
        self.bytes[WINDOW..self.end].copy_from_slice(strip);
        // The last words reach behind it, and shall not depend on what was there before.
        self.bytes[self.end..self.end + LONGEST_WORD].fill(0);
    }

    /// The place behind the strip.
    #[inline(always)]
    pub(super) fn end(&self) -> usize {
        self.end
    }

    /// Four bytes, the first one lowest.
    #[inline(always)]
    pub(super) fn word(&self, at: usize) -> u32 {
        let at = at % SPAN;
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    /// What lies from a place up to another.
    #[inline(always)]
    pub(super) fn bytes(&self, from: usize, to: usize) -> &[u8] {
        &self.bytes[from..to]
    }

    /// How many bytes are the same in two places, `max` at most, known that the first four are.
    #[inline(always)]
    pub(super) fn common(&self, one: usize, other: usize, max: usize) -> usize {
        let mut length = 4;
        while length < max {
            let difference = self.long_word(one + length) ^ self.long_word(other + length);
            if difference != 0 {
                length += (difference.trailing_zeros() / 8) as usize;
                break;
            }
            length += LONGEST_WORD;
        }
        // What lies behind the strip may be the same too.
        length.min(max)
    }

    #[inline(always)]
    fn long_word(&self, at: usize) -> u64 {
        let at = at % SPAN;
        let mut bytes = [0; LONGEST_WORD];
        bytes.copy_from_slice(&self.bytes[at..at + LONGEST_WORD]);
        u64::from_le_bytes(bytes)
    }
}
