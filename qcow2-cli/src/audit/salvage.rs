//! Copying what can be read of a damaged disk.

mod torn;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use qcow2_image::create::CreateOptions;
use qcow2_image::{CacheOptions, Image, ImageError, References};
use qcow2_io::cipher::Secret;
use qcow2_io::{File, FileOptions, Storage};

use super::progress::Interrupt;
use super::text::shown;
use torn::Torn;

/// Bytes copied at once.
const PIECE: u64 = 1 << 20;
/// What a disk reads or fails to read as one.
const SECTOR: u64 = 512;
/// Into how many parts a piece is divided that can't be read.
const PARTS: u64 = 16;
/// Bytes of the disk whose mapping is asked for at once.
const LOOK: u64 = 1 << 30;

/// The disk that is copied.
pub(crate) struct Source<'a> {
    /// The image as the repair would make it.
    pub(crate) storage: Arc<dyn Storage>,
    /// Where it lies: names that it has are meant from there.
    pub(crate) path: &'a Path,
    /// Which of those may be opened.
    pub(crate) references: &'a References,
    /// Passphrases, with the layers they are for.
    pub(crate) secrets: &'a [(usize, Arc<Secret>)],
}

impl Source<'_> {
    fn open(&self) -> Result<Image> {
        let mut options = Image::options()
            .read_only(true)
            .path(self.path)
            .references(self.references.clone())
            // A table of which a sector can't be read is lost sector by sector.
            .cache(CacheOptions::new().l2_slice_bytes(SECTOR));
        for (layer, secret) in self.secrets {
            options = options.layer_secret(*layer, Arc::clone(secret));
        }
        let storage = Torn::new(Arc::clone(&self.storage));
        options.open(Arc::new(storage)).map_err(|error| {
            let advice = match &error {
                ImageError::SecretMissing { .. } => {
                    "; --passphrase-file or --passphrase-env gives what opens it"
                }
                ImageError::Reference { .. } => "; --references says what may be opened",
                _ => "",
            };
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            anyhow!("what the repair would make can't be opened: {text}{advice}")
        })
    }
}

/// Copies the disk of `source` to a new image, and gives the guest ranges that can't be read: they are zeros in the copy.
pub(crate) fn copy(
    source: &Source<'_>,
    out: &Path,
    interrupt: &Interrupt,
) -> Result<Vec<(u64, u64)>> {
    let named = || shown(out);
    let from = source.open()?;
    let options = FileOptions::new().write(true).create_new(true);
    let file = options.open(out).with_context(named)?;
    let copied = fill(&from, file, out, interrupt);
    if copied.is_err() {
        // A part of a copy is of no use to anyone. If it can't be removed, the first error says more.
        let _ = std::fs::remove_file(out);
    }
    copied
}

fn fill(from: &Image, file: File, out: &Path, interrupt: &Interrupt) -> Result<Vec<(u64, u64)>> {
    let named = || shown(out);
    let size = from.virtual_size();
    Image::create(&file, &CreateOptions::new(size)).with_context(named)?;
    let to = Image::options().open(Arc::new(file)).with_context(named)?;
    let lost = transfer(from, &to, interrupt)?;
    to.close().with_context(named)?;
    Ok(lost)
}

/// Copies what can be read of one disk to the other, which is empty.
fn transfer(from: &Image, to: &Image, interrupt: &Interrupt) -> Result<Vec<(u64, u64)>> {
    let size = from.virtual_size();
    let geometry = from.header().geometry;
    // What the entries in one sector of an L2 table map.
    let unit = (SECTOR / geometry.l2_entry_size()) << geometry.cluster_bits();
    let mut lost: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    let mut buffer = vec![0; usize::try_from(PIECE)?];
    while at < size {
        if interrupt.is_set() {
            bail!("the copy was ended before all was read; nothing of it is left");
        }
        let near = (at / unit + 1).saturating_mul(unit).min(size);
        let far = size.min(at.saturating_add(LOOK));
        let extents = from
            .extents(at..far, 1)
            .or_else(|_| from.extents(at..near, 1));
        let Ok(extents) = extents else {
            // What maps this can't be read.
            lose(&mut lost, at, near);
            at = near;
            continue;
        };
        let Some(extent) = extents.first() else { break };
        if extent.kind.reads_as_zeros() {
            at = extent.end();
            continue;
        }
        let end = extent.end().min(at + PIECE);
        let piece = buffer
            .get_mut(..usize::try_from(end - at)?)
            .unwrap_or_default();
        carry(from, to, at, piece, &mut lost)?;
        at = end;
    }
    Ok(lost)
}

/// Copies a piece; where it can't be read, its parts.
fn carry(
    from: &Image,
    to: &Image,
    start: u64,
    piece: &mut [u8],
    lost: &mut Vec<(u64, u64)>,
) -> Result<()> {
    if from.read_at(piece, start).is_ok() {
        to.write_at(piece, start)?;
        return Ok(());
    }
    let len = piece.len() as u64;
    if len <= SECTOR {
        lose(lost, start, start + len);
        return Ok(());
    }
    let part = (len / PARTS).next_multiple_of(SECTOR);
    let mut at = start;
    for piece in piece.chunks_mut(usize::try_from(part)?) {
        carry(from, to, at, piece, lost)?;
        at += piece.len() as u64;
    }
    Ok(())
}

fn lose(lost: &mut Vec<(u64, u64)>, start: u64, end: u64) {
    match lost.last_mut() {
        Some((_, known)) if *known == start => *known = end,
        _ => lost.push((start, end)),
    }
}

#[cfg(test)]
mod tests;
