//! Going over the compressed entries of all tables.

use qcow2_format::ClusterKind;
use qcow2_format::l2::L2Table;

use super::Piece;
use crate::Run;
use crate::image::Image;
use crate::walk::{L1Scan, Plan, TableRef, Window};

/// Bytes of tables looked at together.
const PART_BYTES: usize = 2 << 20;
/// Tables of several places that make a unit of work.
const DUPLICATES_PER_UNIT: usize = 64;

/// All L2 tables, divided into units of work. Each distinct table belongs to one.
pub(super) struct Tables<'a, 'i> {
    pub(super) image: &'a Image<'i>,
    scan: &'a L1Scan,
    plan: Plan,
}

/// Is shown compressed entries.
pub(super) trait Visitor {
    /// An entry of table number `table` of `group`, all of which map the same place of the disk.
    fn entry(&mut self, group: &[TableRef], table: usize, index: u64, piece: Piece);

    /// All tables of the group have been shown up to the same index.
    fn part_end(&mut self, group: &[TableRef]) {
        _ = group;
    }
}

/// What a thread needs to go over tables.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    window: Window,
    group: Vec<TableRef>,
    buffer: Vec<u8>,
}

impl<'a, 'i> Tables<'a, 'i> {
    pub(super) fn new(image: &'a Image<'i>, scan: &'a L1Scan) -> Self {
        Self {
            image,
            scan,
            plan: Window::plan(image),
        }
    }

    fn units(&self) -> u64 {
        let duplicates = self.scan.duplicates.len().div_ceil(DUPLICATES_PER_UNIT);
        self.scan.windows.len() as u64 + duplicates as u64
    }

    /// Shows every compressed entry to a visitor, each thread with one of its own that `make` makes; `unit_end` is called with
    /// the visitor and the number of the unit behind each unit. Gives the visitors back.
    pub(super) fn visit<V: Visitor + Send>(
        &self,
        run: &Run<'_>,
        make: impl Fn() -> V + Sync,
        unit_end: impl Fn(&mut V, u64) + Sync,
    ) -> Vec<V> {
        let workers = run.share_out(
            self.units(),
            || (make(), Scratch::default()),
            |(visitor, scratch), unit| {
                self.unit(unit, scratch, visitor);
                unit_end(visitor, unit);
                run.progress(self.image.reader.bytes_read());
            },
        );
        workers.into_iter().map(|(visitor, _)| visitor).collect()
    }

    fn unit(&self, unit: u64, scratch: &mut Scratch, visitor: &mut impl Visitor) {
        let Some(number) = self.scan.window(unit) else {
            let unit = unit.saturating_sub(self.scan.windows.len() as u64);
            let first = usize::try_from(unit).unwrap_or(0) * DUPLICATES_PER_UNIT;
            let tables = self.scan.duplicates.iter();
            for table in tables.skip(first).take(DUPLICATES_PER_UNIT) {
                self.group(std::slice::from_ref(table), &mut scratch.buffer, visitor);
            }
            return;
        };
        let Scratch {
            window,
            group,
            buffer,
        } = scratch;
        window.load(self.image, &self.plan, number, |_, _, _| {});
        for index in window.indices() {
            window.group(self.image, index, group);
            group.retain(|table| !self.scan.is_duplicate(table.offset));
            if !group.is_empty() {
                self.group(group, buffer, visitor);
            }
        }
    }

    /// Shows the entries of tables that map the same place, part by part. What can't be read was told by the walk before.
    fn group(&self, group: &[TableRef], buffer: &mut Vec<u8>, visitor: &mut impl Visitor) {
        let image = self.image;
        let size = image.geometry.cluster_len();
        let part = (PART_BYTES / group.len().max(1))
            .next_power_of_two()
            .clamp(512, size);
        let entry_size = if image.geometry.extended_l2() { 16 } else { 8 };
        buffer.resize(part, 0);
        for from in (0..size).step_by(part) {
            for (number, table) in group.iter().enumerate() {
                let offset = table.offset.saturating_add(from as u64);
                if image.reader.is_known_zero(offset, part as u64)
                    || image.reader.read(buffer, offset).is_err()
                {
                    continue;
                }
                let first = (from / entry_size) as u64;
                let entries = L2Table::new(buffer, image.geometry);
                for (index, entry) in (first..).zip(entries.iter()) {
                    let ClusterKind::Compressed(extent) = entry.kind(image.rules) else {
                        continue;
                    };
                    let offset = extent.offset.get();
                    // What starts behind the end is not there. The walk told that unless it reads as zeros by the rules.
                    if offset < image.file_len() || image.is_inside(offset, extent.len_bytes) {
                        visitor.entry(group, number, index, Piece::new(image, extent));
                    }
                }
            }
            visitor.part_end(group);
        }
    }
}
