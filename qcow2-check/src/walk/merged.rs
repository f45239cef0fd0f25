//! Several tables for one place of the disk: the active one and those of snapshots, walked side by side.
//!
//! A cluster that two of them have at the same index is shared as it should be, and is counted once with the weight of all.

use qcow2_format::L2Entry;
use qcow2_format::l2::L2Table;

use super::entries::{HostRef, Sequence};
use super::{TableRef, Worker};

/// Bytes of tables held in memory at once.
const MERGE_BYTES: usize = 2 << 20;

/// One table's way through its entries.
#[derive(Clone, Debug, Default)]
struct Way {
    sequence: Sequence,
    /// Entries up to here go on as `first` says.
    end: usize,
    start: usize,
    /// The entry at `start`; the ones after it up to `end` follow it, or are empty as it is.
    first: L2Entry,
}

/// What one table refers to at the index at hand.
#[derive(Clone, Copy, Debug)]
struct Claim {
    target: HostRef,
    table: usize,
    copied: bool,
    entry: L2Entry,
}

impl Worker<'_, '_> {
    /// Walks the tables of a group side by side.
    pub(super) fn walk_merged(&mut self, group: &[TableRef]) {
        let size = self.image.geometry.cluster_len();
        let part = (MERGE_BYTES / group.len())
            .next_power_of_two()
            .clamp(512, size);
        let mut buffer = std::mem::take(&mut self.buffer);
        if buffer.len() < part * group.len() {
            buffer.resize(part * group.len(), 0);
        }
        let mut ways = vec![Way::default(); group.len()];
        let entry_size = if self.image.geometry.extended_l2() {
            16
        } else {
            8
        };
        for from in (0..size).step_by(part) {
            for (table, bytes) in group.iter().zip(buffer.chunks_exact_mut(part)) {
                let offset = table.offset.saturating_add(from as u64);
                if self.image.reader.is_known_zero(offset, part as u64) {
                    bytes.fill(0);
                } else if self.image.reader.read(bytes, offset).is_err() {
                    self.read_table_parts(table, from as u64, bytes);
                } else if group.len() > 64 && crate::reader::is_zero(bytes) {
                    self.image.reader.met_zero_table(offset);
                }
            }
            let tables: Vec<L2Table<'_>> = buffer
                .chunks_exact(part)
                .take(group.len())
                .map(|bytes| L2Table::new(bytes, self.image.geometry))
                .collect();
            self.merge_part(group, &tables, &mut ways, from / entry_size);
        }
        self.buffer = buffer;
    }

    fn merge_part(
        &mut self,
        group: &[TableRef],
        tables: &[L2Table<'_>],
        ways: &mut [Way],
        base: usize,
    ) {
        let step = self.image.cluster_size();
        let external = self.image.rules.external_data;
        let len = tables.first().map_or(0, |table| table.len());
        for way in ways.iter_mut() {
            (way.start, way.end) = (0, 0);
        }
        let mut claims: Vec<Claim> = Vec::with_capacity(group.len());
        let mut index = 0;
        while index < len {
            let mut end = len;
            for (table, way) in tables.iter().zip(ways.iter_mut()) {
                if way.end <= index {
                    way.start = index;
                    way.first = table.get(index).unwrap_or_default();
                    let run = if way.first.is_empty() {
                        table.empty_run(index)
                    } else if external {
                        0
                    } else {
                        table.sequential_run(index, step)
                    };
                    way.end = index + run.max(1);
                }
                end = end.min(way.end);
            }
            let count = end - index;
            claims.clear();
            for (number, ((table, at), way)) in
                tables.iter().zip(group).zip(ways.iter_mut()).enumerate()
            {
                if way.first.is_empty() {
                    continue;
                }
                let entry = table.get(index).unwrap_or_default();
                let copied = entry.is_copied();
                if count > 1 {
                    self.judge_run(at, base + index, entry, count, &mut way.sequence);
                    let offset = match entry.kind(self.image.rules) {
                        qcow2_format::ClusterKind::Normal(host) => host.get(),
                        _ => continue,
                    };
                    claims.push(Claim {
                        target: HostRef::Cluster(offset),
                        table: number,
                        copied,
                        entry,
                    });
                } else if let Some(target) =
                    self.judge(at, (base + index) as u64, entry, &mut way.sequence)
                {
                    claims.push(Claim {
                        target,
                        table: number,
                        copied,
                        entry,
                    });
                } else if at.active {
                    self.suspect_copied(entry, 1);
                }
            }
            self.settle(group, &mut claims, base + index, count);
            index = end;
        }
    }

    /// Counts the claims of all tables: equal ones together.
    fn settle(&mut self, group: &[TableRef], claims: &mut [Claim], index: usize, count: usize) {
        claims.sort_by_key(|claim| claim.target);
        for same in claims.chunk_by(|a, b| a.target == b.target) {
            let weight = same
                .iter()
                .filter_map(|claim| group.get(claim.table))
                .fold(0_u64, |sum, at| sum.saturating_add(at.weight));
            let Some((first, at)) = same.first().and_then(|c| Some((c, group.get(c.table)?)))
            else {
                continue;
            };
            match first.target {
                HostRef::Cluster(offset)
                    if count > 1 && offset % self.image.cluster_size() == 0 =>
                {
                    self.refer_run(at, index as u64, offset, count as u64, weight);
                }
                HostRef::Cluster(offset) => {
                    for step in 0..count as u64 {
                        let target = HostRef::Cluster(offset + (step << self.image.cluster_bits()));
                        self.refer(at, index as u64 + step, target, weight);
                    }
                }
                HostRef::Packed(..) => self.refer(at, index as u64, first.target, weight),
            }
            for claim in same {
                let active = group.get(claim.table).is_some_and(|at| at.active);
                if active {
                    self.suspect_copied(claim.entry, weight);
                } else if claim.copied && weight > 1 {
                    self.tally.stale_copied += count as u64;
                }
            }
        }
    }
}
