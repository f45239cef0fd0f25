//! Refcounts, made anew of the references.
//!
//! The structures that hold them own nothing that could not be made again, so they give way to everything else: a block or table that
//! shares its place, lies past the end or can't be found is made anew at the end of the file. What is where it should be stays and
//! is corrected in place. [`RefcountRepair::Anew`] makes all of them anew where refcounts are missing.

mod flags;
mod pass;
mod table;

use std::sync::Arc;

use super::action::ActionKind;
use super::plan::Planner;
use super::{Orphans, PlanError, RefcountRepair, header};
use crate::blocks::Blocks;
use crate::refmap::RefMap;
use crate::{Code, Finding, Place, Run, Severity, Structure, load, references};

use flags::{Corrected, mend_flags};
use pass::{Changed, Direction, Pass, lacks};
use table::Table;

/// The finding that ended a phase.
pub(super) fn hopeless(run: Run<'_>) -> PlanError {
    if run.is_cancelled() {
        return PlanError::Cancelled;
    }
    let (findings, _) = run.finish().1.finish();
    let last = findings
        .into_iter()
        .rfind(|finding| finding.severity() == crate::Severity::Error);
    let unknown = || Finding::new(Code::CheckLimited, Place::of(Structure::File), "unknown");
    PlanError::Hopeless(Box::new(last.unwrap_or_else(unknown)))
}

/// What a failure to start threads is called.
pub(super) fn no_threads() -> PlanError {
    let place = Place::of(Structure::File);
    PlanError::Hopeless(Box::new(Finding::new(
        Code::HeaderUnreadable,
        place,
        "no threads can be started",
    )))
}

/// Lowers refcounts that are too high, and, if `flags`, sets the COPIED flags that follow from them; does nothing else. All references
/// must have been counted.
pub(super) fn lower(planner: &mut Planner<'_, '_>, flags: bool) -> Result<(), PlanError> {
    header::drop_void_bitmaps(planner)?;
    let options = planner.check_options();
    let layer = planner.overlay.layer();
    // A flag says that the refcount is 1 by now.
    let mirror = planner.overlay.layer();
    let overlay = Arc::clone(&planner.overlay);
    let overlay = &*overlay;
    let lowered = Run::start(&options, |run| {
        let counted = load::load(overlay, &run)
            .and_then(|loaded| Some((references::count(&loaded, &run)?, loaded)));
        let Some((counted, loaded)) = counted else {
            return Err(hopeless(run));
        };
        if !counted.complete {
            return Ok((Changed::default(), Corrected::default()));
        }
        let pass = Pass {
            overlay,
            image: &loaded.image,
            map: &counted.map,
            blocks: &counted.blocks,
            keep: None,
        };
        let changed = pass.run(layer, Direction::Lower, &run)?;
        let corrected = if flags && counted.are_flags_suspect() {
            mend_flags(planner, mirror, &loaded.image, &counted.map, &counted.scan)
        } else {
            Corrected::default()
        };
        Ok((changed, corrected))
    });
    let (changed, corrected) = lowered.unwrap_or_else(|| Err(no_threads()))?;
    changed.tell(planner, ActionKind::LowerRefcounts);
    corrected.tell(planner);
    Ok(())
}

/// Puts refcounts and COPIED flags right, and the structures that hold refcounts. Nothing else may be wrong by now.
pub(super) fn mend(planner: &mut Planner<'_, '_>) -> Result<(), PlanError> {
    let options = planner.check_options();
    Run::start(&options, |run| mend_with(planner, run)).unwrap_or_else(|| Err(no_threads()))
}

fn mend_with(planner: &mut Planner<'_, '_>, run: Run<'_>) -> Result<(), PlanError> {
    // The picture is read through the same overlay that is written to: structures that are read here are not written here.
    let raise = planner.overlay.layer();
    let switch = planner.overlay.layer();
    let flags = planner.overlay.layer();
    let lower = planner.overlay.layer();
    let overlay = Arc::clone(&planner.overlay);
    let Some(loaded) = load::load(&*overlay, &run) else {
        return Err(hopeless(run));
    };
    let image = &loaded.image;
    let Some(counted) = references::count_others(&loaded, &run) else {
        return Err(hopeless(run));
    };
    let (mut map, scan) = (counted.map, counted.scan);
    let shared = !scan.duplicates.is_empty() || map.conflicts().next().is_some();
    let suspect = counted.tally.copied_suspect || shared;
    let bits = image.cluster_bits();
    planner.keep_clear(map.end() << bits);

    let unread = image.reader.failure().cloned();
    let mut table = Table::read(image, &map);
    let mut released = table.claim(image, &mut map);
    planner.unreadable |= unread.is_some();
    if let (true, Some((offset, reason))) = (table.is_unreadable, &unread) {
        // Neither who has clusters nor which are in use is known.
        let place = Place::of(Structure::File).at(*offset, 0);
        let finding = Finding::new(Code::ReadFailed, place, reason.clone());
        return Err(PlanError::Hopeless(Box::new(finding)));
    }
    let known = image.reader.failure().is_some();
    let keep = planner.hidden && planner.options.orphans != Orphans::Free;
    let anew = planner.options.refcounts == RefcountRepair::Anew && !keep && !planner.unreadable;
    let old_end = overlay.base_len();
    let is_lacking = |table| lacks(image, &map, table, old_end);
    if anew
        && counts_all(&run, &map)
        && (planner.lacked || table.is_damaged() || is_lacking(&table))
    {
        table.renew(image);
    }
    table.complete(planner, image, &mut map, &mut released)?;
    table.leave_old(&mut map, &mut released);
    if planner.unreadable {
        table.keep_all(image, &mut map);
    }
    table.write(planner, image, (raise, switch))?;

    let blocks = Blocks::from(table.blocks());
    let pass = Pass {
        overlay: &overlay,
        image,
        map: &map,
        blocks: &blocks,
        keep: keep.then_some(&released),
    };
    let unreadable = planner.unreadable;
    let raised = pass.run(raise, Direction::Raise, &run)?;
    let corrected = if suspect {
        mend_flags(planner, flags, image, &map, &scan)
    } else {
        Corrected::default()
    };
    // A refcount that is too high may count what can't be read.
    let lowered = if unreadable {
        Changed::default()
    } else {
        pass.run(lower, Direction::Lower, &run)?
    };
    if run.is_cancelled() {
        return Err(PlanError::Cancelled);
    }
    if !known && let Some((offset, reason)) = image.reader.failure() {
        let place = Place::of(Structure::File).at(*offset, 0);
        let finding = Finding::new(Code::ReadFailed, place, reason.clone());
        return Err(PlanError::Hopeless(Box::new(finding)));
    }
    raised.tell(planner, ActionKind::RaiseRefcounts);
    corrected.tell(planner);
    lowered.tell(planner, ActionKind::LowerRefcounts);
    Ok(())
}

/// Whether nothing was met that could hide references: then what has none is free.
fn counts_all(run: &Run<'_>, map: &RefMap) -> bool {
    run.counts().corruptions == 0
        && run.total_of(Severity::Error) == 0
        && map.conflicts().next().is_none()
}
