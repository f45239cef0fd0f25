//! Compaction: the clusters of an image change their places, and nothing else changes.
//!
//! A move is done in five steps, and each state in between is a sound image with the same content: the refcounts of the new
//! places rise, what is moved is copied there, all pointers to it are changed, and then the refcounts of the old places fall; with a flush
//! between any two. A cluster that several trees share is moved once, and all their pointers with it. Pointers are found by going through all
//! tables, past the cache; so many clusters are moved at a time that this costs little beside the moves.
//!
//! There are two ways. [`Truncate`](CompactMode::Truncate) moves what lies behind the number of clusters in use into the holes before.
//! [`Sequential`](CompactMode::Sequential) first brings everything into the order of the disk: each L2 table, then the compressed data that it leads to, then
//! the other data; the active tree first, then what only snapshots have. What the next slots hold is moved out of the way, and what belongs there
//! is moved in.
//!
//! Guests' requests wait while clusters are moved, but not all the time: the work is done in slices.

mod apply;
mod bitmaps;
mod extents;
mod fragments;
mod into;
mod occupancy;
mod options;
mod order;
mod sequential;
mod structures;
mod truncate;

use qcow2_io::Storage as _;

use crate::copy::Monitor;
use crate::{Image, ImageError};

pub use options::{CompactMode, CompactOptions, CompactReport};

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Done,
    Cancelled,
}

/// A compaction under way.
struct Work<'a> {
    image: &'a Image,
    monitor: Option<&'a dyn Monitor>,
    /// Clusters that are moved in one slice, at most.
    slice: u64,
    /// Bytes that were moved.
    moved_bytes: u64,
}

impl Image {
    /// Moves clusters so that the file gets as small as it can without loss, or into the order of the disk. What the guest and all
    /// snapshots show stays the same, and so does what they share. It may be called while others use the image.
    ///
    /// Not moved are the header and the area of LUKS keys. The file may keep holes before that, and where compressed data
    /// is packed in pieces that fit into none; otherwise there are none left.
    ///
    /// # Errors
    ///
    /// [`ImageError::Unrecoverable`] if something is wrong with the image, before anything is moved; an image that is not open for writing; and
    /// what the storage reports. The image is sound then, and compaction can be called again, which goes on with what is left.
    ///
    /// # Locking
    ///
    /// Requests wait while a slice of the work is done, [64 MiB](CompactOptions::slice) unless told otherwise.
    ///
    /// # Durability
    ///
    /// A crash at any moment leaves the same content in a sound image. What was moved is durable on return, and so is all that was
    /// written before. Clusters that are shared and were just moved when the machine failed may not be shared any more.
    ///
    /// # Memory
    ///
    /// A bit for each cluster of the file, a list of all L2 tables, and some 100 bytes for each cluster of a slice.
    pub fn compact(&self, options: &CompactOptions<'_>) -> Result<CompactReport, ImageError> {
        self.meta.check_writable()?;
        self.get_ready()?;
        let mut report = CompactReport::default();
        let tables = {
            let _closed = self.gate.close();
            self.settle_closed()?;
            self.meta.settle(self.alloc()?)?;
            // Nothing may be moved that something unknown refers to.
            if self.recount_references(|| Ok(()))? {
                // Neither can be moved without the other.
                return Err(ImageError::Unrecoverable {
                    detail: "compressed data claims clusters that hold other data; a repair that salvages parts them".to_owned(),
                });
            }
            report.bytes_before = self.meta.storage().len()?;
            report.fragments_before = self.fragments()?;
            self.all_tables()?.len() as u64
        };
        let slice = (options.slice_bytes() >> self.geometry.cluster_bits()).max(tables * 4);
        let mut work = Work {
            image: self,
            monitor: options.monitor,
            slice: slice.clamp(1, options::SLICE_MAX),
            moved_bytes: 0,
        };
        let mut end = End::Done;
        if options.mode == CompactMode::Sequential {
            end = work.put_in_order()?;
        }
        if end == End::Done {
            end = work.truncate()?;
        }
        let _closed = self.gate.close();
        self.settle_closed()?;
        report.complete = end == End::Done;
        report.moved_bytes = work.moved_bytes;
        report.bytes_after = self.meta.storage().len()?;
        report.fragments_after = self.fragments()?;
        Ok(report)
    }
}

impl Work<'_> {
    fn is_cancelled(&self) -> bool {
        self.monitor.is_some_and(Monitor::is_cancelled)
    }

    fn progress(&self, done: u64, total: u64) {
        let bits = self.image.geometry.cluster_bits();
        if let Some(monitor) = self.monitor {
            monitor.progress(done.min(total) << bits, total << bits);
        }
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
