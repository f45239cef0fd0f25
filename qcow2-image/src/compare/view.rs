//! What one disk is, place by place.

use std::collections::VecDeque;
use std::ops::Range;

use qcow2_format::header::CryptMethod;
use qcow2_io::Operation;

use super::{CompareError, Side};
use crate::chain::{Chain, Found, Layer, Local, Walker};
use crate::{Image, ImageError};

/// Extents that a file is asked for at a time.
const BATCH: usize = 256;

/// What a place is, as far as a strict comparison tells it apart; in which layer does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// No layer says anything; one may keep a place all the same.
    Nothing {
        has_place: bool,
    },
    /// Zeros, as a zero cluster or a hole of a raw disk. Behind the end of a layer that is too short are such, too.
    Zeros {
        has_place: bool,
    },
    /// Bytes as they are or, without a place, encrypted; where the file has a hole they are zeros.
    Data {
        has_place: bool,
        is_hole: bool,
    },
    Compressed,
}

impl State {
    pub(super) fn reads_as_zeros(self) -> bool {
        matches!(
            self,
            Self::Nothing { .. } | Self::Zeros { .. } | Self::Data { is_hole: true, .. }
        )
    }
}

/// What is at some place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    pub(super) state: State,
    /// Where it comes from; nowhere behind the end.
    found: Option<Found>,
}

/// A disk, from front to back.
pub(super) struct View<'a> {
    side: Side,
    len: u64,
    /// Nobody asks for what lies behind.
    end: u64,
    chain: Chain<'a>,
    walker: Walker<'a>,
    /// Parts of the disk that its file was asked about, and which of them are holes.
    parts: VecDeque<(Range<u64>, bool)>,
}

impl<'a> View<'a> {
    /// A look at what there is up to `limit`.
    pub(super) fn new(chain: &Chain<'a>, side: Side, limit: u64) -> Result<Self, CompareError> {
        let walker = Walker::new(chain, limit).map_err(|error| failed(side, 0, 0, error))?;
        Ok(Self {
            side,
            len: walker.len(),
            end: walker.len().min(limit),
            chain: chain.clone(),
            walker,
            parts: VecDeque::new(),
        })
    }

    /// What is at `at`, and where that ends. Behind the end of the disk is nothing, without end. Must not be asked of places
    /// before the last.
    pub(super) fn at(&mut self, at: u64) -> Result<(Look, u64), CompareError> {
        if at >= self.len {
            let state = State::Nothing { has_place: false };
            return Ok((Look { state, found: None }, u64::MAX));
        }
        let (side, len) = (self.side, self.len);
        let look = self.look(at);
        look.map_err(|error| failed(side, at, len - at, error))
    }

    fn look(&mut self, at: u64) -> Result<(Look, u64), ImageError> {
        let (found, run) = self.walker.look(at, self.end)?;
        let mut end = at + run;
        let layer = self.chain.layers().get(found.depth).copied();
        let image = layer.as_ref().and_then(Layer::image);
        let is_plain = image.is_none_or(|image| image.crypt.is_none());
        let state = match found.local {
            _ if found.is_cut => State::Zeros { has_place: false },
            Local::Nothing(place) => State::Nothing {
                has_place: is_plain && place.is_some(),
            },
            Local::Zero(place) => State::Zeros {
                has_place: is_plain && place.is_some(),
            },
            Local::Packed(_) => State::Compressed,
            Local::Data(host) => {
                let mut is_hole = false;
                if let Some(layer) = layer
                    && image.is_some_and(Image::maps_holes)
                {
                    (is_hole, end) = self.hole(layer, host, at..end)?;
                }
                State::Data {
                    has_place: is_plain,
                    is_hole,
                }
            }
        };
        let found = Some(found);
        Ok((Look { state, found }, end))
    }

    /// Whether the file has a hole for the beginning of a range of the disk, which lies there from `host` on; and how far that holds.
    fn hole(
        &mut self,
        layer: Layer<'_>,
        host: u64,
        range: Range<u64>,
    ) -> Result<(bool, u64), ImageError> {
        while self
            .parts
            .front()
            .is_some_and(|(part, _)| part.end <= range.start)
        {
            self.parts.pop_front();
        }
        if self.parts.is_empty() {
            let end = host.saturating_add(range.end - range.start);
            let mut at = range.start;
            for extent in layer.data().extents(host..end, BATCH)? {
                let stop = range.start + (extent.end().min(end) - host);
                self.parts
                    .push_back((at..stop, extent.kind.reads_as_zeros()));
                at = stop;
            }
        }
        Ok(match self.parts.front() {
            Some((part, is_hole)) => (*is_hole, part.end.min(range.end)),
            // A file that tells nothing has data.
            None => (false, range.end),
        })
    }

    /// Whether both may have layers in common.
    pub(super) fn shares_layer(&self, other: &Self) -> bool {
        self.walker.shares_layer(&other.walker)
    }

    /// How far from `at` both are certainly the same.
    pub(super) fn same_until(&self, other: &Self, at: u64) -> Option<u64> {
        self.walker.same_table(&other.walker, at)
    }

    /// Whether both take their bytes from the same place.
    pub(super) fn is_same(&self, look: Look, other: &Self, other_look: Look) -> bool {
        let (Some(one), Some(two)) = (look.found, other_look.found) else {
            return false;
        };
        self.walker.is_same_place(one, &other.walker, two)
            && !self.depends_on_passphrase(one)
            && !other.depends_on_passphrase(two)
    }

    /// Whether any passphrase opens the layer, each of which shows something else.
    fn depends_on_passphrase(&self, found: Found) -> bool {
        let layer = self.chain.layers().get(found.depth);
        let image = layer.and_then(Layer::image);
        image.is_some_and(|image| image.header().crypt_method == CryptMethod::Aes)
    }
}

fn failed(side: Side, offset: u64, len: u64, error: ImageError) -> CompareError {
    CompareError::Storage {
        side,
        offset,
        len,
        source: error.into_storage_error(Operation::Extents, offset, len),
    }
}
