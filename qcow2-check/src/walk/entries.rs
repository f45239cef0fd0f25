//! L2 entries: what each one refers to, and what is wrong with it.

use qcow2_format::l2::L2Table;
use qcow2_format::{ClusterKind, L2Entry};

use super::{TableRef, Worker};
use crate::image::{Image, uncounted};
use crate::refmap::Sharing;
use crate::{Code, Place, Structure};

/// What an entry refers to in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum HostRef {
    /// One cluster; not always aligned.
    Cluster(u64),
    /// Compressed data: offset and length.
    Packed(u64, u64),
}

/// Where the next cluster of a table would lie if it followed its predecessor.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sequence {
    pub(super) next: u64,
}

impl Image<'_> {
    /// Words for a reference past the end.
    pub(crate) fn past_end(&self, offset: u64) -> String {
        format!(
            "leads to {offset:#x}, the file ends at {:#x}",
            self.file_len()
        )
    }

    /// How many of `count` clusters from `offset` on, aligned, may be counted.
    #[inline]
    fn inside(&self, offset: u64, count: u64) -> u64 {
        let clusters = self
            .geometry
            .clusters_for(self.file_len().saturating_sub(offset));
        clusters.min(count)
    }
}

impl Worker<'_, '_> {
    /// Walks a table that has no company in its group. Tells how many of its entries are not empty.
    pub(super) fn walk_entries(&mut self, at: &TableRef, bytes: &[u8]) -> u64 {
        let image = self.image;
        let table = L2Table::new(bytes, image.geometry);
        let step = image.cluster_size();
        let mut sequence = Sequence::default();
        let mut index = 0;
        let mut met = 0;
        while index < table.len() {
            let run = if image.rules.external_data {
                0
            } else {
                table.sequential_run(index, step)
            };
            let scattered = if run == 1 {
                self.scattered_run(at, table, index, &mut sequence)
            } else {
                0
            };
            if scattered > 0 {
                index += scattered;
                met += scattered as u64;
                continue;
            }
            if run > 0
                && let Some(entry) = table.get(index)
            {
                self.plain_run(at, index, entry, run, at.weight, &mut sequence);
                index += run;
                met += run as u64;
                continue;
            }
            let packed = self.packed_run(at, table, index);
            if packed > 0 {
                index += packed;
                met += packed as u64;
                continue;
            }
            let empty = table.empty_run(index);
            index += empty;
            let Some(entry) = table.get(index) else { break };
            if empty > 0 {
                continue;
            }
            if let Some(target) = self.judge(at, index as u64, entry, &mut sequence) {
                self.refer(at, index as u64, target, at.weight);
            }
            if at.active {
                self.suspect_copied(entry, at.weight);
            } else if entry.is_copied() && at.weight > 1 {
                self.tally.stale_copied += 1;
            }
            index += 1;
            met += 1;
        }
        met
    }

    /// Counts references to `count` clusters from `offset` on.
    #[inline]
    pub(super) fn refer_run(
        &mut self,
        at: &TableRef,
        index: u64,
        offset: u64,
        count: u64,
        weight: u64,
    ) {
        let image = self.image;
        let inside = image.inside(offset, count);
        if inside == 1 {
            let cluster = offset >> image.cluster_bits();
            if weight == 1 {
                self.map.add_later(cluster);
            } else {
                self.map.add(cluster, weight, Sharing::Exclusive);
            }
            self.bound_memory();
        } else if inside > 0 {
            self.map
                .add_run(offset >> image.cluster_bits(), inside, weight);
            self.bound_memory();
        }
        if inside < count {
            let from = offset + (inside << image.cluster_bits());
            let lost = count - inside;
            let len = lost << image.cluster_bits();
            self.find(Code::ReferencePastEnd, lost.saturating_mul(weight), || {
                let place = Place::of(Structure::Data)
                    .at(from, len)
                    .guest(image.guest_offset(at.l1_index, index + inside), len)
                    .snapshot(if at.active { None } else { at.snapshot });
                (place, image.past_end(from))
            });
        }
    }

