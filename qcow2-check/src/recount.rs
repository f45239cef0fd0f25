//! What refcounts and COPIED flags should be: for whoever is to put them right.
//!
//! An image whose refcounts were postponed tells by its dirty bit that they may be wrong. All else in it is meant to be
//! right, so its references are counted as in a check, and what differs is told piece by piece. Nothing is written here.

use std::fmt;
use std::ops::ControlFlow;

use qcow2_format::header::Header;
use qcow2_format::{HostCluster, HostOffset};
use qcow2_io::Storage;
use thiserror::Error;

use crate::blocks::BlockRef;
use crate::compare::{self, Comparison, Plan};
use crate::copied::{self, Flags, WrongFlag};
use crate::image::Image;
use crate::load::{self, Loaded};
use crate::references::{self, Counted};
use crate::refmap::RefMap;
use crate::report::Collector;
use crate::walk::Window;
use crate::{Code, Finding, Options, Phase, Place, Run, Severity, Structure, owners};

/// A cluster whose refcount on disk is not the number of its references.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountDifference {
    /// The cluster; it may lie behind the end of the file.
    pub cluster: HostCluster,
    /// Its refcount on disk; 0 where there is no refcount block for it.
    pub found: u64,
    /// Its references, at most what refcounts of the image's width can express.
    pub expected: u64,
}

/// An entry of an active table whose COPIED flag does not fit the references to what it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopiedDifference {
    /// The kind of table: [`Structure::ActiveL1`] or [`Structure::L2Table`].
    pub structure: Structure,
    /// First byte of the table.
    pub table: HostOffset,
    /// Which of the table's entries, counted from 0.
    pub index: u64,
    /// Where the entry lies: the first of the eight bytes whose highest bit is the flag.
    pub entry: HostOffset,
    /// Whether the flag should be set: what the entry leads to has exactly one reference.
    pub should_be_set: bool,
}

/// Why references could not be counted or compared.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RecountError {
    /// The file is no image that can be walked, or claims so absurdly much that it can't be kept in memory.
    #[error("references can't be counted: {0}")]
    Uncountable(Box<Finding>),
    /// Some metadata can't be read.
    #[error("metadata at {offset} can't be read: {reason}")]
    Unreadable {
        /// Where the first read failed.
        offset: HostOffset,
        /// What the storage said.
        reason: String,
    },
    /// The monitor ended the walk.
    #[error("the count of references was cancelled")]
    Cancelled,
}

/// The references of an image, counted.
///
/// Take what it says for a repair only if [`is_complete`](Self::is_complete), and look at [`totals`](Self::totals) before
/// anything is written: it repairs nothing else. While it lives, the image's L1, L2 and snapshot tables must stay where they
/// are; refcounts and COPIED flags may be written.
///
/// ```
/// use std::ops::ControlFlow;
/// use qcow2_check::{Options, RecountError, recount};
///
/// # fn set_refcount(_: qcow2_check::RefcountDifference) -> std::io::Result<()> { Ok(()) }
/// # fn repair(image: &dyn qcow2_io::Storage) -> Result<std::io::Result<()>, RecountError> {
/// let references = recount(image, &Options::default())?;
/// if !references.is_complete() {
///     return Ok(Err(std::io::Error::other("more than refcounts is wrong")));
/// }
/// let end = references.refcount_differences(|difference| match set_refcount(difference) {
///     Ok(()) => ControlFlow::Continue(()),
///     Err(error) => ControlFlow::Break(error),
/// })?;
/// # Ok(match end { ControlFlow::Continue(()) => Ok(()), ControlFlow::Break(error) => Err(error) })
/// # }
/// ```
pub struct Recount<'a> {
    loaded: Loaded<'a>,
    counted: Counted,
    problems: Vec<Finding>,
    totals: Vec<(Code, u64)>,
}

/// Counts all references of an image. Time and memory are those of a check.
///
/// # Errors
///
/// The file can't be taken for an image, would take absurd memory, or the monitor ended the walk. Damage is no error.
pub fn recount<'a>(
    storage: &'a dyn Storage,
    options: &Options<'_>,
) -> Result<Recount<'a>, RecountError> {
    Run::start(options, |run| count(storage, run)).unwrap_or_else(|| {
        let place = Place::of(Structure::File);
        let finding = Finding::new(Code::HeaderUnreadable, place, "no threads can be started");
        Err(RecountError::Uncountable(Box::new(finding)))
    })
}

