//! Where it goes.

use std::ops::Range;

use qcow2_io::codec::Level;
use qcow2_io::{Storage, ZeroFlags};

use crate::chain::Local;
use crate::{Image, ImageError};

/// The smallest piece that raw disks are written in; bytes.
const SECTOR: u64 = 512;
/// Zeros among data are found in pieces of this many bytes, unless clusters are larger.
const GRAIN: u64 = 64 << 10;

/// Where it goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sink<'a> {
    /// A disk that is overwritten.
    Disk(&'a dyn Storage),
    /// An image where only what it does not have itself is stored.
    Gaps(&'a Image, Option<Level>),
}

impl Sink<'_> {
    /// What is stored is multiples of this, or goes up to the end; bytes.
    pub(super) fn unit(&self) -> u64 {
        match self {
            Self::Disk(_) => SECTOR,
            Self::Gaps(image, None) => image.geometry().subcluster_size(),
            Self::Gaps(image, Some(_)) => image.geometry().cluster_size(),
        }
    }

    /// What is compared, or found to be zero, as one; bytes.
    pub(super) fn grain(&self) -> u64 {
        match self {
            Self::Disk(disk) => disk.limits().optimal.max(GRAIN).next_power_of_two(),
            Self::Gaps(..) => self.unit(),
        }
    }

    fn storage(&self) -> &dyn Storage {
        match self {
            Self::Disk(disk) => *disk,
            Self::Gaps(image, _) => *image,
        }
    }

    /// Stores bytes; tells how many clusters were compressed.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<u64, ImageError> {
        let Self::Gaps(image, Some(level)) = *self else {
            self.storage().write_at(bytes, offset)?;
            return Ok(0);
        };
        let mut compressed = 0;
        let len = image.geometry().cluster_len();
        for (cluster, guest) in bytes.chunks(len).zip((offset..).step_by(len)) {
            let range = guest..guest + cluster.len() as u64;
            let gaps = gaps(image, range.clone())?;
            if gaps.first() == Some(&range) {
                let packed = image.pack(cluster, guest, level)?;
                compressed += u64::from(packed.pays());
                image.store_packed(&packed, cluster, guest)?;
                continue;
            }
            for gap in gaps {
                let at = |place: u64| usize::try_from(place - guest).unwrap_or(usize::MAX);
                let part = cluster.get(at(gap.start)..at(gap.end)).unwrap_or_default();
                image.write_at(part, gap.start)?;
            }
        }
        Ok(compressed)
    }

    /// Stores zeros.
    pub(super) fn zero(&self, range: Range<u64>) -> Result<(), ImageError> {
        let Self::Gaps(image, Some(_)) = *self else {
            return Ok(self.storage().write_zeroes(range, ZeroFlags::MAY_UNMAP)?);
        };
        for gap in gaps(image, range)? {
            image.write_zeroes(gap, ZeroFlags::MAY_UNMAP)?;
        }
        Ok(())
    }
}

/// The parts of a range of which the image has nothing itself.
fn gaps(image: &Image, range: Range<u64>) -> Result<Vec<Range<u64>>, ImageError> {
    let _pass = image.gate.enter();
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let (local, run) = image.local(at, range.end - at)?;
        if matches!(local, Local::Nothing(_)) {
            match found.last_mut() {
                Some(last) if last.end == at => last.end += run,
                _ => found.push(at..at + run),
            }
        }
        at += run;
    }
    Ok(found)
}
