//! Bitmaps of a disk that changes its size, or goes back in time.

use std::ops::Range;

use qcow2_cache::Kinds;
use qcow2_format::Header;
use qcow2_format::bitmap::BitmapCluster;

use super::directory::{Directory, Known};
use super::edit::Edit;
use super::place::Piece;
use super::record::full_page;
use super::tracker::{PAGE_BITS, PAGE_WORDS, Words};
use super::{BitmapState, State};
use crate::{Image, ImageError};

/// What bits that are added are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewBits {
    /// Clear: what is added reads as zeros.
    Clear,
    /// Set, in bitmaps that record: what is added has been there before.
    Changed,
}

impl Image {
    /// Whether the bitmaps can follow a disk that gets another size. The image is ready for writes.
    pub(crate) fn check_bitmaps_fit(&self, size: u64) -> Result<(), ImageError> {
        let state = self.bitmaps.lock();
        let Some(directory) = &state.directory else {
            return Ok(());
        };
        check_fit(self, directory, size)
    }

    /// Makes `size` that of the disk in the header, and the bitmaps fit it, in the same moment. `switch` does that to the header
    /// where no bitmap has to change; `change` is the same as a part of something larger. The gate is closed.
    pub(crate) fn switch_size_of_all(
        &self,
        size: u64,
        new_bits: NewBits,
        switch: impl FnOnce() -> Result<(), ImageError>,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), ImageError> {
        let state = &mut *self.bitmaps.lock();
        let old = self.meta.header().virtual_size();
        let has_any = state
            .directory
            .as_ref()
            .is_some_and(|directory| !directory.known.is_empty() || directory.rest.is_some());
        if !has_any || size == old {
            return switch();
        }
        check_fit(self, &Self::directory(state), size)?;
        self.settle_bitmaps(state, None)?;
        match self.fitted(state, old, size, new_bits)? {
            Some(edit) => self.switch_directory(state, edit, change),
            None => switch(),
        }
    }

    /// The directory with all bitmaps as they have to be for another size; `None` if they are so.
    fn fitted(
        &self,
        state: &State,
        old: u64,
        size: u64,
        new_bits: NewBits,
    ) -> Result<Option<Edit<'_>>, ImageError> {
        let mut edit = Edit::new(Self::directory(state));
        edit.size = Some(size);
        let mut any = false;
        for known in &Self::directory(state).known {
            let before = self.table_of(known)?;
            let entries = self.table_entries(&known.entry, size)?;
            let mut after = before.clone();
            let entries = usize::try_from(entries).unwrap_or(usize::MAX);
            for kind in before.get(entries..).unwrap_or_default() {
                if let BitmapCluster::Cluster(offset) = kind {
                    edit.drop_clusters(*offset, 1, Kinds::BITMAP_DATA);
                }
            }
            let fill = new_bits == NewBits::Changed && known.entry.flags.auto();
            let new = if fill {
                BitmapCluster::AllOnes
            } else {
                BitmapCluster::AllZeros
            };
            after.resize(entries, new);
            let bits = |size: u64| size.div_ceil(1 << known.entry.granularity_bits);
            let (old_bits, new_bits) = (bits(old), bits(size));
            // The cluster of bits in which the smaller of the two sizes ends.
            let border = old_bits.min(new_bits);
            let per_cluster = self.bits_of(known).per_cluster();
            let index = usize::try_from(border / per_cluster).unwrap_or(usize::MAX);
            let mut bordered = None;
            if !border.is_multiple_of(per_cluster)
                && old_bits != new_bits
                && let Some(kind) = after.get(index)
            {
                let all = border / per_cluster * per_cluster
                    ..new_bits.min((border / per_cluster + 1) * per_cluster);
                let filled = fill && old_bits < new_bits;
                if let Some(pages) = self.bordered(known, *kind, all, border, filled)? {
                    if let BitmapCluster::Cluster(offset) = *kind {
                        edit.drop_clusters(offset, 1, Kinds::BITMAP_DATA);
                    }
                    bordered = Some(pages);
                }
            }
            if after != before || bordered.is_some() {
                let mut table: Vec<Piece> = after.into_iter().map(Piece::There).collect();
                if let (Some(piece), Some(pages)) = (table.get_mut(index), bordered) {
                    *piece = Piece::New(pages);
                }
                self.edit_table(known, table, &mut edit)?;
                any = true;
            }
        }
        Ok(any.then_some(edit))
    }

    /// The pages of the cluster of bits `all`, with those from `border` on set or clear; `None` if it is so already.
    fn bordered(
        &self,
        known: &Known,
        kind: BitmapCluster,
        all: Range<u64>,
        border: u64,
        set: bool,
    ) -> Result<Option<Vec<(u64, Words)>>, ImageError> {
        let first = all.start / PAGE_BITS;
        let cluster_end = all.start + self.bits_of(known).per_cluster();
        let count = (cluster_end - all.start) / PAGE_BITS;
        let old = match kind {
            BitmapCluster::AllZeros => {
                vec![[0; PAGE_WORDS]; usize::try_from(count).unwrap_or(0)]
            }
            BitmapCluster::AllOnes => {
                vec![[u64::MAX; PAGE_WORDS]; usize::try_from(count).unwrap_or(0)]
            }
            BitmapCluster::Cluster(offset) => {
                self.bits_of(known).read_pages(offset, first, count)?
            }
        };
        let new: Vec<(u64, Words)> = (first..)
            .zip(&old)
            .map(|(page, words)| {
                let below = full_page(page, border);
                let within = full_page(page, all.end);
                let mut words = *words;
                for ((word, below), within) in words.iter_mut().zip(below).zip(within) {
                    *word &= below;
                    if set {
                        *word |= within & !below;
                    }
                }
                (page, words)
            })
            .collect();
        // An entry for ones has no more bits than the disk.
        let same = if kind == BitmapCluster::AllOnes {
            set || all.end <= border
        } else {
            new.iter().zip(&old).all(|((_, new), old)| new == old)
        };
        Ok((!same).then_some(new))
    }
}

fn check_fit(image: &Image, directory: &Directory, size: u64) -> Result<(), ImageError> {
    let whole = directory.rest.is_none();
    let known = directory.known.iter();
    if !whole
        || known
            .clone()
            .any(|one| one.state != BitmapState::Consistent)
    {
        return Err(ImageError::Unsupported {
            what: "a disk with a bitmap that is inconsistent or broken can't change its size: remove or recover it first",
        });
    }
    for one in known {
        image.table_entries(&one.entry, size)?;
    }
    Ok(())
}
