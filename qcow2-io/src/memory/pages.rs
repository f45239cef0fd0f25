//! Pages by their number, found without a lock.
//!
//! Pages hang in trees of tables that come into being when they are needed and stay. A page's number decides by its size
//! which tree it belongs to, so small numbers are found in few steps:
//!
//! ```text
//!   number < 2^6     leaf
//!   number < 2^15    table - leaf
//!   number < 2^24    table - table - leaf
//!   ...
//! ```
//!
//! Only a leaf, at the end, has a lock, and that is in parts: who reads takes the one part that is its thread's, who writes all of
//! them. So threads that read write to no common cache line, though all of them want the same pages.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError};

use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard};

pub(super) const PAGE: u64 = 4096;
pub(super) const PAGE_BYTES: usize = 4096;

/// Pages of a leaf, as a power of two.
const LEAF_BITS: u32 = 6;
/// Bytes that a leaf covers.
const LEAF_BYTES: u64 = PAGE << LEAF_BITS;
/// Children of a table, as a power of two.
const TABLE_BITS: u32 = 9;

type Tree0 = Leaf;
type Tree1 = Table<Tree0>;
type Tree2 = Table<Tree1>;
type Tree3 = Table<Tree2>;
type Tree4 = Table<Tree3>;
type Tree5 = Table<Tree4>;

/// All pages of a storage.
#[derive(Default)]
pub(super) struct Pages {
    tree0: Child<Tree0>,
    tree1: Child<Tree1>,
    tree2: Child<Tree2>,
    tree3: Child<Tree3>,
    tree4: Child<Tree4>,
    tree5: Child<Tree5>,
    held: Held,
}

/// How many pages there are; apart from the trees, which all threads read.
#[derive(Default)]
#[repr(align(64))]
struct Held(AtomicU64);

// The last tree reaches as far as any storage.
const _: () = assert!(Tree5::BITS + PAGE.trailing_zeros() >= 63);

/// A page; none where it is a hole.
type Page = Option<Box<[u8; PAGE_BYTES]>>;
/// Those of a leaf.
type Neighbours = [Page; 1 << LEAF_BITS];

type Child<T> = OnceLock<Box<T>>;

/// Pages with a lock in common.
struct Leaf(ShardedLock<Neighbours>);

struct Table<T>([Child<T>; 1 << TABLE_BITS]);

/// A tree of some height. Numbers have all their bits on each level; a level looks at its own.
trait Tree: Default {
    /// How many numbers it covers, as a power of two.
    const BITS: u32;

    /// The leaf of a number.
    fn get(&self, number: u64) -> Option<&Leaf>;

    fn get_or_make(&self, number: u64) -> &Leaf;

    /// Shows the leaves that exist and have numbers of the range, in order, each with its first number; `first` is the lowest
    /// number covered.
    fn visit(
        &self,
        first: u64,
        range: &Range<u64>,
        each: &mut dyn FnMut(u64, &Leaf) -> ControlFlow<()>,
    ) -> ControlFlow<()>;
}

impl Pages {
    /// The leaf of a page, if there has been one in its neighbourhood.
    fn get(&self, number: u64) -> Option<&Leaf> {
        match height(number) {
            0 => self.tree0.get()?.get(number),
            1 => self.tree1.get()?.get(number),
            2 => self.tree2.get()?.get(number),
            3 => self.tree3.get()?.get(number),
            4 => self.tree4.get()?.get(number),
            _ => self.tree5.get()?.get(number),
        }
    }

    fn get_or_make(&self, number: u64) -> &Leaf {
        match height(number) {
            0 => grown(&self.tree0).get_or_make(number),
            1 => grown(&self.tree1).get_or_make(number),
            2 => grown(&self.tree2).get_or_make(number),
            3 => grown(&self.tree3).get_or_make(number),
            4 => grown(&self.tree4).get_or_make(number),
            _ => grown(&self.tree5).get_or_make(number),
        }
    }

