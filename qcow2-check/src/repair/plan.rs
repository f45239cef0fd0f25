//! Making a plan: phase after phase on the picture of the image.

use std::sync::Arc;

use qcow2_format::geometry::HOST_OFFSET_LIMIT;
use qcow2_io::Storage;

use super::action::{Action, ActionKind, Actions};
use super::overlay::Overlay;
use super::undo::{self, UndoError};
use super::{Level, Orphans, Plan, PlanError, RepairOptions, SnapshotTables};
use super::{bits, header, orphans, refcounts, rounds, salvage};
use crate::check::check_as_written;
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
        let limit = self.options.max_growth;
        let limit = limit.unwrap_or_else(|| self.overlay.base_len().max(GROWTH_MIN));
        let too_large = |needed| PlanError::TooLarge { needed, limit };
        let start = self
            .end
            .max(self.overlay.new_len())
            .checked_next_multiple_of(cluster_size)
            .ok_or_else(|| too_large(u64::MAX))?;
        let end = clusters
            .checked_mul(cluster_size)
            .and_then(|len| start.checked_add(len))
            .ok_or_else(|| too_large(u64::MAX))?;
        let needed = end.saturating_sub(self.overlay.base_len());
        if needed > limit {
            return Err(too_large(needed));
        }
        if end > HOST_OFFSET_LIMIT {
            return Err(PlanError::Limit {
                what: "file",
                found: end,
                limit: HOST_OFFSET_LIMIT,
            });
        }
        self.end = end;
        Ok(start)
    }

    fn after(&self) -> Report {
        check(&*self.overlay, &self.check_options())
    }

    /// A look at the picture, its snapshot table read as the options say.
    pub(super) fn look<'r>(&self, run: Run<'r>) -> Run<'r> {
        match self.options.snapshot_tables {
            SnapshotTables::Searched => run,
            SnapshotTables::AsWritten => run.as_written(),
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
        let loaded = load::load(&*planner.overlay, &run.as_written())?;
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
    let mut after = None;
    if options.level == Level::Leaks {
        let is_whole = header::snapshots::hidden(&planner)?.is_none();
        if before.complete && before.verdict() != Verdict::Sound && is_whole {
            refcounts::lower(&mut planner)?;
        }
    } else if before.verdict() != Verdict::Sound || needs_header(&before) {
        if options.level == Level::Salvage {
            salvage::header(&mut planner)?;
        }
        header::start::mend(&mut planner)?;
        header::trial::mend(&mut planner, &before)?;
        bits::mark(&mut planner)?;
        header::mend(&mut planner)?;
        header::snapshots::mend(&mut planner)?;
        if options.level == Level::Salvage {
            salvage::snapshots(&mut planner)?;
            salvage::l1(&mut planner)?;
        }
        let mended = rounds::mend(&mut planner);
        if options.level == Level::Salvage && mended.as_ref().is_err_and(is_no_l1) {
            // What looked like an L1 table turned out to be none.
            salvage::another_l1(&mut planner)?;
            rounds::mend(&mut planner)?;
        } else {
            mended?;
        }
        if options.level == Level::Salvage && salvage::tables(&mut planner)? {
            rounds::mend(&mut planner)?;
        }
        if planner.hidden && options.orphans == Orphans::Snapshot {
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
    })
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
