//! All L2 tables of an image, those of snapshots among them, gone through in the order of the file and past the cache.

use std::ops::ControlFlow;

use qcow2_cache::Kinds;
use qcow2_format::{HostOffset, L1Entry, L2Entry};
use qcow2_io::Storage as _;

use crate::buffer::Pages;
use crate::{Image, ImageError};

/// Tables that lie side by side are read together, up to so many bytes.
const PIECE: u64 = 1 << 20;

/// An L2 table, however many L1 tables lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// Where it lies in the file.
    pub(crate) offset: u64,
    /// How many L1 entries lead to it.
    pub(crate) times: u64,
    /// The lowest index that such an entry has: all have the same, in a sound image.
    pub(crate) index: u64,
}

/// Tables that lie side by side, with their bytes.
pub(crate) struct Piece<'a> {
    pub(crate) tables: &'a [Table],
    pub(crate) bytes: &'a mut [u8],
    entry_words: usize,
    table_len: usize,
}

impl Piece<'_> {
    /// Calls `change` for each entry that is not empty, with its table and its index there; it gives the new one, or none to leave it.
    /// Tells whether any is new.
    pub(crate) fn change<E>(
        &mut self,
        mut change: impl FnMut(&Table, u64, L2Entry) -> Result<Option<L2Entry>, E>,
    ) -> Result<bool, E> {
        let step = self.entry_words;
        let mut any = false;
        for (table, bytes) in self
            .tables
            .iter()
            .zip(self.bytes.chunks_exact_mut(self.table_len))
        {
            let words = bytes.as_chunks_mut::<8>().0;
            for (index, entry) in (0..).zip(words.chunks_exact_mut(step)) {
                let word = entry.first().map_or(0, |word| u64::from_be_bytes(*word));
                let bitmap = match entry.get(1) {
                    Some(word) => u64::from_be_bytes(*word),
                    None => 0,
                };
                if word == 0 && bitmap == 0 {
                    continue;
                }
                let old = L2Entry::from_bits(word, bitmap);
                let Some(new) = change(table, index, old)? else {
                    continue;
                };
                any = true;
                for (place, value) in entry.iter_mut().zip([new.word(), new.bitmap()]) {
                    *place = value.to_be_bytes();
                }
            }
        }
        Ok(any)
    }
}

impl Image {
    /// The L1 tables: the active one as it is in memory, and those of snapshots, each with its place in the file.
    ///
    /// # Errors
    ///
    /// A snapshot table or an L1 table that can't be read.
    pub(crate) fn for_each_l1(
        &self,
        mut each: impl FnMut(HostOffset, Vec<L1Entry>) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        each(self.meta.header().l1_table_offset, self.active_l1())?;
        for snapshot in self.snapshot_table()?.0 {
            let entries = self.read_l1(snapshot.l1_table_offset, snapshot.l1_entries)?;
            each(snapshot.l1_table_offset, entries)?;
        }
        Ok(())
    }

    /// Where the L2 table of an L1 entry lies, if it has one.
    ///
    /// # Errors
    ///
    /// One that lies at no cluster.
    pub(crate) fn table_place(&self, entry: L1Entry) -> Result<Option<u64>, ImageError> {
        let offset = entry.l2_table();
        if self.geometry.is_cluster_aligned(offset) {
            return Ok(Some(offset.get()).filter(|offset| *offset > 0));
        }
        Err(ImageError::Refused {
            what: "an L2 table",
            offset,
            detail: "it does not start at a cluster".to_owned(),
        })
    }

    /// All L2 tables in the order of the file, each once.
    ///
    /// # Errors
    ///
    /// As [`for_each_l1`](Self::for_each_l1), and tables that lie at no cluster.
    pub(crate) fn all_tables(&self) -> Result<Vec<Table>, ImageError> {
        let mut tables: Vec<Table> = Vec::new();
        let mut from_last = 0;
        self.for_each_l1(|_, entries| {
            for (index, entry) in (0..).zip(entries) {
                if let Some(offset) = self.table_place(entry)? {
                    tables.push(Table {
                        offset,
                        times: 1,
                        index,
                    });
                }
            }
            // Snapshots share most of their tables, so that the list is kept short by merging now and then.
            if tables.len() > from_last * 2 {
                merge(&mut tables);
                from_last = tables.len();
            }
            Ok(())
        })?;
        merge(&mut tables);
        Ok(tables)
    }

    /// Reads tables, which are in the order of the file, in pieces, and writes back the pieces that `each` tells of. `each` may end
    /// it, between pieces.
    ///
    /// # Errors
    ///
    /// What the storage or `each` reports.
    pub(crate) fn for_each_piece<E: From<ImageError>>(
        &self,
        tables: &[Table],
        mut each: impl FnMut(&mut Piece<'_>) -> Result<ControlFlow<(), bool>, E>,
    ) -> Result<(), E> {
        let size = self.cluster_size();
        let most = usize::try_from(PIECE / size).unwrap_or(1).max(1);
        let storage = self.meta.storage();
        let mut bytes = Pages::default();
        for run in tables.chunk_by(|a, b| a.offset + size == b.offset) {
            for tables in run.chunks(most) {
                let Some(first) = tables.first() else {
                    continue;
                };
                bytes.resize(tables.len() * self.geometry.cluster_len());
                storage
                    .read_at(&mut bytes, first.offset)
                    .map_err(ImageError::from)?;
                let mut piece = Piece {
                    tables,
                    bytes: &mut bytes,
                    entry_words: if self.geometry.extended_l2() { 2 } else { 1 },
                    table_len: self.geometry.cluster_len(),
                };
                match each(&mut piece)? {
                    ControlFlow::Break(()) => return Ok(()),
                    ControlFlow::Continue(false) => {}
                    ControlFlow::Continue(true) => {
                        let kinds = Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2;
                        self.meta
                            .write(kinds, HostOffset::new(first.offset), &bytes)
                            .map_err(ImageError::from)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Sorts, and makes one of those that lie in one place.
fn merge(tables: &mut Vec<Table>) {
    tables.sort_unstable_by_key(|table| table.offset);
    tables.dedup_by(|next, kept| {
        let same = next.offset == kept.offset;
        if same {
            kept.times += next.times;
            kept.index = kept.index.min(next.index);
        }
        same
    });
}
