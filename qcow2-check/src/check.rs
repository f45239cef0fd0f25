//! The check from beginning to end.

use qcow2_io::Storage;

use crate::load::{self, Loaded};
use crate::references::{self, Counted};
use crate::walk;
use crate::{
    Code, Finding, Options, Phase, Place, Report, Run, Structure, compare, copied, owners,
};

/// Checks an image: is it consistent?
///
/// Never fails: what can't be read is a finding. Nothing is written, and nothing the image names is opened.
pub fn check(storage: &dyn Storage, options: &Options<'_>) -> Report {
    run_all(options, |run| report(storage, run, false))
}

/// The same, but of a snapshot table that goes beyond the limits, what does so is left out.
pub(crate) fn check_as_written(storage: &dyn Storage, options: &Options<'_>) -> Report {
    run_all(options, |run| {
        report(storage, run.reading_as_written(), false)
    })
}

/// Checks an image and looks for what is dangerous about it, too.
///
/// Nothing is written, and nothing the image names is opened.
pub fn audit(storage: &dyn Storage, options: &Options<'_>) -> Report {
    run_all(options, |run| report(storage, run, true))
}

fn run_all(options: &Options<'_>, work: impl FnOnce(Run<'_>) -> Report) -> Report {
    Run::start(options, work).unwrap_or_else(|| {
        let place = Place::of(Structure::File);
        let finding = Finding::new(Code::HeaderUnreadable, place, "no threads can be started");
        Report {
            findings: vec![finding],
            totals: vec![(Code::HeaderUnreadable, 1)],
            fatal: true,
            ..Report::default()
        }
    })
}

fn report(storage: &dyn Storage, run: Run<'_>, hazards: bool) -> Report {
    run.phase(Phase::Tables, 0);
    let loaded = load::load(storage, &run);
    let fatal = loaded.as_ref().is_none_or(|loaded| loaded.fatal);
    let mut complete = false;
    let mut bytes_read = 0;
    let mut decoded = run.is_deep().then_some(0);
    if let Some(loaded) = &loaded {
        complete = compared(loaded, &run, hazards, &mut decoded);
        complete &= !references::hidden_failure(&loaded.image, &run);
        bytes_read = loaded.image.reader.bytes_read();
    }
    let cancelled = run.is_cancelled();
    let (counts, found) = run.finish();
    let (findings, totals) = found.finish();
    Report {
        counts,
        findings,
        totals,
        fatal,
        cancelled,
        complete,
        bytes_read,
        decoded,
    }
}

/// Counts and compares references, and decodes what is compressed unless `decoded` is `None`. Tells whether nothing was met
/// that could hide references.
fn compared(loaded: &Loaded<'_>, run: &Run<'_>, hazards: bool, decoded: &mut Option<u64>) -> bool {
    let image = &loaded.image;
    let Some(counted) = references::count(loaded, run) else {
        return false;
    };
    let Counted {
        map, scan, blocks, ..
    } = &counted;
    run.phase(Phase::Refcounts, blocks.len() << image.cluster_bits());
    let compared = compare::compare(image, map, blocks, run);
    {
        let mut counts = run.counts();
        counts.check_errors = counts.check_errors.saturating_add(compared.errors);
        counts.corruptions = counts.corruptions.saturating_add(compared.corruptions);
        counts.leaks = compared.leaks;
        counts.image_end_offset = compared.end.max(1) << image.cluster_bits();
    }
    run.phase(Phase::Details, 0);
    if counted.are_flags_suspect() || !compared.is_equal() {
        let wrong = copied::check(image, map, scan, blocks, run);
        let mut counts = run.counts();
        counts.corruptions = counts.corruptions.saturating_add(wrong);
    }
    let mut harmless = true;
    if counted.conflicts && !run.is_cancelled() {
        harmless = owners::conflicts(loaded, map, scan, blocks, run);
    }
    if run.is_cancelled() {
        return false;
    }
    tallied_notes(&counted.tally, run);
    crate::audit::file_end(image, compared.end, run);
    crate::crypto::check(image, run);
    if hazards {
        crate::audit::hazards(loaded, scan, &counted.tally, run);
    }
    if let Some(decoded) = decoded {
        *decoded = crate::deep::check(image, scan, run);
    }
    counted.complete && harmless
}

fn tallied_notes(tally: &walk::Tally, run: &Run<'_>) {
    let note = |code, structure, count: u64, what: &str| {
        if count > 0 {
            let detail = format!("{count} {what}");
            run.find(Finding::new(code, Place::of(structure), detail).times(count));
        }
    };
    note(
        Code::CopiedStale,
        Structure::SnapshotL1,
        tally.stale_copied,
        "L2 entries",
    );
    note(
        Code::BeyondDisk,
        Structure::ActiveL1,
        tally.beyond_disk,
        "clusters",
    );
    note(
        Code::VmStateActive,
        Structure::ActiveL1,
        tally.vm_state,
        "clusters",
    );
}
