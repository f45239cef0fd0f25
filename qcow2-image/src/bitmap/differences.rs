//! Recording that a disk goes back to a snapshot.

use qcow2_format::L1Entry;
use qcow2_io::Storage as _;

use crate::{Image, ImageError};

/// Bit 63 of entries: it says nothing about the data.
const COPIED: u64 = 1 << 63;

impl Image {
    /// Records all in which the disk will differ from what it is, when another L1 table takes the place of the active one. The
    /// gate is closed.
    ///
    /// # Errors
    ///
    /// Also if the bitmaps can't follow to another size.
    pub(crate) fn record_return(
        &self,
        old: &[L1Entry],
        new: &[L1Entry],
        new_size: u64,
    ) -> Result<(), ImageError> {
        let size = self.virtual_size();
        if new_size != size {
            self.check_bitmaps_fit(new_size)?;
        }
        if !self.bitmaps.trackers.is_recording() {
            return Ok(());
        }
        // The tables in the file are those in memory then.
        self.settle_closed()?;
        let coverage = self.geometry.l2_coverage();
        let size_of_both = size.min(new_size);
        let none = L1Entry::default();
        for index in 0..self.geometry.l1_entries_for(size_of_both) {
            let at = |l1: &[L1Entry]| {
                let index = usize::try_from(index).unwrap_or(usize::MAX);
                l1.get(index).copied().unwrap_or(none).l2_table().get()
            };
            let (old, new) = (at(old), at(new));
            if old != new {
                self.record_table(old, new, index * coverage, size_of_both)?;
            }
        }
        // What follows the shorter end shares a bit with what is before it.
        match size_of_both.checked_sub(1) {
            Some(last) if size != new_size => self.record(last, 1),
            _ => Ok(()),
        }
    }

    /// Records the clusters from `guest` on, before `end`, that two L2 tables map differently; 0 is a table that maps none.
    fn record_table(&self, old: u64, new: u64, guest: u64, end: u64) -> Result<(), ImageError> {
        let words = if self.geometry.extended_l2() { 2 } else { 1 };
        let read = |table: u64| -> Result<Vec<u64>, ImageError> {
            let mut bytes = vec![0; self.geometry.cluster_len()];
            if table != 0 {
                self.meta.storage().read_at(&mut bytes, table)?;
            }
            let entries = bytes.as_chunks::<8>().0.iter().enumerate();
            Ok(entries
                .map(|(index, bytes)| {
                    let flag = if index % words == 0 { COPIED } else { 0 };
                    u64::from_be_bytes(*bytes) & !flag
                })
                .collect())
        };
        let (old, new) = (read(old)?, read(new)?);
        let cluster = self.cluster_size();
        let differs = old.chunks(words).zip(new.chunks(words));
        let mut run: Option<(u64, u64)> = None;
        for ((old, new), start) in differs.zip((guest..end).step_by(self.geometry.cluster_len())) {
            if old == new {
                continue;
            }
            let len = cluster.min(end - start);
            match &mut run {
                Some((first, sum)) if *first + *sum == start => *sum += len,
                _ => {
                    if let Some((first, sum)) = run.replace((start, len)) {
                        self.record(first, sum)?;
                    }
                }
            }
        }
        match run {
            Some((first, sum)) => self.record(first, sum),
            None => Ok(()),
        }
    }
}
