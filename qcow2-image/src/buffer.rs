//! Buffers that are used again and again, for fresh memory costs more than what is done with it; and that begin where pages do, for some
//! processors copy pages of a file to other places at a fifth of the speed.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers that a thread keeps.
const KEPT: usize = 4;
/// The largest that is kept; bytes.
const KEPT_LEN: usize = 2 << 20;

/// Where buffers begin: multiples of this; bytes.
const PAGE: usize = 4096;

thread_local! {
    static SPARE: RefCell<Vec<Pages>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that begin where a page does.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Pages {
    pub(crate) const EMPTY: Self = Self {
        bytes: Vec::new(),
        start: 0,
        len: 0,
    };

    /// Makes them at least so many; then there is anything in them.
    pub(crate) fn grow(&mut self, len: usize) {
        if self.len < len {
            self.resize(len);
        }
    }

    /// Makes them so many; there may be anything in them.
    pub(crate) fn resize(&mut self, len: usize) {
        if self.bytes.len() < len.saturating_add(PAGE) {
            self.bytes = vec![0; len.saturating_add(PAGE)];
            let address = self.bytes.as_ptr().addr();
            self.start = address.next_multiple_of(PAGE) - address;
        }
        self.len = len;
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let end = self.start.saturating_add(self.len);
        self.bytes.get(self.start..end).unwrap_or_default()
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        let end = self.start.saturating_add(self.len);
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }
}

/// Some bytes, back with their thread when they are dropped.
pub(crate) struct Buffer {
    pages: Pages,
    len: usize,
}

impl Buffer {
    pub(crate) const EMPTY: Self = Self {
        pages: Pages::EMPTY,
        len: 0,
    };

    /// A buffer with anything in it: whoever asks fills it.
    pub(crate) fn unfilled(len: u64) -> Self {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        // A thread that is ending has none.
        let spare = SPARE.try_with(|spare| spare.borrow_mut().pop());
        let mut pages = spare.ok().flatten().unwrap_or_default();
        pages.grow(len);
        Self { pages, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.pages.get(..self.len).unwrap_or_default()
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.pages.get_mut(..self.len).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        if pages.is_empty() || pages.len() > KEPT_LEN {
            return;
        }
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < KEPT {
                spare.push(pages);
            }
        });
    }
}

/// Whether there is nothing but zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks
        .iter()
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_the_length_that_was_asked_for_and_is_used_again() {
        let mut first = Buffer::unfilled(100);
        first.fill(7);
        let at = first.as_ptr();
        drop(first);
        let second = Buffer::unfilled(60);
        assert_eq!(&*second, [7; 60]);
        assert_eq!(second.as_ptr(), at);
        let third = Buffer::unfilled(200);
        assert_eq!(third.len(), 200);
        assert_ne!(third.as_ptr(), at);
    }

    #[test]
    fn buffers_begin_where_pages_do() {
        let mut pages = Pages::default();
        for len in [1, 512, 5000, 4000, 300_000] {
            pages.grow(len);
            assert!(pages.len() >= len);
            assert!(pages.as_ptr().addr().is_multiple_of(PAGE));
            pages.fill(1);
        }
        assert!(Buffer::unfilled(100).as_ptr().addr().is_multiple_of(PAGE));
        assert!(Pages::EMPTY.is_empty());
    }

    #[test]
    fn large_ones_are_not_kept() {
        let len = KEPT_LEN as u64 + 1;
        drop(Buffer::unfilled(len));
        assert!(SPARE.with_borrow(|spare| spare.iter().all(|pages| pages.len() <= KEPT_LEN)));
        assert!(Buffer::EMPTY.is_empty());
    }
}
