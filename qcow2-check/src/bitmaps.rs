//! Persistent bitmaps: directory, tables and data.

use std::collections::HashSet;

use qcow2_format::bitmap::{BitmapCluster, BitmapDirectory};
use qcow2_format::{BitmapEntry, BitmapTableEntry};

use crate::image::{Image, MetaRange, uncounted};
use crate::refmap::{RefMap, Sharing};
use crate::{Code, Finding, Place, Run, Structure};

/// Bytes of bitmap tables read in all: far more than sound images have.
const TABLE_BYTES_MAX: u64 = 256 << 20;
const READ_BYTES: u64 = 256 << 10;

/// What the checker remembers of a bitmap.
#[derive(Clone, Debug)]
pub(crate) struct BitmapInfo {
    table_offset: u64,
    table_entries: u64,
    granularity_bits: u8,
    in_use: bool,
}

impl BitmapInfo {
    /// First byte of its table.
    pub(crate) fn table_offset(&self) -> u64 {
        self.table_offset
    }
}

/// Reads the bitmap directory and adds its ranges to the image.
pub(crate) fn load(image: &mut Image<'_>, run: &Run<'_>) -> Vec<BitmapInfo> {
    let mut bitmaps = Vec::new();
    let Some(extension) = image
        .header
        .bitmaps()
        .filter(|_| image.header.autoclear.bitmaps())
        .copied()
    else {
        return bitmaps;
    };
    let offset = extension.directory_offset.get();
    let len = extension.directory_len_bytes;
    image.metadata.push(MetaRange {
        structure: Structure::BitmapDirectory,
        offset,
        len,
        index: None,
        weight: 1,
    });
    let invalid = |place: Place, detail: String| {
        run.find(Finding::new(Code::BitmapsInvalid, place, detail));
    };
    let place = Place::of(Structure::BitmapDirectory).at(offset, len);
    if !image.is_inside(offset, len) {
        invalid(place, image.past_end(offset));
        return bitmaps;
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    if let Err(error) = image.reader.read(&mut bytes, offset) {
        invalid(place, format!("can't be read: {error}"));
        return bitmaps;
    }
    let mut names = HashSet::new();
    let mut sum = 0_u64;
    let mut cut = 0_u64;
    for (number, entry) in (0_u64..).zip(BitmapDirectory::new(&bytes, extension.count)) {
        let place = place.clone().entry(number);
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                invalid(place, error.to_string());
                break;
            }
        };
        judge(image, &entry, &place, run);
        if !names.insert(entry.name.clone()) {
            invalid(
                place,
                format!(
                    "a second bitmap is named {:?}",
                    String::from_utf8_lossy(&entry.name)
                ),
            );
        }
        let table_offset = entry.table_offset.get();
        let table_entries = u64::from(entry.table_entries);
        let usable = table_offset != 0
            && image.geometry.is_cluster_aligned(entry.table_offset)
            && entry.table_entries <= qcow2_format::bitmap::MAX_TABLE_ENTRIES;
        if !usable {
            continue;
        }
        sum = sum.saturating_add(table_entries * 8);
        if sum > TABLE_BYTES_MAX {
            sum -= table_entries * 8;
            cut += 1;
            continue;
        }
        image.metadata.push(MetaRange {
            structure: Structure::BitmapTable,
            offset: table_offset,
            len: table_entries * 8,
            index: Some(number),
            weight: 1,
        });
        bitmaps.push(BitmapInfo {
            table_offset,
            table_entries,
            granularity_bits: entry.granularity_bits,
            in_use: entry.flags.in_use(),
        });
    }
    if cut > 0 {
        run.find(Finding::new(
            Code::CheckLimited,
            place,
            format!("the tables of {cut} bitmaps are too large to be read"),
        ));
    }
    bitmaps
}

fn judge(image: &Image<'_>, entry: &BitmapEntry, place: &Place, run: &Run<'_>) {
    for defect in entry.defects(image.geometry, image.header.virtual_size()) {
        let code = if defect.is_refused() {
            Code::BitmapsInvalid
        } else {
            Code::BitmapOdd
        };
        run.find(Finding::new(code, place.clone(), defect.to_string()));
    }
    if entry.flags.in_use() {
        let detail = format!("bitmap {:?}", String::from_utf8_lossy(&entry.name));
        run.find(Finding::new(Code::BitmapInUse, place.clone(), detail));
    }
}

