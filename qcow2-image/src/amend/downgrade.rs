//! From version 3 to version 2, which has no clusters of zeros: they become nothing where nothing reads as zeros, and data where a
//! backing file would show.
//!
//! That is done under the dirty bit, in the tables of all snapshots, too, and references are counted anew in the end. Each state
//! in between is an image of version 3 with the same content.

use std::ops::ControlFlow;

use qcow2_alloc::Allocation;
use qcow2_check::{Options, recount};
use qcow2_format::{ClusterKind, HostCluster, HostOffset, L2Entry};
use qcow2_io::{Storage as _, ZeroFlags};

use super::{AmendError, header};
use crate::copy::Monitor;
use crate::ready::snapshot_l1_len;
use crate::trees::Table;
use crate::{Image, ImageError};

impl Image {
    /// Whether the image has a compressed cluster, in a snapshot perhaps.
    pub(super) fn has_compressed(&self) -> Result<bool, ImageError> {
        let mut found = false;
        self.for_each_piece(&self.all_tables()?, |piece| {
            piece.change(|_, _, entry| {
                found |= entry.is_compressed();
                Ok::<_, ImageError>(None)
            })?;
            Ok::<_, ImageError>(if found {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(false)
            })
        })?;
        Ok(found)
    }

    /// Refuses an image that has a snapshot whose L1 table can't be one.
    pub(super) fn check_snapshot_l1s(&self) -> Result<(), ImageError> {
        for one in self.snapshot_table()?.0 {
            snapshot_l1_len(self.geometry, one.l1_table_offset, one.l1_entries)?;
        }
        Ok(())
    }

    /// Refuses an image with damage: its references are going to be counted, and with damage they can't be.
    pub(super) fn check_sound(&self) -> Result<(), AmendError> {
        let refuse = |why: String| AmendError::refused("compat", why);
        let counted = recount(self.meta.storage(), &Options::default())
            .map_err(|error| refuse(error.to_string()))?;
        if let Some(problem) = counted.problems().first() {
            return Err(refuse(format!("the image is damaged: {problem}")));
        }
        if counted.is_complete() {
            Ok(())
        } else {
            Err(refuse("not all references can be found".to_owned()))
        }
    }

    /// Makes it an image of version 2, which nothing speaks against.
    pub(super) fn downgrade(&self, monitor: Option<&dyn Monitor>) -> Result<(), AmendError> {
        self.get_ready()?;
        let done = self.rework(|| {
            let done = self.expand_zeros(monitor)?;
            self.settle_closed()?;
            self.recount_references(|| Ok(()))?;
            Ok(done)
        })?;
        if !done {
            return Err(AmendError::Cancelled);
        }
        let rewritten = self.meta.rewrite_header(header::downgrade);
        rewritten.map_err(|error| {
            // Old or new, who knows.
            self.meta.give_up();
            error.into()
        })
    }

    /// Takes the zero flag from all entries of all tables. `false` if the monitor has ended it.
    fn expand_zeros(&self, monitor: Option<&dyn Monitor>) -> Result<bool, ImageError> {
        let backed = self.backing.is_some() || self.meta.header().backing_name.is_some();
        let tables = self.all_tables()?;
        let size = self.cluster_size();
        // Counted are L1 entries: those without a table are done.
        let mut entries = 0;
        self.for_each_l1(|_, l1| {
            entries += l1.len() as u64;
            Ok(())
        })?;
        let mut left: u64 = tables.iter().map(|table| table.times).sum();
        let mut whole = true;
        let tell = |left: u64| {
            if let Some(monitor) = monitor {
                monitor.progress((entries - left) * size, entries * size);
            }
        };
        (left..entries).rev().for_each(tell);
        self.for_each_piece(&tables, |piece| {
            if monitor.is_some_and(Monitor::is_cancelled) {
                whole = false;
                return Ok(ControlFlow::Break(()));
            }
            let changed = if backed {
                let mut wanted = 0;
                piece.change(|_, _, entry| {
                    wanted += u64::from(self.is_zero(entry));
                    Ok::<_, ImageError>(None)
                })?;
                let mut zeros = Zeros::new(self, wanted);
                let changed = piece.change(|table, index, entry| {
                    if !self.is_zero(entry) {
                        return Ok(None);
                    }
                    zeros.fill(table, index, entry).map(Some)
                })?;
                zeros.finish()?;
                changed
            } else {
                piece.change(|_, _, entry| {
                    Ok::<_, ImageError>(self.is_zero(entry).then(L2Entry::default))
                })?
            };
            let done: u64 = piece.tables.iter().map(|table| table.times).sum();
            left -= done;
            (left..left + done).rev().for_each(tell);
            Ok(ControlFlow::Continue(changed))
        })
        .map(|()| whole)
    }

    fn is_zero(&self, entry: L2Entry) -> bool {
        matches!(
            entry.kind(self.rules),
            ClusterKind::ZeroPlain | ClusterKind::ZeroAllocated(_)
        )
    }
}

/// Clusters that are filled with zeros, for entries that are about to lead to them.
struct Zeros<'a> {
    image: &'a Image,
    /// Clusters still wanted, at most.
    wanted: u64,
    /// What is left of the clusters handed out last, all zeros.
    ready: Option<(Allocation<'a>, u64)>,
    any: bool,
}

impl<'a> Zeros<'a> {
    fn new(image: &'a Image, wanted: u64) -> Self {
        Self {
            image,
            wanted,
            ready: None,
            any: false,
        }
    }

    /// The entry for a cluster of zeros without the zero flag. Refcounts and flags are put right later.
    fn fill(&mut self, table: &Table, index: u64, entry: L2Entry) -> Result<L2Entry, ImageError> {
        let image = self.image;
        let bits = image.geometry.cluster_bits();
        let guest = ((table.index << image.geometry.l2_bits()) + index) << bits;
        self.any = true;
        self.wanted = self.wanted.saturating_sub(1);
        if let ClusterKind::ZeroAllocated(place) = entry.kind(image.rules) {
            // If others have the cluster, it may be data for them.
            let cluster = image.geometry.host_cluster(place);
            if image.alloc()?.refcount(cluster)? == 1 {
                self.zero(guest, place)?;
                return Ok(L2Entry::normal(place, entry.is_copied(), 0));
            }
        }
        let cluster = self.take()?;
        let place = HostOffset::new(cluster.get() << bits);
        self.zero(guest, place)?;
        Ok(L2Entry::normal(place, false, 0))
    }

    fn take(&mut self) -> Result<HostCluster, ImageError> {
        if let Some((run, used)) = &mut self.ready
            && *used < run.count()
        {
            *used += 1;
            return Ok(HostCluster::new(run.first().get() + *used - 1));
        }
        if let Some((run, _)) = self.ready.take() {
            run.keep();
        }
        let run = self.image.alloc()?.allocate(self.wanted + 1, None)?;
        let first = run.first();
        self.ready = Some((run, 1));
        Ok(first)
    }

    fn zero(&self, guest: u64, place: HostOffset) -> Result<(), ImageError> {
        let image = self.image;
        let size = image.cluster_size();
        image.check_data(place, size)?;
        if image.crypt.is_some() {
            return image.store_zeros(guest, place, size);
        }
        let range = place.get()..place.get() + size;
        Ok(image.meta.storage().write_zeroes(range, ZeroFlags::NONE)?)
    }

    /// The zeros come before what leads to them.
    fn finish(mut self) -> Result<(), ImageError> {
        if let Some((run, used)) = self.ready.take() {
            run.keep_first(used);
        }
        if self.any {
            self.image.meta.flush()?;
        }
        Ok(())
    }
}
