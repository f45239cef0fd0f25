//! New places for bitmaps: data, then the table, one bitmap after the other in the order of the directory.

use std::ops::Range;

use qcow2_cache::Kinds;
use qcow2_format::bitmap::{BitmapCluster, BitmapFlags};
use qcow2_format::{BitmapEntry, BitmapTableEntry};

use super::State;
use super::directory::{Directory, Known, text};
use super::edit::Edit;
use super::record::full_page;
use super::tracker::{PAGE_BITS, PAGE_WORDS, Page, Words};
use crate::{Image, ImageError};

/// What a cluster of a bitmap's data is to be.
pub(super) enum Piece {
    /// What the file has of it.
    There(BitmapCluster),
    /// These pages; the others are clear.
    New(Vec<(u64, Words)>),
}

impl Directory {
    /// Whether a bitmap is in use from the beginning on, and gets a new place with each change of the directory.
    pub(super) fn takes_anew(&self, known: &Known) -> bool {
        self.anew && known.is_consistent()
    }
}

impl Image {
    /// If bitmaps are in use from opening on, they are that from here on.
    pub(crate) fn occupy_bitmaps(&self) {
        if self.bitmaps.anew && self.header().bitmaps().is_some() {
            // What stands in the way of writes is for the first one to tell, and none is needed to close.
            let _ = self.get_ready();
        }
    }

    /// The last use of the bitmaps: what they have recorded is stored, and the file says that it is complete. No request is in flight.
    pub(crate) fn finish_bitmaps(&self) -> Result<(), ImageError> {
        let moves = {
            let state = &mut *self.bitmaps.lock();
            let directory = state.directory.iter();
            let mut taken =
                directory.flat_map(|all| all.known.iter().map(|one| all.takes_anew(one)));
            let moves = !state.fresh && taken.any(|taken| taken);
            if moves {
                self.place_all_anew(state, false)?;
            }
            moves
        };
        self.store_bitmaps()?;
        if moves {
            // The old places are free then.
            self.flush_all()?;
        }
        Ok(())
    }

    /// Gives all bitmaps that are consistent new places, in use or not. No request is in flight.
    fn place_all_anew(&self, state: &mut State, in_use: bool) -> Result<(), ImageError> {
        let mut edit = Edit::new(Self::directory(state));
        for known in &mut edit.directory.known {
            if known.is_consistent() {
                known.entry.flags = BitmapFlags::new(in_use, known.entry.flags.auto());
            }
        }
        self.switch_directory(state, edit, |_| {})
    }

    /// Gives those of some bitmaps, or of all, new places that have recorded something the file has only roughly. No request
    /// is in flight.
    pub(super) fn place_recorded(
        &self,
        state: &mut State,
        only: Option<usize>,
    ) -> Result<(), ImageError> {
        let Some(directory) = &state.directory else {
            return Ok(());
        };
        let is_armed = |known: &Known| {
            let number = known
                .tracker
                .filter(|number| only.unwrap_or(*number) == *number);
            number.is_some_and(|number| {
                state
                    .armed
                    .range((number, 0)..=(number, u64::MAX))
                    .next()
                    .is_some()
            })
        };
        let mut all = directory.known.iter();
        if all.any(|known| directory.takes_anew(known) && is_armed(known)) {
            self.place_all_anew(state, true)?;
        }
        Ok(())
    }

