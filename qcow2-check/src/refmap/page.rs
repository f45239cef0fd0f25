//! A page of the reference map: 512 clusters.

use super::Sharing;
use super::counts::Counts;

/// Clusters in a page: as many as a cache line has bits.
pub(crate) const PAGE_CLUSTERS: u64 = 512;
pub(super) const PAGE_WORDS: usize = 8;

pub(super) type Words = [u64; PAGE_WORDS];

/// What a page has besides its bits when clusters are referenced more than once, or shared by compressed data.
#[derive(Clone, Debug, Default)]
pub(crate) struct More {
    /// Clusters whose number of references stands in `counts`.
    multi: Words,
    /// Clusters that compressed data refers to, and nothing else, or where there is a conflict, one other owner.
    packed: Words,
    /// Clusters with owners that are not all of the kind that shares.
    pub(super) conflict: Words,
    counts: Counts,
}

#[expect(
    clippy::indexing_slicing,
    reason = "positions in a page are below 512, its words 8"
)]
impl More {
    /// Bytes of memory taken, about.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + 16 + self.counts.bytes()
    }

    /// Sets a count. Tells how many bytes of memory that took.
    #[inline]
    fn set(&mut self, at: usize, count: u64) -> usize {
        if self.counts.set_narrow(at, count) {
            self.multi[at / 64] |= 1 << (at % 64);
            return 0;
        }
        let before = self.counts.bytes();
        self.counts.set(at, count, &self.multi);
        self.multi[at / 64] |= 1 << (at % 64);
        self.counts.bytes().saturating_sub(before)
    }
}

/// A page to look at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page<'a> {
    /// Clusters with at least one reference.
    pub(super) seen: &'a Words,
    pub(super) more: Option<&'a More>,
}

#[expect(
    clippy::indexing_slicing,
    reason = "positions in a page are below 512, its words 8"
)]
impl Page<'_> {
    /// How many references the cluster at `at` has.
    #[inline]
    pub(crate) fn weight(&self, at: usize) -> u64 {
        weight(self.seen, self.more, at)
    }

    /// Of the 64 clusters of word `word`: which have references, and which have their number in the counts.
    #[inline]
    pub(crate) fn word(&self, word: usize) -> (u64, u64) {
        (
            self.seen[word],
            self.more.map_or(0, |more| more.multi[word]),
        )
    }

    /// Whether the cluster at `at` has one owner, and compressed data besides.
    pub(super) fn is_mixed(&self, at: usize) -> bool {
        self.more.is_some_and(|more| {
            (more.packed[at / 64] & more.conflict[at / 64]) >> (at % 64) & 1 != 0
        })
    }

    /// Whether there are clusters with more than one reference.
    pub(crate) fn is_shared(&self) -> bool {
        self.more.is_some_and(|more| more.multi != [0; PAGE_WORDS])
    }

    /// How many references every cluster of the page has, if it is 0 or 1 for all.
    #[inline]
    pub(crate) fn uniform(&self) -> Option<u64> {
        let all = self.seen.iter().fold(u64::MAX, |all, word| all & word);
        let any = self.seen.iter().fold(0, |any, word| any | word);
        match (any, all) {
            (0, _) => Some(0),
            (_, u64::MAX) if self.more.is_none_or(|more| more.multi == [0; PAGE_WORDS]) => Some(1),
            _ => None,
        }
    }
}

#[inline]
#[expect(
    clippy::indexing_slicing,
    reason = "positions in a page are below 512, its words 8"
)]
fn weight(seen: &Words, more: Option<&More>, at: usize) -> u64 {
    let bit = 1_u64 << (at % 64);
    if seen[at / 64] & bit == 0 {
        return 0;
    }
    match more {
        Some(more) if more.multi[at / 64] & bit != 0 => more.counts.get(at),
        _ => 1,
    }
}

/// A page to be changed.
pub(super) struct Slot<'a> {
    pub(super) seen: &'a mut Words,
    /// Empty, or with `places` places.
    pub(super) more: &'a mut Vec<Option<Box<More>>>,
    pub(super) places: usize,
    /// The page's place in `more`.
    pub(super) index: usize,
    pub(super) bytes: &'a mut usize,
    pub(super) conflicts: &'a mut bool,
}

