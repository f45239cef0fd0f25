//! How much decoding a file can be worth.
//!
//! Every byte of a sound image belongs to one compressed cluster at most, and no stream is shorter than its codec allows. An image
//! may claim otherwise: a million windows, each a byte behind the other, would be decoded for hours. Some overlap may be
//! damage and is looked at; beyond that pieces are passed over, and the report says so. Pieces come in the order of the file,
//! so which ones these are depends on nothing else.

use qcow2_io::codec::Codec;

use super::Piece;
use crate::image::Image;
use crate::{Code, Finding, Place, Run, Structure};

/// Bytes that two bits of a deflate stream can stand for, times four.
const DEFLATE_RATIO_MAX: u64 = 1032;
/// Bytes that a block of Zstandard can stand for.
const ZSTD_BLOCK_MAX: u64 = 128 << 10;
/// Bytes of a block at least, and of the frame around the blocks.
const ZSTD_BLOCK_MIN: u64 = 4;
const ZSTD_FRAME_MIN: u64 = 6;
/// Pieces that may start too close behind another.
const CLOSE_MAX: u64 = 1024;
/// Bytes of windows that may lie on other windows, besides as many as all windows cover together.
const OVERLAP_FREE: u64 = 64 << 20;
/// Windows are whole sectors: this much of a neighbour's stream may be in one.
const TAIL: u64 = 511;

/// Decides what is decoded.
#[derive(Debug)]
pub(super) struct Limits {
    /// No stream is shorter.
    stream_min: u64,
    last_start: Option<u64>,
    /// The end of all windows.
    end: u64,
    /// Bytes in any window.
    covered: u64,
    close: u64,
    overlap: u64,
    passed_over: u64,
    first_passed_over: Option<Piece>,
}

impl Limits {
    pub(super) fn new(codec: Codec, cluster_size: u64) -> Self {
        let stream_min = match codec {
            Codec::Zstd => ZSTD_FRAME_MIN + cluster_size.div_ceil(ZSTD_BLOCK_MAX) * ZSTD_BLOCK_MIN,
            _ => cluster_size / DEFLATE_RATIO_MAX,
        };
        Self {
            stream_min: stream_min.max(1),
            last_start: None,
            end: 0,
            covered: 0,
            close: 0,
            overlap: 0,
            passed_over: 0,
            first_passed_over: None,
        }
    }

    /// Whether a piece is to be decoded. Pieces must come in their order.
    pub(super) fn admit(&mut self, image: &Image<'_>, piece: Piece) -> bool {
        let admitted = self.fits(piece.offset(image), piece.len(image));
        if !admitted {
            self.passed_over = self.passed_over.saturating_add(1);
            self.first_passed_over = self.first_passed_over.or(Some(piece));
        }
        admitted
    }

    fn fits(&mut self, offset: u64, len: u64) -> bool {
        let too_close = self
            .last_start
            .is_some_and(|last| offset.saturating_sub(last) < self.stream_min);
        let overlap = self.end.saturating_sub(offset);
        let overlap = overlap.saturating_sub(TAIL).min(len);
        if too_close && self.close >= CLOSE_MAX {
            return false;
        }
        if overlap > 0 && self.overlap + overlap > self.covered.saturating_add(OVERLAP_FREE) {
            return false;
        }
        self.close += u64::from(too_close);
        self.overlap += overlap;
        let end = offset.saturating_add(len);
        self.covered += end.saturating_sub(self.end.max(offset));
        self.end = self.end.max(end);
        self.last_start = Some(offset);
        true
    }

    /// Tells of what was passed over.
    pub(super) fn tell(&self, image: &Image<'_>, run: &Run<'_>) {
        let Some(first) = self.first_passed_over else {
            return;
        };
        let place = Place::of(Structure::CompressedData).at(first.offset(image), first.len(image));
        let detail = format!(
            "{} pieces of compressed data overlap others so closely that few of them can be whole; they were not decoded",
            self.passed_over
        );
        run.find(Finding::new(Code::CheckLimited, place, detail));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of windows of `len` bytes, each `step` behind the other, are decoded.
    fn admitted(codec: Codec, cluster: u64, step: u64, len: u64, count: u64) -> u64 {
        let mut limits = Limits::new(codec, cluster);
        (0..count)
            .map(|n| u64::from(limits.fits(n * step, len)))
            .sum()
    }

    #[test]
    fn streams_side_by_side_are_all_decoded_however_short() {
        for (codec, cluster, stream) in [
            (Codec::Zlib, 512, 3),
            (Codec::Zlib, 1 << 16, 64),
            (Codec::Zlib, 1 << 21, 2033),
            (Codec::Zstd, 1 << 16, 10),
            (Codec::Zstd, 1 << 21, 70),
        ] {
            let mut limits = Limits::new(codec, cluster);
            for n in 0..100_000_u64 {
                let (offset, end) = (n * stream, (n + 1) * stream);
                let window = end.next_multiple_of(512) - offset;
                assert!(limits.fits(offset, window), "{codec} {cluster}: {n}");
            }
        }
    }

    #[test]
    fn what_can_not_all_be_streams_is_passed_over() {
        // A byte apart: of those behind the first and the close ones, each 63rd could be a stream.
        let count = admitted(Codec::Zlib, 1 << 16, 1, 512, 100_000);
        assert_eq!(count, 1 + CLOSE_MAX + (99_999 - CLOSE_MAX) / 63);
        let count = admitted(Codec::Zstd, 1 << 16, 0, 512, 100_000);
        assert_eq!(count, 1 + CLOSE_MAX);
    }

    #[test]
    fn long_windows_on_top_of_each_other_are_passed_over() {
        let window = 4 << 20;
        let count = admitted(Codec::Zlib, 1 << 21, 4096, window, 10_000);
        let covered = 10_000 * 4096 + window;
        assert!(count * window <= 2 * covered + OVERLAP_FREE + window);
        assert!(count >= 20);
    }
}
