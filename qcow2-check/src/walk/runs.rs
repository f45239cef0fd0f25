//! Runs of L2 entries: the few patterns that nearly all entries of nearly all images are part of, each with a loop of its
//! own. What is not part of such a run goes through [`judge`](Worker::judge).

use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, L2Entry};

use super::entries::{HostRef, Sequence};
use super::{TableRef, Worker};

impl Worker<'_, '_> {
    /// Data clusters from `start` on with which nothing is wrong and that don't follow one another. Tells how many there are.
    #[inline]
    pub(super) fn scattered_run(
        &mut self,
        at: &TableRef,
        table: L2Table<'_>,
        start: usize,
        sequence: &mut Sequence,
    ) -> usize {
        let image = self.image;
        let len = image.file_len();
        let step = image.cluster_size();
        let bits = image.cluster_bits();
        if image.rules.external_data
            || image.geometry.extended_l2()
            || at.weight != 1
            || image.guest_offset(at.l1_index.saturating_add(1), 0) > image.header.virtual_size()
        {
            return 0;
        }
        let mut index = start;
        let mut next = sequence.next;
        let mut fragments = 0;
        let mut all_copied = true;
        while let Some(entry) = table.get(index) {
            let Some(host) = entry.plain_data() else {
                break;
            };
            let offset = host.get();
            if offset == next || offset & (step - 1) != 0 || offset >= len {
                break;
            }
            fragments += u64::from(next != 0);
            next = offset + step;
            all_copied &= entry.is_copied();
            self.map.add_later(offset >> bits);
            index += 1;
        }
        let count = (index - start) as u64;
        if count == 0 {
            return 0;
        }
        self.bound_memory();
        sequence.next = next;
        let counts = &mut self.tally.counts;
        counts.allocated_clusters += count * at.active_refs;
        counts.fragmented_clusters += fragments * at.active_refs;
        self.tally.copied_suspect |= at.active && !all_copied;
        index - start
    }

    /// Compressed entries from `start` on with which nothing is wrong. Tells how many there are.
    #[inline]
    pub(super) fn packed_run(&mut self, at: &TableRef, table: L2Table<'_>, start: usize) -> usize {
        let image = self.image;
        let bits = image.cluster_bits();
        let limit = image.file_len().saturating_add(image.cluster_size());
        let mut index = start;
        if image.rules.external_data || image.is_encrypted() {
            return 0;
        }
        let weight = at.weight;
        let (mut cluster, mut sum) = self.packed();
        while let Some(entry) = table.get(index) {
            let ClusterKind::Compressed(extent) = entry.kind(image.rules) else {
                break;
            };
            let offset = extent.offset.get();
            let end = offset.saturating_add(extent.len_bytes);
            if entry.is_copied()
                || entry.bitmap() != 0
                || offset >= qcow2_format::geometry::HOST_OFFSET_LIMIT
                || end >= limit
            {
                break;
            }
            let last = (end - 1) >> bits;
            let mut touched = offset >> bits;
            loop {
                if touched != cluster {
                    self.set_packed((cluster, sum));
                    (cluster, sum) = (touched, 0);
                }
                sum = sum.saturating_add(weight);
                if touched >= last {
                    break;
                }
                touched += 1;
            }
            index += 1;
        }
        self.keep_packed((cluster, sum));
        let count = (index - start) as u64 * at.active_refs;
        let counts = &mut self.tally.counts;
        counts.allocated_clusters += count;
        counts.compressed_clusters += count;
        counts.fragmented_clusters += count;
        index - start
    }

    /// `run` data clusters one behind the other, each with the flags and subclusters of the first.
    #[inline]
    pub(super) fn plain_run(
        &mut self,
        at: &TableRef,
        index: usize,
        entry: L2Entry,
        run: usize,
        weight: u64,
        sequence: &mut Sequence,
    ) {
        let count = run as u64;
        let ClusterKind::Normal(first) = entry.kind(self.image.rules) else {
            return;
        };
        if self.judge_run(at, index, entry, run, sequence) {
            self.refer_run(at, index as u64, first.get(), count, weight);
        } else {
            for (step, index) in (0..count).zip(index as u64..) {
                let target = HostRef::Cluster(first.get() + (step << self.image.cluster_bits()));
                self.refer(at, index, target, weight);
            }
        }
        if at.active {
            self.suspect_copied(entry, weight);
        } else if entry.is_copied() && weight > 1 {
            self.tally.stale_copied += count;
        }
    }

    /// Judges `run` entries that follow each other, without counting references. Tells whether their clusters are aligned.
    #[inline]
    pub(super) fn judge_run(
        &mut self,
        at: &TableRef,
        index: usize,
        entry: L2Entry,
        run: usize,
        sequence: &mut Sequence,
    ) -> bool {
        let image = self.image;
        let ClusterKind::Normal(offset) = entry.kind(image.rules) else {
            return false;
        };
        let aligned = image.geometry.is_cluster_aligned(offset);
        if aligned && entry.allocated_subclusters() & entry.zero_subclusters() == 0 {
            self.allocated(at, index as u64, offset.get(), run as u64, sequence);
            return true;
        }
        for (step, index) in (0..run as u64).zip(index as u64..) {
            let word = entry.word().saturating_add(step << image.cluster_bits());
            self.judge(
                at,
                index,
                L2Entry::from_bits(word, entry.bitmap()),
                sequence,
            );
        }
        aligned
    }
}