    /// Writes what an edit has for its bitmaps to where nothing is; if they get new places with each change, all of them.
    pub(super) fn place_tables<'a>(&'a self, edit: &mut Edit<'a>) -> Result<(), ImageError> {
        for index in 0..edit.directory.known.len() {
            let Some(known) = edit.directory.known.get(index).cloned() else {
                continue;
            };
            let planned = edit.tables.remove(&index);
            let anew = edit.moves && edit.directory.takes_anew(&known);
            if planned.is_none() && !anew {
                continue;
            }
            let placed = self.place_bitmap(&known, planned, anew, edit);
            let entry = placed.map_err(|source| {
                if anew {
                    lost(Some(&known), source)
                } else {
                    source
                }
            })?;
            if let Some(known) = edit.directory.known.get_mut(index) {
                known.entry = entry;
            }
        }
        Ok(())
    }

    fn place_bitmap<'a>(
        &'a self,
        known: &Known,
        planned: Option<Vec<Piece>>,
        anew: bool,
        edit: &mut Edit<'a>,
    ) -> Result<BitmapEntry, ImageError> {
        let pieces = if let Some(pieces) = planned {
            pieces
        } else {
            self.drop_table(known, false, edit)?;
            self.recorded(known, edit)?
        };
        let mut entries = Vec::with_capacity(pieces.len());
        for (number, piece) in (0..).zip(pieces) {
            let kind = match piece {
                Piece::There(kind) if !anew || kind == BitmapCluster::AllZeros => kind,
                Piece::There(kind) => {
                    let pages = self.pages_there(known, number, kind, edit.size)?;
                    if let BitmapCluster::Cluster(offset) = kind {
                        edit.drop_clusters(offset, 1, Kinds::BITMAP_DATA);
                    }
                    self.place_pages(&pages, edit)?
                }
                Piece::New(pages) => self.place_pages(&pages, edit)?,
            };
            entries.push(BitmapTableEntry::new(kind));
        }
        let place = self.new_table(&entries)?;
        let mut entry = known.entry.clone();
        entry.table_offset = place.offset();
        entry.table_entries = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        edit.add(place, Kinds::BITMAP_TABLE);
        Ok(entry)
    }

    fn place_pages<'a>(
        &'a self,
        pages: &[(u64, Words)],
        edit: &mut Edit<'a>,
    ) -> Result<BitmapCluster, ImageError> {
        if pages.iter().all(|(_, words)| *words == [0; PAGE_WORDS]) {
            return Ok(BitmapCluster::AllZeros);
        }
        let data = self.new_data(pages)?;
        let offset = data.offset();
        edit.add(data, Kinds::BITMAP_DATA);
        Ok(BitmapCluster::Cluster(offset))
    }

    /// What a bitmap is: what the file has where nothing was recorded, and what is in memory. Clusters that are not needed for that
    /// are given up.
    fn recorded(&self, known: &Known, edit: &mut Edit<'_>) -> Result<Vec<Piece>, ImageError> {
        let tracker = known
            .tracker
            .and_then(|number| self.bitmaps.trackers.get(number));
        let table = self.table_of(known)?;
        let Some(tracker) = tracker else {
            return Ok(table.into_iter().map(Piece::There).collect());
        };
        let mut pieces = Vec::with_capacity(table.len());
        for (number, kind) in (0..).zip(table) {
            let mut range = self.pages_in(number, self.bit_count(known));
            if !range.any(|page| tracker.page(page).is_some_and(Page::is_loaded)) {
                pieces.push(Piece::There(kind));
                continue;
            }
            let mut pages = self.pages_there(known, number, kind, None)?;
            for (page, words) in &mut pages {
                if let Some(loaded) = tracker.loaded(*page) {
                    *words = loaded;
                }
            }
            if let BitmapCluster::Cluster(offset) = kind {
                edit.drop_clusters(offset, 1, Kinds::BITMAP_DATA);
            }
            pieces.push(Piece::New(pages));
        }
        Ok(pieces)
    }

    /// The pages of a cluster of data as the file has them, for a disk of this size or of the one that it has.
    fn pages_there(
        &self,
        known: &Known,
        number: u64,
        kind: BitmapCluster,
        size: Option<u64>,
    ) -> Result<Vec<(u64, Words)>, ImageError> {
        let bits = match size {
            Some(size) => size.div_ceil(1 << known.entry.granularity_bits),
            None => self.bit_count(known),
        };
        let pages = self.pages_in(number, bits);
        let there = match kind {
            BitmapCluster::Cluster(offset) => {
                let count = pages.end - pages.start;
                self.bits_of(known).read_pages(offset, pages.start, count)?
            }
            _ => Vec::new(),
        };
        let mut there = there.into_iter();
        Ok(pages
            .map(|page| {
                let mut words = full_page(page, bits);
                match kind {
                    BitmapCluster::AllOnes => {}
                    BitmapCluster::AllZeros => words = [0; PAGE_WORDS],
                    BitmapCluster::Cluster(_) => {
                        let there = there.next().unwrap_or([0; PAGE_WORDS]);
                        for (word, there) in words.iter_mut().zip(there) {
                            *word &= there;
                        }
                    }
                }
                (page, words)
            })
            .collect())
    }

    /// The pages that lie in a cluster of data.
    pub(super) fn pages_in(&self, number: u64, bits: u64) -> Range<u64> {
        let per_cluster = self.cluster_size() * 8 / PAGE_BITS;
        let end = bits.div_ceil(PAGE_BITS);
        let first = (number * per_cluster).min(end);
        first..((number + 1) * per_cluster).min(end)
    }
}

/// The failure of a bitmap, or of their directory, to get a new place.
pub(super) fn lost(known: Option<&Known>, source: ImageError) -> ImageError {
    ImageError::BitmapsLost {
        name: known.map(|known| text(&known.entry.name)),
        source: Box::new(source),
    }
}