fn count<'a>(storage: &'a dyn Storage, run: Run<'_>) -> Result<Recount<'a>, RecountError> {
    run.phase(Phase::Tables, 0);
    let mut walked = load::load(storage, &run).and_then(|loaded| {
        let counted = references::count(&loaded, &run)?;
        Some((loaded, counted))
    });
    if run.is_cancelled() {
        return Err(RecountError::Cancelled);
    }
    if let Some((loaded, counted)) = &mut walked {
        counted.complete &= others(loaded, counted, &run);
        if run.is_cancelled() {
            return Err(RecountError::Cancelled);
        }
    }
    let (mut problems, mut totals) = run.finish().1.finish();
    let Some((loaded, counted)) = walked else {
        // Only an error ends a count early, and the last one did.
        let error = problems
            .into_iter()
            .rfind(|finding| finding.severity() == Severity::Error);
        let unknown = || Finding::new(Code::CheckLimited, Place::of(Structure::File), "unknown");
        return Err(RecountError::Uncountable(Box::new(
            error.unwrap_or_else(unknown),
        )));
    };
    problems.retain(|finding| finding.severity() >= Severity::Corruption);
    totals.retain(|(code, _)| code.severity() >= Severity::Corruption);
    Ok(Recount {
        loaded,
        counted,
        problems,
        totals,
    })
}

/// What else is wrong, besides what was met while counting. Tells whether no cluster has owners that may not share it.
fn others(loaded: &Loaded<'_>, counted: &Counted, run: &Run<'_>) -> bool {
    let image = &loaded.image;
    let Counted {
        map, scan, blocks, ..
    } = counted;
    let findings = compare::Findings::new(image, run.limit());
    let mut comparison = Comparison::new(image, map, map.end(), findings);
    comparison.overflows(0, map.end());
    let overflows: Collector = comparison.judge.found;
    run.append(overflows);
    let harmless = !counted.conflicts || owners::conflicts(loaded, map, scan, blocks, run);
    crate::crypto::check(image, run);
    references::hidden_failure(image, run);
    harmless
}

impl Recount<'_> {
    /// The header, as it was read.
    pub fn header(&self) -> &Header {
        &self.loaded.image.header
    }

    /// Whether nothing was met that could hide references or makes their number doubtful. If not, a cluster without
    /// references may well be in use, and a refcount must not be lowered.
    pub fn is_complete(&self) -> bool {
        self.counted.complete
            && self
                .totals
                .iter()
                .all(|(code, _)| *code != Code::ReadFailed)
    }

    /// What is wrong besides refcounts and COPIED flags: corruptions, and what could not be checked. Among them are entries
    /// of the refcount table that can't be used. At most [`Options::max_findings`] of each kind.
    pub fn problems(&self) -> &[Finding] {
        &self.problems
    }

    /// How many problems there are of each kind; empty where nothing else is wrong.
    pub fn totals(&self) -> &[(Code, u64)] {
        &self.totals
    }

    /// Whether compressed data claims clusters that hold other data: nothing is wrong then, but such data can't be moved alone.
    pub fn has_compressed_on_data(&self) -> bool {
        let map = &self.counted.map;
        map.conflicts().any(|cluster| map.is_mixed(cluster))
    }

    /// How many references a cluster has, at most what refcounts of the image's width can express.
    pub fn expected(&self, cluster: HostCluster) -> u64 {
        let max = self.loaded.image.geometry.refcount_max();
        self.counted.map.weight(cluster.get()).min(max)
    }

    /// The cluster behind the last one that the file has, or that is referenced.
    pub fn end(&self) -> HostCluster {
        HostCluster::new(self.counted.end(&self.loaded.image))
    }

    /// Reads all refcounts and calls `sink` for each that differs from the references, in ascending order of the clusters.
    /// `sink` ends it by `Break`, which is handed back. It may write the refcounts that it is told of.
    ///
    /// Refcounts that can't be found, since an entry of the refcount table can't be used, are left out; the entry is one of
    /// the [`problems`](Self::problems).
    ///
    /// # Errors
    ///
    /// Some metadata can't be read, now or before.
    pub fn refcount_differences<B>(
        &self,
        sink: impl FnMut(RefcountDifference) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B>, RecountError> {
        let image = &self.loaded.image;
        let plan = Plan::new(image, &self.counted.blocks);
        let told = Told { sink, broken: None };
        let end = self.counted.end(image);
        let mut comparison = Comparison::new(image, &self.counted.map, end, told);
        let mut buffer = Vec::new();
        for unit in 0..plan.units {
            comparison.unit(&plan, unit, &mut buffer);
            if comparison.judge.broken.is_some() {
                break;
            }
        }
        self.ended(comparison.judge.broken)
    }

    /// Calls `sink` for each COPIED flag in active tables that does not fit the references, as they were counted, not the
    /// refcounts on disk: L2 tables mostly in the order of the disk. `sink` ends it by `Break`, which is handed back. It may
    /// write the flags that it is told of.
    ///
    /// A refcount that is lower than the references must be put right before a flag is set, or durable with it.
    ///
    /// # Errors
    ///
    /// Some metadata can't be read, now or before.
    pub fn copied_differences<B>(
        &self,
        sink: impl FnMut(CopiedDifference) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B>, RecountError> {
        let Counted { map, scan, .. } = &self.counted;
        if !self.counted.are_flags_suspect() {
            // The walk has seen each flag already.
            return self.ended(None);
        }
        let image = &self.loaded.image;
        let judge = ToldFlags {
            image,
            map,
            told: Told { sink, broken: None },
        };
        let plan = Window::plan(image);
        let mut flags = Flags::new(image, judge);
        for unit in 0..copied::units(scan) {
            flags.unit(&plan, scan, unit);
            if flags.judge.told.broken.is_some() {
                break;
            }
        }
        self.ended(flags.judge.told.broken)
    }

    fn ended<B>(&self, broken: Option<B>) -> Result<ControlFlow<B>, RecountError> {
        if let Some(broken) = broken {
            return Ok(ControlFlow::Break(broken));
        }
        match self.loaded.image.reader.failure() {
            Some((offset, reason)) => Err(RecountError::Unreadable {
                offset: HostOffset::new(*offset),
                reason: reason.clone(),
            }),
            None => Ok(ControlFlow::Continue(())),
        }
    }
}

impl fmt::Debug for Recount<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recount")
            .field("is_complete", &self.is_complete())
            .field("totals", &self.totals)
            .finish_non_exhaustive()
    }
}

