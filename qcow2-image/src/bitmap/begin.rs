//! Opening for writing and closing: who records says so in the file.

use std::collections::HashSet;

use qcow2_cache::sync::atomic::Ordering;
use qcow2_cache::{Kinds, MetadataError};
use qcow2_format::bitmap::{BitmapCluster, BitmapFlags, required_table_entries};
use qcow2_format::{BitmapTableEntry, Header, HostCluster, HostOffset};

use super::BitmapState;
use super::directory::{Directory, Known, place_of_directory, read_directory};
use crate::ready::for_each_entry;
use crate::{Image, ImageError};

/// Bytes from the start of an entry of the directory to its flags. They lie within one sector.
const FLAGS: u64 = 12;

impl Image {
    /// Gets the bitmaps ready for writes: those that record are marked as in use, durably. The map of all other metadata is
    /// complete.
    pub(crate) fn begin_bitmaps(&self, header: &Header) -> Result<(), ImageError> {
        let mut state = self.bitmaps.lock();
        let mut directory = read_directory(&**self.meta.storage(), header)?;
        if let Ok(Some(extension)) = place_of_directory(header) {
            let (offset, len) = (extension.directory_offset, extension.directory_len_bytes);
            let map = self.meta.overlap();
            let left = self.meta.storage().len()?.saturating_sub(offset.get());
            let len = len.min(left);
            if self.has_others(offset, len) {
                // Nothing can be written there, not even that a bitmap is in use.
                let mut keep = header.autoclear;
                keep.set_bitmaps(false);
                self.meta.clear_autoclear(keep.bits())?;
                state.directory = Some(Directory::default());
                return Ok(());
            }
            map.add(offset, len, Kinds::BITMAP_DIRECTORY)
                .map_err(MetadataError::from)?;
        }
        let mut seen = HashSet::new();
        for known in &mut directory.known {
            if let Some(why) = self.chart_bitmap(known, &mut seen)?
                && !matches!(known.state, BitmapState::Broken { .. })
            {
                known.state = BitmapState::broken(why);
            }
        }
        // In a directory that can't be read to its end, nothing can get a new place.
        let anew = self.bitmaps.anew && directory.rest.is_none();
        directory.anew = anew;
        let mut marked = false;
        for known in &mut directory.known {
            // A broken one, too: once what breaks it is gone, nobody must take it for complete.
            let flags = known.entry.flags;
            let broken = matches!(known.state, BitmapState::Broken { .. }) && flags.auto();
            let taken = anew && known.is_consistent();
            let wanted = taken || records(header, known) || broken;
            if wanted && !flags.in_use() {
                let in_use = BitmapFlags::new(true, false).bits();
                self.write_flags(known, BitmapFlags::from_bits(flags.bits() | in_use))?;
                marked = true;
            }
        }
        if marked {
            self.meta.flush()?;
        }
        for known in &mut directory.known {
            if records(header, known) {
                self.track(known)?;
            }
        }
        state.directory = Some(directory);
        state.fresh = false;
        Ok(())
    }

    /// Lets a bitmap record from here on. No request is in flight.
    pub(super) fn track(&self, known: &mut Known) -> Result<(), ImageError> {
        let granularity_bits = known.entry.granularity_bits.into();
        let tracker = self.bitmaps.trackers.take(granularity_bits);
        known.tracker = Some(tracker.ok_or(ImageError::Unsupported {
            what: "the image has too many bitmaps that record",
        })?);
        Ok(())
    }

    /// Writes the flags of a bitmap, in place; they are not durable yet.
    pub(super) fn write_flags(
        &self,
        known: &mut Known,
        flags: BitmapFlags,
    ) -> Result<(), ImageError> {
        let place = HostOffset::new(known.place.get() + FLAGS);
        let bytes = flags.bits().to_be_bytes();
        self.meta.write(Kinds::BITMAP_DIRECTORY, place, &bytes)?;
        known.entry.flags = flags;
        Ok(())
    }

