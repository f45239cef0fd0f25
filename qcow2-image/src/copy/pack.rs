//! A piece of the disk between reading and storing.

use std::ops::Range;

use qcow2_format::GuestOffset;

use super::CopyError;
use super::changes::changes;
use super::plan::Job;
use super::run::{Run, slice};
use super::worker::zero;
use crate::ImageError;
use crate::buffer::Pages;
use crate::buffer::is_zero;

/// A piece of the disk, perhaps compressed, on its way to the target.
#[derive(Debug, Default)]
pub(super) struct Parcel {
    job: Job,
    /// The piece as it was read.
    input: Pages,
    /// All streams, one behind the other.
    output: Pages,
    /// What the target has, where only what differs is stored.
    old: Pages,
    clusters: Vec<Cluster>,
}

/// What is to become of a cluster, or of several.
#[derive(Clone, Debug)]
enum Cluster {
    /// A stream, by its place in the output.
    Packed {
        guest: u64,
        stream: Range<usize>,
    },
    /// As it is.
    Plain(Range<u64>),
    Zero(Range<u64>),
}

impl Parcel {
    pub(super) fn ticket(&self) -> u64 {
        self.job.ticket
    }

    pub(super) fn job(&self) -> &Job {
        &self.job
    }

    /// Reads, and compresses if that is wanted.
    pub(super) fn fill(&mut self, run: &Run<'_>, job: Job) -> Result<(), CopyError> {
        self.job = job;
        self.clusters.clear();
        let (place, base) = (&run.place, self.job.range.start);
        let end = self.job.range.end.next_multiple_of(place.unit);
        if self.job.data.is_empty() && place.granule.is_some() {
            self.clusters.push(Cluster::Zero(base..end));
            return Ok(());
        }
        self.input
            .grow(usize::try_from(place.chunk).unwrap_or(usize::MAX));
        let filled = run.read(&self.job, &mut self.input)?;
        let Some((image, level)) = place.packing() else {
            return self.fill_plain(run, filled);
        };
        self.output.grow(self.input.len());
        let mut used = 0;
        let mut at = base;
        for whole in filled {
            self.add_zeros(at..whole.start);
            at = whole.end;
            let changed = self.changed(run, whole.clone())?;
            let mut changed = changed.iter().peekable();
            for start in whole.step_by(usize::try_from(place.unit).unwrap_or(usize::MAX)) {
                if run.is_stopped() {
                    return Ok(());
                }
                let range = start..start + place.unit;
                while changed.next_if(|part| part.end <= start).is_some() {}
                if changed.peek().is_none_or(|part| part.start > start) {
                    continue;
                }
                let cluster = slice(&mut self.input, base, range.clone());
                if place.granule.is_some() && is_zero(cluster) {
                    self.add_zeros(range);
                    continue;
                }
                // No stream is longer than its cluster, so there is always room.
                let room = self.output.get_mut(used..).unwrap_or_default();
                let packed = image.codec().compress(level, cluster, room);
                let packed = packed.map_err(|source| {
                    let guest = GuestOffset::new(range.start);
                    let error = ImageError::Compress { guest, source };
                    CopyError::target_at(range.start, place.unit, error)
                })?;
                if let Some(len) = packed {
                    let stream = used..used + len;
                    used = stream.end;
                    let guest = range.start;
                    self.clusters.push(Cluster::Packed { guest, stream });
                } else {
                    self.add_plain(range);
                }
            }
        }
        self.add_zeros(at..end.max(at));
        Ok(())
    }

    /// The parts of what was read that may have to be stored.
    fn changed(&mut self, run: &Run<'_>, range: Range<u64>) -> Result<Vec<Range<u64>>, CopyError> {
        if !run.place.only_changes {
            return Ok(vec![range]);
        }
        let bytes = slice(&mut self.input, self.job.range.start, range.clone());
        changes(&run.place, bytes, range, &mut self.old)
    }

    /// Leaves out the zeros of what was read.
    fn fill_plain(&mut self, run: &Run<'_>, filled: Vec<Range<u64>>) -> Result<(), CopyError> {
        let (place, base) = (&run.place, self.job.range.start);
        let end = self.job.range.end.next_multiple_of(place.unit);
        let mut at = base;
        for whole in filled {
            let bytes = slice(&mut self.input, base, whole.clone());
            for stretch in place.stretches(bytes, whole) {
                self.add_zeros(at..stretch.start);
                at = stretch.end;
                for part in self.changed(run, stretch)? {
                    self.add_plain(part);
                }
            }
        }
        self.add_zeros(at..end.max(at));
        Ok(())
    }

    fn add_zeros(&mut self, range: Range<u64>) {
        match self.clusters.last_mut() {
            _ if range.is_empty() => {}
            Some(Cluster::Zero(last)) if last.end == range.start => last.end = range.end,
            _ => self.clusters.push(Cluster::Zero(range)),
        }
    }

    fn add_plain(&mut self, range: Range<u64>) {
        match self.clusters.last_mut() {
            Some(Cluster::Plain(last)) if last.end == range.start => last.end = range.end,
            _ => self.clusters.push(Cluster::Plain(range)),
        }
    }

    /// Stores everything, in the order of the disk.
    pub(super) fn store(&mut self, run: &Run<'_>) -> Result<(), CopyError> {
        let (place, base) = (&run.place, self.job.range.start);
        let (mut clusters, mut compressed, mut stored) = (0, 0, 0);
        for cluster in &self.clusters {
            match cluster {
                Cluster::Packed { guest, stream } => {
                    let bytes = self.output.get(stream.clone()).unwrap_or_default();
                    place.write_stream(bytes, *guest)?;
                    clusters += 1;
                    compressed += bytes.len() as u64;
                    stored += place.unit.min(place.len - guest);
                }
                Cluster::Plain(range) => {
                    let bytes = slice(&mut self.input, base, range.clone());
                    stored += place.write(bytes, range.start)?;
                }
                Cluster::Zero(range) => zero(place, range.clone(), &mut self.old)?,
            }
        }
        run.count(|report| {
            report.compressed_clusters += clusters;
            report.compressed_bytes += compressed;
            report.stored_bytes += stored;
        });
        Ok(())
    }
}