    /// Counts one reference.
    pub(super) fn refer(&mut self, at: &TableRef, index: u64, target: HostRef, weight: u64) {
        let image = self.image;
        let (counted, offset, len, structure) = match target {
            HostRef::Cluster(offset) => {
                let len = image.cluster_size();
                let counted = image.count(&mut self.map, offset, len, weight, Sharing::Exclusive);
                self.bound_memory();
                (counted, offset, len, Structure::Data)
            }
            HostRef::Packed(offset, len) => {
                let counted = if image.is_inside(offset, len) {
                    let first = offset >> image.cluster_bits();
                    let last = (offset + (len - 1)) >> image.cluster_bits();
                    for cluster in first..=last {
                        self.refer_packed(cluster, weight);
                    }
                    crate::image::Counted::Yes
                } else {
                    crate::image::Counted::PastEnd
                };
                (counted, offset, len, Structure::CompressedData)
            }
        };
        if let Some(code) = uncounted(counted) {
            self.find(code, weight, || {
                let place = Place::of(structure)
                    .at(offset, len)
                    .guest(image.guest_offset(at.l1_index, index), image.cluster_size())
                    .snapshot(if at.active { None } else { at.snapshot });
                (place, image.past_end(offset))
            });
        }
    }

    /// Compressed data comes in the order of the file mostly, many pieces to a cluster: sum up before the map is asked.
    #[inline]
    pub(super) fn refer_packed(&mut self, cluster: u64, weight: u64) {
        if self.packed.0 == cluster {
            self.packed.1 = self.packed.1.saturating_add(weight);
        } else {
            self.flush_packed();
            self.packed = (cluster, weight);
        }
    }

    /// References to one cluster that were summed up but not handed over: the cluster, and how many.
    #[inline]
    pub(super) fn packed(&self) -> (u64, u64) {
        self.packed
    }

    /// Sets what [`packed`](Self::packed) gives.
    #[inline]
    pub(super) fn keep_packed(&mut self, packed: (u64, u64)) {
        self.packed = packed;
    }

    /// Hands over references that were summed up.
    #[inline]
    pub(super) fn set_packed(&mut self, (cluster, weight): (u64, u64)) {
        if weight > 0 {
            self.map.add_packed(cluster, weight);
            self.bound_memory();
        }
    }

    /// Hands over what [`refer_packed`](Self::refer_packed) has summed up.
    pub(super) fn flush_packed(&mut self) {
        let packed = std::mem::take(&mut self.packed);
        self.set_packed(packed);
    }

    /// Statistics of allocated clusters in the active tree.
    #[inline]
    pub(super) fn allocated(
        &mut self,
        at: &TableRef,
        index: u64,
        offset: u64,
        count: u64,
        sequence: &mut Sequence,
    ) {
        if at.active_refs == 0 {
            return;
        }
        let counts = &mut self.tally.counts;
        counts.allocated_clusters += count * at.active_refs;
        if sequence.next != 0 && sequence.next != offset {
            counts.fragmented_clusters += at.active_refs;
        }
        sequence.next = offset.wrapping_add(count << self.image.cluster_bits());
        let start = self.image.guest_offset(at.l1_index, index);
        let end = start.saturating_add(count << self.image.cluster_bits());
        if end > self.image.header.virtual_size() {
            self.behind_disk(start, count);
        }
    }

    #[cold]
    fn behind_disk(&mut self, start: u64, count: u64) {
        let image = self.image;
        let disk = image.header.virtual_size_raw;
        let vm_state = image
            .geometry
            .l1_entries_for(disk)
            .saturating_mul(image.geometry.l2_coverage());
        for start in (start..)
            .step_by(image.geometry.cluster_len())
            .take(usize::try_from(count).unwrap_or(0))
        {
            if start >= vm_state {
                self.tally.vm_state += 1;
            } else if start >= disk {
                self.tally.beyond_disk += 1;
            }
        }
    }

