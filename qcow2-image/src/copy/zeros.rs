//! Zeros among data.

use std::ops::Range;

use crate::buffer::is_zero;

/// The stretches of `bytes`, which begin at `offset`, that must be stored: all but the pieces of `granule` bytes, at
/// multiples of that, which are zero.
pub(super) fn stretches(bytes: &[u8], offset: u64, granule: u64) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let (mut at, mut rest) = (offset, bytes);
    while !rest.is_empty() {
        let piece = usize::try_from(granule - at % granule).unwrap_or(usize::MAX);
        let (piece, behind) = rest.split_at(piece.min(rest.len()));
        let end = at + piece.len() as u64;
        if !is_zero(piece) {
            match found.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => found.push(at..end),
            }
        }
        (at, rest) = (end, behind);
    }
    found
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    #[test]
    fn whole_pieces_of_zeros_are_left_out() {
        let mut bytes = vec![0; 1000];
        bytes[99] = 1;
        bytes[300] = 1;
        bytes[400] = 1;
        bytes[999] = 1;
        assert_eq!(stretches(&bytes, 0, 100), [0..100, 300..500, 900..1000]);
        // Pieces lie at multiples of their size, the first and the last may be shorter.
        assert_eq!(stretches(&bytes, 50, 100), [100..200, 300..500, 1000..1050]);
        assert_eq!(stretches(&bytes, 7, 4096), vec![7..1007; 1]);
        assert!(stretches(&[0; 64], 3, 16).is_empty());
        assert!(stretches(&[], 3, 16).is_empty());
    }

    #[test]
    fn a_single_bit_is_not_zero() {
        for len in [1, 63, 64, 65, 200] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in [0, len / 2, len - 1] {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
