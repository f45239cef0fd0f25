//! Repair: a plan that can be read, a way back that can be trusted.
//!
//! [`plan`] repairs a picture of the image, kept in memory above the storage, until the checker finds nothing more that it
//! could do something about. The plan is what differs: [actions](Action) with their reasons, and every range that would be
//! written. Nothing is written before [`Plan::apply`], which first saves what it overwrites to an undo file, from which [`undo`] brings
//! each byte back. So the verdict after a repair is known before it begins.
//!
//! What decides between two owners of a cluster: what the header names comes first, then L2 tables, those of the active tree before those of
//! snapshots, then data. The later one gets a copy where a copy can be right, else its pointer is given up. Refcounts say nothing about who
//! owns what; they are made anew of the references, and refcount structures give way to everything else.
//!
//! Nothing is freed because a pointer to it was damaged: where pointers were given up, what is without references becomes a snapshot
//! unless [`RepairOptions::orphans`] says otherwise.

mod action;
mod apply;
mod bitmaps;
mod bits;
mod claims;
mod crc;
mod entries;
mod header;
mod key;
mod l1;
mod orphans;
mod overlay;
mod plan;
mod refcounts;
mod rounds;
mod salvage;
mod snapshots;
mod subclusters;
mod tables;
mod undo;

use std::fmt;
use std::sync::Arc;

use qcow2_io::{Storage, StorageError};
use thiserror::Error;

use crate::{ByteRange, Finding, Monitor, Report};

pub use crate::snapshots::SnapshotCut;
pub use action::{Action, ActionKind, Effect};
pub use apply::{Applied, ApplyError};
pub use key::{DataCipher, Key, KeyError};
pub use undo::{UndoError, UndoSummary, default_undo_path, read_undo, undo};

use overlay::Overlay;

/// How far a repair goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Level {
    /// Frees leaked space, if nothing is wrong that could hide references, and puts COPIED flags right, which mirror refcounts.
    Leaks,
    /// Makes everything consistent that the image's own structures allow to.
    All,
    /// Searches the file for what nothing refers to, too: header, L1 and L2 tables.
    Salvage,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Leaks => "leaks",
            Self::All => "all",
            Self::Salvage => "salvage",
        })
    }
}

/// What becomes of bitmaps that a crash left in use. Broken ones are dropped in any case: they keep QEMU from opening the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum StaleBitmaps {
    /// They stay, marked as they are: nobody trusts them.
    #[default]
    Keep,
    /// They go.
    Drop,
}

/// What becomes of clusters without references where pointers had to be given up that may have led to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Orphans {
    /// They become a snapshot named `lost+found`: the image is consistent, and they can be looked at. Where an image can't have
    /// snapshots, as [`Leave`](Self::Leave).
    #[default]
    Snapshot,
    /// They keep their refcounts: checkers call them leaks.
    Leave,
    /// They are freed. Their bytes stay until somebody writes there.
    Free,
}

/// Where refcounts are put right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RefcountRepair {
    /// In place, as far as a table and blocks have places of their own. What is missing goes to the end of the file.
    #[default]
    InPlace,
    /// As QEMU does it: where a cluster in use has no refcount at all, or refcount structures have no place of their own, all of them
    /// are made anew. They take the lowest free places (a block none before the clusters that it counts, the table after all blocks), and
    /// the old ones are freed. Where references may be hidden, as [`InPlace`](Self::InPlace): what looks free may not be.
    Anew,
}

/// How a snapshot table is read whose entries, or whose lengths, go beyond the limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SnapshotTables {
    /// Lengths that can't be right are corrected by what the entries look like. What only entries led to for which there is no room
    /// stays as [`Orphans`] says.
    #[default]
    Searched,
    /// All lengths are what they say: of too much extra data the end goes, and entries for which there is no room go with all that
    /// only they led to. So does QEMU; names that lie where they would be by other lengths are lost.
    AsWritten,
}

/// How to repair.
#[derive(Clone, Copy)]
pub struct RepairOptions<'a> {
    /// How far to go.
    pub level: Level,
    /// Threads to work with, as in [`Options`](crate::Options::threads).
    pub threads: usize,
    /// Actions and findings of each kind that are told one by one.
    pub max_actions: usize,
    /// Who watches, and may end the planning.
    pub monitor: Option<&'a dyn Monitor>,
    /// Bytes that the file may grow by; `None` for as much as it has, and at least 64 MiB.
    pub max_growth: Option<u64>,
    /// Bitmaps that are in use.
    pub stale_bitmaps: StaleBitmaps,
    /// Clusters without references whose pointers may have been given up.
    pub orphans: Orphans,
    /// Where refcounts are put right.
    pub refcounts: RefcountRepair,
    /// What moves encrypted clusters. Without it they stay where they are, and what is wrong with that is left.
    pub key: Option<&'a dyn Key>,
    /// Snapshot tables beyond the limits.
    pub snapshot_tables: SnapshotTables,
}

impl Default for RepairOptions<'_> {
    fn default() -> Self {
        Self {
            level: Level::All,
            threads: 0,
            max_actions: 100,
            monitor: None,
            max_growth: None,
            stale_bitmaps: StaleBitmaps::Keep,
            orphans: Orphans::Snapshot,
            refcounts: RefcountRepair::InPlace,
            key: None,
            snapshot_tables: SnapshotTables::Searched,
        }
    }
}

impl fmt::Debug for RepairOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RepairOptions")
            .field("level", &self.level)
            .field("threads", &self.threads)
            .field("max_actions", &self.max_actions)
            .field("max_growth", &self.max_growth)
            .field("stale_bitmaps", &self.stale_bitmaps)
            .field("orphans", &self.orphans)
            .field("refcounts", &self.refcounts)
            .field("key", &self.key.is_some())
            .field("snapshot_tables", &self.snapshot_tables)
            .finish_non_exhaustive()
    }
}

