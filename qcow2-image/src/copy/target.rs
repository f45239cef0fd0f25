//! Where the copy goes.

use std::ops::Range;

use qcow2_io::codec::Level;
use qcow2_io::{Storage, ZeroFlags};

use super::{CopyError, CopyOptions};
use crate::Image;

/// Extents of the target that are looked at to learn whether it is empty.
const LOOK: usize = 16;
/// Zeros are written in pieces of at most this many bytes, so that a copy can be cancelled in between.
const ZERO_MAX: u64 = 1 << 30;

/// Where a copy goes.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// Plain bytes: a raw file, memory, anything.
    Storage(&'a dyn Storage),
    /// A qcow2 image that is open for writing.
    Image(&'a Image),
}

impl<'a> From<&'a dyn Storage> for Target<'a> {
    fn from(storage: &'a dyn Storage) -> Self {
        Self::Storage(storage)
    }
}

impl<'a> From<&'a Image> for Target<'a> {
    fn from(image: &'a Image) -> Self {
        Self::Image(image)
    }
}

/// A target that is ready, and what is known of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    target: Target<'a>,
    compress: Option<Level>,
    /// Length in bytes; nothing is written behind it.
    pub(super) len: u64,
    /// It reads as zeros from here on.
    zero_from: u64,
    /// Only multiples of this are written, or up to the end; bytes.
    pub(super) unit: u64,
    /// Pieces that may be left out if they are zero; bytes, multiples of `unit`. `None` if all is to be stored.
    pub(super) granule: Option<u64>,
    /// Bytes of a piece of work; multiples of `unit`.
    pub(super) chunk: u64,
}

impl<'a> Place<'a> {
    /// Makes sure that a source of `source_len` bytes fits.
    pub(super) fn prepare(
        target: Target<'a>,
        source_len: u64,
        options: &CopyOptions<'_>,
    ) -> Result<Self, CopyError> {
        let unit = match (target, options.compress) {
            (Target::Storage(_), Some(_)) => return Err(CopyError::NotAnImage),
            (Target::Image(image), Some(_)) => image.geometry().cluster_size(),
            // The rest of a new cluster would be encrypted and written, and then once more.
            (Target::Image(image), None) if image.is_encrypted() => {
                image.geometry().subcluster_size()
            }
            _ => 1,
        };
        let (chunk, granule) = (options.chunk_bytes(unit)?, options.granule(unit)?);
        let storage = storage_of(target);
        let before = storage
            .len()
            .map_err(|error| CopyError::target_at(0, 0, error))?;
        let mut len = before;
        if before < source_len {
            if let Target::Image(_) = target {
                return Err(CopyError::TooSmall {
                    source_len,
                    target_len: before,
                });
            }
            let grown = storage.set_len(source_len);
            grown.map_err(|error| CopyError::target_at(before, source_len - before, error))?;
            len = source_len;
        }
        if let (Target::Image(image), Some(_)) = (target, options.compress) {
            let end = source_len.next_multiple_of(unit).min(len);
            let checked = image.check_compressible(0, end);
            checked.map_err(|error| CopyError::target_at(0, end, error))?;
        }
        let is_zero = options.target_is_zero || reads_as_zeros(storage, before)?;
        Ok(Self {
            target,
            compress: options.compress,
            len,
            zero_from: if is_zero { 0 } else { before },
            unit,
            granule,
            chunk,
        })
    }

    /// The image and the level, if clusters are to be compressed.
    pub(super) fn packing(&self) -> Option<(&'a Image, Level)> {
        match (self.target, self.compress) {
            (Target::Image(image), Some(level)) => Some((image, level)),
            _ => None,
        }
    }

    /// Whether zeros need no writing anywhere.
    pub(super) fn is_zero(&self) -> bool {
        self.zero_from == 0
    }

    /// Stores bytes of the disk, but none behind its end; tells how many.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<u64, CopyError> {
        let len = (bytes.len() as u64).min(self.len.saturating_sub(offset));
        let inside = usize::try_from(len).ok().and_then(|len| bytes.get(..len));
        let storage = storage_of(self.target);
        storage
            .write_at(inside.unwrap_or_default(), offset)
            .map_err(|error| CopyError::target_at(offset, len, error))?;
        Ok(len)
    }

    /// Sees to it that a range reads as zeros.
    pub(super) fn zero(&self, range: Range<u64>) -> Result<(), CopyError> {
        let storage = storage_of(self.target);
        for part in self.zero_parts(range) {
            let (start, len) = (part.start, part.end - part.start);
            storage
                .write_zeroes(part, ZeroFlags::MAY_UNMAP)
                .map_err(|error| CopyError::target_at(start, len, error))?;
        }
        Ok(())
    }

    /// The parts of a range that have to be zeroed, none of them large.
    pub(super) fn zero_parts(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let end = range.end.min(self.zero_from).min(self.len);
        let mut at = range.start;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let start = at;
                at = end.min(start.saturating_add(ZERO_MAX));
                start..at
            })
        })
    }
}

fn storage_of(target: Target<'_>) -> &dyn Storage {
    match target {
        Target::Storage(storage) => storage,
        Target::Image(image) => image,
    }
}

/// Whether a target knows that it has nothing but zeros.
fn reads_as_zeros(storage: &dyn Storage, len: u64) -> Result<bool, CopyError> {
    let found = storage.extents(0..len, LOOK);
    let found = found.map_err(|error| CopyError::target_at(0, len, error))?;
    let end = found.last().map_or(0, qcow2_io::Extent::end);
    Ok(end >= len && found.iter().all(|extent| extent.kind.reads_as_zeros()))
}
