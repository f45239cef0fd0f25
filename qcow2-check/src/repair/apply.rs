//! Carrying a plan out.
//!
//! Everything that will be overwritten is durable in the undo file before the first write. Then the layers follow one another, a
//! flush behind each: first what nothing refers to yet, then pointers, refcounts raised before and lowered after,
//! and the dirty and corrupt bits last. A crash leaves some of a layer's sectors written; a new plan made of that ends where this
//! one would have.

use qcow2_io::{Storage, StorageError};
use thiserror::Error;

use super::crc::crc;
use super::overlay::Overlay;
use super::undo::{IDENTITY_LEN, UndoError, Writer, identity};
use crate::ByteRange;

/// Bytes written at once.
const WRITE_BYTES: u64 = 1 << 20;

/// Why a plan was not carried out, or not to its end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The image was changed since the plan was made. Nothing was written.
    #[error("the image was changed since the plan was made")]
    Changed,
    /// The undo file could not be written. If that is so before the repair has begun, nothing was written to the image.
    #[error(transparent)]
    Undo(#[from] UndoError),
    /// The image could not be read or written. What was written up to then can be undone, or repaired anew.
    #[error("the image failed")]
    Image(#[from] StorageError),
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub struct Applied {
    /// Bytes written to the image.
    pub bytes_written: u64,
    /// Bytes that the file has grown by.
    pub bytes_grown: u64,
}

pub(super) fn apply(
    overlay: &Overlay<'_>,
    before: u64,
    undo: Option<&dyn Storage>,
) -> Result<Applied, ApplyError> {
    let image = overlay.base();
    if image.len()? != overlay.base_len() || identity(image)? != before {
        return Err(ApplyError::Changed);
    }
    let saved: Vec<ByteRange> = overlay
        .ranges(None)
        .into_iter()
        .filter(|range| range.start < overlay.base_len())
        .map(|range| ByteRange {
            end: range.end.min(overlay.base_len()),
            ..range
        })
        .collect();
    let mut writer = match undo {
        Some(file) => {
            let mut writer = Writer::start(file, image, &sectors(overlay)?)?;
            writer.save(image, &saved)?;
            Some(writer)
        }
        None => None,
    };
    let mut applied = Applied {
        bytes_grown: overlay.new_len() - overlay.base_len(),
        ..Applied::default()
    };
    if overlay.new_len() > overlay.base_len() {
        image.set_len(overlay.new_len())?;
    }
    let mut bytes = Vec::new();
    for layer in 0..overlay.layers() {
        for range in overlay.ranges(Some(layer)) {
            let mut at = range.start;
            while at < range.end {
                let piece = (range.end - at).min(WRITE_BYTES);
                bytes.resize(usize::try_from(piece).unwrap_or(0), 0);
                overlay.read_layer(layer, &mut bytes, at)?;
                image.write_at(&bytes, at)?;
                applied.bytes_written += piece;
                at += piece;
            }
        }
        image.flush()?;
    }
    if let Some(writer) = &mut writer {
        writer.done(image, &saved)?;
    }
    Ok(applied)
}

/// Checksums of what becomes of the first sector.
fn sectors(overlay: &Overlay<'_>) -> Result<Vec<u64>, ApplyError> {
    let mut sums = Vec::new();
    let mut sector = [0; IDENTITY_LEN];
    for layer in 0..overlay.layers() {
        overlay.read_layer(layer, &mut sector, 0)?;
        sums.push(crc(&sector));
    }
    sums.dedup();
    Ok(sums)
}
