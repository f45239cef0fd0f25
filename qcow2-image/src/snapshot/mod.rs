//! Internal snapshots: states of the disk that are kept in the image itself.
//!
//! A snapshot is a copy of the L1 table; all else is shared, counted by refcounts, until the guest writes. So taking, deleting or
//! applying one changes the refcounts of all clusters and the COPIED flags of all entries. That is done in bulk, in
//! the order of the file, while no request is in flight.

mod table;

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use qcow2_alloc::Reason;
use qcow2_cache::sync::atomic::Ordering;
use qcow2_cache::{Kinds, MetadataError, field};
use qcow2_format::header::MAX_SNAPSHOTS;
use qcow2_format::{Header, HostOffset, L1Entry, Snapshot, SnapshotError};

use crate::bitmap::NewBits;
use crate::bulk::{Change, Flags, Set};
use crate::{Image, ImageError};

/// Bytes of an id, at most: what QEMU shows.
const ID_MAX: usize = 127;
/// Bytes of a name, at most: what QEMU shows.
const NAME_MAX: usize = 255;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its id: a number, by convention. Any bytes.
    pub id: Vec<u8>,
    /// Its name; any bytes.
    pub name: Vec<u8>,
    /// When it was taken, since 1970.
    pub date: Duration,
    /// How long the guest had run.
    pub vm_clock: Duration,
    /// Bytes of machine state.
    pub vm_state_size: u64,
    /// Instructions that the guest had run, if they were counted.
    pub icount: Option<u64>,
    /// Bytes of the disk then.
    pub disk_size: u64,
}

/// Which snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotKey {
    /// The one with this id.
    Id(Vec<u8>),
    /// The first one with this name.
    Name(Vec<u8>),
    /// The one with this id, or else the first one with this name.
    IdOrName(Vec<u8>),
}

/// What is noted about a new snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// Its name; at most 255 bytes.
    pub name: Vec<u8>,
    /// Its id, at most 127 bytes; if not given, the next number.
    pub id: Option<Vec<u8>>,
    /// When it was taken, since 1970; if not given, now.
    pub date: Option<Duration>,
    /// How long the guest had run.
    pub vm_clock: Duration,
    /// Instructions that the guest had run.
    pub icount: Option<u64>,
    /// Bytes of machine state that were [written](Image::write_vm_state) for it; 0 if it has none.
    pub vm_state_size: u64,
    /// With a size of 0: what has been written of a state that no snapshot has taken over goes into this one, and stays in the
    /// image, too, though nothing notes how long it is. Else it is dropped. qemu-img keeps it.
    pub keep_loose_state: bool,
}

impl SnapshotOptions {
    /// A snapshot with a name.
    pub fn new(name: impl Into<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }
}

impl SnapshotKey {
    /// Whose id is `text`, or else whose name.
    pub fn any(text: impl Into<Vec<u8>>) -> Self {
        Self::IdOrName(text.into())
    }

    fn find(&self, snapshots: &[Snapshot]) -> Option<usize> {
        let id = |wanted: &[u8]| snapshots.iter().position(|one| one.id == wanted);
        let name = |wanted: &[u8]| snapshots.iter().position(|one| one.name == wanted);
        match self {
            Self::Id(wanted) => id(wanted),
            Self::Name(wanted) => name(wanted),
            Self::IdOrName(wanted) => id(wanted).or_else(|| name(wanted)),
        }
    }

    fn text(&self) -> String {
        let (Self::Id(text) | Self::Name(text) | Self::IdOrName(text)) = self;
        text.escape_ascii().to_string()
    }

    pub(crate) fn of<'a>(
        &self,
        snapshots: &'a [Snapshot],
    ) -> Result<(usize, &'a Snapshot), ImageError> {
        self.find(snapshots)
            .and_then(|index| Some((index, snapshots.get(index)?)))
            .ok_or_else(|| ImageError::NoSnapshot { key: self.text() })
    }
}

