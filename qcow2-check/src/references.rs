//! All references of an image, counted.

use crate::blocks::Blocks;
use crate::image::{Image, uncounted};
use crate::load::Loaded;
use crate::refmap::{RefMap, Sharing};
use crate::walk::{self, L1Scan, Tally};
use crate::{Code, Finding, Phase, Place, Run, Severity, Structure, bitmaps, blocks};

/// What there is to compare with once all references are counted.
pub(crate) struct Counted {
    pub(crate) map: RefMap,
    pub(crate) scan: L1Scan,
    pub(crate) tally: Tally,
    pub(crate) blocks: Blocks,
    /// There are clusters with several owners, or with one and compressed data besides.
    pub(crate) conflicts: bool,
    /// Nothing was met that could hide references; provided that it is guest data which compressed data shares a cluster with.
    pub(crate) complete: bool,
}

impl Counted {
    /// The cluster behind the last one that may have references.
    pub(crate) fn end(&self, image: &Image<'_>) -> u64 {
        self.map.end().max(image.file_clusters())
    }

    /// Whether active COPIED flags may not fit the number of references.
    pub(crate) fn are_flags_suspect(&self) -> bool {
        self.tally.copied_suspect || self.conflicts || !self.scan.duplicates.is_empty()
    }
}

/// References of everything but the refcount structures, or of all that is not behind the refcount table.
pub(crate) struct Others {
    pub(crate) map: RefMap,
    pub(crate) scan: L1Scan,
    pub(crate) tally: Tally,
}

/// Counts the references of everything but refcount table and refcount blocks: those can be made anew of the others.
/// `None` as in [`count`].
pub(crate) fn count_others(loaded: &Loaded<'_>, run: &Run<'_>) -> Option<Others> {
    count_trees(loaded, run, |structure| {
        structure != Structure::RefcountTable
    })
}

/// Counts all references. `None` where that would take absurd memory; then there is a finding that says so.
pub(crate) fn count(loaded: &Loaded<'_>, run: &Run<'_>) -> Option<Counted> {
    let image = &loaded.image;
    let Others {
        mut map,
        scan,
        tally,
    } = count_trees(loaded, run, |_| true)?;
    let blocks = blocks::load(image, &mut map, run);
    let conflicts = map.conflicts().next().is_some();
    let complete = map.conflicts().all(|cluster| map.is_mixed(cluster))
        && loaded.defects.iter().all(|defect| !defect.is_refused())
        && run.counts().corruptions == 0
        && run.total_of(Severity::Error) == 0
        && image.reader.failure().is_none()
        && run.total(Code::BitmapsInvalid) == 0;
    Some(Counted {
        map,
        scan,
        tally,
        blocks,
        conflicts,
        complete,
    })
}

/// Counts the references of metadata, as far as it is `wanted`, of bitmaps, and of all trees.
fn count_trees(
    loaded: &Loaded<'_>,
    run: &Run<'_>,
    wanted: impl Fn(Structure) -> bool,
) -> Option<Others> {
    let image = &loaded.image;
    let mut map = RefMap::new(image.file_clusters());
    count_metadata(image, &mut map, run, wanted);
    bitmaps::count(image, &loaded.bitmaps, &mut map, run);

    let scan = walk::scan(image, run);
    if scan.scattered || map.is_scattered() {
        limited(run);
        return None;
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
        limited(run);
        return None;
    }
    Some(Others { map, scan, tally })
}

/// Ends a count that would take absurd memory.
fn limited(run: &Run<'_>) {
    let place = Place::of(Structure::File);
    let detail = "references are scattered so widely, or repeated so often, that they can't be kept in memory";
    run.find(Finding::new(Code::CheckLimited, place, detail));
}

fn count_metadata(
    image: &Image<'_>,
    map: &mut RefMap,
    run: &Run<'_>,
    wanted: impl Fn(Structure) -> bool,
) {
    let ranges = image.metadata.iter();
    for range in ranges.filter(|range| wanted(range.structure)) {
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

/// Whether a read failed that no finding tells of. Now there is one.
pub(crate) fn hidden_failure(image: &Image<'_>, run: &Run<'_>) -> bool {
    let Some((offset, error)) = image.reader.failure() else {
        return false;
    };
    if run.total_of(Severity::Error) > 0 {
        return false;
    }
    let place = Place::of(Structure::File).at(*offset, 0);
    run.find(Finding::new(Code::ReadFailed, place, error.clone()));
    true
}
