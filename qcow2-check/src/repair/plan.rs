//! Making a plan: phase after phase on the picture of the image.

use std::sync::Arc;

use qcow2_format::geometry::HOST_OFFSET_LIMIT;
use qcow2_format::header::Header;
use qcow2_io::{Operation, Storage};

use super::action::{Action, ActionKind, Actions};
use super::overlay::Overlay;
use super::undo::{self, UndoError};
use super::{Level, Orphans, Plan, PlanError, RepairOptions, SnapshotTables};
use super::{bits, header, orphans, refcounts, rounds, salvage};
use crate::check::check_as_written;
use crate::image::Image;
use crate::snapshots::{SnapshotCut, read_as_written};
use crate::{Code, Finding, Options, Report, Run, Severity, Structure, Verdict, check, load};

/// Bytes that any file may grow by.
const GROWTH_MIN: u64 = 64 << 20;

/// A plan in the making.
pub(super) struct Planner<'a, 'o> {
    pub(super) overlay: Arc<Overlay<'a>>,
    pub(super) options: &'o RepairOptions<'o>,
    pub(super) actions: Actions,
    /// Pointers were given up whose target is not known: what has no references may be what they led to.
    pub(super) hidden: bool,
    /// There were such clusters, and they stay.
    pub(super) kept: bool,
    /// Something that refers to clusters can't be read: whatever is not known to be free may be in use.
    pub(super) unreadable: bool,
    /// The snapshot table and the bitmap directory can be read, if there are any.
    pub(super) snapshots_known: bool,
    /// Encrypted clusters were left where they are, since no key is at hand.
    pub(super) wants_key: bool,
    /// Clusters had no refcounts before the snapshot table was cut: only the cut makes up for that.
    pub(super) lacked: bool,
    /// Where the next new cluster goes: nothing lies there or behind, and nothing refers there.
    end: u64,
}

impl<'a, 'o> Planner<'a, 'o> {
    fn new(storage: &'a dyn Storage, options: &'o RepairOptions<'o>) -> Result<Self, PlanError> {
        let overlay = Overlay::new(storage)?;
        Ok(Self {
            end: overlay.base_len(),
            overlay: Arc::new(overlay),
            options,
            actions: Actions::new(options.max_actions),
            hidden: false,
            kept: false,
            unreadable: false,
            snapshots_known: true,
            wants_key: false,
            lacked: false,
        })
    }

    /// Options of a check of the picture.
    pub(super) fn check_options(&self) -> Options<'o> {
        Options {
            threads: self.options.threads,
            max_findings: self.options.max_actions,
            monitor: self.options.monitor,
            deep: false,
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        let monitor = self.options.monitor;
        monitor.is_some_and(crate::Monitor::is_cancelled)
    }

    pub(super) fn add(&mut self, action: Action) {
        self.actions.add(action);
    }

    /// Says that nothing refers to what lies at `end` or behind.
    pub(super) fn keep_clear(&mut self, end: u64) {
        self.end = self.end.max(end);
    }

    /// New clusters at the end of the file, one behind the other: the first byte.
    pub(super) fn allocate(&mut self, clusters: u64, cluster_size: u64) -> Result<u64, PlanError> {
        let start = self.end.max(self.overlay.new_len());
        let start = start.checked_next_multiple_of(cluster_size);
        let start = start.ok_or_else(|| self.too_large(u64::MAX))?;
        self.occupy(start, clusters, cluster_size)?;
        Ok(start)
    }

    /// Takes clusters that are known to be free, from byte `start` on.
    pub(super) fn occupy(
        &mut self,
        start: u64,
        clusters: u64,
        cluster_size: u64,
    ) -> Result<(), PlanError> {
        let end = clusters
            .checked_mul(cluster_size)
            .and_then(|len| start.checked_add(len))
            .ok_or_else(|| self.too_large(u64::MAX))?;
        let needed = end.saturating_sub(self.overlay.base_len());
        if needed > self.limit() {
            return Err(self.too_large(needed));
        }
        if end > HOST_OFFSET_LIMIT {
            return Err(PlanError::Limit {
                what: "file",
                found: end,
                limit: HOST_OFFSET_LIMIT,
            });
        }
        self.end = self.end.max(end);
        Ok(())
    }