    /// Remembers that a COPIED flag does not fit the references met in its group.
    #[inline]
    pub(super) fn suspect_copied(&mut self, entry: L2Entry, weight: u64) {
        let rules = self.image.rules;
        let weight = if rules.external_data { 1 } else { weight };
        if entry.is_copied() != (weight == 1) {
            self.tally.copied_suspect |= matches!(
                entry.kind(rules),
                ClusterKind::Normal(_) | ClusterKind::ZeroAllocated(_)
            );
        }
    }

    /// Judges one entry: tells what is wrong, counts statistics, and gives what it refers to.
    pub(super) fn judge(
        &mut self,
        at: &TableRef,
        index: u64,
        entry: L2Entry,
        sequence: &mut Sequence,
    ) -> Option<HostRef> {
        let image = self.image;
        let weight = at.weight;
        let place = || image.l2_place(at, index);
        if entry.reserved_bits() != 0 {
            self.find(Code::L2Reserved, weight, || {
                (
                    place(),
                    format!(
                        "entry {:#x} has the reserved bits {:#x}",
                        entry.word(),
                        entry.reserved_bits()
                    ),
                )
            });
        }
        if entry.misplaced_zero_flag(image.rules) {
            self.find(Code::L2ZeroFlag, weight, || {
                (place(), format!("entry {:#x} has bit 0 set", entry.word()))
            });
        }
        match entry.kind(image.rules) {
            ClusterKind::Unallocated => {
                if entry.allocated_subclusters() != 0 {
                    self.find(Code::SubclusterUnallocated, weight, || {
                        (
                            place(),
                            format!("no host cluster, subclusters {:#x}", entry.bitmap()),
                        )
                    });
                }
                None
            }
            ClusterKind::ZeroPlain => None,
            ClusterKind::Normal(host) | ClusterKind::ZeroAllocated(host) => {
                let offset = host.get();
                if entry.allocated_subclusters() & entry.zero_subclusters() != 0 {
                    self.find(Code::SubclusterConflict, weight, || {
                        (place(), format!("subclusters {:#x}", entry.bitmap()))
                    });
                }
                if !image.geometry.is_cluster_aligned(host) {
                    let holds_data = if image.geometry.extended_l2() {
                        entry.allocated_subclusters() != 0
                    } else {
                        !entry.has_zero_flag()
                    };
                    let code = if holds_data {
                        Code::L2Unaligned
                    } else {
                        Code::L2UnalignedZero
                    };
                    self.find(code, weight, || {
                        (place(), format!("the cluster would start at {host}"))
                    });
                }
                self.allocated(at, index, offset, 1, sequence);
                if image.rules.external_data {
                    let guest = image.guest_offset(at.l1_index, index);
                    if offset != guest {
                        self.find(Code::ExternalOffset, weight, || {
                            (
                                place(),
                                format!("host offset {host}, guest offset {guest:#x}"),
                            )
                        });
                    }
                    return None;
                }
                Some(HostRef::Cluster(offset))
            }
            ClusterKind::Compressed(extent) => {
                if entry.is_copied() {
                    self.find(Code::CompressedCopied, weight, || {
                        (
                            place(),
                            format!("entry {:#x} has the COPIED flag", entry.word()),
                        )
                    });
                }
                if image.rules.external_data {
                    self.find(Code::CompressedExternal, weight, || {
                        (place(), format!("compressed entry {:#x}", entry.word()))
                    });
                    return None;
                }
                if entry.bitmap() != 0 {
                    self.find(Code::CompressedSubclusters, weight, || {
                        (
                            place(),
                            format!("compressed, subclusters {:#x}", entry.bitmap()),
                        )
                    });
                    return None;
                }
                let offset = extent.offset.get();
                if offset >= qcow2_format::geometry::HOST_OFFSET_LIMIT {
                    self.find(Code::CompressedOffset, weight, || {
                        (place(), format!("compressed data at {offset:#x}"))
                    });
                }
                let counts = &mut self.tally.counts;
                counts.allocated_clusters += at.active_refs;
                counts.compressed_clusters += at.active_refs;
                counts.fragmented_clusters += at.active_refs;
                self.tally.clear_text += u64::from(image.is_encrypted());
                Some(HostRef::Packed(offset, extent.len_bytes))
            }
        }
    }
}
