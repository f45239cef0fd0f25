//! Where blocks end.
//!
//! A block has codes of its own, which cost as much as some hundred bits. So neighbouring parts share a block unless they
//! are too different: the two that gain most are joined, again and again, until none gain.

use super::alphabet::Histogram;
use super::parse::Part;

/// Bits of a block's header, whatever is in it.
const HEADER: f32 = 120.0;
/// Bits it takes to tell the length of one symbol's code.
const PER_SYMBOL: f32 = 3.8;

/// The blocks that parts are being joined to.
#[derive(Default)]
pub(super) struct Splitter {
    costs: Vec<f32>,
    /// What is gained when a block is joined with the next.
    gains: Vec<f32>,
}

impl Splitter {
    /// Joins neighbouring parts until more blocks would be cheaper.
    pub(super) fn join(&mut self, parts: &mut Vec<Part>) {
        self.costs.clear();
        self.costs
            .extend(parts.iter().map(|part| cost(&part.histogram)));
        self.gains.clear();
        for first in 1..parts.len() {
            self.gains.push(self.gain(parts, first - 1));
        }
        while let Some((first, gain)) = self.best() {
            if gain <= 0.0 {
                break;
            }
            let next = parts.remove(first + 1);
            let part = &mut parts[first];
            part.histogram.add(&next.histogram);
            part.bytes.end = next.bytes.end;
            part.sequences.end = next.sequences.end;
            let both = self.costs[first] + self.costs.remove(first + 1) - gain;
            self.costs[first] = both;
            self.gains.remove(first);
            if first > 0 {
                self.gains[first - 1] = self.gain(parts, first - 1);
            }
            if first < self.gains.len() {
                self.gains[first] = self.gain(parts, first);
            }
        }
    }

    fn gain(&self, parts: &[Part], first: usize) -> f32 {
        let mut both = parts[first].histogram.clone();
        both.add(&parts[first + 1].histogram);
        self.costs[first] + self.costs[first + 1] - cost(&both)
    }

    fn best(&self) -> Option<(usize, f32)> {
        let gains = self.gains.iter().copied().enumerate();
        gains.reduce(|best, other| if other.1 > best.1 { other } else { best })
    }
}

/// About how many bits a block takes, but for those that are the same in any block.
fn cost(histogram: &Histogram) -> f32 {
    HEADER + entropy(&histogram.literals) + entropy(&histogram.distances)
}

/// The bits of symbols that occur so many times, and of a description of their code.
#[expect(
    clippy::cast_precision_loss,
    reason = "a sum of 16 bits, or little more"
)]
fn entropy(counts: &[u16]) -> f32 {
    const LANES: usize = 8;
    let mut total = 0;
    let mut sums = [0.0; LANES];
    let mut used = [0.0; LANES];
    let (chunks, rest) = counts.as_chunks::<LANES>();
    let mut last = [0; LANES];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    for chunk in chunks.iter().chain([&last]) {
        for lane in 0..LANES {
            let count = chunk[lane];
            total += u32::from(count);
            sums[lane] += weighted_log(f32::from(count));
            used[lane] += f32::from(count.min(1));
        }
    }
    let sum: f32 = sums.iter().sum();
    let used: f32 = used.iter().sum();
    weighted_log(total as f32) - sum + PER_SYMBOL * used
}

/// `count` times its logarithm to the base 2, to about three digits; 0 for 0.
#[expect(clippy::cast_precision_loss, reason = "it's about three digits")]
#[inline(always)]
fn weighted_log(count: f32) -> f32 {
    let bits = count.to_bits();
    // The bits of a number are its exponent, then its fraction: a logarithm with straight lines between powers of two.
    let straight = bits.cast_signed() as f32 / 8_388_608.0 - 127.0;
    let fraction = f32::from_bits(bits & 0x7f_ffff | 0x3f80_0000) - 1.0;
    count * (straight + 0.346 * fraction * (1.0 - fraction))
}