    /// Bytes that the file may grow by.
    fn limit(&self) -> u64 {
        let limit = self.options.max_growth;
        limit.unwrap_or_else(|| self.overlay.base_len().max(GROWTH_MIN))
    }

    fn too_large(&self, needed: u64) -> PlanError {
        let limit = self.limit();
        PlanError::TooLarge { needed, limit }
    }

    /// Remembers that something of the image can't be read.
    pub(super) fn note_unreadable(&mut self, image: &Image<'_>) {
        self.unreadable |= image.reader.failure().is_some();
    }

    /// Goes on after a step that could not read what it needed: then it has done nothing.
    fn go_on(&mut self, step: Result<(), PlanError>) -> Result<(), PlanError> {
        match step {
            Err(PlanError::Storage(error)) if error.operation() == Operation::Read => {
                self.unreadable = true;
                Ok(())
            }
            other => other,
        }
    }

    /// Makes sure that the overlay has the cipher of encrypted data. `false` if no key is at hand.
    pub(super) fn open_key(&mut self, header: &Header) -> Result<bool, PlanError> {
        if self.overlay.has_cipher() {
            return Ok(true);
        }
        let Some(key) = self.options.key else {
            self.wants_key = true;
            return Ok(false);
        };
        let cipher = key.open(&*self.overlay, header).map_err(PlanError::Key)?;
        self.overlay.set_cipher(cipher);
        Ok(true)
    }

    fn after(&self) -> Report {
        check(&*self.overlay, &self.check_options())
    }

    /// A look at the picture, its snapshot table read as the options say.
    pub(super) fn look<'r>(&self, run: Run<'r>) -> Run<'r> {
        match self.options.snapshot_tables {
            SnapshotTables::Searched => run,
            SnapshotTables::AsWritten => run.reading_as_written(),
        }
    }
}

/// What will go of a snapshot table that is taken as it is written, and a check without that.
fn cuts(planner: &Planner<'_, '_>, before: &Report) -> (Vec<SnapshotCut>, Option<Report>) {
    let options = planner.options;
    if options.snapshot_tables != SnapshotTables::AsWritten
        || options.level == Level::Leaks
        || before.total(Code::SnapshotTableUnreadable) == 0
    {
        return (Vec::new(), None);
    }
    let checks = planner.check_options();
    let cuts = Run::start(&checks, |run| {
        let loaded = load::load(&*planner.overlay, &run.reading_as_written())?;
        let table = read_as_written(&loaded.image).ok()?;
        Some(table.cuts)
    });
    let cuts = cuts.flatten().unwrap_or_default();
    let without = (!cuts.is_empty()).then(|| check_as_written(&*planner.overlay, &checks));
    (cuts, without)
}

