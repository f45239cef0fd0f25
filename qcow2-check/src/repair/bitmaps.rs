//! Bitmaps: broken ones go, for they keep QEMU from opening the image; parts that can't be read count as changed.

use std::collections::HashSet;

use qcow2_format::bitmap::{BitmapCluster, BitmapDirectory, MAX_TABLE_ENTRIES};
use qcow2_format::header::extension::BITMAPS;
use qcow2_format::header::{BitmapsExtension, Extension, Header};
use qcow2_format::{BitmapEntry, BitmapTableEntry, HostOffset};

use super::action::{Action, ActionKind};
use super::plan::Planner;
use super::{PlanError, StaleBitmaps};
use crate::image::Image;
use crate::{Place, Structure};

/// A table entry for bits that are all set, without a cluster.
const ALL_ONES: u64 = 1;

/// The bitmaps that stay.
#[derive(Debug, Default)]
struct Directory {
    entries: Vec<BitmapEntry>,
    dropped: Vec<(u64, String)>,
}

/// Reads the directory; `None` if there are no bitmaps that count.
fn read(image: &Image<'_>, drop_stale: bool) -> Option<Directory> {
    let extension = image.header.bitmaps()?;
    if !image.header.autoclear.bitmaps() {
        return None;
    }
    let mut directory = Directory::default();
    let offset = extension.directory_offset.get();
    let len = extension.directory_len_bytes;
    let inside = image.is_inside(offset, len);
    let mut bytes = vec![0; usize::try_from(len).ok().filter(|_| inside).unwrap_or(0)];
    if !inside || image.reader.read(&mut bytes, offset).is_err() {
        let reason = format!("the directory can't be read: {len} bytes at {offset:#x}");
        directory.dropped.push((0, reason));
        return Some(directory);
    }
    let mut names = HashSet::new();
    for (number, entry) in (0..).zip(BitmapDirectory::new(&bytes, extension.count)) {
        match entry {
            Ok(entry) => match unusable(image, &entry, &mut names, drop_stale) {
                Some(reason) => directory.dropped.push((number, reason)),
                None => directory.entries.push(entry),
            },
            Err(error) => {
                let reason = format!("the directory can't be read on: {error}");
                directory.dropped.push((number, reason));
                break;
            }
        }
    }
    Some(directory)
}