#[expect(
    clippy::indexing_slicing,
    reason = "positions in a page are below 512, its words 8; the index is below the number of places"
)]
impl Slot<'_> {
    fn known(&self) -> Option<&More> {
        self.more.get(self.index).and_then(Option::as_deref)
    }

    fn place(&mut self) -> &mut Option<Box<More>> {
        if self.more.is_empty() {
            self.more.resize_with(self.places, || None);
            *self.bytes += self.places * size_of::<usize>();
        }
        &mut self.more[self.index]
    }

    fn more(&mut self) -> &mut More {
        if self.known().is_none() {
            *self.bytes += size_of::<More>() + 16;
        }
        self.place().get_or_insert_default()
    }

    /// Adds references to the cluster at `at`, in any case there is.
    pub(super) fn add(&mut self, at: usize, weight: u64, sharing: Sharing) {
        let bit = 1_u64 << (at % 64);
        let word = at / 64;
        let before = self::weight(self.seen, self.known(), at);
        self.seen[word] |= bit;
        if before == 0 && weight == 1 && sharing == Sharing::Exclusive {
            return;
        }
        let more = self.more();
        let mut clash = false;
        match sharing {
            Sharing::Packed if before == 0 => more.packed[word] |= bit,
            Sharing::Packed if more.packed[word] & bit != 0 => {}
            _ if before == 0 => {}
            _ => {
                // One owner and compressed data are told from several owners, once and for all.
                let one = match sharing {
                    Sharing::Packed => more.conflict[word] & bit == 0,
                    Sharing::Exclusive => more.packed[word] & !more.conflict[word] & bit != 0,
                };
                more.packed[word] = more.packed[word] & !bit | if one { bit } else { 0 };
                more.conflict[word] |= bit;
                clash = true;
            }
        }
        let sum = before.saturating_add(weight);
        let mut grown = 0;
        if sum > 1 {
            grown = more.set(at, sum);
        }
        *self.bytes += grown;
        *self.conflicts |= clash;
    }

    /// Adds references of compressed data to the cluster at `at`.
    #[inline]
    pub(super) fn add_packed(&mut self, at: usize, weight: u64) {
        let bit = 1_u64 << (at % 64);
        let word = at / 64;
        // In compressed images every page comes to this: counts in the narrow form, the cluster a new one.
        if self.seen[word] & bit == 0
            && let Some(Some(more)) = self.more.get_mut(self.index)
            && more.counts.set_narrow(at, weight)
        {
            self.seen[word] |= bit;
            more.packed[word] |= bit;
            more.multi[word] |= bit;
        } else {
            self.add(at, weight, Sharing::Packed);
        }
    }

    /// Adds references to the clusters at `from..to`, one exclusive owner each.
    pub(super) fn add_run(&mut self, from: usize, to: usize, weight: u64) {
        let words = from / 64..=(to - 1) / 64;
        let bits = |word: usize| super::run_mask(word as u64, from as u64, to as u64);
        if words.clone().any(|word| self.seen[word] & bits(word) != 0) {
            for at in from..to {
                self.add(at, weight, Sharing::Exclusive);
            }
            return;
        }
        for word in words.clone() {
            self.seen[word] |= bits(word);
        }
        if weight > 1 {
            let more = self.more();
            let before = more.counts.bytes();
            more.counts.set_run(from, to, weight, &more.multi);
            for word in words {
                more.multi[word] |= bits(word);
            }
            let grown = more.counts.bytes().saturating_sub(before);
            *self.bytes += grown;
        }
    }

    /// Takes the references of the same page of another map in.
    pub(super) fn merge(&mut self, seen: &Words, theirs: Option<Box<More>>) {
        let both = |mine: &Words| mine.iter().zip(seen).fold(0, |both, (a, b)| both | a & b);
        if self.known().is_none() && both(self.seen) == 0 {
            if let Some(theirs) = theirs {
                *self.bytes += theirs.bytes();
                *self.place() = Some(theirs);
            }
        } else if theirs.is_some() || both(self.seen) != 0 {
            self.merge_more(seen, theirs.as_deref());
        }
        for (mine, theirs) in self.seen.iter_mut().zip(seen) {
            *mine |= theirs;
        }
    }

    fn merge_more(&mut self, seen: &Words, theirs: Option<&More>) {
        let mine = *self.seen;
        let mut clashes = 0;
        let mut grown = 0;
        let more = self.more();
        for word in 0..PAGE_WORDS {
            let both = mine[word] & seen[word];
            // Where both have references, the sum is formed; else counts move over as they are.
            let mut counted = both | theirs.map_or(0, |theirs| theirs.multi[word]);
            while counted != 0 {
                let bit = counted & counted.wrapping_neg();
                counted &= counted - 1;
                let at = word * 64 + bit.trailing_zeros() as usize;
                let sum = weight(&mine, Some(more), at).saturating_add(weight(seen, theirs, at));
                grown += more.set(at, sum);
            }
            let packed = (
                more.packed[word],
                theirs.map_or(0, |theirs| theirs.packed[word]),
            );
            let conflict = (
                more.conflict[word],
                theirs.map_or(0, |theirs| theirs.conflict[word]),
            );
            // Each side has nothing but compressed data, or has an owner that is something else, or several.
            let only = (packed.0 & !conflict.0, packed.1 & !conflict.1);
            let clash = both & !(only.0 & only.1);
            let several =
                conflict.0 & !packed.0 | conflict.1 & !packed.1 | both & !only.0 & !only.1;
            more.conflict[word] = conflict.0 | conflict.1 | clash;
            more.packed[word] = (packed.0 | packed.1) & !several;
            clashes |= clash;
        }
        *self.bytes += grown;
        *self.conflicts |= clashes != 0;
    }
}
