//! Cuts bytes into literals and matches.

use std::ops::Range;

use super::alphabet::{
    DISTANCES, END, Histogram, LENGTH_CLASS, LITERALS, MIN_MATCH, WINDOW, distance_class,
};
use super::chains::{Chains, Match};
use super::effort::Effort;
use super::window::{STRIP, Window};

/// Symbols after which a part ends; the last sequence may bring as many more.
const PART: usize = 1024;
/// Parts that are looked at together.
const PARTS: usize = 28;
const _: () = assert!(
    (PARTS + 2) * (2 * PART + 16) < 1 << 16,
    "histograms count in 16 bits"
);
/// Literals in a row after which fewer places are looked at, as a power of two.
const DULL_BITS: u32 = 7;

/// The longest way back that the shortest match is worth.
const FAR: u16 = 1024;

/// Literals, then a match; none when its length is 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence {
    pub(super) literals: u16,
    pub(super) length: u16,
    pub(super) distance: u16,
}

/// A piece of the stream that will lie in one block.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) sequences: Range<usize>,
    pub(super) bytes: Range<usize>,
    pub(super) histogram: Histogram,
}

/// The way of a cluster into sequences.
pub(super) struct Parser {
    chains: Chains,
    window: Window,
    /// Where in the data what is in the window starts.
    strip: usize,
    pub(super) sequences: Vec<Sequence>,
    pub(super) parts: Vec<Part>,
    /// Of the part that grows.
    histogram: Histogram,
    symbols: usize,
    part_sequences: usize,
    part_bytes: usize,
}

impl Parser {
    pub(super) fn new() -> Self {
        Self {
            chains: Chains::new(),
            window: Window::new(),
            strip: 0,
            sequences: Vec::new(),
            parts: Vec::new(),
            histogram: Histogram::EMPTY,
            symbols: 0,
            part_sequences: 0,
            part_bytes: 0,
        }
    }

    /// Forgets the cluster before.
    pub(super) fn clear(&mut self) {
        self.chains.clear();
    }

    /// Fills the sequences and parts with what stands at `from`, and says where they end: with the data, or earlier when
    /// there are enough for one look.
    pub(super) fn parse(&mut self, data: &[u8], from: usize, effort: Effort) -> usize {
        self.sequences.clear();
        self.parts.clear();
        self.part_sequences = 0;
        self.part_bytes = from;
        let strip = from / STRIP * STRIP;
        if strip == from {
            self.window
                .fill(&data[strip..data.len().min(strip + STRIP)]);
            self.strip = strip;
        }
        let end = self.window.end();
        let Effort {
            depth,
            nice,
            good,
            patience,
        } = effort;
        let mut at = WINDOW + from - strip;
        // Literals that belong to no sequence yet start here.
        let mut start = at;
        while end - at >= 4 && self.parts.len() < PARTS {
            let word = self.window.word(at);
            let latest = self.chains.enter(at, word);
            let mut best = self
                .chains
                .longest(&self.window, at, latest, 0, depth, nice);
            if !is_worth(best) {
                self.histogram.literals[usize::from(word as u8)] += 1;
                at += 1;
                let run = at - start;
                if run >> DULL_BITS > 0 {
                    let dull = self.window.bytes(at, end).iter().take(run >> DULL_BITS);
                    at += dull.len();
                    for byte in dull {
                        self.histogram.literals[usize::from(*byte)] += 1;
                    }
                    if at - start >= PART {
                        self.push(start..at, Match::default());
                        start = at;
                    }
                }
                continue;
            }
            // A match is given up for a better one that starts a little later.
            let mut entered = at + 1;
            'better: while best.length < good {
                for ahead in 1..=patience {
                    let later = at + ahead;
                    let latest = self.chains.enter(later, self.window.word(later));
                    entered = later + 1;
                    let floor = best.length - 1;
                    let other =
                        self.chains
                            .longest(&self.window, later, latest, floor, depth / 2, nice);
                    if is_better(other, best, ahead) {
                        for byte in self.window.bytes(at, later) {
                            self.histogram.literals[usize::from(*byte)] += 1;
                        }
                        at = later;
                        best = other;
                        continue 'better;
                    }
                }
                break;
            }
            self.push(start..at, best);
            at += best.length;
            start = at;
            for skipped in entered..at {
                self.chains.enter(skipped, self.window.word(skipped));
            }
        }
        if self.parts.len() < PARTS {
            for byte in self.window.bytes(at, end) {
                self.histogram.literals[usize::from(*byte)] += 1;
            }
            at = end;
            while start < end {
                let until = end.min(start + PART);
                self.push(start..until, Match::default());
                start = until;
            }
        }
        if self.symbols > 0 {
            self.end_part(at);
        }
        at - WINDOW + strip
    }

    #[inline(always)]
    fn push(&mut self, literals: Range<usize>, found: Match) {
        let end = literals.end + found.length;
        let count = literals.len();
        self.symbols += count;
        if found.length > 0 {
            let class = usize::from(LENGTH_CLASS[(found.length - MIN_MATCH) & 0xff]);
            self.histogram.literals[(END + 1 + class).min(LITERALS - 1)] += 1;
            self.histogram.distances[distance_class(found.distance).min(DISTANCES - 1)] += 1;
            self.symbols += 1;
        }
        self.sequences.push(Sequence {
            literals: count as u16,
            length: found.length as u16,
            distance: found.distance,
        });
        if self.symbols >= PART {
            self.end_part(end);
        }
    }

    #[cold]
    fn end_part(&mut self, end: usize) {
        let end = end - WINDOW + self.strip;
        self.parts.push(Part {
            sequences: self.part_sequences..self.sequences.len(),
            bytes: self.part_bytes..end,
            histogram: self.histogram.clone(),
        });
        self.histogram = Histogram::EMPTY;
        self.symbols = 0;
        self.part_sequences = self.sequences.len();
        self.part_bytes = end;
    }
}

/// Whether a match takes fewer bits than its literals would.
#[inline(always)]
fn is_worth(found: Match) -> bool {
    found.length > MIN_MATCH || found.length == MIN_MATCH && found.distance <= FAR
}

/// Whether a match that starts `ahead` bytes later saves more bits than this one, with the literals before it.
#[inline(always)]
fn is_better(other: Match, best: Match, ahead: usize) -> bool {
    if other.length == 0 {
        return false;
    }
    let bytes = |found: Match| 4 * found.length;
    let bits = |found: Match| found.distance.ilog2() as usize;
    let least = if ahead == 1 { 2 } else { 6 };
    bytes(other) + bits(best) > bytes(best) + bits(other) + least
}
