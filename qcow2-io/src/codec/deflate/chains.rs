//! Finds earlier places of the same bytes.
//!
//! Positions are kept as their low 16 bits. So an entry can be mistaken for a place 64 KiB further on, or for one that was
//! never entered; as bytes are compared before a match is believed, that costs a comparison and nothing else.

use super::alphabet::{MAX_MATCH, MIN_MATCH, WINDOW};
use super::window::Window;

/// Bits of a hash of three bytes.
const BITS_OF_THREE: u32 = 12;
/// Bits of a hash of four bytes.
const BITS_OF_FOUR: u32 = 13;
/// An odd number with bits all over.
const SPREAD: u32 = 0x9e37_79b1;
/// An entry that is too far away for the first positions.
const NONE: u16 = 0x8000;

/// Bytes that repeat what lies `distance` back. None when the length is 0.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Match {
    pub(super) length: usize,
    pub(super) distance: u16,
}

/// The latest places that may have the same three and the same four bytes.
#[derive(Clone, Copy)]
pub(super) struct Latest {
    three: u16,
    four: u16,
}

/// The positions of the window, by what is there.
pub(super) struct Chains {
    latest_of_three: [u16; 1 << BITS_OF_THREE],
    latest_of_four: [u16; 1 << BITS_OF_FOUR],
    /// By the low bits of a position: the one before with the same hash of four bytes.
    previous: [u16; WINDOW],
}

impl Chains {
    pub(super) fn new() -> Self {
        Self {
            latest_of_three: [NONE; _],
            latest_of_four: [NONE; _],
            previous: [NONE; _],
        }
    }

    /// Forgets all, so that what is found depends on nothing before.
    pub(super) fn clear(&mut self) {
        self.latest_of_three.fill(NONE);
        self.latest_of_four.fill(NONE);
        self.previous.fill(NONE);
    }

    /// Enters a position, of which `word` is the four bytes, and gives those it follows.
    #[inline(always)]
    pub(super) fn enter(&mut self, at: usize, word: u32) -> Latest {
        let position = at as u16;
        let three = ((word << 8).wrapping_mul(SPREAD) >> (32 - BITS_OF_THREE)) as usize;
        let four = (word.wrapping_mul(SPREAD) >> (32 - BITS_OF_FOUR)) as usize;
        let latest = Latest {
            three: self.latest_of_three[three],
            four: self.latest_of_four[four],
        };
        self.latest_of_three[three] = position;
        self.latest_of_four[four] = position;
        self.previous[at % WINDOW] = latest.four;
        latest
    }

    /// The longest match at a position, the nearest of those, when there is one longer than `floor`.
    #[inline(always)]
    pub(super) fn longest(
        &self,
        window: &Window,
        at: usize,
        latest: Latest,
        floor: usize,
        depth: u32,
        nice: usize,
    ) -> Match {
        let mut best = Match::default();
        let max = (window.end() - at).min(MAX_MATCH);
        if max < 4 || floor >= max {
            return best;
        }
        let nice = nice.min(max);
        let word = window.word(at);
        let position = at as u16;
        let mut length = floor.max(MIN_MATCH);
        // A longer match must also agree in the four bytes that end one byte further on.
        let mut tail = length - MIN_MATCH;
        let mut wanted = window.word(at + tail);
        let mut candidate = latest.four;
        let mut reached = 0;
        for _ in 0..depth {
            let distance = position.wrapping_sub(candidate);
            if !is_near(distance, reached) {
                break;
            }
            reached = distance;
            let start = at - usize::from(distance);
            if window.word(start + tail) == wanted && window.word(start) == word {
                let found = window.common(start, at, max);
                if found > length {
                    length = found;
                    best = Match { length, distance };
                    if length >= nice {
                        break;
                    }
                    tail = length - MIN_MATCH;
                    wanted = window.word(at + tail);
                }
            }
            candidate = self.previous[usize::from(candidate) % WINDOW];
        }
        if best.length == 0 && floor < MIN_MATCH {
            let distance = position.wrapping_sub(latest.three);
            let differing = window.word(at.wrapping_sub(distance.into())) ^ word;
            // Both or neither are hard to foretell, and so would be two branches.
            if is_near(distance, 0) & (differing << 8 == 0) {
                best = Match {
                    length: MIN_MATCH,
                    distance,
                };
            }
        }
        best
    }
}

/// Whether a way back stays in the window and is longer than the one before, as it must be along a chain.
#[inline(always)]
fn is_near(distance: u16, reached: u16) -> bool {
    (distance > reached) & (usize::from(distance) <= WINDOW)
}
