//! A walk along the disk, which remembers what each layer has said so far.

use std::collections::VecDeque;
use std::ops::Range;

use qcow2_io::ExtentKind;

use super::{Chain, Layer, Local};
use crate::ImageError;

/// Stretches that a layer is asked for at a time.
const BATCH: usize = 256;

/// Goes along the disk, never back. Each layer is looked at once, and only where those above it have nothing.
#[derive(Debug)]
pub(crate) struct Walker<'a> {
    steps: Vec<Step<'a>>,
    /// Nobody will ask for what lies behind.
    limit: u64,
}

#[derive(Debug)]
struct Step<'a> {
    layer: Layer<'a>,
    len: u64,
    known: VecDeque<(Range<u64>, Local)>,
}

/// What the disk is at some place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Which layer says it; where none does, the last that could.
    pub(crate) depth: usize,
    pub(crate) local: Local,
    /// The next layer is too short to say anything, so zeros follow whatever is below.
    pub(crate) is_cut: bool,
}

impl<'a> Walker<'a> {
    /// A walk that ends at `limit` or before.
    pub(crate) fn new(chain: &Chain<'a>, limit: u64) -> Result<Self, ImageError> {
        let steps = chain.layers.iter().map(|layer| {
            Ok(Step {
                layer: *layer,
                len: layer.len()?,
                known: VecDeque::new(),
            })
        });
        Ok(Self {
            steps: steps.collect::<Result<_, ImageError>>()?,
            limit,
        })
    }

    /// Bytes of the disk when the walk began.
    pub(crate) fn len(&self) -> u64 {
        self.steps.first().map_or(0, |step| step.len)
    }

    /// What the disk is at `at`, which must not be before the last place asked for, and for how many of the bytes up to `end`
    /// (at least one) that holds.
    pub(crate) fn look(&mut self, at: u64, end: u64) -> Result<(Found, u64), ImageError> {
        let mut end = end;
        let mut found = Found {
            depth: 0,
            local: Local::Nothing(None),
            is_cut: false,
        };
        for (depth, step) in self.steps.iter_mut().enumerate() {
            // Behind the end of a layer is nothing of those above it either.
            if at >= step.len {
                found.is_cut = true;
                break;
            }
            let (local, stop) = step.look(at, end.min(step.len), self.limit)?;
            found = Found {
                depth,
                local,
                is_cut: false,
            };
            end = stop;
            if !matches!(local, Local::Nothing(_)) {
                break;
            }
        }
        Ok((found, end - at))
    }

    /// Whether what was found here and what was found in another walk is stored bytes of the same place.
    pub(crate) fn is_same_place(&self, found: Found, other: &Self, other_found: Found) -> bool {
        let is_same_place = match (found.local, other_found.local) {
            (Local::Data(one), Local::Data(two)) => one == two,
            (Local::Packed(one), Local::Packed(two)) => one == two,
            _ => false,
        };
        let (one, two) = (
            self.steps.get(found.depth),
            other.steps.get(other_found.depth),
        );
        is_same_place
            && one
                .zip(two)
                .is_some_and(|(one, two)| one.layer.origin == two.layer.origin)
    }

    /// Whether some layer is one of the other walk's, too.
    pub(crate) fn shares_layer(&self, other: &Self) -> bool {
        self.steps.iter().any(|one| {
            let mut others = other.steps.iter();
            others.any(|two| one.layer.origin == two.layer.origin)
        })
    }

    /// How far from `at` both disks are certainly the same because one L2 table serves both.
    pub(crate) fn same_table(&self, other: &Self, at: u64) -> Option<u64> {
        let (one, two) = (self.steps.first()?, other.steps.first()?);
        let (a, b) = (one.layer.image?, two.layer.image?);
        if self.steps.len() != other.steps.len() || at >= one.len.min(two.len) {
            return None;
        }
        let same = self.steps.iter().zip(&other.steps);
        if !same
            .clone()
            .all(|(one, two)| one.layer.origin == two.layer.origin)
        {
            return None;
        }
        let table = |image: &crate::Image| image.l1.get(image.l1_index(at)).l2_table();
        if table(a) != table(b) {
            return None;
        }
        let coverage = a.geometry.l2_coverage();
        Some(
            (at / coverage + 1)
                .saturating_mul(coverage)
                .min(one.len)
                .min(two.len),
        )
    }
}

impl Step<'_> {
    /// What this layer says of `at`, and up to where.
    fn look(&mut self, at: u64, end: u64, limit: u64) -> Result<(Local, u64), ImageError> {
        while self.known.front().is_some_and(|(range, _)| range.end <= at) {
            self.known.pop_front();
        }
        if self.known.front().is_none_or(|(range, _)| range.start > at) {
            self.known.clear();
            self.learn(at, end, limit)?;
        }
        match self.known.front() {
            Some((range, local)) => Ok((local.advanced(at - range.start), range.end.min(end))),
            None => Ok((Local::Data(at), end)),
        }
    }

    fn learn(&mut self, at: u64, end: u64, limit: u64) -> Result<(), ImageError> {
        if let Some(image) = self.layer.image {
            return image.look(at..end, BATCH, &mut self.known);
        }
        // A file system is not asked for every gap of an image above.
        let stop = self.len.min(limit).max(end);
        let mut at = at;
        for extent in self.layer.storage.extents(at..stop, BATCH)? {
            let end = extent.end().min(stop);
            if end <= at {
                continue;
            }
            let local = match extent.kind {
                ExtentKind::Hole => Local::Zero(Some(at)),
                // Images note such, which are seen as plain disks here.
                ExtentKind::Zero => Local::Zero(None),
                _ => Local::Data(at),
            };
            self.known.push_back((at..end, local));
            at = end;
        }
        Ok(())
    }
}