/// Why no plan could be made. Nothing was written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The storage failed.
    #[error("the image can't be read")]
    Storage(#[from] StorageError),
    /// The file is so damaged that no table can be found at this level, or claims so absurdly much that it can't be looked through.
    #[error("there is nothing to begin with: {0}")]
    Hopeless(Box<Finding>),
    /// The repair would need more space than it may take.
    #[error("the repair would make the file grow by {needed} bytes, more than the {limit} allowed")]
    TooLarge {
        /// Bytes it would grow by, at least.
        needed: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A structure would become larger than the format allows.
    #[error("the {what} would have {found} bytes, at most {limit} are allowed")]
    Limit {
        /// Which one.
        what: &'static str,
        /// Its length.
        found: u64,
        /// The format's limit.
        limit: u64,
    },
    /// Encrypted clusters have to be moved, and the [key](RepairOptions::key) that is given does not open them.
    #[error("encrypted clusters have to be moved, and the key can't be had")]
    Key(#[source] KeyError),
    /// The monitor ended it.
    #[error("planning was cancelled")]
    Cancelled,
}

/// What a repair would do.
///
/// While it lives, nobody may write to the image but [`apply`](Self::apply).
#[derive(Debug)]
pub struct Plan<'a> {
    overlay: Arc<Overlay<'a>>,
    level: Level,
    /// Checksum of the first sector.
    identity: u64,
    actions: Vec<Action>,
    before: Report,
    cuts: Vec<SnapshotCut>,
    before_without: Option<Report>,
    after: Report,
    kept_orphans: bool,
    wants_key: bool,
}

/// Plans a repair. Reads the image, writes nothing.
///
/// Time is that of some checks. Memory, besides that of a check, is what the plan changes.
///
/// # Errors
///
/// The image can't be read, has nothing to begin with, or the repair would break a limit.
pub fn plan<'a>(
    storage: &'a dyn Storage,
    options: &RepairOptions<'_>,
) -> Result<Plan<'a>, PlanError> {
    plan::make(storage, options)
}

impl<'a> Plan<'a> {
    /// The level it was made for.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The actions in their order.
    pub fn actions(&self) -> &[Action] {
        &self.actions
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.actions.is_empty()
    }

    /// The check of the image as it is.
    pub fn before(&self) -> &Report {
        &self.before
    }

    /// What goes of a snapshot table beyond the limits that is taken [as it is written](SnapshotTables::AsWritten).
    pub fn snapshot_cuts(&self) -> &[SnapshotCut] {
        &self.cuts
    }

    /// Where there are [such](Self::snapshot_cuts): the check of the image as it is but without them. Refcounts of what only they led to
    /// are leaks there.
    pub fn before_without_cuts(&self) -> Option<&Report> {
        self.before_without.as_ref()
    }

    /// The check of the image as it will be: what it still finds is left.
    pub fn after(&self) -> &Report {
        &self.after
    }

    /// Whether clusters without references stay allocated, in a snapshot or as leaks, since pointers were given up that may have led there.
    pub fn keeps_orphans(&self) -> bool {
        self.kept_orphans
    }

    /// Whether a [key](RepairOptions::key) would do more: encrypted clusters that share their place were left there, or a cluster that should read
    /// as zeros reads as noise.
    pub fn wants_key(&self) -> bool {
        self.wants_key
    }

    /// Every range of the file that will be written, ascending and apart, in whole sectors of 512 bytes.
    pub fn writes(&self) -> Vec<ByteRange> {
        self.overlay.ranges(None)
    }

    /// Length of the file afterwards, in bytes.
    pub fn new_len(&self) -> u64 {
        self.overlay.new_len()
    }

    /// Length of the file as it is, in bytes.
    pub fn old_len(&self) -> u64 {
        self.overlay.base_len()
    }

    /// The image as it will be: for reading only.
    pub fn preview(&self) -> &dyn Storage {
        &*self.overlay
    }

    /// The image as it will be, for who needs to own it.
    pub fn into_preview(self) -> Arc<dyn Storage + 'a> {
        self.overlay
    }

    /// Carries the plan out. What is overwritten goes to `undo` first: an empty storage, or one that holds a repair of this image
    /// that was cut short.
    ///
    /// # Errors
    ///
    /// The image was changed since the plan was made (then nothing was written), or a storage fails.
    ///
    /// # Durability
    ///
    /// What will be overwritten is durable in `undo` before the first write to the image. After a crash, `undo` brings back what the image was,
    /// and another plan brings it to its end. When this returns, all is durable.
    pub fn apply(&self, undo: Option<&dyn Storage>) -> Result<Applied, ApplyError> {
        apply::apply(&self.overlay, self.identity, undo)
    }
}

impl fmt::Display for Plan<'_> {
    /// One line an action.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, action) in (1..).zip(&self.actions) {
            writeln!(f, "{number}. {action}")?;
        }
        Ok(())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Plan<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let writes = self.writes();
        let bytes = writes.iter().map(|range| range.end - range.start);
        let mut out = serializer.serialize_struct("Plan", 9)?;
        out.serialize_field("level", &self.level)?;
        out.serialize_field("actions", &self.actions)?;
        out.serialize_field("old-length", &self.old_len())?;
        out.serialize_field("new-length", &self.new_len())?;
        out.serialize_field("bytes-written", &bytes.sum::<u64>())?;
        out.serialize_field("verdict-before", &self.before.verdict())?;
        out.serialize_field("verdict-after", &self.after.verdict())?;
        out.serialize_field("keeps-orphans", &self.kept_orphans)?;
        out.serialize_field("wants-key", &self.wants_key)?;
        out.end()
    }
}