impl Image {
    /// The internal snapshots, in the order of their table.
    ///
    /// # Errors
    ///
    /// A table that can't be read.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>, ImageError> {
        let _pass = self.gate.enter();
        let current = self.virtual_size();
        let (snapshots, _) = self.snapshot_table()?;
        Ok(snapshots
            .into_iter()
            .map(|snapshot| SnapshotInfo {
                date: Duration::new(snapshot.date_sec.into(), 0)
                    + Duration::from_nanos(snapshot.date_nsec.into()),
                vm_clock: Duration::from_nanos(snapshot.vm_clock_nsec),
                vm_state_size: snapshot.vm_state_size(),
                icount: snapshot.icount(),
                disk_size: snapshot.disk_size().unwrap_or(current),
                id: snapshot.id,
                name: snapshot.name,
            })
            .collect())
    }

    /// Takes a snapshot of the disk as it is now; gives its id. Requests wait meanwhile.
    ///
    /// # Errors
    ///
    /// [`ImageError::Unsupported`] with an external data file; an id that is taken, and names that are too long
    /// ([`ImageError::Option`]); as many snapshots as there may be ([`ImageError::Snapshots`]); refcounts that can't count one more
    /// reference, or that are not there ([`ImageError::Uncounted`]), before anything has changed; and what the storage reports, after which the snapshot is there or not.
    ///
    /// # Durability
    ///
    /// On return it is durable, and so is all that it shows.
    pub fn create_snapshot(&self, options: &SnapshotOptions) -> Result<Vec<u8>, ImageError> {
        self.meta.check_writable()?;
        let count = self.header().snapshot_count;
        if count >= MAX_SNAPSHOTS {
            let found = u64::from(count) + 1;
            let limit = MAX_SNAPSHOTS.into();
            return Err(SnapshotError::TooMany { found, limit }.into());
        }
        self.get_ready()?;
        let _closed = self.gate.close();
        self.check_snapshots_possible()?;
        let (mut snapshots, _) = self.snapshot_table()?;
        let keeps_loose = options.vm_state_size == 0 && options.keep_loose_state;
        if options.vm_state_size > 0 {
            self.check_vm_state(options.vm_state_size)?;
        } else if !keeps_loose {
            // One that was never finished.
            self.drop_vm_state()?;
        }
        let mut new = new_snapshot(options, &snapshots, self.virtual_size())?;
        new.l1_entries = u32::try_from(self.l1.len()).unwrap_or(u32::MAX);
        let id = new.id.clone();
        let l1 = self.active_l1();
        self.check_counted(&l1)?;
        self.rework(|| {
            self.check_room(&l1)?;
            let copy = self.place_l1(&l1)?;
            new.l1_table_offset = copy
                .as_ref()
                .map_or(HostOffset::new(0), qcow2_alloc::Allocation::offset);
            snapshots.push(new);
            let table = self.place_table(&snapshots)?;
            // An entry without the flag is harmless whatever its refcount; one with it is not.
            let counted = self.count_window(&l1, 0..0, 0, Flags::Clear)?;
            self.flag_l1(None)?;
            self.meta.flush()?;
            let own = &mut Set::default();
            self.change_references(&l1, 0..0, Change::Add, own, Some(counted))?;
            self.switch_table(&snapshots, table)?;
            if let Some(copy) = copy {
                let added = self.chart_tree(copy.offset(), &l1);
                copy.keep();
                added?;
            }
            Ok(())
        })?;
        if !keeps_loose {
            // Else the next one would be copied on write over it.
            self.drop_vm_state()?;
        }
        Ok(id)
    }

    /// Deletes a snapshot. What only it held is free then. Requests wait meanwhile.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoSnapshot`], and what the storage reports, after which the snapshot is there or not.
    pub fn delete_snapshot(&self, key: &SnapshotKey) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        self.get_ready()?;
        let _closed = self.gate.close();
        let (mut snapshots, _) = self.snapshot_table()?;
        let (index, _) = key.of(&snapshots)?;
        let old = snapshots.remove(index);
        let l1 = self.read_l1(old.l1_table_offset, old.l1_entries)?;
        self.rework(|| {
            let table = self.place_table(&snapshots)?;
            self.switch_table(&snapshots, table)?;
            self.unchart_tree(&old, &l1)?;
            let mut own = Set::default();
            let change = Change::Remove(Reason::Snapshot);
            let clusters = self.l1_clusters(&old);
            self.change_references(&l1, clusters, change, &mut own, None)?;
            // First the refcount, then the flag that says it is 1.
            self.meta.flush()?;
            self.flag_own(&own)
        })
    }

    /// Makes the disk what it was when a snapshot was taken; the state it had is lost. The snapshot stays. Bitmaps that
    /// record have as changed what is different then. Requests wait meanwhile.
    ///
    /// # Errors
    ///
    /// [`ImageError::NoSnapshot`]; [`ImageError::Unsupported`] if the disk had another size and a bitmap is inconsistent or
    /// broken; refcounts that can't count one more reference, before anything has changed; and what
    /// the storage reports, after which the disk is in its old state or in that of the snapshot.
    pub fn apply_snapshot(&self, key: &SnapshotKey) -> Result<(), ImageError> {
        self.meta.check_writable()?;
        self.get_ready()?;
        let _closed = self.gate.close();
        let (snapshots, _) = self.snapshot_table()?;
        let (_, snapshot) = key.of(&snapshots)?;
        let size = snapshot.disk_size().unwrap_or(self.virtual_size());
        let needed = self.geometry.l1_entries_for(size);
        if size > i64::MAX as u64 || needed > u64::from(snapshot.l1_entries) {
            return Err(ImageError::Refused {
                what: "the L1 table of a snapshot",
                offset: snapshot.l1_table_offset,
                detail: format!(
                    "{} entries are too few for {size} bytes",
                    snapshot.l1_entries
                ),
            });
        }
        let new = self.read_l1(snapshot.l1_table_offset, snapshot.l1_entries)?;
        let old = self.active_l1();
        let shared: Vec<L1Entry> = new
            .iter()
            .map(|entry| L1Entry::new(entry.l2_table(), false))
            .collect();
        self.record_return(&old, &new, size)?;
        self.rework(|| {
            // Of what both have, nothing changes.
            let (gone, come) = differing(&old, &new);
            self.check_room(&come)?;
            let place = self.place_l1(&shared)?;
            self.meta.flush()?;
            let counted = self.count_window(&come, 0..0, 0, Flags::Clear)?;
            self.meta.flush()?;
            let own = &mut Set::default();
            self.change_references(&come, 0..0, Change::Add, own, Some(counted))?;
            self.switch_l1(&old, &shared, place, size)?;
            // All that the disk has now is the snapshot's as well, so no flag is to be set.
            let change = Change::Remove(Reason::Snapshot);
            self.change_references(&gone, 0..0, change, own, None)
        })
    }

    pub(crate) fn check_snapshots_possible(&self) -> Result<(), ImageError> {
        if self.rules.external_data {
            return Err(ImageError::Unsupported {
                what: "an image with an external data file can't have snapshots",
            });
        }
        Ok(())
    }

    /// Sets the flags of clusters that only the active state refers to now.
    fn flag_own(&self, own: &Set) -> Result<(), ImageError> {
        if own.is_empty() {
            return Ok(());
        }
        self.walk(&self.active_l1(), None, Flags::Set(own))?;
        self.flag_l1(Some(own))
    }

    /// The clusters of a snapshot's L1 table.
    fn l1_clusters(&self, snapshot: &Snapshot) -> Range<u64> {
        let first = self.geometry.host_cluster(snapshot.l1_table_offset).get();
        let clusters = self
            .geometry
            .clusters_for(u64::from(snapshot.l1_entries) * 8);
        first..first + clusters
    }

    /// Makes another L1 table and size the active ones, and releases the old table.
    fn switch_l1(
        &self,
        old: &[L1Entry],
        new: &[L1Entry],
        place: Option<qcow2_alloc::Allocation<'_>>,
        size: u64,
    ) -> Result<(), ImageError> {
        let (old_place, old_len) = (self.meta.header().l1_table_offset, old.len() as u64 * 8);
        let new_len = new.len() as u64 * 8;
        let new_place = place
            .as_ref()
            .map_or(HostOffset::new(0), qcow2_alloc::Allocation::offset);
        let switched = self.chart_active(new_place, new).and_then(|()| {
            self.meta.commit(self.alloc()?)?;
            self.meta.write_refcounts()?;
            let change = |header: &mut Header| {
                header.virtual_size_raw = size;
                header.l1_table_offset = new_place;
                header.l1_entries = u32::try_from(new.len()).unwrap_or(u32::MAX);
            };
            let switch = || Ok(self.meta.switch_header(field::SIZE_AND_L1_TABLE, change)?);
            self.switch_size_of_all(size, NewBits::Changed, switch, change)
        });
        if let Err(error) = switched {
            self.unchart_active(new_place, new_len, new, old);
            return Err(error);
        }
        if let Some(place) = place {
            place.keep();
        }
        for index in 0..self.l1.len() {
            self.l1.set(index, L1Entry::default());
        }
        self.l1.set_len(new.len() as u64);
        for (index, entry) in (0..).zip(new) {
            self.l1.set(index, *entry);
        }
        self.size.store(size, Ordering::Release);
        self.unchart_active(old_place, old_len, old, new);
        if old_len > 0 {
            self.alloc()?.release(
                self.geometry.host_cluster(old_place),
                self.geometry.clusters_for(old_len),
                Reason::Snapshot,
            );
        }
        Ok(())
    }

    /// Notes where an L1 table that is about to be the active one, and its L2 tables, lie.
    fn chart_active(&self, place: HostOffset, l1: &[L1Entry]) -> Result<(), ImageError> {
        let map = self.meta.overlap();
        let add = |offset, len, kinds| map.add(offset, len, kinds).map_err(MetadataError::from);
        add(place, l1.len() as u64 * 8, Kinds::ACTIVE_L1)?;
        for entry in l1.iter().filter(|entry| entry.l2_table().get() != 0) {
            add(entry.l2_table(), self.cluster_size(), Kinds::ACTIVE_L2)?;
        }
        Ok(())
    }

    /// Forgets where an L1 table and its L2 tables lie, but not those that another table has, too.
    fn unchart_active(&self, place: HostOffset, len: u64, l1: &[L1Entry], other: &[L1Entry]) {
        let map = self.meta.overlap();
        map.remove(place, len, Kinds::ACTIVE_L1);
        let kept: BTreeSet<u64> = other.iter().map(|entry| entry.l2_table().get()).collect();
        for entry in l1.iter().filter(|entry| entry.l2_table().get() != 0) {
            if !kept.contains(&entry.l2_table().get()) {
                map.remove(entry.l2_table(), self.cluster_size(), Kinds::ACTIVE_L2);
            }
        }
    }
}

