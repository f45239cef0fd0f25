//! The refcount table: which refcount blocks there are, and what is wrong with their entries.

use qcow2_format::RefcountTableEntry;

use crate::image::{Counted, Image};
use crate::refmap::{RefMap, Sharing};
use crate::{Code, Finding, Place, Run, Structure};

/// Blocks that share their cluster, up to which each is compared. What lies beyond only costs time.
const SHARED_MAX: u64 = 4096;
/// Offsets that QEMU's block layer refuses to read at.
const OFFSET_MAX: u64 = (1 << 63) - (1 << 30);
/// Bytes of the table read at once.
const READ_BYTES: usize = 1 << 20;

/// Where the refcounts of a stretch of clusters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockRef {
    /// There is no block; the refcounts are 0.
    Absent,
    /// The block starts here.
    At(u64),
    /// There is a block that can't be read.
    Unreadable,
    /// Not looked at, to keep an absurd table from costing time.
    Skipped,
}

/// The refcount blocks in the order of the clusters they are for.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    refs: Vec<BlockRef>,
}

impl From<Vec<BlockRef>> for Blocks {
    fn from(refs: Vec<BlockRef>) -> Self {
        Self { refs }
    }
}

impl Blocks {
    /// The block for the stretch numbered `index`.
    pub(crate) fn get(&self, index: u64) -> BlockRef {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.refs.get(index))
            .copied()
            .unwrap_or(BlockRef::Absent)
    }

    /// Stretches that the table has entries for, up to the last one in use.
    pub(crate) fn len(&self) -> u64 {
        self.refs.len() as u64
    }
}

/// Reads the refcount table, counts the references to its blocks, and tells what is wrong with its entries.
///
/// The last of the reference counting: a block must have its cluster for itself when all else has been counted.
pub(crate) fn load(image: &Image<'_>, map: &mut RefMap, run: &Run<'_>) -> Blocks {
    let mut blocks = Blocks::default();
    let offset = image.header.refcount_table_offset.get();
    let len = u64::from(image.header.refcount_table_clusters) << image.cluster_bits();
    let len = len.min(image.file_len().saturating_sub(offset));
    let known_clusters = map.end().max(image.file_clusters());
    let refcount_max = image.geometry.refcount_max();
    let mut shared = 0;
    let mut buffer = vec![
        0;
        READ_BYTES.min(
            usize::try_from(len)
                .unwrap_or(READ_BYTES)
                .next_multiple_of(8)
        )
    ];
    let mut index = 0_u64;
    while index * 8 < len {
        let part = usize::try_from((len - index * 8).next_multiple_of(8)).unwrap_or(usize::MAX);
        let bytes_len = part.min(buffer.len());
        let bytes = buffer.get_mut(..bytes_len).unwrap_or_default();
        let at = offset + index * 8;
        if image.reader.is_known_zero(at, bytes.len() as u64) {
            index += bytes.len() as u64 / 8;
            continue;
        }
        if let Err(error) = image.reader.read(bytes, at) {
            let place = Place::of(Structure::RefcountTable)
                .at(at, bytes.len() as u64)
                .entry(index);
            run.find(Finding::new(
                Code::RefcountUnreadable,
                place,
                format!("the refcount table can't be read: {error}"),
            ));
            index += bytes.len() as u64 / 8;
            continue;
        }
        for word in bytes.as_chunks::<8>().0 {
            let entry = RefcountTableEntry::from_be_bytes(*word);
            if entry.bits() != 0 {
                let block = judge(
                    image,
                    map,
                    run,
                    index,
                    entry,
                    known_clusters,
                    refcount_max,
                    &mut shared,
                );
                let slot = usize::try_from(index).unwrap_or(usize::MAX);
                blocks.refs.resize(slot, BlockRef::Absent);
                blocks.refs.push(block);
            }
            index += 1;
        }
    }
    if shared > SHARED_MAX {
        run.tell(Finding::new(
            Code::CheckLimited,
            Place::of(Structure::RefcountTable).at(offset, len),
            format!(
                "more than {SHARED_MAX} refcount blocks share clusters or are scattered absurdly"
            ),
        ));
    }
    blocks
}

#[expect(
    clippy::too_many_arguments,
    reason = "one entry's way through the rules, called from one place"
)]
fn judge(
    image: &Image<'_>,
    map: &mut RefMap,
    run: &Run<'_>,
    index: u64,
    entry: RefcountTableEntry,
    known_clusters: u64,
    refcount_max: u64,
    shared: &mut u64,
) -> BlockRef {
    let offset = entry.block().get();
    let size = image.cluster_size();
    let place = || {
        Place::of(Structure::RefcountBlock)
            .at(offset, size)
            .entry(index)
    };
    let aligned = image.geometry.is_cluster_aligned(entry.block());
    let found = if offset == 0 {
        BlockRef::Absent
    } else if !aligned || offset >= OFFSET_MAX {
        BlockRef::Unreadable
    } else {
        BlockRef::At(offset)
    };
    let (bits, reserved) = (entry.bits(), entry.reserved_bits());
    if reserved != 0 {
        run.find_with(Code::RefcountTableReserved, || {
            (
                place(),
                format!("entry {bits:#x} has the reserved bits {reserved:#x}"),
            )
        });
        return found;
    }
    if !aligned {
        run.find_with(Code::RefcountBlockUnaligned, || {
            (place(), format!("the block would start at {offset:#x}"))
        });
        return found;
    }
    let cluster = offset >> image.cluster_bits();
    if cluster >= known_clusters {
        run.find_with(Code::RefcountBlockPastEnd, || {
            (place(), image.past_end(offset))
        });
        return found;
    }
    if found == BlockRef::Absent {
        return found;
    }
    match image.count(map, offset, size, 1, Sharing::Exclusive) {
        Counted::Yes => {}
        Counted::PastEnd | Counted::TooLong => {
            run.find_with(Code::ReferencePastEnd, || (place(), image.past_end(offset)));
        }
    }
    if map.is_scattered() {
        *shared = SHARED_MAX + 1;
        return BlockRef::Skipped;
    }
    let owners = map.weight(cluster);
    if owners.min(refcount_max) != 1 {
        *shared += 1;
        run.find_with(Code::RefcountBlockShared, || {
            (place(), format!("its cluster has {owners} owners by now"))
        });
        if *shared > SHARED_MAX {
            return BlockRef::Skipped;
        }
    }
    found
}
