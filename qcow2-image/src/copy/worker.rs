//! Copying pieces, whoever is ready first.

use std::ops::Range;

use super::CopyError;
use super::changes::{self, changes};
use super::pack::Parcel;
use super::plan::Job;
use super::run::{Run, Watch, slice};
use super::target::Place;
use crate::buffer::Pages;

/// Works until nothing is left.
pub(super) fn work(run: &Run<'_>) {
    let _watch = Watch(run);
    let mut buffers = Buffers::default();
    let mut parcel = Parcel::default();
    while let Some(job) = run.next() {
        let done = if run.place.packing().is_some() {
            let filled = parcel.fill(run, job.clone());
            filled.and_then(|()| parcel.store(run))
        } else {
            copy(run, &job, &mut buffers)
        };
        match done {
            Ok(()) => run.note_done(&job),
            Err(error) => return run.fail(error),
        }
    }
}

/// What a thread reads into.
#[derive(Default)]
struct Buffers {
    source: Pages,
    /// What the target has.
    target: Pages,
}

fn copy(run: &Run<'_>, job: &Job, buffers: &mut Buffers) -> Result<(), CopyError> {
    let place = &run.place;
    let base = job.range.start;
    // Behind the last whole unit may be another, which the target has a part of.
    let end = job.range.end.next_multiple_of(place.unit);
    if job.data.is_empty() && place.granule.is_some() {
        return zero(place, base..end, &mut buffers.target);
    }
    let buffer = &mut buffers.source;
    buffer.grow(usize::try_from(place.chunk).unwrap_or(usize::MAX));
    let filled = run.read(job, buffer)?;
    let mut stored = 0;
    let mut at = base;
    for whole in filled {
        let bytes = slice(buffer, base, whole.clone());
        for stretch in place.stretches(bytes, whole) {
            zero(place, at..stretch.start, &mut buffers.target)?;
            at = stretch.end;
            let bytes = slice(buffer, base, stretch.clone());
            if !place.only_changes {
                stored += place.write(bytes, stretch.start)?;
                continue;
            }
            for part in changes(place, bytes, stretch, &mut buffers.target)? {
                let bytes = slice(buffer, base, part.clone());
                stored += place.write(bytes, part.start)?;
            }
        }
    }
    zero(place, at..end.max(at), &mut buffers.target)?;
    run.count(|report| report.stored_bytes += stored);
    Ok(())
}

/// Sees to it that a range of the target reads as zeros.
pub(super) fn zero(
    place: &Place<'_>,
    range: Range<u64>,
    room: &mut Pages,
) -> Result<(), CopyError> {
    if place.only_changes {
        changes::zero(place, range, room)
    } else {
        place.zero(range)
    }
}
