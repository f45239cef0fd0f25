//! Persistent dirty bitmaps: which parts of the disk have changed since some moment, kept in the image.
//!
//! A bitmap has a bit for each stretch of the disk, as long as its granularity says. One that is *enabled* records: each write,
//! zero write and discard sets the bits of what it touches, and so does all else that changes what the guest sees.

mod begin;
mod differences;
mod directory;
mod edit;
mod extents;
mod load;
mod manage;
mod merge;
mod place;
mod record;
mod resize;
mod tracker;
mod walk;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use qcow2_cache::sync::{Mutex, MutexGuard, lock};

use self::directory::{Directory, Known};
use self::tracker::Trackers;
use crate::{Image, ImageError};

pub use extents::DirtyRanges;
pub use manage::{BitmapOptions, BitmapRecovery};
pub(crate) use resize::NewBits;

/// A persistent bitmap of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Its name; any bytes.
    pub name: Vec<u8>,
    /// Bytes of the disk that one bit stands for. 0 if it is broken so much that this makes no sense.
    pub granularity: u64,
    /// Whether the file says that someone has the image open and records in it, or had when it crashed.
    pub in_use: bool,
    /// Whether it is enabled: it records what changes.
    pub auto: bool,
    /// Whether its bits can be used.
    pub state: BitmapState,
    /// Bytes of the disk that it has as changed, a partial granule at the end counted as what it has; if its bits
    /// can be used.
    pub dirty_bytes: Option<u64>,
}

/// Whether the bits of a bitmap can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapState {
    /// They can.
    Consistent,
    /// Who recorded in it last has not closed the image, or is recording still: changes may be missing. It can be removed or
    /// recovered.
    Inconsistent,
    /// Its structures make no sense. It can only be removed.
    Broken {
        /// What is wrong.
        why: String,
    },
}

impl BitmapState {
    fn broken(why: impl Into<String>) -> Self {
        Self::Broken { why: why.into() }
    }
}

/// What an image knows of its bitmaps while it is open.
pub(crate) struct Bitmaps {
    trackers: Trackers,
    /// How often the file gets the pages as they are.
    interval: Duration,
    /// Whether those that are consistent are in use from the beginning on, and get new places with each change.
    anew: bool,
    /// Taken after the gate and the locks of clusters; commits run under it.
    state: Mutex<State>,
}

/// A tracker, and one of its pages.
type PageKey = (usize, u64);

#[derive(Default)]
struct State {
    /// The bitmaps of an image that is ready for writes.
    directory: Option<Directory>,
    /// Pages of which the file may have more than is set, each with the number of its last announcement.
    armed: BTreeMap<PageKey, u64>,
    /// Announcements so far.
    stamp: u64,
    /// When the file last got the pages as they are.
    refined: Option<Instant>,
    /// Nothing has happened to bitmaps since they got new places.
    fresh: bool,
}

impl Bitmaps {
    /// None yet. The file gets the bits as they are once in an interval; or, if they get new places, then.
    pub(crate) fn new(interval: Duration, anew: bool) -> Self {
        Self {
            trackers: Trackers::new(),
            interval,
            anew,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Image {
    /// The persistent bitmaps, in the order of their directory. None where the image says that its bitmaps can't be relied
    /// upon, since something wrote to it that doesn't know them.
    ///
    /// A directory that makes no sense in part ends with a broken bitmap without a name, for what can't be read of it.
    ///
    /// # Errors
    ///
    /// What the storage reports.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>, ImageError> {
        let _pass = self.gate.enter();
        self.with_directory(|directory| {
            let mut all = Vec::with_capacity(directory.known.len());
            let clusters = self.geometry.clusters_for(self.meta.storage().len()?);
            let budget = Cell::new(clusters);
            for known in &directory.known {
                all.push(self.info(known, &budget)?);
            }
            if let Some(why) = &directory.rest {
                all.push(BitmapInfo {
                    name: Vec::new(),
                    granularity: 0,
                    in_use: false,
                    auto: false,
                    state: BitmapState::broken(format!("the directory of bitmaps: {why}")),
                    dirty_bytes: None,
                });
            }
            Ok(all)
        })
    }

    fn info(&self, known: &Known, budget: &Cell<u64>) -> Result<BitmapInfo, ImageError> {
        let entry = &known.entry;
        let mut state = known.state.clone();
        let mut dirty_bytes = None;
        if state == BitmapState::Consistent {
            match self.dirty_bytes(known, budget) {
                Ok(bytes) => dirty_bytes = Some(bytes),
                Err(ImageError::BitmapUnusable { why, .. }) => state = BitmapState::broken(why),
                Err(error) => return Err(error),
            }
        }
        Ok(BitmapInfo {
            name: entry.name.clone(),
            granularity: 1_u64
                .checked_shl(entry.granularity_bits.into())
                .unwrap_or(0),
            in_use: entry.flags.in_use(),
            auto: entry.flags.auto(),
            state,
            dirty_bytes,
        })
    }
}
