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
//! Only the slot of a page, at the end, has a lock. Threads that use different pages write to no common cache line.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub(super) const PAGE: u64 = 4096;
pub(super) const PAGE_BYTES: usize = 4096;

/// Slots of a leaf, as a power of two.
const LEAF_BITS: u32 = 6;
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

/// How many slots hold a page; apart from the trees, which all threads read.
#[derive(Default)]
#[repr(align(64))]
struct Held(AtomicU64);

// The last tree reaches as far as any storage.
const _: () = assert!(Tree5::BITS + PAGE.trailing_zeros() >= 63);

/// The place of one page; empty where the page is a hole. A cache line of its own.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct Slot(RwLock<Option<Box<[u8; PAGE_BYTES]>>>);

type Child<T> = OnceLock<Box<T>>;

struct Leaf([Slot; 1 << LEAF_BITS]);

struct Table<T>([Child<T>; 1 << TABLE_BITS]);

/// A tree of some height. Numbers have all their bits on each level; a level looks at its own.
trait Tree: Default {
    /// How many numbers it covers, as a power of two.
    const BITS: u32;

    fn get(&self, number: u64) -> Option<&Slot>;

    fn get_or_make(&self, number: u64) -> &Slot;

    /// Shows the slots that exist, in order; `first` is the lowest number covered.
    fn visit(
        &self,
        first: u64,
        range: &Range<u64>,
        each: &mut dyn FnMut(u64, &Slot) -> ControlFlow<()>,
    ) -> ControlFlow<()>;
}

impl Pages {
    /// The slot of a page, if there has been one in its neighbourhood.
    pub(super) fn get(&self, number: u64) -> Option<&Slot> {
        match height(number) {
            0 => self.tree0.get()?.get(number),
            1 => self.tree1.get()?.get(number),
            2 => self.tree2.get()?.get(number),
            3 => self.tree3.get()?.get(number),
            4 => self.tree4.get()?.get(number),
            _ => self.tree5.get()?.get(number),
        }
    }

    fn get_or_make(&self, number: u64) -> &Slot {
        match height(number) {
            0 => grown(&self.tree0).get_or_make(number),
            1 => grown(&self.tree1).get_or_make(number),
            2 => grown(&self.tree2).get_or_make(number),
            3 => grown(&self.tree3).get_or_make(number),
            4 => grown(&self.tree4).get_or_make(number),
            _ => grown(&self.tree5).get_or_make(number),
        }
    }

    /// Shows the slots of a range of numbers as far as they exist, in order, until one says stop.
    pub(super) fn visit(
        &self,
        range: &Range<u64>,
        mut each: impl FnMut(u64, &Slot) -> ControlFlow<()>,
    ) {
        // Stopped or not, it is over.
        let _ = self.visit_trees(range, &mut each);
    }

    /// Each tree's lowest numbers live in the tree before, so the trees follow each other.
    fn visit_trees(
        &self,
        range: &Range<u64>,
        each: &mut dyn FnMut(u64, &Slot) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        in_tree(&self.tree0, range, each)?;
        in_tree(&self.tree1, range, each)?;
        in_tree(&self.tree2, range, each)?;
        in_tree(&self.tree3, range, each)?;
        in_tree(&self.tree4, range, each)?;
        in_tree(&self.tree5, range, each)
    }

    /// How many pages are held.
    pub(super) fn held(&self) -> u64 {
        self.held.0.load(Ordering::Relaxed)
    }

    /// Stores bytes within a page, unless `may` says no. It is asked when nobody else can use the page any more.
    pub(super) fn write(
        &self,
        number: u64,
        start: usize,
        bytes: &[u8],
        may: impl FnOnce() -> bool,
    ) -> bool {
        let mut page = self.get_or_make(number).write();
        if !may() {
            return false;
        }
        let page = page.get_or_insert_with(|| {
            self.held.0.fetch_add(1, Ordering::Relaxed);
            zeroed_page()
        });
        page.get_mut(start..start.saturating_add(bytes.len()))
            .expect("a piece lies within its page")
            .copy_from_slice(bytes);
        true
    }

    /// Zeroes a range of bytes: whole pages go, the edges of others are overwritten.
    pub(super) fn clear(&self, range: &Range<u64>) {
        let numbers = range.start / PAGE..range.end.div_ceil(PAGE);
        self.visit(&numbers, |number, slot| {
            let first = number.saturating_mul(PAGE);
            let from = range.start.max(first).saturating_sub(first);
            let to = range.end.saturating_sub(first).min(PAGE);
            let mut page = slot.write();
            if from == 0 && to == PAGE {
                if page.take().is_some() {
                    self.held.0.fetch_sub(1, Ordering::Relaxed);
                }
            } else if let Some(page) = &mut *page {
                let edge = page.get_mut(within_page(from)..within_page(to));
                edge.unwrap_or_default().fill(0);
            }
            ControlFlow::Continue(())
        });
    }
}