/// Counts the references of all bitmap tables, and judges them.
pub(crate) fn count(image: &Image<'_>, bitmaps: &[BitmapInfo], map: &mut RefMap, run: &Run<'_>) {
    for (number, bitmap) in (0_u64..).zip(bitmaps) {
        if map.is_scattered() {
            return;
        }
        let mut last = BitmapCluster::AllZeros;
        each_entry(image, bitmap, run, |index, entry| {
            // Entries of zeros don't come by.
            if index + 1 == bitmap.table_entries {
                last = entry.kind();
            }
            let place = || {
                Place::of(Structure::BitmapTable)
                    .at(bitmap.table_offset + index * 8, 8)
                    .entry(index)
            };
            let unaligned = match entry.kind() {
                BitmapCluster::Cluster(offset) => !image.geometry.is_cluster_aligned(offset),
                _ => false,
            };
            if entry.reserved_bits() != 0 || unaligned {
                let detail = format!("entry {:#x} of bitmap {number}", entry.bits());
                run.find(Finding::new(Code::BitmapTableReserved, place(), detail));
                return;
            }
            if let BitmapCluster::Cluster(offset) = entry.kind() {
                let offset = offset.get();
                let counted = image.count(map, offset, image.cluster_size(), 1, Sharing::Exclusive);
                if let Some(code) = uncounted(counted) {
                    run.find(Finding::new(code, place(), image.past_end(offset)));
                }
            }
        });
        if let (BitmapCluster::Cluster(offset), false) = (last, bitmap.in_use) {
            tail(image, bitmap, number, offset.get(), run);
        }
    }
}

/// Calls `each` with every entry of a bitmap's table that is not zero.
pub(crate) fn each_entry(
    image: &Image<'_>,
    bitmap: &BitmapInfo,
    run: &Run<'_>,
    mut each: impl FnMut(u64, BitmapTableEntry),
) {
    let in_file = image
        .file_len()
        .saturating_sub(bitmap.table_offset)
        .div_ceil(8);
    let entries = bitmap.table_entries.min(in_file);
    let mut buffer = Vec::new();
    let mut index = 0;
    while index < entries {
        let count = (entries - index).min(READ_BYTES / 8);
        let at = bitmap.table_offset.saturating_add(index * 8);
        if !image.reader.is_known_zero(at, count * 8) {
            buffer.resize(usize::try_from(count * 8).unwrap_or(0), 0);
            if let Err(error) = image.reader.read(&mut buffer, at) {
                run.find(Finding::new(
                    Code::BitmapsInvalid,
                    Place::of(Structure::BitmapTable).at(at, count * 8),
                    format!("can't be read: {error}"),
                ));
            } else if crate::reader::is_zero(&buffer) {
                image.reader.met_zero_table(at);
            } else {
                for (index, word) in (index..).zip(buffer.as_chunks::<8>().0) {
                    let entry = BitmapTableEntry::from_be_bytes(*word);
                    if entry.bits() != 0 {
                        each(index, entry);
                    }
                }
            }
        }
        index += count;
    }
}

/// Looks for bits behind the end of the disk in the last cluster of a bitmap.
fn tail(image: &Image<'_>, bitmap: &BitmapInfo, number: u64, offset: u64, run: &Run<'_>) {
    if !(9..=31).contains(&bitmap.granularity_bits) {
        return;
    }
    let bits = image
        .header
        .virtual_size()
        .div_ceil(1 << bitmap.granularity_bits);
    let before = (bitmap.table_entries.saturating_sub(1) << image.cluster_bits()).saturating_mul(8);
    let Some(used) = bits
        .checked_sub(before)
        .filter(|used| *used < image.cluster_size() * 8)
    else {
        return;
    };
    let mut cluster = vec![0; image.geometry.cluster_len()];
    if image.reader.read(&mut cluster, offset).is_err() {
        return;
    }
    let set = (0_u64..)
        .zip(&cluster)
        .filter(|(at, _)| (at + 1) * 8 > used)
        .map(|(at, byte)| {
            let keep = used.saturating_sub(at * 8).min(8);
            u64::from((u32::from(*byte) >> keep).count_ones())
        })
        .sum::<u64>();
    if set > 0 {
        let place = Place::of(Structure::BitmapData).at(offset, image.cluster_size());
        let detail = format!("{set} bits behind the end in bitmap {number}");
        run.find(Finding::new(Code::BitmapTailBits, place, detail));
    }
}