    /// Each tree's lowest numbers live in the tree before, so the trees follow each other.
    fn visit(
        &self,
        range: &Range<u64>,
        each: &mut dyn FnMut(u64, &Leaf) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        visit_child(&self.tree0, 0, range, each)?;
        visit_child(&self.tree1, 0, range, each)?;
        visit_child(&self.tree2, 0, range, each)?;
        visit_child(&self.tree3, 0, range, each)?;
        visit_child(&self.tree4, 0, range, each)?;
        visit_child(&self.tree5, 0, range, each)
    }

    /// Shows the numbers of a range that have pages, in order, until one says stop.
    pub(super) fn visit_held(
        &self,
        range: &Range<u64>,
        mut each: impl FnMut(u64) -> ControlFlow<()>,
    ) {
        // Stopped or not, it is over.
        let _ = self.visit(range, &mut |first, leaf| {
            // A copy, so that nobody waits for what `each` does.
            let held: [bool; 1 << LEAF_BITS] = {
                let pages = leaf.read();
                std::array::from_fn(|place| pages.get(place).is_some_and(Option::is_some))
            };
            for (number, is_held) in (first..).zip(held) {
                if is_held && range.contains(&number) {
                    each(number)?;
                }
            }
            ControlFlow::Continue(())
        });
    }

    /// How many pages are held.
    pub(super) fn held(&self) -> u64 {
        self.held.0.load(Ordering::Relaxed)
    }

    /// Fills `out` with the bytes from `offset` on; zeros where there is no page.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        let mut position = offset;
        let mut rest = out;
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at_mut(left_in(LEAF_BYTES, position, rest.len()));
            match self.get(position / PAGE) {
                Some(leaf) => leaf.load(position, piece),
                None => piece.fill(0),
            }
            position = position.saturating_add(piece.len() as u64);
            rest = tail;
        }
    }

    /// Stores bytes from `offset` on, leaf by leaf, as long as `may` agrees that the bytes up to an offset be written. It is asked
    /// when nobody else can use them any more.
    pub(super) fn write(&self, offset: u64, bytes: &[u8], may: impl Fn(u64) -> bool) -> bool {
        let mut position = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at(left_in(LEAF_BYTES, position, rest.len()));
            let end = position.saturating_add(piece.len() as u64);
            let mut pages = self.get_or_make(position / PAGE).write();
            if !may(end) {
                return false;
            }
            let made = store(&mut pages, position, piece);
            drop(pages);
            if made > 0 {
                self.held.0.fetch_add(made, Ordering::Relaxed);
            }
            position = end;
            rest = tail;
        }
        true
    }

    /// Zeroes a range of bytes: whole pages go, the edges of others are overwritten.
    pub(super) fn clear(&self, range: &Range<u64>) {
        let numbers = range.start / PAGE..range.end.div_ceil(PAGE);
        // Nobody says stop.
        let _ = self.visit(&numbers, &mut |first, leaf| {
            let mut pages = leaf.write();
            let mut gone = 0;
            for (number, page) in (first..).zip(&mut *pages) {
                if !numbers.contains(&number) {
                    continue;
                }
                let start = number.saturating_mul(PAGE);
                let from = range.start.max(start).saturating_sub(start);
                let to = range.end.saturating_sub(start).min(PAGE);
                if from == 0 && to == PAGE {
                    gone += u64::from(page.take().is_some());
                } else if let Some(page) = page {
                    let edge = page.get_mut(within_page(from)..within_page(to));
                    edge.unwrap_or_default().fill(0);
                }
            }
            drop(pages);
            if gone > 0 {
                self.held.0.fetch_sub(gone, Ordering::Relaxed);
            }
            ControlFlow::Continue(())
        });
    }
}

impl Leaf {
    /// Copies bytes that all lie in this leaf.
    fn load(&self, offset: u64, out: &mut [u8]) {
        let pages = self.read();
        let mut position = offset;
        let mut rest = out;
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at_mut(left_in(PAGE, position, rest.len()));
            let start = within_page(position % PAGE);
            match pages.get(position_in(position / PAGE)) {
                Some(Some(page)) => piece.copy_from_slice(
                    page.get(start..start.saturating_add(piece.len()))
                        .expect("a piece lies within its page"),
                ),
                _ => piece.fill(0),
            }
            position = position.saturating_add(piece.len() as u64);
            rest = tail;
        }
    }

    // A panic can't leave a page half made, so poison says nothing here.
    fn read(&self) -> ShardedLockReadGuard<'_, Neighbours> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> ShardedLockWriteGuard<'_, Neighbours> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stores bytes that all lie in one leaf; how many pages came into being.