    /// Notes where a bitmap lies. Tells why it can't be used, if so.
    fn chart_bitmap(
        &self,
        known: &Known,
        seen: &mut HashSet<u64>,
    ) -> Result<Option<String>, ImageError> {
        let geometry = self.geometry;
        let (table, len) = (known.entry.table_offset, known.table_len());
        let storage = &**self.meta.storage();
        let map = self.meta.overlap();
        let file_len = storage.len()?.next_multiple_of(geometry.cluster_size());
        let lies = table.get() != 0
            && geometry.is_cluster_aligned(table)
            && table
                .get()
                .checked_add(len)
                .is_some_and(|end| end <= file_len);
        if !lies {
            return Ok(Some("its table lies nowhere".to_owned()));
        }
        let mut why = None;
        let mut take = |offset: HostOffset, len: u64, kind: Kinds| {
            let first = geometry.host_cluster(offset).get();
            let mut clusters = first..first + geometry.clusters_for(len);
            if self.has_others(offset, len) || clusters.any(|number| !seen.insert(number)) {
                why = Some("it lies on other metadata".to_owned());
            }
            map.add(offset, len, kind).map_err(MetadataError::from)
        };
        take(table, len, Kinds::BITMAP_TABLE)?;
        let mut bad = None;
        for_each_entry(storage, table, len, |bits| {
            let entry = BitmapTableEntry::from_bits(bits);
            match entry.kind() {
                _ if entry.reserved_bits() != 0 => {
                    bad = Some("its table has reserved bits set".to_owned());
                }
                BitmapCluster::Cluster(data) => {
                    if !geometry.is_cluster_aligned(data) || data.get() >= file_len {
                        bad = Some("its table points to where no data can be".to_owned());
                        return Ok(());
                    }
                    take(data, geometry.cluster_size(), Kinds::BITMAP_DATA)?;
                }
                BitmapCluster::AllZeros | BitmapCluster::AllOnes => {}
            }
            Ok(())
        })?;
        Ok(bad.or(why))
    }

    /// Whether metadata of something else lies in the clusters of a bitmap.
    fn has_others(&self, offset: HostOffset, len: u64) -> bool {
        let own = Kinds::BITMAP_DIRECTORY | Kinds::BITMAP_TABLE | Kinds::BITMAP_DATA;
        let first = self.geometry.host_cluster(offset).get();
        let end = offset
            .get()
            .saturating_add(len)
            .div_ceil(self.cluster_size());
        (first..end).any(|number| {
            let kinds = self.meta.overlap().kinds(HostCluster::new(number));
            number == 0 || !kinds.without(own).is_empty()
        })
    }

    /// As [`store_bitmaps`](Self::store_bitmaps), for as long as what it gives lives. No request may be in flight until then.
    pub(crate) fn rest_bitmaps(&self) -> Result<Resting<'_>, ImageError> {
        let resting = Resting(self);
        self.store_bitmaps()?;
        Ok(resting)
    }

    /// Marks those that record as in use again.
    fn resume_bitmaps(&self) -> Result<(), ImageError> {
        let mut state = self.bitmaps.lock();
        let Some(directory) = &mut state.directory else {
            return Ok(());
        };
        let (anew, mut marked) = (directory.anew, false);
        for known in &mut directory.known {
            let wanted = known.tracker.is_some() || anew && known.is_consistent();
            let flags = known.entry.flags;
            if wanted && !flags.in_use() {
                self.write_flags(known, BitmapFlags::new(true, flags.auto()))?;
                marked = true;
            }
        }
        if marked {
            self.meta.flush()?;
        }
        Ok(())
    }

    /// As [`store_bitmaps`](Self::store_bitmaps), and what is known of them is forgotten: the image has to get ready again
    /// before it is written to. The caller has the image for itself: a request that waits at the gate has seen it ready.
    pub(crate) fn close_bitmaps(&self) -> Result<(), ImageError> {
        self.store_bitmaps()?;
        self.ready.store(false, Ordering::Release);
        let mut state = self.bitmaps.lock();
        self.forget_pages(&mut state, None);
        if let Some(directory) = state.directory.take() {
            for number in directory.known.iter().filter_map(|known| known.tracker) {
                self.bitmaps.trackers.release(number);
            }
        }
        Ok(())
    }

    /// Stores what was recorded, and says that it is complete: the last use of the bitmaps. No request is in flight.
    pub(crate) fn store_bitmaps(&self) -> Result<(), ImageError> {
        let mut state = self.bitmaps.lock();
        if !self.bitmaps.trackers.is_recording() && !self.bitmaps.anew {
            return Ok(());
        }
        self.settle_bitmaps(&mut state, None)?;
        let Some(directory) = &mut state.directory else {
            return Ok(());
        };
        let stored = |known: &Known| known.entry.flags.in_use() && known.is_consistent();
        for known in directory.known.iter_mut().filter(|known| stored(known)) {
            let auto = known.entry.flags.auto();
            self.write_flags(known, BitmapFlags::new(false, auto))?;
        }
        Ok(self.meta.flush()?)
    }
}

/// The file is as if the bitmaps had been closed while this lives.
pub(crate) struct Resting<'a>(&'a Image);

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        if self.0.resume_bitmaps().is_err() {
            // A write would be missing in bitmaps that the file says are complete.
            self.0.meta.give_up();
        }
    }
}

/// Whether changes are to be recorded in it. An inconsistent one goes on, so that it can still be recovered later.
fn records(header: &Header, known: &Known) -> bool {
    let granularity_bits = known.entry.granularity_bits.into();
    let needed = required_table_entries(header.geometry, header.virtual_size(), granularity_bits);
    known.entry.flags.auto()
        && !matches!(known.state, BitmapState::Broken { .. })
        && needed == u64::from(known.entry.table_entries)
}
