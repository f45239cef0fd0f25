//! The check from beginning to end.

use qcow2_io::Storage;

use crate::image::{Image, uncounted};
use crate::load::{self, Loaded};
use crate::refmap::{RefMap, Sharing};
use crate::walk;
use crate::{
    Code, Finding, Options, Phase, Place, Report, Run, Severity, Structure, bitmaps, blocks,
    compare, copied, owners,
};

/// Checks an image: is it consistent?
///
/// Never fails: what can't be read is a finding. Nothing is written, and nothing the image names is opened.
pub fn check(storage: &dyn Storage, options: &Options<'_>) -> Report {
    run_all(storage, options, false)
}

/// Checks an image and looks for what is dangerous about it, too.
///
/// Nothing is written, and nothing the image names is opened.
pub fn audit(storage: &dyn Storage, options: &Options<'_>) -> Report {
    run_all(storage, options, true)
}

fn run_all(storage: &dyn Storage, options: &Options<'_>, hazards: bool) -> Report {
    Run::start(options, |run| report(storage, run, hazards)).unwrap_or_else(|| {
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
    if let Some(loaded) = &loaded {
        complete = references(loaded, &run, hazards);
        if let Some((offset, error)) = loaded.image.reader.failure()
            && run.total_of(Severity::Error) == 0
        {
            let place = Place::of(Structure::File).at(*offset, 0);
            run.find(Finding::new(Code::ReadFailed, place, error.clone()));
            complete = false;
        }
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
    }
}

/// Counts and compares references. Tells whether nothing was met that could hide some.
fn references(loaded: &Loaded<'_>, run: &Run<'_>, hazards: bool) -> bool {
    let image = &loaded.image;
    let mut map = RefMap::new(image.file_clusters());
    count_metadata(image, &mut map, run);
    bitmaps::count(image, &loaded.bitmaps, &mut map, run);

    let scan = walk::scan(image, run);
    if scan.scattered || map.is_scattered() {
        return limited(run);
    }
    run.phase(Phase::References, scan.l1_entries << image.cluster_bits());
    let walked = walk::walk(image, &scan, run);
    map.merge(walked.map);
    let tally = walked.tally;
    {
        let mut counts = run.counts();
        counts.check_errors = counts
            .check_errors
            .saturating_add(tally.counts.check_errors);
        counts.corruptions = counts.corruptions.saturating_add(tally.counts.corruptions);
        counts.allocated_clusters = tally.counts.allocated_clusters;
        counts.compressed_clusters = tally.counts.compressed_clusters;
        counts.fragmented_clusters = tally.counts.fragmented_clusters;
        counts.total_clusters = image.geometry.clusters_for(image.header.virtual_size());
    }
    if walked.scattered {
        return limited(run);
    }
    let blocks = blocks::load(image, &mut map, run);
    let conflicts = map.conflicts().next().is_some();
    let complete = !conflicts
        && loaded.defects.iter().all(|defect| !defect.is_refused())
        && run.counts().corruptions == 0
        && run.total_of(Severity::Error) == 0
        && image.reader.failure().is_none()
        && run.total(Code::BitmapsInvalid) == 0;

    run.phase(Phase::Refcounts, blocks.len() << image.cluster_bits());
    let compared = compare::compare(image, &map, &blocks, run);
    {
        let mut counts = run.counts();
        counts.check_errors = counts.check_errors.saturating_add(compared.errors);
        counts.corruptions = counts.corruptions.saturating_add(compared.corruptions);
        counts.leaks = compared.leaks;
        counts.image_end_offset = compared.end.max(1) << image.cluster_bits();
    }
    run.phase(Phase::Details, 0);
    if tally.copied_suspect || conflicts || !scan.duplicates.is_empty() || !compared.is_equal() {
        let wrong = copied::check(image, &map, &scan, &blocks, run);
        let mut counts = run.counts();
        counts.corruptions = counts.corruptions.saturating_add(wrong);
    }
    if conflicts && !run.is_cancelled() {
        owners::conflicts(loaded, &map, &scan, &blocks, run);
    }
    if run.is_cancelled() {
        return false;
    }
    tallied_notes(image, &tally, run);
    crate::audit::file_end(image, compared.end, run);
    crate::crypto::check(image, run);
    if hazards {
        crate::audit::hazards(loaded, &scan, &tally, run);
    }
    complete
}

/// Ends a check that would take absurd memory.
fn limited(run: &Run<'_>) -> bool {
    let place = Place::of(Structure::File);
    let detail = "references are scattered so widely, or repeated so often, that they can't be kept in memory";
    run.find(Finding::new(Code::CheckLimited, place, detail));
    false
}

fn count_metadata(image: &Image<'_>, map: &mut RefMap, run: &Run<'_>) {
    for range in &image.metadata {
        let counted = image.count(
            map,
            range.offset,
            range.len,
            range.weight,
            Sharing::Exclusive,
        );
        if let Some(code) = uncounted(counted) {
            let detail = image.past_end(range.offset.saturating_add(range.len));
            run.find(Finding::new(code, range.place(), detail).times(range.weight));
        }
    }
}

fn tallied_notes(image: &Image<'_>, tally: &walk::Tally, run: &Run<'_>) {
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
    _ = image;
}
