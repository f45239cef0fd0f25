//! The directory of bitmaps, as it is found.

use std::collections::HashMap;

use qcow2_format::bitmap::BitmapDirectory;
use qcow2_format::header::extension::{BITMAPS, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS};
use qcow2_format::header::{BitmapsExtension, Extension};
use qcow2_format::{BitmapEntry, Header, HostOffset};
use qcow2_io::Storage;

use super::BitmapState;
use crate::ImageError;

/// A bitmap of the directory.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) entry: BitmapEntry,
    /// Where its entry lies.
    pub(super) place: HostOffset,
    pub(super) state: BitmapState,
    /// The tracker that records for it.
    pub(super) tracker: Option<usize>,
}

/// All bitmaps of an image.
#[derive(Clone, Debug, Default)]
pub(super) struct Directory {
    pub(super) known: Vec<Known>,
    /// Why the rest of it can't be read.
    pub(super) rest: Option<String>,
    /// Whether bitmaps get new places with each change.
    pub(super) anew: bool,
}

impl Directory {
    /// Where the bitmap of this name is in the list.
    pub(super) fn find(&self, name: &[u8]) -> Result<usize, ImageError> {
        let found = self.known.iter().position(|one| one.entry.name == name);
        found.ok_or_else(|| ImageError::NoBitmap { name: text(name) })
    }

    /// The bitmap of this name, if its bits can be used.
    pub(super) fn usable(&self, name: &[u8]) -> Result<&Known, ImageError> {
        let index = self.find(name)?;
        let known = self.known.get(index);
        let known = known.ok_or_else(|| ImageError::NoBitmap { name: text(name) })?;
        known.check_consistent()?;
        Ok(known)
    }
}

impl Known {
    pub(super) fn is_consistent(&self) -> bool {
        self.state == BitmapState::Consistent
    }

    pub(super) fn check_consistent(&self) -> Result<(), ImageError> {
        let why = match &self.state {
            BitmapState::Consistent => return Ok(()),
            BitmapState::Inconsistent => {
                "the image was not closed, or is open elsewhere: it can be removed or recovered"
                    .to_owned()
            }
            BitmapState::Broken { why } => why.clone(),
        };
        Err(unusable(&self.entry.name, why))
    }

    pub(super) fn table_len(&self) -> u64 {
        u64::from(self.entry.table_entries) * 8
    }
}

/// A name, printable.
pub(super) fn text(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}

pub(super) fn unusable(name: &[u8], why: impl Into<String>) -> ImageError {
    ImageError::BitmapUnusable {
        name: text(name),
        why: why.into(),
    }
}

/// Where the directory lies, if there is one whose bitmaps are valid; or why it can't be read.
pub(super) fn place_of_directory(
    header: &Header,
) -> Result<Option<BitmapsExtension>, &'static str> {
    let is_odd = |one: &Extension| matches!(one, Extension::Unknown { kind: BITMAPS, .. });
    match header.bitmaps() {
        _ if !header.autoclear.bitmaps() => Ok(None),
        None if header.extensions.iter().any(is_odd) => {
            Err("the header does not say where it lies")
        }
        None => Ok(None),
        Some(one) if one.count == 0 || one.count > MAX_BITMAPS => {
            Err("the number of bitmaps is not allowed")
        }
        Some(one) if one.directory_len_bytes > MAX_BITMAP_DIRECTORY_BYTES => {
            Err("it is longer than allowed")
        }
        Some(one)
            if one.directory_offset.get() == 0
                || !header.geometry.is_cluster_aligned(one.directory_offset) =>
        {
            Err("it lies where none can")
        }
        Some(one) => Ok(Some(*one)),
    }
}

/// Reads and judges the directory, but no table. An image without valid bitmaps has none.
pub(super) fn read_directory(
    storage: &dyn Storage,
    header: &Header,
) -> Result<Directory, ImageError> {
    let mut directory = Directory::default();
    let extension = match place_of_directory(header) {
        Ok(Some(extension)) => extension,
        Ok(None) => return Ok(directory),
        Err(why) => {
            directory.rest = Some(why.to_owned());
            return Ok(directory);
        }
    };
    let geometry = header.geometry;
    let offset = extension.directory_offset.get();
    let file_len = storage.len()?;
    // The header's limits keep it below 64 MiB.
    let len = extension
        .directory_len_bytes
        .min(file_len.saturating_sub(offset));
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    storage.read_at(&mut bytes, offset)?;
    let mut at = offset;
    for entry in BitmapDirectory::new(&bytes, extension.count) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                directory.rest = Some(error.to_string());
                break;
            }
        };
        let defects = entry.defects(geometry, header.virtual_size());
        let defect = defects.iter().find(|defect| defect.is_refused());
        let table_end = entry
            .table_offset
            .get()
            .saturating_add(u64::from(entry.table_entries) * 8);
        let state = if let Some(defect) = defect {
            BitmapState::broken(defect.to_string())
        } else if table_end > file_len.next_multiple_of(geometry.cluster_size()) {
            BitmapState::broken("its table reaches beyond the end of the file")
        } else if entry.flags.in_use() {
            BitmapState::Inconsistent
        } else {
            BitmapState::Consistent
        };
        let place = HostOffset::new(at);
        let unpadded = 24 + entry.extra_data.len() + entry.name.len();
        at = at.saturating_add(unpadded.next_multiple_of(8) as u64);
        directory.known.push(Known {
            entry,
            place,
            state,
            tracker: None,
        });
    }
    find_doubles(&mut directory.known);
    find_shared_tables(&mut directory.known, geometry.cluster_size());
    Ok(directory)
}

fn find_doubles(known: &mut [Known]) {
    let mut count: HashMap<Vec<u8>, usize> = HashMap::new();
    for one in &*known {
        *count.entry(one.entry.name.clone()).or_default() += 1;
    }
    for one in known {
        if count.get(&one.entry.name).is_some_and(|count| *count > 1) {
            one.state = BitmapState::broken("another bitmap has the same name");
        }
    }
}

/// Tables that lie on each other are no one's. So all tables together are no longer than the file.
fn find_shared_tables(known: &mut [Known], cluster_size: u64) {
    let mut order: Vec<(u64, u64, usize)> = (0..)
        .zip(&*known)
        .filter(|(_, one)| !matches!(one.state, BitmapState::Broken { .. }))
        .map(|(index, one)| {
            let start = one.entry.table_offset.get();
            let len = one.table_len().next_multiple_of(cluster_size);
            (start, start.saturating_add(len), index)
        })
        .collect();
    order.sort_unstable();
    let mut shared = Vec::new();
    let mut last: Option<(u64, usize)> = None;
    for (start, end, index) in order {
        match last {
            Some((last_end, other)) if start < last_end => {
                shared.extend([other, index]);
                if end > last_end {
                    last = Some((end, index));
                }
            }
            _ => last = Some((end, index)),
        }
    }
    for index in shared {
        if let Some(one) = known.get_mut(index) {
            one.state = BitmapState::broken("its table lies on that of another bitmap");
        }
    }
}
