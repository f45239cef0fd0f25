//! How often the clusters of one page are referenced, where that is more than once.

use super::page::Words;

/// Positions in a page.
const POSITIONS: usize = 512;
/// Entries of the sparse form, at most.
const SPARSE_MAX: usize = 32;

/// Counts for some positions of a page: those set in a mask that the page keeps, and that comes with each call.
#[derive(Clone, Debug, Default)]
pub(super) enum Counts {
    #[default]
    Empty,
    /// All positions have the same count: clusters that the same snapshots share.
    Uniform(u64),
    /// Position and count, sorted by position.
    Sparse(Vec<(u16, u64)>),
    /// Counts below 256.
    Narrow(Box<[u8; POSITIONS]>),
    Wide(Box<[u64; POSITIONS]>),
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "positions are below 512, counts compared before"
)]
#[expect(clippy::indexing_slicing, reason = "positions in a page are below 512")]
impl Counts {
    /// The count of a position that was set.
    #[inline]
    pub(super) fn get(&self, at: usize) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Uniform(count) => *count,
            Self::Sparse(entries) => entries
                .binary_search_by_key(&(at as u16), |entry| entry.0)
                .map_or(0, |found| entries[found].1),
            Self::Narrow(counts) => u64::from(counts[at]),
            Self::Wide(counts) => counts[at],
        }
    }

    /// Sets the count of a position if that needs no other form than the narrow one that there is.
    #[inline]
    pub(super) fn set_narrow(&mut self, at: usize, count: u64) -> bool {
        match (self, u8::try_from(count)) {
            (Self::Narrow(counts), Ok(count)) => {
                counts[at] = count;
                true
            }
            _ => false,
        }
    }

    /// Sets the count of a position. `set` are the positions that have one already.
    pub(super) fn set(&mut self, at: usize, count: u64, set: &Words) {
        match self {
            Self::Empty => *self = Self::Uniform(count),
            Self::Uniform(all) if *all == count => {}
            Self::Uniform(_) => {
                self.spread(set);
                self.set(at, count, set);
            }
            Self::Sparse(entries) => match entries.binary_search_by_key(&(at as u16), |e| e.0) {
                Ok(found) => entries[found].1 = count,
                Err(place) if entries.len() < SPARSE_MAX => {
                    entries.insert(place, (at as u16, count));
                }
                Err(_) => {
                    let entries = std::mem::take(entries);
                    *self = Self::Narrow(Box::new([0; POSITIONS]));
                    for (at, count) in entries {
                        self.set(usize::from(at), count, set);
                    }
                    self.set(at, count, set);
                }
            },
            Self::Narrow(counts) if u8::try_from(count).is_ok() => counts[at] = count as u8,
            Self::Narrow(counts) => {
                let mut wide = Box::new([0; POSITIONS]);
                for (wide, narrow) in wide.iter_mut().zip(counts.iter()) {
                    *wide = u64::from(*narrow);
                }
                wide[at] = count;
                *self = Self::Wide(wide);
            }
            Self::Wide(counts) => counts[at] = count,
        }
    }

    /// Sets the count of a run of positions.
    pub(super) fn set_run(&mut self, from: usize, to: usize, count: u64, set: &Words) {
        match self {
            Self::Narrow(counts) if u8::try_from(count).is_ok() => {
                counts[from..to].fill(count as u8);
            }
            Self::Wide(counts) => counts[from..to].fill(count),
            Self::Empty => *self = Self::Uniform(count),
            Self::Uniform(all) if *all == count => {}
            _ => {
                for at in from..to {
                    self.set(at, count, set);
                }
            }
        }
    }

    /// Bytes of memory besides the value itself, about.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Empty | Self::Uniform(_) => 0,
            Self::Sparse(entries) => entries.capacity() * 16,
            Self::Narrow(_) => POSITIONS,
            Self::Wide(_) => POSITIONS * 8,
        }
    }

    /// Leaves the uniform form, as other counts are to come.
    fn spread(&mut self, set: &Words) {
        let Self::Uniform(count) = *self else {
            return;
        };
        *self = Self::Sparse(Vec::new());
        for at in (0..POSITIONS).filter(|at| set[at / 64] & (1 << (at % 64)) != 0) {
            self.set(at, count, set);
        }
    }
}
