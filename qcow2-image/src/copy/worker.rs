//! Copying pieces, whoever is ready first.

use std::ops::Range;

use super::CopyError;
use super::pack::Parcel;
use super::plan::Job;
use super::run::{Run, Watch, slice};

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
    source: Vec<u8>,
    /// What the target has.
    target: Vec<u8>,
}

fn copy(run: &Run<'_>, job: &Job, buffers: &mut Buffers) -> Result<(), CopyError> {
    let place = &run.place;
    let base = job.range.start;
    // Behind the last whole unit may be another, which the target has a part of.
    let end = job.range.end.next_multiple_of(place.unit);
    if job.data.is_empty() && place.granule.is_some() {
        return place.zero(base..end);
    }
    let buffer = &mut buffers.source;
    if buffer.is_empty() {
        buffer.resize(usize::try_from(place.chunk).unwrap_or(usize::MAX), 0);
    }
    let filled = run.read(job, buffer)?;
    let mut stored = 0;
    let mut at = base;
    for whole in filled {
        let bytes = slice(buffer, base, whole.clone());
        for stretch in place.stretches(bytes, whole) {
            place.zero(at..stretch.start)?;
            at = stretch.end;
            let bytes = slice(buffer, base, stretch.clone());
            stored += if place.only_changes {
                store_changes(run, bytes, stretch, &mut buffers.target)?
            } else {
                place.write(bytes, stretch.start)?
            };
        }
    }
    place.zero(at..end.max(at))?;
    run.count(|report| report.stored_bytes += stored);
    Ok(())
}

/// Stores what differs from what the target has, in pieces of a granule; tells how much.
fn store_changes(
    run: &Run<'_>,
    bytes: &[u8],
    range: Range<u64>,
    target: &mut Vec<u8>,
) -> Result<u64, CopyError> {
    let place = &run.place;
    target.resize(bytes.len(), 0);
    place.read(target, range.start)?;
    let granule = usize::try_from(place.granule.unwrap_or(place.unit).max(4096)).unwrap_or(4096);
    let mut stored = 0;
    let (mut from, mut at) = (None, 0);
    let store = |from: usize, to: usize| {
        let part = bytes.get(from..to).unwrap_or_default();
        place.write(part, range.start + from as u64)
    };
    for (new, old) in bytes.chunks(granule).zip(target.chunks(granule)) {
        match (new == old, from) {
            (false, None) => from = Some(at),
            (true, Some(start)) => {
                stored += store(start, at)?;
                from = None;
            }
            _ => {}
        }
        at += new.len();
    }
    if let Some(start) = from {
        stored += store(start, at)?;
    }
    Ok(stored)
}
