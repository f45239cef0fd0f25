//! Writing what was planned.

use qcow2_format::header::{CryptMethod, Version};
use qcow2_format::{HostOffset, L1Entry, L2Entry, RefcountTableEntry, set_refcount};
use qcow2_io::{Result as StorageResult, Storage, ZeroFlags};

use super::layout::Layout;
use super::plan::Plan;
use super::target::{CHUNK, Target};
use super::{CreateError, CreateOptions, Preallocation};

/// Bytes that a crash can't tear.
const SECTOR: usize = 512;

/// Writes a new image into `storage`, and an empty disk into its external data file if it has one. What was in them is lost.
///
/// The data file comes from `data_file`, or else from the options. A storage that keeps its length, such as a block device or
/// a [`Slice`](qcow2_io::Slice) of anything, is written over; any other becomes exactly as long as the image. So an image
/// inside another image's disk is written to a slice: the disk would be cut otherwise.
///
/// Memory stays at a few MiB, however large the disk is.
///
/// # Durability
///
/// On return the image is durable. After a crash or an error in between, the storage holds no image at all: the old header is
/// wiped first, and the first sector of the new one written last, with a flush before and after.
///
/// # Errors
///
/// A rule that the options break, or a `storage` of fixed length that is too short: nothing has changed then. Otherwise
/// what the storages report.
pub fn write_image(
    storage: &dyn Storage,
    data_file: Option<&dyn Storage>,
    options: &CreateOptions,
) -> Result<(), CreateError> {
    let plan = Plan::new(options)?;
    let data_file = data_file.or(options.data_file_storage.as_deref());
    match (&options.data_file, data_file) {
        (Some(_), None) => return Err(CreateError::DataStorageMissing),
        (None, Some(_)) => return Err(CreateError::DataFileNameMissing),
        _ => {}
    }
    let layout = &plan.layout;
    let image = Target::clear(storage, "image", layout.file_len(), SECTOR as u64)?;
    if let Some(storage) = data_file {
        let data = Target::clear(storage, "data file", plan.size, 0)?;
        fill_data_file(&data, &plan)?;
    } else {
        reserve(&image, &plan)?;
    }
    write_refcounts(storage, layout).map_err(CreateError::while_trying("write the refcounts"))?;
    write_l1_table(&image, layout).map_err(CreateError::while_trying("write the L1 table"))?;
    let zeros_between = data_file.is_none() && plan.preallocation == Preallocation::Full;
    let version3 = options.version == Version::V3;
    let encrypted = options.encryption.method != CryptMethod::None;
    write_l2_tables(&image, layout, zeros_between, encrypted && version3)
        .map_err(CreateError::while_trying("write the preallocated clusters"))?;
    options.encryption.write(storage, layout, !version3)?;
    // A sector is written as a whole or not at all.
    let (sector, rest) = plan
        .first_cluster
        .split_at_checked(SECTOR)
        .unwrap_or((&plan.first_cluster, &[]));
    storage
        .write_at(rest, SECTOR as u64)
        .and_then(|()| storage.flush())
        .map_err(CreateError::while_trying("flush the tables"))?;
    storage
        .write_at(sector, 0)
        .and_then(|()| storage.flush())
        .map_err(CreateError::while_trying("write the header"))
}

/// Makes the data file read as zeros where somebody will read it, and reserves its space.
fn fill_data_file(data: &Target<'_>, plan: &Plan) -> Result<(), CreateError> {
    let all = 0..plan.size;
    match plan.preallocation {
        Preallocation::Metadata if data.stale => {
            data.storage.write_zeroes(all, ZeroFlags::MAY_UNMAP)
        }
        // Nobody reads it, or it is a new file and reads as zeros.
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => data.storage.write_zeroes(all, ZeroFlags::NONE),
        Preallocation::Full => data.write_zero_bytes(all, &zeros()),
    }
    .and_then(|()| data.storage.flush())
    .map_err(CreateError::while_trying("fill the data file"))
}

/// Reserves the space behind the L1 table, or wipes it where old bytes would show through.
fn reserve(image: &Target<'_>, plan: &Plan) -> Result<(), CreateError> {
    let range = plan.layout.preallocated();
    match plan.preallocation {
        Preallocation::Metadata if image.stale => {
            image.storage.write_zeroes(range, ZeroFlags::MAY_UNMAP)
        }
        Preallocation::Falloc => image.storage.write_zeroes(range, ZeroFlags::NONE),
        // Full writes the zeros together with the tables between them.
        Preallocation::Off | Preallocation::Metadata | Preallocation::Full => Ok(()),
    }
    .map_err(CreateError::while_trying("reserve the data clusters"))
}