/// Tells the caller's sink, until it wants no more.
struct Told<F, B> {
    sink: F,
    broken: Option<B>,
}

impl<F, B> Told<F, B> {
    fn tell<T>(&mut self, difference: T)
    where
        F: FnMut(T) -> ControlFlow<B>,
    {
        if self.broken.is_none()
            && let ControlFlow::Break(broken) = (self.sink)(difference)
        {
            self.broken = Some(broken);
        }
    }
}

impl<F, B> compare::Judge for Told<F, B>
where
    F: FnMut(RefcountDifference) -> ControlFlow<B>,
{
    fn differ(&mut self, first: u64, count: u64, on_disk: u64, expected: u64) {
        for cluster in first..first.saturating_add(count) {
            self.tell(RefcountDifference {
                cluster: HostCluster::new(cluster),
                found: on_disk,
                expected,
            });
        }
    }

    fn behind(&mut self, base: u64, bits: u64, value: impl Fn(u64) -> u64) {
        for cluster in (base..).take(64).filter(|c| bits >> (c % 64) & 1 != 0) {
            self.differ(cluster, 1, value(cluster), 0);
        }
    }

    fn overflow(&mut self, _cluster: u64, _weight: u64, _max: u64) {
        // Told when the references were counted.
    }

    fn unreadable(&mut self, _index: u64, _block: BlockRef, _start: u64, _stop: u64) {
        // An entry that can't be used was told before, and a read that failed ends it all.
    }
}

/// Judges flags by counted references.
struct ToldFlags<'a, 'i, F, B> {
    image: &'a Image<'i>,
    map: &'a RefMap,
    told: Told<F, B>,
}

impl<F, B> copied::Judge for ToldFlags<'_, '_, F, B>
where
    F: FnMut(CopiedDifference) -> ControlFlow<B>,
{
    fn is_one(&self, cluster: u64) -> Option<bool> {
        Some(self.map.weight(cluster) == 1)
    }

    fn wrong(&mut self, flag: WrongFlag<'_>) {
        let image = self.image;
        let entry_size = if image.geometry.extended_l2() { 16 } else { 8 };
        let (structure, table, entry) = match flag.table {
            Some(table) => (
                Structure::L2Table,
                table.offset,
                table.offset.saturating_add(flag.index * entry_size),
            ),
            None => (
                Structure::ActiveL1,
                image.header.l1_table_offset.get(),
                image.active_entry(flag.index),
            ),
        };
        self.told.tell(CopiedDifference {
            structure,
            table: HostOffset::new(table),
            index: flag.index,
            entry: HostOffset::new(entry),
            should_be_set: !flag.copied,
        });
    }
}