impl Slot {
    /// Copies bytes of the page; zeros where there is none.
    pub(super) fn read(&self, start: usize, out: &mut [u8]) {
        match &*self.lock() {
            None => out.fill(0),
            Some(page) => out.copy_from_slice(
                page.get(start..start.saturating_add(out.len()))
                    .expect("a piece lies within its page"),
            ),
        }
    }

    /// Whether there is a page.
    pub(super) fn is_held(&self) -> bool {
        self.lock().is_some()
    }

    // A panic can't leave a page half made, so poison says nothing here.
    fn lock(&self) -> RwLockReadGuard<'_, Option<Box<[u8; PAGE_BYTES]>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Option<Box<[u8; PAGE_BYTES]>>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Leaf {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Slot::default()))
    }
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| OnceLock::new()))
    }
}

impl Tree for Leaf {
    const BITS: u32 = LEAF_BITS;

    fn get(&self, number: u64) -> Option<&Slot> {
        self.0.get(position(number, 0, LEAF_BITS))
    }

    fn get_or_make(&self, number: u64) -> &Slot {
        self.get(number).expect("a leaf has all its slots")
    }

    fn visit(
        &self,
        first: u64,
        range: &Range<u64>,
        each: &mut dyn FnMut(u64, &Slot) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        for (number, slot) in (first..).zip(&self.0) {
            if range.contains(&number) {
                each(number, slot)?;
            }
        }
        ControlFlow::Continue(())
    }
}

impl<T: Tree> Tree for Table<T> {
    const BITS: u32 = T::BITS + TABLE_BITS;

    fn get(&self, number: u64) -> Option<&Slot> {
        let child = self.0.get(position(number, T::BITS, TABLE_BITS))?;
        child.get()?.get(number)
    }

    fn get_or_make(&self, number: u64) -> &Slot {
        let child = self.0.get(position(number, T::BITS, TABLE_BITS));
        grown(child.expect("a table has all its children")).get_or_make(number)
    }

    fn visit(
        &self,
        first: u64,
        range: &Range<u64>,
        each: &mut dyn FnMut(u64, &Slot) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let span = 1 << T::BITS;
        for (place, child) in (0..).zip(&self.0) {
            let first = first.saturating_add(span * place);
            if let Some(child) = child.get()
                && first < range.end
                && range.start < first.saturating_add(span)
            {
                child.visit(first, range, each)?;
            }
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

fn grown<T: Tree>(child: &Child<T>) -> &T {
    child.get_or_init(Box::default)
}

fn in_tree<T: Tree>(
    tree: &Child<T>,
    range: &Range<u64>,
    each: &mut dyn FnMut(u64, &Slot) -> ControlFlow<()>,
) -> ControlFlow<()> {
    match tree.get() {
        Some(tree) => tree.visit(0, range, each),
        None => ControlFlow::Continue(()),
    }
}

/// A number of bytes within a page.
pub(super) fn within_page(offset: u64) -> usize {
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
            assert!(pages.write(*number, 7, &[byte; 3], || true));
        }
        for (byte, number) in (1..).zip(&numbers) {
            let mut found = [0xee; 5];
            pages.get(*number).unwrap().read(6, &mut found);
            assert_eq!(found, [0, byte, byte, byte, 0]);
        }
        let held_in = |range: Range<u64>| {
            let mut held = Vec::new();
            pages.visit(&range, |number, slot| {
                if slot.is_held() {
                    held.push(number);
                }
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
            pages.write(number, 0, &[1], || true);
        }
        for stop in borders() {
            let mut last = None;
            pages.visit(&(0..u64::MAX), |number, _| {
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
        assert!(!pages.write(3, 0, &[1], || false));
        assert_eq!(pages.held(), 0);
        assert!(!pages.get(3).unwrap().is_held());
    }

    #[test]
    fn clearing_drops_whole_pages_and_wipes_edges() {
        let pages = Pages::default();
        for number in 60..70 {
            pages.write(number, 0, &[9; PAGE_BYTES], || true);
        }
        pages.clear(&(61 * PAGE - 10..69 * PAGE + 10));
        assert_eq!(pages.held(), 2);
        let mut edge = [0; 20];
        pages.get(60).unwrap().read(PAGE_BYTES - 20, &mut edge);
        assert_eq!(edge, [[9; 10], [0; 10]].concat()[..]);
        pages.get(69).unwrap().read(0, &mut edge);
        assert_eq!(edge, [[0; 10], [9; 10]].concat()[..]);
    }
}