fn store(pages: &mut Neighbours, offset: u64, bytes: &[u8]) -> u64 {
    let mut made = 0;
    let mut position = offset;
    let mut rest = bytes;
    while !rest.is_empty() {
        let (piece, tail) = rest.split_at(left_in(PAGE, position, rest.len()));
        let start = within_page(position % PAGE);
        pages
            .get_mut(position_in(position / PAGE))
            .expect("a leaf has all its places")
            .get_or_insert_with(|| {
                made += 1;
                zeroed_page()
            })
            .get_mut(start..start.saturating_add(piece.len()))
            .expect("a piece lies within its page")
            .copy_from_slice(piece);
        position = position.saturating_add(piece.len() as u64);
        rest = tail;
    }
    made
}

impl Default for Leaf {
    fn default() -> Self {
        Self(ShardedLock::new(std::array::from_fn(|_| None)))
    }
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| OnceLock::new()))
    }
}

impl Tree for Leaf {
    const BITS: u32 = LEAF_BITS;

    fn get(&self, _: u64) -> Option<&Leaf> {
        Some(self)
    }

    fn get_or_make(&self, _: u64) -> &Leaf {
        self
    }

    fn visit(
        &self,
        first: u64,
        _: &Range<u64>,
        each: &mut dyn FnMut(u64, &Leaf) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        each(first, self)
    }
}

impl<T: Tree> Tree for Table<T> {
    const BITS: u32 = T::BITS + TABLE_BITS;

    fn get(&self, number: u64) -> Option<&Leaf> {
        let child = self.0.get(position(number, T::BITS, TABLE_BITS))?;
        child.get()?.get(number)
    }

    fn get_or_make(&self, number: u64) -> &Leaf {
        let child = self.0.get(position(number, T::BITS, TABLE_BITS));
        grown(child.expect("a table has all its children")).get_or_make(number)
    }

    fn visit(
        &self,
        first: u64,
        range: &Range<u64>,
        each: &mut dyn FnMut(u64, &Leaf) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let span = 1 << T::BITS;
        for (place, child) in (0..).zip(&self.0) {
            visit_child(child, first.saturating_add(span * place), range, each)?;
        }
        ControlFlow::Continue(())
    }
}

/// Which tree a number belongs to.
fn height(number: u64) -> u32 {
    let bits = u64::BITS - number.leading_zeros();
    bits.saturating_sub(LEAF_BITS).div_ceil(TABLE_BITS)
}

/// The part of a number that a level looks at.
fn position(number: u64, shift: u32, bits: u32) -> usize {
    usize::try_from((number >> shift) & ((1 << bits) - 1))
        .expect("a table is far smaller than memory")
}

/// The place of a page in its leaf.
fn position_in(number: u64) -> usize {
    position(number, 0, LEAF_BITS)
}

fn grown<T: Tree>(child: &Child<T>) -> &T {
    child.get_or_init(Box::default)
}

/// Shows what a tree has of the range, if there is one; its numbers begin at `first`.
fn visit_child<T: Tree>(
    tree: &Child<T>,
    first: u64,
    range: &Range<u64>,
    each: &mut dyn FnMut(u64, &Leaf) -> ControlFlow<()>,
) -> ControlFlow<()> {
    match tree.get() {
        Some(tree) if first < range.end && range.start < first.saturating_add(1 << T::BITS) => {
            tree.visit(first, range, each)
        }
        _ => ControlFlow::Continue(()),
    }
}

/// How many of the next `len` bytes at `offset` lie in the same piece, if pieces have `size` bytes.
fn left_in(size: u64, offset: u64, len: usize) -> usize {
    let left = size - offset % size;
    usize::try_from(left).map_or(len, |left| left.min(len))
}

/// A number of bytes within a page.
fn within_page(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(PAGE_BYTES)
}