/// Why a bitmap can't stay.
fn unusable(
    image: &Image<'_>,
    entry: &BitmapEntry,
    names: &mut HashSet<Vec<u8>>,
    drop_stale: bool,
) -> Option<String> {
    let name = String::from_utf8_lossy(&entry.name).into_owned();
    let geometry = image.geometry;
    let defects = entry.defects(geometry, image.header.virtual_size());
    if let Some(defect) = defects.iter().find(|defect| defect.is_refused()) {
        return Some(format!("{name:?}: {defect}"));
    }
    let len = u64::from(entry.table_entries) * 8;
    let offset = entry.table_offset;
    let usable = offset.get() != 0
        && geometry.is_cluster_aligned(offset)
        && entry.table_entries <= MAX_TABLE_ENTRIES
        && image.is_inside(offset.get(), len);
    if !usable {
        return Some(format!(
            "{name:?}: its table would be at {offset}, {len} bytes"
        ));
    }
    if !names.insert(entry.name.clone()) {
        return Some(format!("{name:?}: another one has this name"));
    }
    if drop_stale && entry.flags.in_use() {
        return Some(format!("{name:?}: it is in use, so its bits are stale"));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    if image.reader.read(&mut bytes, offset.get()).is_err() {
        return Some(format!("{name:?}: its table can't be read"));
    }
    let (mut bad, mut good) = (0_u64, 0_u64);
    for word in bytes.as_chunks::<8>().0.iter().filter(|w| **w != [0; 8]) {
        if is_bad(image, BitmapTableEntry::from_be_bytes(*word)) {
            bad += 1;
        } else {
            good += 1;
        }
    }
    (bad > good.saturating_add(1)).then(|| format!("{name:?}: its table is none"))
}

/// Whether an entry of a bitmap's table can't be what it should.
pub(super) fn is_bad(image: &Image<'_>, entry: BitmapTableEntry) -> bool {
    entry.reserved_bits() != 0
        || match entry.kind() {
            BitmapCluster::Cluster(offset) => {
                !image.geometry.is_cluster_aligned(offset)
                    || !image.is_inside(offset.get(), image.cluster_size())
            }
            _ => false,
        }
}

/// Drops bitmaps that can't stay. Tells whether there were any.
pub(super) fn mend(planner: &mut Planner<'_, '_>, image: &Image<'_>) -> Result<bool, PlanError> {
    let drop_stale = planner.options.stale_bitmaps == StaleBitmaps::Drop;
    let Some(directory) = read(image, drop_stale) else {
        return Ok(false);
    };
    if !directory.dropped.is_empty() {
        rewrite(planner, &image.header, &directory.entries)?;
        for (number, reason) in directory.dropped {
            tell_dropped(planner, &image.header, number, reason);
        }
        return Ok(true);
    }
    Ok(false)
}

/// Lets an entry of a bitmap's table say that all of its part has changed.
pub(super) fn mark(
    planner: &mut Planner<'_, '_>,
    layer: usize,
    at: u64,
    index: u64,
    reason: String,
) -> Result<(), PlanError> {
    planner.overlay.write(layer, at, &ALL_ONES.to_be_bytes())?;
    let place = Place::of(Structure::BitmapTable).at(at, 8).entry(index);
    let action = Action::new(ActionKind::MendBitmap, place, reason);
    planner.add(action.changes(at, 8));
    Ok(())
}

fn tell_dropped(planner: &mut Planner<'_, '_>, header: &Header, number: u64, reason: String) {
    let place = Place::of(Structure::BitmapDirectory).entry(number);
    let action = Action::new(ActionKind::DropBitmap, place, reason);
    planner.add(action.changes(0, header.geometry.cluster_size()));
}

/// Drops the bitmaps with these numbers.
pub(super) fn drop_numbers(
    planner: &mut Planner<'_, '_>,
    image: &Image<'_>,
    numbers: &[(u64, String)],
) -> Result<(), PlanError> {
    let Some(directory) = read(image, false) else {
        return Ok(());
    };
    let entries: Vec<BitmapEntry> = (0..)
        .zip(directory.entries)
        .filter(|(number, _)| !numbers.iter().any(|(gone, _)| gone == number))
        .map(|(_, entry)| entry)
        .collect();
    rewrite(planner, &image.header, &entries)?;
    for (number, reason) in numbers {
        tell_dropped(planner, &image.header, *number, reason.clone());
    }
    Ok(())
}

/// Writes the directory anew, at the end of the file, and the header that points at it.
fn rewrite(
    planner: &mut Planner<'_, '_>,
    header: &Header,
    entries: &[BitmapEntry],
) -> Result<(), PlanError> {
    let content = planner.overlay.layer();
    let switch = planner.overlay.layer();
    let mut bytes = Vec::new();
    let mut count = 0;
    for entry in entries {
        // What was decoded can be encoded.
        if let Ok(entry) = entry.encode() {
            bytes.extend(entry);
            count += 1;
        }
    }
    let mut header = header.clone();
    if count == 0 {
        header.extensions.retain(|e| e.kind() != BITMAPS);
        header.autoclear.set_bitmaps(false);
    } else {
        let size = header.geometry.cluster_size();
        let clusters = header.geometry.clusters_for(bytes.len() as u64);
        let offset = planner.allocate(clusters, size)?;
        planner.overlay.write(content, offset, &bytes)?;
        planner.overlay.grow(offset + clusters * size);
        let new = Extension::Bitmaps(BitmapsExtension {
            count,
            directory_len_bytes: bytes.len() as u64,
            directory_offset: HostOffset::new(offset),
        });
        header.extensions = header
            .extensions
            .into_iter()
            .map(|e| if e.kind() == BITMAPS { new.clone() } else { e })
            .collect();
    }
    // The header was read, so it can be written, and it has not become longer.
    if let Ok(bytes) = header.encode() {
        planner.overlay.write(switch, 0, &bytes)?;
    }
    Ok(())
}
