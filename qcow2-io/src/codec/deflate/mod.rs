//! Writes raw deflate (RFC 1951) for readers that keep 4 KiB of what they have read, as those of qcow2 do.
//!
//! Made for clusters: all bytes are there at once, and the window is so small that everything a search needs stays in the
//! first level cache. A cluster is cut into literals and matches by hash chains (`chains`, `parse`), the result into blocks
//! wherever different codes pay (`split`), and each block is written in the shortest of the format's three ways (`block`).
//! What a stream holds depends on the cluster and the level alone.

#![forbid(unsafe_code)]
#![expect(
    clippy::indexing_slicing,
    reason = "indices are bounded by masks or by the lengths of what was cut before; a test for each costs speed"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "only low bits are meant, or symbols, lengths and counts of a bounded part"
)]
#![expect(
    clippy::little_endian_bytes,
    reason = "deflate is little-endian, and so are words whose first byte is to be the lowest"
)]
#![expect(
    clippy::inline_always,
    reason = "calls in the loops over each byte cost a tenth of the speed"
)]
#![expect(
    clippy::needless_bitwise_bool,
    reason = "what can't be foretold is better one branch than two"
)]

mod alphabet;
mod bits;
mod block;
mod chains;
mod effort;
mod huffman;
mod parse;
mod split;
mod window;

use bits::BitWriter;
use effort::Effort;
use parse::Parser;
use split::Splitter;

/// What one cluster after the other is compressed with.
pub(super) struct Encoder {
    parser: Parser,
    splitter: Splitter,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self {
            parser: Parser::new(),
            splitter: Splitter::default(),
        }
    }

    /// Writes a stream with a final block to the start of `out`, and gives its length in bytes; `None` when `out` is too
    /// short for it. Levels go from 1 to 9.
    pub(super) fn compress(&mut self, level: i32, data: &[u8], out: &mut [u8]) -> Option<usize> {
        let effort = Effort::of_level(level);
        let mut writer = BitWriter::new(out);
        self.parser.clear();
        let mut at = 0;
        while at < data.len() {
            at = self.parser.parse(data, at, effort);
            let parts = &mut self.parser.parts;
            self.splitter.join(parts);
            for part in &*parts {
                let is_last = part.bytes.end == data.len();
                if !block::write(&mut writer, part, &self.parser.sequences, data, is_last) {
                    return None;
                }
            }
        }
        if data.is_empty() {
            // A final block of fixed codes with nothing but its end.
            if writer.room() < 10 {
                return None;
            }
            writer.put(3, 10);
        }
        Some(writer.finish())
    }
}

#[cfg(test)]
mod tests;
