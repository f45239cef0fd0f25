//! Adding the bits of one bitmap to another.

use std::collections::BTreeMap;
use std::ops::Range;

use qcow2_cache::Kinds;
use qcow2_format::bitmap::BitmapCluster;

use super::directory::{Known, unusable};
use super::edit::Edit;
use super::place::Piece;
use super::record::{bits_of, full_page};
use super::tracker::{PAGE_BITS, PAGE_WORDS, Words, by_page, masks};
use super::walk::Sink;
use super::{BitmapOptions, State};
use crate::{Image, ImageError};

/// Bits in memory: pages that have some.
pub(super) struct Sparse {
    pages: BTreeMap<u64, Box<Words>>,
    /// Base-2 logarithms of the bytes that a bit stands for, where they come from and here.
    from_bits: u32,
    to_bits: u32,
    size: u64,
}

impl Sink for Sparse {
    fn run(&mut self, bits: Range<u64>) -> bool {
        let start = bits.start << self.from_bits;
        let end = (bits.end << self.from_bits).min(self.size);
        if start < end {
            for part in by_page(bits_of(start, end - start, self.to_bits)) {
                let page = self.pages.entry(part.start / PAGE_BITS);
                let page = page.or_insert_with(|| Box::new([0; PAGE_WORDS]));
                for (index, mask) in masks(part) {
                    if let Some(word) = page.get_mut(index) {
                        *word |= mask;
                    }
                }
            }
        }
        true
    }
}

impl Image {
    /// Adds to a bitmap what another one has, of this image or another. Their granularities may differ; the disks must have one
    /// size. Requests to this image wait meanwhile; none that ended before the call is missing.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoBitmap`]; [`ImageError::BitmapUnusable`] if one of them is not consistent, or the disks differ in size; and
    /// what the storages report, after which all is added or nothing.
    ///
    /// # Durability
    ///
    /// On return it is durable.
    pub fn merge_bitmap(
        &self,
        name: &[u8],
        source: &Image,
        source_name: &[u8],
    ) -> Result<(), ImageError> {
        self.check_same_size(name, source)?;
        if std::ptr::eq(self, source) {
            return self.edit_bitmaps(|state| {
                let directory = Self::directory(state);
                let known = directory.usable(name)?;
                let other = directory.usable(source_name)?;
                if name == source_name {
                    return Ok(());
                }
                let bits = self.gather(other, known.entry.granularity_bits.into())?;
                self.add_bits(state, known, &bits)
            });
        }
        // Before anything here is locked: the other image may be doing the same.
        let target_bits = self.with_directory(|directory| {
            let known = directory.usable(name)?;
            Ok(u32::from(known.entry.granularity_bits))
        })?;
        let bits = source.bits_of_bitmap(source_name, Some(target_bits))?;
        self.edit_bitmaps(|state| {
            let directory = Self::directory(state);
            let known = directory.usable(name)?;
            self.check_size(known, &bits)?;
            self.add_bits(state, known, &bits)
        })
    }

    /// Makes a new bitmap that has what one of another image has, and its name and granularity. A crash leaves all of it or nothing.
    pub(crate) fn adopt_bitmap(
        &self,
        source: &Image,
        name: &[u8],
        enabled: bool,
    ) -> Result<(), ImageError> {
        self.check_same_size(name, source)?;
        let bits = source.bits_of_bitmap(name, None)?;
        let options = BitmapOptions::new()
            .granularity(1 << bits.to_bits)
            .enabled(enabled);
        self.add_bitmap(name, &options, Some(&bits))
    }

    fn check_same_size(&self, name: &[u8], source: &Image) -> Result<(), ImageError> {
        let (size, other) = (self.virtual_size(), source.virtual_size());
        if size == other {
            return Ok(());
        }
        let why =
            format!("it is for a disk of {size} bytes, and the other for one of {other} bytes");
        Err(unusable(name, why))
    }

    /// Refuses bits that were gathered for what the bitmap was before.
    pub(super) fn check_size(&self, known: &Known, bits: &Sparse) -> Result<(), ImageError> {
        let same_grain = u32::from(known.entry.granularity_bits) == bits.to_bits;
        if same_grain && self.virtual_size() == bits.size {
            return Ok(());
        }
        Err(unusable(
            &known.entry.name,
            "it changed while the other one was read",
        ))
    }

