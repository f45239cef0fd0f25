//! Parts of requests whose bytes lie in several buffers.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

/// `len` bytes from `skip` on of what the buffers hold together.
pub(crate) fn cut<'a>(bufs: &'a [IoSlice<'_>], skip: u64, len: u64) -> Vec<IoSlice<'a>> {
    let mut start = 0;
    bufs.iter()
        .map(|buf| (buf, part(&mut start, buf.len(), skip, len)))
        .filter(|(_, part)| !part.is_empty())
        .filter_map(|(buf, part)| buf.get(part).map(IoSlice::new))
        .collect()
}

/// As [`cut`], for buffers that are to be filled.
pub(crate) fn cut_mut<'a>(
    bufs: &'a mut [IoSliceMut<'_>],
    skip: u64,
    len: u64,
) -> Vec<IoSliceMut<'a>> {
    let mut start = 0;
    bufs.iter_mut()
        .map(|buf| {
            let part = part(&mut start, buf.len(), skip, len);
            (buf, part)
        })
        .filter(|(_, part)| !part.is_empty())
        .filter_map(|(buf, part)| buf.get_mut(part).map(IoSliceMut::new))
        .collect()
}

/// Which bytes of a buffer of `buf` bytes, before which others have `start`, are among the `len` from `skip` on of what all hold
/// together. Makes `start` that of the next buffer.
fn part(start: &mut u64, buf: usize, skip: u64, len: u64) -> Range<usize> {
    let (first, end) = (*start, *start + buf as u64);
    *start = end;
    let within = |at: u64| usize::try_from(at.clamp(first, end) - first).unwrap_or(buf);
    within(skip)..within(skip.saturating_add(len))
}

/// How many bytes the buffers hold together.
pub(crate) fn len_of(bufs: &[IoSlice<'_>]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

/// Copies what the buffers hold to the start of `out`; tells how much it is.
pub(crate) fn gather(bufs: &[IoSlice<'_>], out: &mut [u8]) -> usize {
    let mut filled = 0;
    for buf in bufs {
        let end = filled + buf.len();
        if let Some(to) = out.get_mut(filled..end) {
            to.copy_from_slice(buf);
        }
        filled = end;
    }
    filled
}

/// Copies `bytes` to where the buffers hold the bytes from `skip` on.
pub(crate) fn fill_from(bufs: &mut [IoSliceMut<'_>], skip: u64, bytes: &[u8]) {
    let mut rest = bytes;
    for part in &mut cut_mut(bufs, skip, bytes.len() as u64) {
        let (now, later) = rest.split_at_checked(part.len()).unwrap_or((rest, &[]));
        part.copy_from_slice(now);
        rest = later;
    }
}

/// Zeroes `len` bytes from `skip` on.
pub(crate) fn zero(bufs: &mut [IoSliceMut<'_>], skip: u64, len: u64) {
    for part in &mut cut_mut(bufs, skip, len) {
        part.fill(0);
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    #[test]
    fn parts_cross_buffers_and_skip_empty_ones() {
        let bufs = [&b"abc"[..], b"", b"defg", b"h"].map(IoSlice::new);
        let joined = |skip, len| -> Vec<u8> {
            cut(&bufs, skip, len)
                .iter()
                .flat_map(|part| part.to_vec())
                .collect()
        };
        assert_eq!(joined(0, 8), b"abcdefgh");
        assert_eq!(joined(2, 3), b"cde");
        assert_eq!(joined(3, 4), b"defg");
        assert_eq!(joined(7, 1), b"h");
        assert_eq!(joined(4, 0), b"");
    }

    #[test]
    fn filling_reaches_the_right_bytes() {
        let (mut a, mut b) = ([b'.'; 3], [b'.'; 4]);
        let mut bufs = [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)];
        fill_from(&mut bufs, 2, b"xyz");
        zero(&mut bufs, 0, 1);
        assert_eq!((&a, &b), (b"\0.x", b"yz.."));
    }
}
