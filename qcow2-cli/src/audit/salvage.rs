//! Copying what can be read of a damaged disk.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, References};
use qcow2_io::{File, FileOptions, Storage};

use super::progress::Interrupt;
use super::text::shown;

/// Bytes copied at once.
const PIECE: u64 = 1 << 20;
/// Where a piece can't be read, it is tried in parts of this length.
const PART: u64 = 4096;

/// Copies the disk of `source` to a new image, and gives the guest ranges that can't be read: they are zeros in the copy.
pub(crate) fn copy(
    source: Arc<dyn Storage>,
    out: &Path,
    interrupt: &Interrupt,
) -> Result<Vec<(u64, u64)>> {
    let named = || shown(out);
    let from = Image::options()
        .read_only(true)
        .references(References::Deny)
        .open(source)
        .map_err(|error| anyhow!("what the repair would make can't be opened: {error}"))?;
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
    let mut lost: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    let mut buffer = vec![0; usize::try_from(PIECE)?];
    while at < size {
        if interrupt.is_set() {
            bail!("the copy was ended before all was read; nothing of it is left");
        }
        let extents = from.extents(at..size.min(at.saturating_add(1 << 30)), 1)?;
        let Some(extent) = extents.first() else { break };
        if extent.kind.reads_as_zeros() {
            at = extent.end();
            continue;
        }
        let end = extent.end().min(at + PIECE);
        piece(from, &to, (at, end), &mut buffer, &mut lost)?;
        at = end;
    }
    to.close().with_context(named)?;
    Ok(lost)
}

fn piece(
    from: &Image,
    to: &Image,
    (start, end): (u64, u64),
    buffer: &mut [u8],
    lost: &mut Vec<(u64, u64)>,
) -> Result<()> {
    let whole = buffer
        .get_mut(..usize::try_from(end - start)?)
        .unwrap_or_default();
    if from.read_at(whole, start).is_ok() {
        to.write_at(whole, start)?;
        return Ok(());
    }
    let mut at = start;
    while at < end {
        let stop = end.min(at + PART);
        let part = buffer
            .get_mut(..usize::try_from(stop - at)?)
            .unwrap_or_default();
        if from.read_at(part, at).is_ok() {
            to.write_at(part, at)?;
        } else {
            match lost.last_mut() {
                Some((_, known)) if *known == at => *known = stop,
                _ => lost.push((at, stop)),
            }
        }
        at = stop;
    }
    Ok(())
}
