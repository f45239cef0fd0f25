//! The next distinct pieces in the order of the file, however many there are and however often they are referred to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Piece;
use super::tables::{Tables, Visitor};
use crate::Run;
use crate::walk::TableRef;

/// Pieces that a thread keeps before it hands them over.
const KEPT: usize = 1 << 13;

/// Some of the image's pieces.
pub(super) struct Gathered {
    /// Ascending, each once.
    pub(super) pieces: Vec<Piece>,
    /// Whether there are others behind them.
    pub(super) more: bool,
}

/// Gives the `most` pieces that follow `after`, or all that there are if they are fewer.
pub(super) fn gather(
    tables: &Tables<'_, '_>,
    after: Option<Piece>,
    most: usize,
    run: &Run<'_>,
) -> Gathered {
    let nearest = Nearest {
        most,
        bound: AtomicU64::new(Piece::BEHIND_ALL),
        pieces: Mutex::default(),
    };
    let visitors = tables.visit(
        run,
        || Gatherer {
            nearest: &nearest,
            after,
            kept: Vec::new(),
        },
        |_, _| {},
    );
    for mut visitor in visitors {
        visitor.hand_over();
    }
    nearest.finish()
}

struct Gatherer<'a> {
    nearest: &'a Nearest,
    after: Option<Piece>,
    kept: Vec<Piece>,
}

impl Visitor for Gatherer<'_> {
    fn entry(&mut self, _group: &[TableRef], _table: usize, _index: u64, piece: Piece) {
        // A snapshot's entry often comes right behind an equal one.
        if Some(piece) <= self.after
            || self.kept.last() == Some(&piece)
            || piece.number() >= self.nearest.bound.load(Ordering::Relaxed)
        {
            return;
        }
        self.kept.push(piece);
        if self.kept.len() >= KEPT {
            self.hand_over();
        }
    }
}

impl Gatherer<'_> {
    fn hand_over(&mut self) {
        self.nearest.take_in(&mut self.kept);
    }
}

/// The pieces with the lowest numbers of all that were handed over.
struct Nearest {
    most: usize,
    /// Pieces from this number on are not wanted any more.
    bound: AtomicU64,
    /// At most twice as many as are wanted, and what one thread hands over.
    pieces: Mutex<Vec<Piece>>,
}

impl Nearest {
    fn take_in(&self, found: &mut Vec<Piece>) {
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.append(found);
        if pieces.len() >= self.most.saturating_mul(2) {
            self.cut(&mut pieces);
        }
    }

    fn cut(&self, pieces: &mut Vec<Piece>) {
        pieces.sort_unstable();
        pieces.dedup();
        if let Some(first_out) = pieces.get(self.most) {
            self.bound.fetch_min(first_out.number(), Ordering::Relaxed);
            pieces.truncate(self.most);
        }
    }

    fn finish(self) -> Gathered {
        let lock = self.pieces.lock();
        let mut pieces = std::mem::take(&mut *lock.unwrap_or_else(PoisonError::into_inner));
        self.cut(&mut pieces);
        Gathered {
            pieces,
            more: self.bound.into_inner() != Piece::BEHIND_ALL,
        }
    }
}
