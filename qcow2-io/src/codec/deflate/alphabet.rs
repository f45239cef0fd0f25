//! What lengths and distances are called in deflate (RFC 1951, 3.2.5).

/// Literals, the end of a block, and 29 lengths.
pub(super) const LITERALS: usize = 286;
/// Distances up to 4096.
pub(super) const DISTANCES: usize = 24;
/// The end of a block.
pub(super) const END: usize = 256;

/// The shortest match, bytes.
pub(super) const MIN_MATCH: usize = 3;
/// The longest.
pub(super) const MAX_MATCH: usize = 258;
/// The longest way back, bytes: what readers of qcow2 keep.
pub(super) const WINDOW: usize = 4096;

/// How many times each symbol occurs in a part of the stream.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    /// Literals and lengths. The end is not counted.
    pub(super) literals: [u16; LITERALS],
    pub(super) distances: [u16; DISTANCES],
}

impl Histogram {
    pub(super) const EMPTY: Self = Self {
        literals: [0; LITERALS],
        distances: [0; DISTANCES],
    };

    pub(super) fn add(&mut self, other: &Self) {
        for (to, from) in self.literals.iter_mut().zip(&other.literals) {
            *to += from;
        }
        for (to, from) in self.distances.iter_mut().zip(&other.distances) {
            *to += from;
        }
    }
}

/// The number of a length's symbol behind [`END`] + 1, for lengths from [`MIN_MATCH`] on.
pub(super) const LENGTH_CLASS: [u8; 256] = {
    let mut classes = [0; 256];
    let mut length = 0;
    while length < 255 {
        classes[length] = if length < 8 {
            length as u8
        } else {
            let log = length.ilog2();
            (log * 4 - 4 + (length >> (log - 2) & 3) as u32) as u8
        };
        length += 1;
    }
    // The longest has a symbol of its own.
    classes[255] = 28;
    classes
};

/// Bits that follow a length's symbol.
#[inline]
pub(super) const fn length_extra(class: usize) -> u32 {
    match class {
        0..8 | 28 => 0,
        _ => (class as u32 >> 2) - 1,
    }
}

/// The number of a distance's symbol.
#[inline(always)]
pub(super) fn distance_class(distance: u16) -> usize {
    let back = u32::from(distance).wrapping_sub(1) & 0xfff;
    // From the second power of two on there are two symbols for each.
    let log = (back | 2).ilog2();
    let upper = (back >> (log - 1) & 1) + log * 2;
    // The first two have one each.
    (upper - (u32::from(back < 2) << 1)) as usize
}

/// Bits that follow a distance's symbol.
#[inline(always)]
pub(super) const fn distance_extra(class: usize) -> u32 {
    (class as u32 >> 1).saturating_sub(1)
}