/// Refcount table and refcount blocks: each cluster of the file has one reference.
fn write_refcounts(storage: &dyn Storage, layout: &Layout) -> StorageResult<()> {
    let geometry = layout.geometry();
    let blocks = layout.refcount_blocks();
    let slots = layout.refcount_table_clusters() * (geometry.cluster_size() / 8);
    let words = (0..slots).map(|index| {
        if index < blocks {
            RefcountTableEntry::from_bits(layout.refcount_block(index).get()).bits()
        } else {
            0
        }
    });
    write_words(storage, layout.refcount_table().get(), words)?;

    let full = layout.clusters() / geometry.refcounts_per_block();
    let ones = |count: u64| {
        let mut block = vec![0; geometry.cluster_len()];
        for index in 0..usize::try_from(count).unwrap_or(usize::MAX) {
            set_refcount(&mut block, geometry, index, 1)
                .expect("an index within the block, and 1 fits every width");
        }
        block
    };
    if full > 0 {
        let block = ones(geometry.refcounts_per_block());
        let at_once = (CHUNK / block.len()).max(1);
        let many = block.repeat(at_once);
        let mut index = 0;
        while index < full {
            let count = (full - index).min(at_once as u64);
            let len = usize::try_from(count).unwrap_or(at_once) * block.len();
            let part = many.get(..len).unwrap_or(&many);
            storage.write_at(part, layout.refcount_block(index).get())?;
            index += count;
        }
    }
    if full < blocks {
        let rest = layout.clusters() % geometry.refcounts_per_block();
        storage.write_at(&ones(rest), layout.refcount_block(full).get())?;
    }
    Ok(())
}

fn write_l1_table(image: &Target<'_>, layout: &Layout) -> StorageResult<()> {
    let start = layout.l1_table().get();
    let entries = layout.l1_entries();
    if entries == 0 {
        return Ok(());
    }
    if layout.l2_tables() == 0 {
        let range = start..layout.tables_end();
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        if len <= CHUNK {
            // A reserved range would be an extent of its own for the file system, which costs it more than such a table.
            image.storage.write_at(&vec![0; len], start)?;
        } else {
            image.storage.write_zeroes(range, ZeroFlags::NONE)?;
        }
    } else {
        let words = (0..entries).map(|index| L1Entry::new(layout.l2_table(index), true).bits());
        write_words(image.storage, start, words)?;
    }
    if image.stale {
        // The rest of the last cluster has no meaning, but old bytes there would surprise whoever looks.
        let len = image.storage.len()?;
        let end = layout.preallocated().start.min(len);
        image.storage.write_zeroes(
            layout.tables_end()..end.max(layout.tables_end()),
            ZeroFlags::NONE,
        )?;
    }
    Ok(())
}

/// The L2 tables of a preallocated image, and zeros in the data clusters between them if they are to be written.
///
/// The entries of encrypted images say that their clusters are zeros, for what is in them would be deciphered.
fn write_l2_tables(
    image: &Target<'_>,
    layout: &Layout,
    zeros_between: bool,
    encrypted: bool,
) -> StorageResult<()> {
    let geometry = layout.geometry();
    let zeros = if zeros_between { zeros() } else { Vec::new() };
    let mut table = vec![0; geometry.cluster_len()];
    let entry_len = if geometry.extended_l2() { 16 } else { 8 };
    for index in 0..layout.l2_tables() {
        let clusters = layout.guest_clusters_of(index);
        let first = layout.data(clusters.start).get();
        table.fill(0);
        for (slot, number) in table.chunks_exact_mut(entry_len).zip(clusters.clone()) {
            let place = first + ((number - clusters.start) << geometry.cluster_bits());
            // With extended entries no subcluster is in use yet: they read from below.
            let place = HostOffset::new(place);
            let entry = if encrypted && !geometry.extended_l2() {
                L2Entry::zero(place, true)
            } else {
                L2Entry::normal(place, true, 0)
            };
            if let Some(word) = slot.first_chunk_mut() {
                *word = entry.word().to_be_bytes();
            }
        }
        image
            .storage
            .write_at(&table, layout.l2_table(index).get())?;
        if zeros_between {
            let len = (clusters.end - clusters.start) << geometry.cluster_bits();
            image.write_zero_bytes(first..first + len, &zeros)?;
        }
    }
    Ok(())
}

/// Writes a table of big-endian words, front to back.
fn write_words(
    storage: &dyn Storage,
    offset: u64,
    words: impl Iterator<Item = u64>,
) -> StorageResult<()> {
    let mut position = offset;
    let mut buffer = Vec::new();
    for word in words {
        buffer.extend(word.to_be_bytes());
        if buffer.len() >= CHUNK {
            storage.write_at(&buffer, position)?;
            position += buffer.len() as u64;
            buffer.clear();
        }
    }
    storage.write_at(&buffer, position)
}

fn zeros() -> Vec<u8> {
    vec![0; CHUNK]
}
