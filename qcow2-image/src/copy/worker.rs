//! Copying pieces as they are.

use super::CopyError;
use super::plan::Job;
use super::run::{Run, Watch, slice};
use super::zeros::stretches;

/// Works until nothing is left.
pub(super) fn work(run: &Run<'_>) {
    let _watch = Watch(run);
    let mut buffer = Vec::new();
    while let Some(job) = run.next() {
        match copy(run, &job, &mut buffer) {
            Ok(()) => run.note_done(job.len()),
            Err(error) => return run.fail(error),
        }
    }
}

fn copy(run: &Run<'_>, job: &Job, buffer: &mut Vec<u8>) -> Result<(), CopyError> {
    let place = &run.place;
    let base = job.range.start;
    // Behind the last whole unit may be another, which the target has a part of.
    let end = job.range.end.next_multiple_of(place.unit);
    if job.data.is_empty() && place.granule.is_some() {
        return place.zero(base..end);
    }
    if buffer.is_empty() {
        buffer.resize(usize::try_from(place.chunk).unwrap_or(usize::MAX), 0);
    }
    let filled = run.read(job, buffer)?;
    let mut stored = 0;
    let mut at = base;
    for whole in filled {
        let bytes = slice(buffer, base, whole.clone());
        let found = match place.granule {
            Some(granule) => stretches(bytes, whole.start, granule),
            None => vec![whole],
        };
        for stretch in found {
            place.zero(at..stretch.start)?;
            stored += place.write(slice(buffer, base, stretch.clone()), stretch.start)?;
            at = stretch.end;
        }
    }
    place.zero(at..end.max(at))?;
    run.count(|report| report.stored_bytes += stored);
    Ok(())
}
