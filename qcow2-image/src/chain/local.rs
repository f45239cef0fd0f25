//! What one image says of a stretch of its disk, whatever lies below.

use std::collections::VecDeque;
use std::ops::Range;

use qcow2_format::{ClusterKind, CompressedExtent, HostOffset};

use crate::extents::ENTRIES_MAX;
use crate::scan::Scan;
use crate::{Image, ImageError};

/// What one layer says of a stretch of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Local {
    /// It is stored from here on in the data file.
    Data(u64),
    /// It is in a compressed cluster.
    Packed(CompressedExtent),
    /// It is zeros, and may have a place in the data file.
    Zero(Option<u64>),
    /// Nothing, though it may have a place in the data file.
    Nothing(Option<u64>),
}

impl Local {
    /// The same, `len` bytes further on.
    pub(crate) fn advanced(self, len: u64) -> Self {
        let on = |place: u64| place.wrapping_add(len);
        match self {
            Self::Data(place) => Self::Data(on(place)),
            Self::Zero(place) => Self::Zero(place.map(on)),
            Self::Nothing(place) => Self::Nothing(place.map(on)),
            Self::Packed(extent) => Self::Packed(extent),
        }
    }

    pub(crate) fn reads_as_zeros(self) -> bool {
        matches!(self, Self::Zero(_) | Self::Nothing(_))
    }

    /// Whether `next` goes on behind `len` bytes of this.
    pub(crate) fn joins(self, len: u64, next: Self) -> bool {
        !matches!(self, Self::Packed(_)) && self.advanced(len) == next
    }
}

impl Image {
    /// Notes what this image says of a range of the disk, stretch by stretch, up to `max` of them.
    pub(super) fn look(
        &self,
        range: Range<u64>,
        max: usize,
        known: &mut VecDeque<(Range<u64>, Local)>,
    ) -> Result<(), ImageError> {
        let _pass = self.gate.enter();
        let mut scan = Scan::new(self, range).limited(ENTRIES_MAX);
        while known.len() < max
            && let Some(stretch) = scan.next()?
        {
            known.push_back((stretch.range, stretch.local));
        }
        Ok(())
    }

    /// What is said of the bytes from `guest` on, and of how many of the next `len` (at least one) it is said without a gap.
    /// The caller has a pass.
    pub(crate) fn local(&self, guest: u64, len: u64) -> Result<(Local, u64), ImageError> {
        let (first, mut run) = self.local_or_no_table(guest, len)?;
        while run < len {
            let (next, more) = self.local_or_no_table(guest + run, len - run)?;
            if !first.joins(run, next) {
                break;
            }
            run += more;
        }
        Ok((first, run))
    }

    fn local_or_no_table(&self, guest: u64, len: u64) -> Result<(Local, u64), ImageError> {
        match self.unmapped(guest, len) {
            0 => self.local_in_cluster(guest, len),
            run => Ok((Local::Nothing(None), run)),
        }
    }

    fn local_in_cluster(&self, guest: u64, len: u64) -> Result<(Local, u64), ImageError> {
        let found = self.find(guest)?;
        let in_cluster = self.in_cluster(guest);
        let left = (self.cluster_size() - in_cluster).min(len);
        let kind = self.kind(guest, found)?;
        let place = |offset: HostOffset| offset.get() + in_cluster;
        if !self.geometry.extended_l2() || found.entry.is_compressed() {
            let local = match kind {
                ClusterKind::Normal(offset) => Local::Data(place(offset)),
                ClusterKind::Compressed(extent) => Local::Packed(extent),
                ClusterKind::ZeroPlain => Local::Zero(None),
                ClusterKind::ZeroAllocated(offset) => Local::Zero(Some(place(offset))),
                ClusterKind::Unallocated => Local::Nothing(None),
            };
            return Ok((local, left));
        }
        let place = match kind {
            ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset) => Some(place(offset)),
            _ => None,
        };
        let (data, zero) = (
            found.entry.allocated_subclusters(),
            found.entry.zero_subclusters(),
        );
        let size = self.geometry.subcluster_size();
        let state = |number: u64| {
            let bit = 1_u32 << number;
            (data & bit != 0, zero & bit != 0)
        };
        let first = in_cluster / size;
        let wanted = state(first);
        let mut end = first + 1;
        while end < 32 && end * size < in_cluster + left && state(end) == wanted {
            end += 1;
        }
        let local = match (wanted, place) {
            ((true, _), Some(place)) => Local::Data(place),
            ((_, true), place) => Local::Zero(place),
            (_, place) => Local::Nothing(place),
        };
        Ok((local, (end * size - in_cluster).min(left)))
    }
}
