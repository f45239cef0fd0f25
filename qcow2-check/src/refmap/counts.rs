//! How often the clusters of one page are referenced, where that is more than once.

use std::collections::BTreeMap;

/// Positions in a page.
const POSITIONS: usize = 512;

/// Entries of the sparse form before the dense one is smaller for what it holds.
const SPARSE_MAX: usize = 64;
/// In the dense form: the count stands in `large`.
const LARGE: u8 = u8::MAX;

/// Counts for some positions of a page. Only positions that were set may be asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    form: Form,
    /// Counts the form has no room for.
    large: BTreeMap<u16, u64>,
}

#[derive(Clone, Debug, Default)]
enum Form {
    #[default]
    Empty,
    /// Position and count, sorted by position.
    Sparse(Vec<(u16, u8)>),
    Dense(Box<[u8; POSITIONS]>),
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "positions are below 512, counts compared before"
)]
#[expect(clippy::indexing_slicing, reason = "positions in a page are below 512")]
impl Counts {
    #[inline]
    pub(super) fn get(&self, at: usize) -> u64 {
        let small = match &self.form {
            Form::Empty => 0,
            Form::Sparse(entries) => entries
                .binary_search_by_key(&(at as u16), |e| e.0)
                .map_or(0, |found| entries[found].1),
            Form::Dense(counts) => counts[at],
        };
        if small == LARGE {
            self.large.get(&(at as u16)).copied().unwrap_or(0)
        } else {
            u64::from(small)
        }
    }

    pub(super) fn set(&mut self, at: usize, count: u64) {
        let small = if count < u64::from(LARGE) {
            count as u8
        } else {
            self.large.insert(at as u16, count);
            LARGE
        };
        match &mut self.form {
            Form::Empty => self.form = Form::Sparse(vec![(at as u16, small)]),
            Form::Dense(counts) => counts[at] = small,
            Form::Sparse(entries) => match entries.binary_search_by_key(&(at as u16), |e| e.0) {
                Ok(found) => entries[found].1 = small,
                Err(place) if entries.len() < SPARSE_MAX => {
                    entries.insert(place, (at as u16, small));
                }
                Err(_) => self.dense()[at] = small,
            },
        }
    }

    pub(super) fn set_run(&mut self, from: usize, to: usize, count: u64) {
        if to - from < 16 || count >= u64::from(LARGE) {
            for at in from..to {
                self.set(at, count);
            }
            return;
        }
        self.dense()[from..to].fill(count as u8);
    }

    fn dense(&mut self) -> &mut [u8; POSITIONS] {
        if !matches!(self.form, Form::Dense(_)) {
            let mut counts = Box::new([0; POSITIONS]);
            if let Form::Sparse(entries) = &self.form {
                for (at, count) in entries {
                    counts[usize::from(*at)] = *count;
                }
            }
            self.form = Form::Dense(counts);
        }
        match &mut self.form {
            Form::Dense(counts) => counts,
            Form::Empty | Form::Sparse(_) => unreachable!("made dense just above"),
        }
    }
}