fn zeroed_page() -> Box<[u8; PAGE_BYTES]> {
    Box::new([0; PAGE_BYTES])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers on both sides of each border between trees, and the last of all.
    fn borders() -> Vec<u64> {
        let mut numbers = vec![0];
        for bits in [6, 15, 24, 33, 42] {
            numbers.extend([(1 << bits) - 1, 1 << bits]);
        }
        numbers.push((1 << 51) - 1);
        numbers
    }

    #[test]
    fn pages_of_all_trees_are_found_in_order() {
        let pages = Pages::default();
        let numbers = borders();
        for (byte, number) in (1..).zip(&numbers) {
            assert!(pages.write(*number * PAGE + 7, &[byte; 3], |_| true));
        }
        for (byte, number) in (1..).zip(&numbers) {
            let mut found = [0xee; 5];
            pages.read(*number * PAGE + 6, &mut found);
            assert_eq!(found, [0, byte, byte, byte, 0]);
        }
        let held_in = |range: Range<u64>| {
            let mut held = Vec::new();
            pages.visit_held(&range, |number| {
                held.push(number);
                ControlFlow::Continue(())
            });
            held
        };
        assert_eq!(held_in(0..1 << 51), numbers);
        for pair in numbers.windows(2) {
            assert_eq!(held_in(pair[0]..pair[1]), pair[..1]);
            assert_eq!(held_in(pair[0]..pair[1] + 1), *pair);
        }
        assert_eq!(pages.held(), numbers.len() as u64);
    }

    #[test]
    fn a_visit_can_be_stopped_in_any_tree() {
        let pages = Pages::default();
        for number in borders() {
            pages.write(number * PAGE, &[1], |_| true);
        }
        for stop in borders() {
            let mut last = None;
            pages.visit_held(&(0..u64::MAX), |number| {
                last = Some(number);
                if number == stop {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
            assert_eq!(last, Some(stop));
        }
    }

    #[test]
    fn a_refused_write_changes_nothing() {
        let pages = Pages::default();
        assert!(!pages.write(3 * PAGE, &[1], |_| false));
        assert_eq!(pages.held(), 0);
        pages.visit_held(&(0..64), |number| panic!("{number} is held"));
    }

    #[test]
    fn a_write_over_leaves_asks_for_each_and_stops_where_it_may_not() {
        let pages = Pages::default();
        let asked = std::cell::RefCell::new(Vec::new());
        let may = |end| {
            asked.borrow_mut().push(end);
            end <= 2 * LEAF_BYTES
        };
        let bytes = vec![5; within(2 * LEAF_BYTES)];
        assert!(!pages.write(LEAF_BYTES - 10, &bytes, may));
        let ends = [LEAF_BYTES, 2 * LEAF_BYTES, 3 * LEAF_BYTES - 10];
        assert_eq!(*asked.borrow(), ends);
        assert_eq!(pages.held(), 1 + (1 << LEAF_BITS));
        let mut found = vec![1; within(2 * LEAF_BYTES + 20)];
        pages.read(LEAF_BYTES - 20, &mut found);
        let (before, rest) = found.split_at(10);
        let (stored, behind) = rest.split_at(within(LEAF_BYTES + 10));
        assert!(before.iter().chain(behind).all(|byte| *byte == 0));
        assert!(stored.iter().all(|byte| *byte == 5));
    }

    fn within(len: u64) -> usize {
        usize::try_from(len).unwrap()
    }

    #[test]
    fn clearing_drops_whole_pages_and_wipes_edges() {
        let pages = Pages::default();
        for number in 60..70 {
            pages.write(number * PAGE, &[9; PAGE_BYTES], |_| true);
        }
        pages.clear(&(61 * PAGE - 10..69 * PAGE + 10));
        assert_eq!(pages.held(), 2);
        let mut edge = [0; 20];
        pages.read(61 * PAGE - 20, &mut edge);
        assert_eq!(edge, [[9; 10], [0; 10]].concat()[..]);
        pages.read(69 * PAGE, &mut edge);
        assert_eq!(edge, [[0; 10], [9; 10]].concat()[..]);
    }
}
