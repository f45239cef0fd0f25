//! Where the copy goes.

use std::ops::Range;

use qcow2_io::codec::Level;
use qcow2_io::{Extent, Storage, ZeroFlags};

use super::zeros::stretches;
use super::{CopyError, CopyOptions};
use crate::Image;

/// Extents of the target that are looked at to learn whether it is empty.
const LOOK: usize = 16;
/// Extents of the target that are asked for at a time.
const BATCH: usize = 256;
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
    /// Clusters that an image's file had before.
    file_clusters: u64,
    /// Bytes of a piece of work; multiples of `unit`.
    pub(super) chunk: u64,
    /// Where the copy begins in the target; bytes. All other places are told from there.
    shift: u64,
    /// What the target has already is not written again.
    pub(super) only_changes: bool,
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
        let shift = options.at;
        // An encrypted image takes any place, and only works more.
        let unit = match options.compress {
            None if !shift.is_multiple_of(unit) => 1,
            _ => unit,
        };
        let (chunk, granule) = (options.chunk_bytes(unit)?, options.granule(unit)?);
        if options.only_changes && options.reserve {
            return Err(CopyError::Options("changes only, and reserved space,"));
        }
        let storage = storage_of(target);
        let before = storage
            .len()
            .map_err(|error| CopyError::target_at(0, 0, error))?;
        let end = shift.saturating_add(source_len);
        let mut len = before;
        if before < end {
            if let Target::Image(_) = target {
                return Err(CopyError::TooSmall {
                    source_len,
                    target_len: before.saturating_sub(shift),
                });
            }
            let grown = storage.set_len(end);
            grown.map_err(|error| CopyError::target_at(before, end - before, error))?;
            len = end;
        }
        if let (Target::Image(image), Some(_)) = (target, options.compress) {
            let end = end.next_multiple_of(unit).min(len);
            let checked = image.check_compressible(shift, end.saturating_sub(shift));
            checked.map_err(|error| CopyError::target_at(shift, source_len, error))?;
        }
        let was_zero = options.resume.map(|checkpoint| checkpoint.was_zero);
        let is_zero = match was_zero {
            // Layers that are left out show through.
            _ if options.layers.is_some() => false,
            _ if options.target_is_zero => true,
            Some(was_zero) => was_zero,
            None if options.write_zeros => false,
            None => {
                reads_as_zeros(storage, shift..before.min(end).max(shift))?
                    && (!options.zero_rest
                        || !options.is_whole()
                        || reads_as_zeros(storage, end.min(before)..before)?)
            }
        };
        if options.reserve && options.resume.is_none() {
            let rest = options.zero_rest && options.is_whole();
            reserve(storage, shift..if rest { len } else { end })?;
        }
        Ok(Self {
            target,
            compress: options.compress,
            len: len.saturating_sub(shift),
            zero_from: if is_zero || options.reserve {
                0
            } else {
                shown_end(target, before, options)?.saturating_sub(shift)
            },
            unit,
            granule,
            file_clusters: match target {
                Target::Image(image) => image.file_clusters(),
                Target::Storage(_) => 0,
            },
            chunk,
            shift,
            only_changes: options.only_changes,
        })
    }

    /// The image and the level, if clusters are to be compressed.
    pub(super) fn packing(&self) -> Option<(&'a Image, Level)> {
        match (self.target, self.compress) {
            (Target::Image(image), Some(level)) => Some((image, level)),
            _ => None,
        }
    }

    /// Makes a file that has grown end with a whole cluster; compressed data ends where it ends.
    pub(super) fn round_up(&self) -> Result<(), CopyError> {
        match self.target {
            Target::Image(image)
                if self.compress.is_none() && image.file_clusters() > self.file_clusters =>
            {
                let filled = image.fill_last_cluster();
                filled.map_err(|error| CopyError::target_at(0, 0, error))
            }
            _ => Ok(()),
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
            .write_at(inside.unwrap_or_default(), self.shift + offset)
            .map_err(|error| CopyError::target_at(offset, len, error))?;
        Ok(len)
    }

    /// Stores a stream that gives a whole cluster.
    pub(super) fn write_stream(&self, stream: &[u8], offset: u64) -> Result<(), CopyError> {
        let Target::Image(image) = self.target else {
            return Err(CopyError::NotAnImage);
        };
        image
            .write_stream(stream, self.shift + offset)
            .map_err(|error| CopyError::target_at(offset, self.unit, error))
    }

    /// What the target has.
    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), CopyError> {
        let len = bytes.len() as u64;
        storage_of(self.target)
            .read_at(bytes, self.shift + offset)
            .map_err(|error| CopyError::target_at(offset, len, error))
    }

    /// What the target says of a range; the first of it, if it is much.
    pub(super) fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, CopyError> {
        let (start, len) = (range.start, range.end - range.start);
        let found =
            storage_of(self.target).extents(self.shift + start..self.shift + range.end, BATCH);
        let mut found = found.map_err(|error| CopyError::target_at(start, len, error))?;
        for extent in &mut found {
            extent.offset = extent.offset.saturating_sub(self.shift);
        }
        Ok(found)
    }

    /// Makes what was written durable.
    pub(super) fn flush(&self) -> Result<(), CopyError> {
        storage_of(self.target)
            .flush()
            .map_err(|error| CopyError::target_at(0, 0, error))
    }

    /// The parts of a range, whose bytes these are, that have to be stored.
    pub(super) fn stretches(&self, bytes: &[u8], range: Range<u64>) -> Vec<Range<u64>> {
        match self.granule {
            Some(granule) => stretches(bytes, range.start, granule),
            None => vec![range],
        }
    }

    /// Sees to it that a range reads as zeros.
    pub(super) fn zero(&self, range: Range<u64>) -> Result<(), CopyError> {
        let storage = storage_of(self.target);
        for part in self.zero_parts(range) {
            let (start, len) = (part.start, part.end - part.start);
            storage
                .write_zeroes(
                    self.shift + start..self.shift + part.end,
                    ZeroFlags::MAY_UNMAP,
                )
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

/// Whether a target knows that it has nothing but zeros in a range.
fn reads_as_zeros(storage: &dyn Storage, range: Range<u64>) -> Result<bool, CopyError> {
    let (mut at, len) = (range.start, range.end);
    while at < len {
        let found = storage.extents(at..len, LOOK);
        let found = found.map_err(|error| CopyError::target_at(at, len - at, error))?;
        let end = found.last().map_or(0, Extent::end);
        if end <= at || found.iter().any(|extent| !extent.kind.reads_as_zeros()) {
            return Ok(false);
        }
        at = end;
    }
    Ok(true)
}

/// Where a target ends that shows the layers which are left out: behind the end of its backing file there is nothing to
/// show, and a new image reads as zeros.
fn shown_end(target: Target<'_>, len: u64, options: &CopyOptions<'_>) -> Result<u64, CopyError> {
    let (Target::Image(image), Some(_)) = (target, options.layers) else {
        return Ok(len);
    };
    let below = match &image.backing {
        Some(backing) => backing.len(),
        None => return Ok(len),
    };
    let below = below.map_err(|error| CopyError::target_at(0, len, error))?;
    if below >= len {
        return Ok(len);
    }
    let nothing = reads_as_zeros(image, below..len)?;
    Ok(if nothing && !options.write_zeros {
        below
    } else {
        len
    })
}

/// Has space kept for a range, which reads as zeros then.
fn reserve(storage: &dyn Storage, range: Range<u64>) -> Result<(), CopyError> {
    let (start, len) = (range.start, range.end - range.start);
    storage
        .write_zeroes(range, ZeroFlags::NONE)
        .map_err(|error| CopyError::target_at(start, len, error))
}
