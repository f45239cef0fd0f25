//! Changing the size of the disk.

use std::io::IoSlice;
use std::ops::Range;

use qcow2_alloc::Reason;
use qcow2_cache::sync::atomic::Ordering;
use qcow2_cache::{Kinds, MetadataError, Step, field};
use qcow2_format::geometry::MAX_L1_BYTES;
use qcow2_format::{ClusterKind, Header, HostOffset, L1Entry, L2Entry};
use qcow2_io::{Storage as _, ZeroFlags};

use crate::bitmap::NewBits;
use crate::bulk::{Change, Set};
use crate::create::Preallocation;
use crate::zero::ALL_ZERO;
use crate::{Image, ImageError};

/// No disk is larger; bytes. Offsets are signed elsewhere, and rounded up.
pub(crate) const SIZE_MAX: u64 = (1 << 63) - (1 << 30);
/// Clusters that are preallocated at a time.
const RUN: u64 = 1024;
/// Zeros are written in pieces of this many bytes.
const PIECE: u64 = 1 << 20;

/// How a disk changes its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeOptions {
    /// What is done in advance for the part that is added.
    pub preallocation: Preallocation,
    /// Whether the disk may become smaller, which loses what is behind the new end.
    pub shrink: bool,
}

impl Image {
    /// Changes the size of the disk to `size` bytes, a multiple of 512. What is added reads as zeros.
    ///
    /// # Errors
    ///
    /// Sizes that the format, the options or the granularity of a bitmap don't allow; version 2 with snapshots; bitmaps that are
    /// inconsistent or broken; and what the storage reports. Then the disk has its old size or, when it was to become smaller,
    /// perhaps the new one.
    ///
    /// # Locking
    ///
    /// Waits until no request is in flight and keeps new ones waiting.
    pub fn resize(&self, size: u64, options: ResizeOptions) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        if !size.is_multiple_of(512) {
            return Err(refuse(size, "it must be a multiple of 512".to_owned()));
        }
        let l1_entries = self.geometry.l1_entries_for(size);
        if size > SIZE_MAX || l1_entries * 8 > MAX_L1_BYTES {
            let limit = (MAX_L1_BYTES / 8).saturating_mul(self.geometry.l2_coverage());
            let limit = limit.min(SIZE_MAX);
            return Err(refuse(
                size,
                format!("a disk with clusters of this size has at most {limit} bytes"),
            ));
        }
        self.get_ready()?;
        let _closed = self.gate.close();
        self.check_bitmaps_fit(size)?;
        let header = self.header();
        if self.rules.version2 && header.snapshot_count > 0 {
            return Err(ImageError::Unsupported {
                what: "an image of version 2 can't be resized while it has snapshots",
            });
        }
        let old = self.virtual_size();
        if size < old {
            if !options.shrink {
                return Err(refuse(
                    size,
                    format!("the disk has {old} bytes, and shrinking loses data"),
                ));
            }
            if options.preallocation != Preallocation::Off {
                return Err(ImageError::Unsupported {
                    what: "nothing can be preallocated when a disk shrinks",
                });
            }
            self.shrink(old, size)
        } else {
            self.grow(old, size, options.preallocation)
        }
    }

    fn switch_size(&self, size: u64) -> Result<(), ImageError> {
        let change = |header: &mut Header| header.virtual_size_raw = size;
        let switch = || Ok(self.meta.switch_header(field::SIZE, change)?);
        self.switch_size_of_all(size, NewBits::Clear, switch, change)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Commits, and frees what was released: the gate is closed, so no one knows it any more.
    pub(crate) fn settle_closed(&self) -> Result<(), ImageError> {
        let alloc = self.alloc()?;
        self.meta.commit(alloc)?;
        self.forget_places();
        alloc.reclaim(alloc.take_ripe())?;
        Ok(())
    }

    fn grow(&self, old: u64, size: u64, wanted: Preallocation) -> Result<(), ImageError> {
        self.settle_closed()?;
        self.drop_behind(old)?;
        self.grow_l1(self.geometry.l1_entries_for(size))?;
        if self.rules.external_data {
            self.grow_data_file(old, size)?;
        }
        // The last cluster may hold old bytes behind the old end, and a longer backing file has some, too.
        let cluster_end = old.next_multiple_of(self.cluster_size()).min(size);
        let hidden = match &self.backing {
            Some(backing) => backing.len()?.min(size),
            None => 0,
        };
        let zero_to = hidden.max(self.tail_end(old, cluster_end)?);
        if zero_to > old && !self.raw_data {
            self.zero_guest(old..zero_to, size, ZeroFlags::NONE)?;
        }
        let wanted = match wanted {
            Preallocation::Off if self.raw_data => Preallocation::Metadata,
            other => other,
        };
        if wanted != Preallocation::Off {
            let start = self.preallocation_start(old, cluster_end, hidden)?;
            self.preallocate(start, size, wanted)?;
        }
        self.settle_closed()?;
        self.switch_size(size)
    }

    /// Where preallocation begins: with the cluster that the disk ended in, if that has no place.
    fn preallocation_start(
        &self,
        old: u64,
        cluster_end: u64,
        hidden: u64,
    ) -> Result<u64, ImageError> {
        let next = old.next_multiple_of(self.cluster_size());
        if old == next || self.rules.external_data {
            return Ok(next);
        }
        let start = next - self.cluster_size();
        if hidden <= start {
            // One that has a place is passed over.
            return Ok(start);
        }
        let found = self.find(old)?;
        if let ClusterKind::Unallocated | ClusterKind::ZeroPlain = self.kind(old, found)? {
            // The rest of it comes from the backing file.
            let zeros = vec![0; usize::try_from(cluster_end - old).unwrap_or(0)];
            self.write_guest(&[IoSlice::new(&zeros)], old, cluster_end - old)?;
        }
        Ok(next)
    }

    fn grow_data_file(&self, old: u64, size: u64) -> Result<(), ImageError> {
        let data = self.meta.data();
        let len = data.len()?;
        // What a raw data file has behind the end of the disk, as when shrinking it failed, must not come back.
        if self.raw_data && len > old && data.set_len(old).is_err() {
            data.write_zeroes(old..len.min(size), ZeroFlags::NONE)?;
        }
        if data.len()? < size || (self.raw_data && data.len()? != size) {
            data.set_len(size)?;
        }
        Ok(())
    }

    /// How far the last, partial cluster has to be zeroed: only if it holds something.
    fn tail_end(&self, old: u64, cluster_end: u64) -> Result<u64, ImageError> {
        if old >= cluster_end {
            return Ok(old);
        }
        let found = self.find(old)?;
        Ok(match self.kind(old, found)? {
            ClusterKind::Normal(_) | ClusterKind::Compressed(_) => cluster_end,
            _ => old,
        })
    }

    /// Frees what is mapped behind the end of the disk: machine states that would become the guest's.
    pub(crate) fn drop_behind(&self, size: u64) -> Result<(), ImageError> {
        let coverage = self.geometry.l2_coverage();
        let from = size.next_multiple_of(self.cluster_size());
        let whole = from.div_ceil(coverage);
        let tables =
            (whole..self.l1.len()).filter(|index| self.l1.get(*index).l2_table().get() != 0);
        if !self.rules.external_data && tables.count() > 1 {
            self.drop_behind_tables(from..whole * coverage)?;
            self.settle_closed()?;
            return self.drop_tables(whole);
        }
        self.drop_behind_tables(from..self.l1.len() * coverage)?;
        self.settle_closed()
    }

    /// Frees what is mapped in a range that ends with a table, and the tables that lie in it.
    fn drop_behind_tables(&self, range: Range<u64>) -> Result<(), ImageError> {
        let coverage = self.geometry.l2_coverage();
        let alloc = self.alloc()?;
        for index in self.l1_index(range.start)..self.l1.len().min(range.end / coverage) {
            let table = self.l1.get(index).l2_table();
            if table.get() == 0 {
                continue;
            }
            let start = (index * coverage).max(range.start);
            self.forget_clusters(start..(index + 1) * coverage)?;
            if index * coverage < range.start {
                continue;
            }
            // Forgetting may have made the table the image's own.
            let table = self.l1.get(index).l2_table();
            self.l1.set(index, L1Entry::default());
            self.meta.change_l1(index, 0);
            self.meta.l2().forget(table, self.cluster_size());
            self.meta
                .overlap()
                .remove(table, self.cluster_size(), Kinds::ACTIVE_L2);
            alloc.release(self.geometry.host_cluster(table), 1, Reason::Cut);
        }
        Ok(())
    }

    /// Frees all tables from one on, and what they lead to.
    pub(crate) fn drop_tables(&self, first: u64) -> Result<(), ImageError> {
        self.meta.before(Step::ChangeL1)?;
        let entries = first..self.l1.len();
        let gone: Vec<L1Entry> = entries.clone().map(|index| self.l1.get(index)).collect();
        self.rework(|| {
            for index in entries {
                self.l1.set(index, L1Entry::default());
            }
            self.write_l1()?;
            self.meta.flush()?;
            for table in gone.iter().map(|entry| entry.l2_table()) {
                if table.get() != 0 {
                    self.meta
                        .overlap()
                        .remove(table, self.cluster_size(), Kinds::ACTIVE_L2);
                }
            }
            // What a snapshot has as well is only its own now, not the disk's: no flag is to be set.
            let change = Change::Remove(Reason::Cut);
            self.change_references(&gone, 0..0, change, &mut Set::default(), None)
        })
    }

    /// Moves the L1 table to where it has room for more entries.
    pub(crate) fn grow_l1(&self, entries: u64) -> Result<(), ImageError> {
        let old_entries = self.l1.len();
        if entries <= old_entries {
            return Ok(());
        }
        let alloc = self.alloc()?;
        let clusters = self.geometry.clusters_for(entries * 8);
        self.meta.before(Step::AllocateL1)?;
        let allocation = alloc.allocate_contiguous(clusters)?;
        let place = allocation.offset();
        // The refcounts of the new place, and what the entries point at, come before the table, and that before the header.
        // Lazy refcounts, too: without a dirty bit nothing else would say that the new place is taken.
        self.meta.commit(alloc)?;
        self.meta.write_refcounts()?;
        let mut bytes = Vec::new();
        for index in 0..entries {
            bytes.extend_from_slice(&self.l1.get(index).to_be_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(self.geometry.cluster_len()), 0);
        self.meta.before(Step::WriteL1)?;
        self.meta.write(Kinds::ACTIVE_L1, place, &bytes)?;
        self.meta.before(Step::SwitchL1)?;
        let (old_place, old_len) = (self.meta.header().l1_table_offset, old_entries * 8);
        self.meta
            .overlap()
            .add(place, entries * 8, Kinds::ACTIVE_L1)
            .map_err(MetadataError::from)?;
        let switched = self.meta.switch_header(field::L1_TABLE, |header| {
            header.l1_table_offset = place;
            // At most 2^22, which the caller has tested.
            header.l1_entries = u32::try_from(entries).unwrap_or(u32::MAX);
        });
        if let Err(error) = switched {
            self.meta
                .overlap()
                .remove(place, entries * 8, Kinds::ACTIVE_L1);
            return Err(error.into());
        }
        allocation.keep();
        self.l1.set_len(entries);
        self.meta
            .overlap()
            .remove(old_place, old_len, Kinds::ACTIVE_L1);
        if old_len > 0 {
            let old_clusters = self.geometry.clusters_for(old_len);
            alloc.release(
                self.geometry.host_cluster(old_place),
                old_clusters,
                Reason::Other,
            );
        }
        Ok(())
    }

    /// Maps the clusters from `start` to `end` that are not mapped.
    fn preallocate(&self, start: u64, end: u64, wanted: Preallocation) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        let mut at = start;
        while at < end {
            let stop = end
                .next_multiple_of(self.cluster_size())
                .min(at + (RUN << bits));
            at += self.preallocate_run(at, (stop - at) >> bits, end, wanted)? << bits;
        }
        if self.rules.external_data {
            let data = self.meta.data();
            match wanted {
                Preallocation::Off | Preallocation::Metadata => {}
                Preallocation::Falloc => data.write_zeroes(start.min(end)..end, ZeroFlags::NONE)?,
                Preallocation::Full => self.write_zeros(start.min(end), end)?,
            }
        }
        Ok(())
    }

    /// Maps up to `count` clusters at `guest` of a disk that ends at `end`; tells how many it has looked at. Tables come before all data, so that this is one
    /// piece for the host, too.
    fn preallocate_run(
        &self,
        guest: u64,
        count: u64,
        end: u64,
        wanted: Preallocation,
    ) -> Result<u64, ImageError> {
        let bits = self.geometry.cluster_bits();
        let size = self.cluster_size();
        let found = self.find(guest)?;
        let mapped = !matches!(
            self.kind(guest, found)?,
            ClusterKind::Unallocated | ClusterKind::ZeroPlain
        );
        if mapped {
            return Ok(1);
        }
        let mut run = 1;
        while run < count {
            let found = self.find(guest + (run << bits))?;
            if !found.entry.is_empty() {
                break;
            }
            run += 1;
        }
        for part in self.parts_by_table(guest, run) {
            self.prepare_table(part.start)?;
        }
        // Nothing of a backing file may show in what is new.
        let bitmap = match (self.geometry.extended_l2(), wanted, self.backing.is_some()) {
            (false, ..) | (true, Preallocation::Metadata, false) => 0,
            (true, Preallocation::Metadata, true) => ALL_ZERO,
            // What is encrypted never reads as zeros by itself.
            (true, ..) if self.crypt.is_some() => ALL_ZERO,
            (true, ..) => 0xffff_ffff,
        };
        let entry = |place: u64| {
            let place = HostOffset::new(place);
            if self.crypt.is_some() && !self.geometry.extended_l2() && !self.rules.version2 {
                L2Entry::zero(place, true)
            } else {
                L2Entry::normal(place, true, bitmap)
            }
        };
        if self.rules.external_data {
            for part in self.parts_by_table(guest, run) {
                self.change(
                    part.start,
                    (part.end - part.start) >> bits,
                    Reason::Other,
                    |number, _| Some(entry(part.start + number * size)),
                )
                .map_err(|(_, error)| error)?;
            }
            return Ok(run);
        }
        let alloc = self.alloc()?;
        let allocation = alloc.allocate(run, None)?;
        let run = allocation.count();
        let place = allocation.offset().get();
        let range = place..place + (run << bits);
        self.check_data(allocation.offset(), run << bits)?;
        let storage = self.meta.storage();
        match wanted {
            _ if self.crypt.is_some() && self.rules.version2 => {
                // There are no zero clusters to tell of.
                self.store_zeros(guest, allocation.offset(), run << bits)?;
            }
            Preallocation::Full => self.write_zeros(range.start, range.end)?,
            Preallocation::Falloc => {
                // What the disk has of its last cluster: the host would have to part what it keeps for more.
                let in_disk = place + (end - guest).min(run << bits);
                let used = allocation.virgin_from().get() << bits;
                let stop = if used < range.end { in_disk } else { range.end };
                storage.write_zeroes(range.start..stop, ZeroFlags::NONE)?;
                if storage.len()? < range.end {
                    storage.set_len(range.end)?;
                }
            }
            Preallocation::Off | Preallocation::Metadata => {
                let used = allocation.virgin_from().get() << bits;
                if used > range.start {
                    let flags = ZeroFlags::MAY_UNMAP;
                    storage.write_zeroes(range.start..used.min(range.end), flags)?;
                }
                if storage.len()? < range.end {
                    storage.set_len(range.end)?;
                }
            }
        }
        for part in self.parts_by_table(guest, run) {
            let before = part.start - guest;
            let count = (part.end - part.start) >> bits;
            let linked = self.change(part.start, count, Reason::Other, |number, _| {
                Some(entry(place + before + number * size))
            });
            if let Err((done, error)) = linked {
                allocation.keep_first((before >> bits) + done);
                return Err(error);
            }
        }
        allocation.keep();
        Ok(run)
    }

    /// The parts of `count` clusters at `guest` that have a table each.
    fn parts_by_table(&self, guest: u64, count: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let coverage = self.geometry.l2_coverage();
        let end = guest + (count << self.geometry.cluster_bits());
        let first = guest / coverage;
        (first..end.div_ceil(coverage))
            .map(move |table| (table * coverage).max(guest)..((table + 1) * coverage).min(end))
    }

    /// Writes zeros as data of the guest.
    pub(crate) fn store_zeros(
        &self,
        guest: u64,
        host: HostOffset,
        len: u64,
    ) -> Result<(), ImageError> {
        let zeros = vec![0; usize::try_from(PIECE.min(len)).unwrap_or(0)];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(PIECE);
            let bytes = zeros.get(..usize::try_from(piece).unwrap_or(0));
            let bytes = IoSlice::new(bytes.unwrap_or_default());
            self.store_data(&[bytes], guest + done, HostOffset::new(host.get() + done))?;
            done += piece;
        }
        Ok(())
    }

    /// Writes zeros to where guest data lies.
    fn write_zeros(&self, start: u64, end: u64) -> Result<(), ImageError> {
        let zeros = vec![0; usize::try_from(PIECE).unwrap_or(0)];
        let mut at = start;
        while at < end {
            let len = usize::try_from((end - at).min(PIECE)).unwrap_or(0);
            let bytes = IoSlice::new(zeros.get(..len).unwrap_or_default());
            self.meta.data().write_vectored_at(&[bytes], at)?;
            at += len as u64;
        }
        Ok(())
    }

    fn shrink(&self, old: u64, size: u64) -> Result<(), ImageError> {
        self.settle_closed()?;
        // From here on the rest is as good as gone: what is left of it after a crash is behind the end of the disk, and growing
        // drops it before it could show.
        self.switch_size(size)?;
        let cluster_end = size.next_multiple_of(self.cluster_size());
        let tail = self.tail_end(size, cluster_end.min(old))?;
        if tail > size && !self.raw_data {
            self.zero_guest(size..tail, old, ZeroFlags::NONE)?;
        }
        self.drop_behind(size)?;
        if self.rules.external_data {
            self.meta.data().set_len(size)?;
        }
        self.cut_file()
    }

    /// Gives back what the file has behind the last cluster that is in use. The gate is closed.
    pub(crate) fn cut_file(&self) -> Result<(), ImageError> {
        let alloc = self.alloc()?;
        let mut idle = alloc.drop_idle_blocks(None)?;
        while let Some(counted_by) = idle {
            // In the file the table points at what was given up until this is through.
            self.settle_closed().inspect_err(|_| self.meta.give_up())?;
            idle = alloc.drop_idle_blocks(Some(&counted_by))?;
        }
        let clusters = alloc.end()?;
        let bits = self.geometry.cluster_bits();
        let storage = self.meta.storage();
        // A device keeps its length; what is behind is free then.
        if storage.len()? > clusters << bits && storage.set_len(clusters << bits).is_ok() {
            alloc.file_was_cut(clusters);
        }
        Ok(self.meta.commit(alloc)?)
    }
}

fn refuse(size: u64, why: String) -> ImageError {
    ImageError::Option {
        option: "size",
        value: size.to_string(),
        why,
    }
}