    /// Reads a bitmap, in bits of another granularity if one is given. The caller has no lock of any image.
    fn bits_of_bitmap(&self, name: &[u8], to_bits: Option<u32>) -> Result<Sparse, ImageError> {
        let _pass = self.gate.enter();
        self.with_directory(|directory| {
            let known = directory.usable(name)?;
            let own = u32::from(known.entry.granularity_bits);
            self.gather(known, to_bits.unwrap_or(own))
        })
    }

    /// Reads a bitmap.
    fn gather(&self, known: &Known, to_bits: u32) -> Result<Sparse, ImageError> {
        let mut bits = Sparse {
            pages: BTreeMap::new(),
            from_bits: known.entry.granularity_bits.into(),
            to_bits,
            size: self.meta.header().virtual_size(),
        };
        self.walk_bits(known, 0..self.bit_count(known), &mut bits)?;
        Ok(bits)
    }

    /// Adds bits to a bitmap: what changes of its data is written to new places.
    fn add_bits(&self, state: &mut State, known: &Known, bits: &Sparse) -> Result<(), ImageError> {
        self.settle_bitmaps(state, known.tracker)?;
        let table = self.table_of(known)?;
        let mut edit = Edit::new(Self::directory(state));
        let table = self.add_to_table(known, table, bits, &mut edit)?;
        self.edit_table(known, table, &mut edit)?;
        self.switch_directory(state, edit, |_| {})
    }

    /// What becomes of a table so.
    pub(super) fn add_to_table(
        &self,
        known: &Known,
        table: Vec<BitmapCluster>,
        bits: &Sparse,
        edit: &mut Edit<'_>,
    ) -> Result<Vec<Piece>, ImageError> {
        let mut table: Vec<Piece> = table.into_iter().map(Piece::There).collect();
        let file = self.bits_of(known);
        let total = self.bit_count(known);
        let pages_per_cluster = file.per_cluster() / PAGE_BITS;
        let new: Vec<(&u64, &Box<Words>)> = bits.pages.iter().collect();
        let cluster_of = |page: u64| page / pages_per_cluster;
        for same in new.chunk_by(|(a, _), (b, _)| cluster_of(**a) == cluster_of(**b)) {
            let Some((first, _)) = same.first() else {
                continue;
            };
            let cluster = cluster_of(**first);
            let index = usize::try_from(cluster).unwrap_or(usize::MAX);
            let Some(piece @ &mut Piece::There(kind)) = table.get_mut(index) else {
                continue;
            };
            let first_page = cluster * pages_per_cluster;
            let end_page = (first_page + pages_per_cluster).min(total.div_ceil(PAGE_BITS));
            let mut pages: Vec<Words> = match kind {
                BitmapCluster::AllOnes => continue,
                BitmapCluster::AllZeros => {
                    let count = usize::try_from(end_page - first_page).unwrap_or(0);
                    vec![[0; PAGE_WORDS]; count]
                }
                BitmapCluster::Cluster(offset) => {
                    file.read_pages(offset, first_page, end_page - first_page)?
                }
            };
            let mut changed = false;
            for (page, words) in same {
                let at = usize::try_from(**page - first_page).unwrap_or(usize::MAX);
                let Some(there) = pages.get_mut(at) else {
                    continue;
                };
                for (there, word) in there.iter_mut().zip(words.iter()) {
                    changed |= *word & !*there != 0;
                    *there |= word;
                }
            }
            if !changed {
                continue;
            }
            let pages: Vec<(u64, Words)> = (first_page..).zip(pages).collect();
            if let BitmapCluster::Cluster(offset) = kind {
                edit.drop_clusters(offset, 1, Kinds::BITMAP_DATA);
            }
            let full = pages
                .iter()
                .all(|(page, words)| *words == full_page(*page, total));
            *piece = if full {
                Piece::There(BitmapCluster::AllOnes)
            } else {
                Piece::New(pages)
            };
        }
        Ok(table)
    }

    /// Gives a bitmap another table, as a part of an edit that takes care of its data.
    pub(super) fn edit_table(
        &self,
        known: &Known,
        table: Vec<Piece>,
        edit: &mut Edit<'_>,
    ) -> Result<(), ImageError> {
        let mut all = edit.directory.known.iter();
        if let Some(at) = all.position(|one| one.place == known.place) {
            edit.tables.insert(at, table);
        }
        self.drop_table(known, false, edit)
    }
}