pub(super) fn make<'a>(
    storage: &'a dyn Storage,
    options: &RepairOptions<'_>,
) -> Result<Plan<'a>, PlanError> {
    let mut planner = Planner::new(storage, options)?;
    let identity = undo::identity(storage).map_err(|error| match error {
        UndoError::Image(error) => PlanError::Storage(error),
        // Nothing else is asked for.
        _ => PlanError::Cancelled,
    })?;
    let before = check(&*planner.overlay, &planner.check_options());
    if planner.is_cancelled() {
        return Err(PlanError::Cancelled);
    }
    let (cuts, before_without) = cuts(&planner, &before);
    planner.lacked = before_without
        .as_ref()
        .is_some_and(|report| report.total(Code::RefcountMissing) > 0);
    let mut after = None;
    if options.level == Level::Leaks {
        if before.complete && before.verdict() != Verdict::Sound && is_whole(&planner)? {
            // Flags mirror refcounts, and none is raised here.
            let low = before.total(Code::RefcountLow) + before.total(Code::RefcountMissing);
            refcounts::lower(&mut planner, low == 0)?;
        }
    } else if before.verdict() != Verdict::Sound
        || needs_header(&before)
        || options.level == Level::Salvage && before.total(Code::CompressedOnData) > 0
    {
        if options.level == Level::Salvage {
            let step = salvage::header(&mut planner);
            planner.go_on(step)?;
        }
        let step = header::start::mend(&mut planner);
        planner.go_on(step)?;
        let step = header::trial::mend(&mut planner, &before);
        planner.go_on(step)?;
        bits::mark(&mut planner)?;
        let step = header::mend(&mut planner);
        planner.go_on(step)?;
        let step = header::snapshots::mend(&mut planner);
        planner.go_on(step)?;
        if options.level == Level::Salvage {
            let step = salvage::snapshots(&mut planner);
            planner.go_on(step)?;
            let step = salvage::l1(&mut planner);
            planner.go_on(step)?;
        }
        let mended = rounds::mend(&mut planner);
        if options.level == Level::Salvage && mended.as_ref().is_err_and(is_no_l1) {
            // What looked like an L1 table turned out to be none.
            salvage::another_l1(&mut planner)?;
            rounds::mend(&mut planner)?;
        } else {
            mended?;
        }
        // What nothing seems to refer to may be what an entry has that can't be read.
        let search = options.level == Level::Salvage && !planner.unreadable;
        if search && salvage::tables(&mut planner)? {
            rounds::mend(&mut planner)?;
        }
        // What a table that can't be read has must not be had by another one, too.
        if planner.hidden && !planner.unreadable && options.orphans == Orphans::Snapshot {
            orphans::keep(&mut planner)?;
        }
        refcounts::mend(&mut planner)?;
    }
    if planner.is_cancelled() {
        return Err(PlanError::Cancelled);
    }
    let mark = usize::from(planner.actions.has(ActionKind::MarkCorrupt));
    if planner.actions.len() > mark {
        after = Some(planner.after());
    } else if mark > 0 {
        // Nothing could be done: then the mark is not set either.
        planner = Planner::new(storage, options)?;
    }
    // The bits go only if nothing is wrong any more.
    let reached = after.as_ref().unwrap_or(&before);
    let sound = reached.complete && reached.verdict() <= Verdict::Leaks;
    if sound && bits::clear(&mut planner)? || !sound && bits::unmark(&mut planner)? {
        after = Some(planner.after());
    }
    let Planner {
        overlay,
        actions,
        hidden,
        kept,
        wants_key,
        ..
    } = planner;
    let after = after.unwrap_or_else(|| before.clone());
    let leaks = after.total_of(Severity::Leak) > 0;
    Ok(Plan {
        overlay,
        level: options.level,
        identity,
        actions: actions.finish(),
        before,
        cuts,
        before_without,
        after,
        kept_orphans: kept || hidden && leaks,
        wants_key,
    })
}

/// Whether the header is such that nothing else can be meant: by one that is wrong in its first fields, or about where LUKS keys are, or forgets its
/// snapshots, what is in use may look like a leak.
fn is_whole(planner: &Planner<'_, '_>) -> Result<bool, PlanError> {
    // Snapshots that can't be read are none that are known not to be there.
    if !header::snapshots::hidden(planner).is_ok_and(|hidden| hidden.is_none()) {
        return Ok(false);
    }
    let mut trial = Planner::new(planner.overlay.base(), planner.options)?;
    let is_start = header::start::mend(&mut trial).is_ok() && trial.actions.len() == 0;
    Ok(is_start && header::has_right_key_area(&mut trial)?)
}

/// Whether the active L1 table is what there is nothing to begin with.
fn is_no_l1(error: &PlanError) -> bool {
    let is_l1 = |finding: &Finding| finding.place.structure == Structure::ActiveL1;
    matches!(error, PlanError::Hopeless(finding) if is_l1(finding))
}

/// Whether notes of the check are of a kind that a repair puts right.
fn needs_header(before: &Report) -> bool {
    [Code::BitmapsUntrusted, Code::AutoclearBitmaps]
        .iter()
        .any(|code| before.total(*code) > 0)
}
