//! Who has the pieces that don't decode?

use super::Piece;
use super::decode::{Failed, Why};
use super::tables::{Tables, Visitor};
use crate::image::Image;
use crate::report::Collector;
use crate::units::Ordered;
use crate::walk::TableRef;
use crate::{Code, Place, Run, Structure};

/// Tells of every guest cluster that has one of the pieces, which are in order.
pub(super) fn tell(tables: &Tables<'_, '_>, failed: &[Failed], run: &Run<'_>) {
    let ordered = Ordered::new(run);
    tables.visit(
        run,
        || Teller {
            image: tables.image,
            failed,
            met: Vec::new(),
            found: Collector::new(run.limit()),
        },
        |teller, unit| ordered.deliver(unit, &mut teller.found),
    );
}

/// An entry that leads to one of the pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Met {
    index: u64,
    /// Which of the pieces.
    failed: usize,
    /// Which table of the group.
    table: usize,
}

struct Teller<'a, 'i> {
    image: &'a Image<'i>,
    failed: &'a [Failed],
    /// Of the part of the tables at hand.
    met: Vec<Met>,
    found: Collector,
}

impl Visitor for Teller<'_, '_> {
    fn entry(&mut self, _group: &[TableRef], table: usize, index: u64, piece: Piece) {
        let found = self
            .failed
            .binary_search_by_key(&piece, |failed| failed.piece);
        if let Ok(failed) = found {
            self.met.push(Met {
                index,
                failed,
                table,
            });
        }
    }

    fn part_end(&mut self, group: &[TableRef]) {
        let mut met = std::mem::take(&mut self.met);
        met.sort_unstable();
        for same in met.chunk_by(|a, b| (a.index, a.failed) == (b.index, b.failed)) {
            self.cluster(group, same);
        }
        met.clear();
        self.met = met;
    }
}

impl Teller<'_, '_> {
    /// Tells of one guest cluster, which one or several trees have.
    fn cluster(&mut self, group: &[TableRef], met: &[Met]) {
        let image = self.image;
        let Some(first) = met.first() else { return };
        let Some(Failed { piece, why }) = self.failed.get(first.failed) else {
            return;
        };
        let code = match why {
            Why::Undecodable(_) => Code::CompressedUndecodable,
            Why::Unknown(_) => Code::CompressedUnchecked,
        };
        self.found.add_with(code, 1, || {
            let owners = met.iter().filter_map(|met| group.get(met.table));
            let mut shared = Shared::default();
            owners.for_each(|table| shared.add(table));
            let guest = image.guest_offset(shared.l1_index, first.index);
            let place = Place::of(Structure::CompressedData)
                .at(piece.offset(image), piece.len(image))
                .guest(guest, image.cluster_size())
                .snapshot(shared.named());
            let why = match why {
                Why::Undecodable(error) => error.to_string(),
                Why::Unknown(why) => (*why).to_owned(),
            };
            (place, why + &shared.words())
        });
    }
}

/// The trees that have a guest cluster.
#[derive(Debug, Default)]
struct Shared {
    l1_index: u64,
    active: u64,
    snapshots: u64,
    first_snapshot: Option<u64>,
}

impl Shared {
    fn add(&mut self, table: &TableRef) {
        self.l1_index = table.l1_index;
        self.active = self.active.saturating_add(table.active_refs);
        let snapshots = table.weight.saturating_sub(table.active_refs);
        self.snapshots = self.snapshots.saturating_add(snapshots);
        self.first_snapshot = match (self.first_snapshot, table.snapshot) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }

    /// The snapshot that gives the place its name.
    fn named(&self) -> Option<u64> {
        match self.active {
            0 => self.first_snapshot,
            _ => None,
        }
    }

    /// Words for the trees that the place does not name.
    fn words(&self) -> String {
        let others = match self.active {
            0 => self.snapshots.saturating_sub(1),
            _ => self.snapshots,
        };
        match (others, self.active) {
            (0, _) => String::new(),
            (1, 0) => "; 1 more snapshot has it".to_owned(),
            (n, 0) => format!("; {n} more snapshots have it"),
            (1, _) => "; 1 snapshot has it, too".to_owned(),
            (n, _) => format!("; {n} snapshots have it, too"),
        }
    }
}
