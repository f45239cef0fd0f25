//! What the target shows already, which is not stored again.

use std::ops::Range;

use super::CopyError;
use super::target::Place;
use crate::buffer::Pages;
use crate::buffer::is_zero;

/// Pieces that are compared as one, unless clusters have to be; bytes.
const GRAIN: u64 = 4096;

/// Bytes of a piece that is stored as a whole if any of it differs.
fn grain(place: &Place<'_>) -> u64 {
    place.granule.unwrap_or(place.unit).max(GRAIN)
}

/// Reads what the target shows in a range; behind its end are zeros.
fn read<'b>(
    place: &Place<'_>,
    range: &Range<u64>,
    room: &'b mut Pages,
) -> Result<&'b [u8], CopyError> {
    let index = |len: u64| usize::try_from(len).unwrap_or(usize::MAX);
    let len = index(range.end - range.start);
    room.grow(len);
    let there = index(place.len.clamp(range.start, range.end) - range.start);
    let bytes = room.get_mut(..len).unwrap_or_default();
    let (inside, behind) = bytes.split_at_mut(there);
    place.read(inside, range.start)?;
    behind.fill(0);
    Ok(bytes)
}

/// The parts of a range that the target shows otherwise than `bytes`, in pieces that begin where the range does.
pub(super) fn changes(
    place: &Place<'_>,
    bytes: &[u8],
    range: Range<u64>,
    room: &mut Pages,
) -> Result<Vec<Range<u64>>, CopyError> {
    let grain = usize::try_from(grain(place)).unwrap_or(usize::MAX);
    let old = read(place, &range, room)?;
    let pieces = bytes.chunks(grain).zip(old.chunks(grain));
    Ok(runs(
        pieces.map(|(new, old)| (new.len() as u64, new != old)),
        range.start,
    ))
}

/// Sees to it that a range reads as zeros, and stores none where it does.
pub(super) fn zero(
    place: &Place<'_>,
    range: Range<u64>,
    room: &mut Pages,
) -> Result<(), CopyError> {
    let grain = grain(place);
    let end = range.end.min(place.len);
    let mut at = range.start;
    while at < end {
        let asked_from = at;
        let mut data = Vec::new();
        for extent in place.extents(at..end)? {
            if !extent.kind.reads_as_zeros() {
                let start = (extent.offset / grain * grain).max(at);
                let stop = extent.end().next_multiple_of(grain).min(range.end);
                if start < stop {
                    data.push(start..stop);
                }
                at = at.max(stop);
            }
            at = at.max(extent.end());
        }
        if at == asked_from {
            // One that says nothing may have anything.
            data.push(at..range.end);
            at = range.end;
        }
        for part in data {
            zero_data(place, part, grain, room)?;
        }
    }
    Ok(())
}

/// The same where the target has data, which may be zeros.
fn zero_data(
    place: &Place<'_>,
    range: Range<u64>,
    grain: u64,
    room: &mut Pages,
) -> Result<(), CopyError> {
    let mut at = range.start;
    while at < range.end {
        let end = (at / grain * grain)
            .saturating_add(place.chunk.next_multiple_of(grain))
            .min(range.end);
        let old = read(place, &(at..end), room)?;
        let step = usize::try_from(grain).unwrap_or(usize::MAX);
        let pieces = old.chunks(step);
        let found = runs(
            pieces.map(|piece| (piece.len() as u64, !is_zero(piece))),
            at,
        );
        for part in found {
            place.zero(part)?;
        }
        at = end;
    }
    Ok(())
}

/// The ranges of those pieces that are wanted; they follow one another from `start` on.
fn runs(pieces: impl Iterator<Item = (u64, bool)>, start: u64) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = start;
    for (len, is_wanted) in pieces {
        let piece = at..at + len;
        at = piece.end;
        match found.last_mut() {
            _ if !is_wanted => {}
            Some(last) if last.end == piece.start => last.end = piece.end,
            _ => found.push(piece),
        }
    }
    found
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    #[test]
    fn wanted_pieces_that_touch_are_one() {
        let pieces = [(4, true), (4, true), (4, false), (2, true)];
        assert_eq!(runs(pieces.into_iter(), 10), [10..18, 22..24]);
        assert!(runs([(4, false)].into_iter(), 0).is_empty());
    }
}
