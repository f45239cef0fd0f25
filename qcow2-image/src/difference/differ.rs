//! Two states of a disk side by side, by what their tables say.

use crate::ImageError;
use crate::chain::{Chain, Walker};

/// Goes along two states of a disk, never back.
#[derive(Debug)]
pub(crate) struct Differ<'a> {
    one: Walker<'a>,
    two: Walker<'a>,
}

/// What tables say of a stretch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Both states are the same there.
    Same,
    /// Only their contents could tell. At most one is known to read as zeros.
    Open {
        /// The first state is.
        is_zero: bool,
        /// The second one is.
        other_is_zero: bool,
    },
}

impl<'a> Differ<'a> {
    /// Two states side by side, up to `limit`. Either may be shorter; zeros follow then.
    pub(crate) fn new(one: &Chain<'a>, two: &Chain<'a>, limit: u64) -> Result<Self, ImageError> {
        Ok(Self {
            one: Walker::new(one, limit)?,
            two: Walker::new(two, limit)?,
        })
    }

    /// What the tables say of `at`, which must not be before the last place asked for, and up to where (at most `end`).
    pub(crate) fn look(&mut self, at: u64, end: u64) -> Result<(Verdict, u64), ImageError> {
        if let Some(stop) = self.one.same_table(&self.two, at) {
            return Ok((Verdict::Same, stop.min(end)));
        }
        let (one, run) = self.one.look(at, end)?;
        let (two, run) = self.two.look(at, at + run)?;
        let (is_zero, other_is_zero) = (one.local.reads_as_zeros(), two.local.reads_as_zeros());
        let verdict = if (is_zero && other_is_zero) || self.one.is_same_place(one, &self.two, two) {
            Verdict::Same
        } else {
            Verdict::Open {
                is_zero,
                other_is_zero,
            }
        };
        Ok((verdict, at + run))
    }
}