/// The entries with tables that only the one L1 table leads to, and those with tables that only the other leads to.
fn differing(one: &[L1Entry], other: &[L1Entry]) -> (Vec<L1Entry>, Vec<L1Entry>) {
    let sorted = |l1: &[L1Entry]| {
        let mut tables: Vec<HostOffset> = l1.iter().map(|entry| entry.l2_table()).collect();
        tables.retain(|table| table.get() != 0);
        tables.sort_unstable();
        tables
    };
    // Both may lead to a table more than once.
    let mut others = sorted(other).into_iter().peekable();
    let (mut only_one, mut only_other) = (Vec::new(), Vec::new());
    for table in sorted(one) {
        while let Some(less) = others.next_if(|other| *other < table) {
            only_other.push(L1Entry::new(less, false));
        }
        if others.next_if_eq(&table).is_none() {
            only_one.push(L1Entry::new(table, false));
        }
    }
    only_other.extend(others.map(|table| L1Entry::new(table, false)));
    (only_one, only_other)
}

/// The entry of a new snapshot; its L1 table is still to come.
fn new_snapshot(
    options: &SnapshotOptions,
    others: &[Snapshot],
    disk_size: u64,
) -> Result<Snapshot, ImageError> {
    let refuse = |option, value: &[u8], why: &str| ImageError::Option {
        option,
        value: value.escape_ascii().to_string(),
        why: why.to_owned(),
    };
    if options.name.len() > NAME_MAX {
        return Err(refuse(
            "name",
            &options.name,
            "at most 255 bytes are allowed",
        ));
    }
    let id = match &options.id {
        Some(id) if id.is_empty() || id.len() > ID_MAX => {
            return Err(refuse("id", id, "1 to 127 bytes are allowed"));
        }
        Some(id) if others.iter().any(|other| other.id == *id) => {
            return Err(refuse("id", id, "another snapshot has it"));
        }
        Some(id) => id.clone(),
        None => next_id(others),
    };
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
    };
    let date = options.date.unwrap_or_else(now);
    let vm_clock = u64::try_from(options.vm_clock.as_nanos()).unwrap_or(u64::MAX);
    let words = [
        options.vm_state_size,
        disk_size,
        options.icount.unwrap_or(u64::MAX),
    ];
    Ok(Snapshot {
        id,
        name: options.name.clone(),
        date_sec: u32::try_from(date.as_secs()).unwrap_or(u32::MAX),
        date_nsec: date.subsec_nanos(),
        vm_clock_nsec: vm_clock,
        // The whole of it is in the extra data.
        vm_state_size_32: u32::try_from(options.vm_state_size).unwrap_or(u32::MAX),
        extra_data: words.iter().flat_map(|word| word.to_be_bytes()).collect(),
        ..Snapshot::default()
    })
}

/// One more than the largest number among the ids.
fn next_id(others: &[Snapshot]) -> Vec<u8> {
    let numbers = others.iter().filter_map(|other| {
        let text = std::str::from_utf8(&other.id).ok()?;
        text.parse::<u64>().ok()
    });
    let last = numbers.max().unwrap_or(0);
    last.saturating_add(1).to_string().into_bytes()
}
