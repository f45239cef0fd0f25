//! Buffers that a thread uses again and again: fresh memory costs more than what is done with it.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers that a thread keeps.
const KEPT: usize = 4;
/// The largest that is kept; bytes.
const KEPT_LEN: usize = 2 << 20;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Some bytes, back with their thread when they are dropped.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
}

impl Buffer {
    pub(crate) const EMPTY: Self = Self {
        bytes: Vec::new(),
        len: 0,
    };

    /// A buffer with anything in it: whoever asks fills it.
    pub(crate) fn unfilled(len: u64) -> Self {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        // A thread that is ending has none.
        let spare = SPARE.try_with(|spare| spare.borrow_mut().pop());
        let mut bytes = spare.ok().flatten().unwrap_or_default();
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
        Self { bytes, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.len).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes.is_empty() || bytes.capacity() > KEPT_LEN {
            return;
        }
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < KEPT {
                spare.push(bytes);
            }
        });
    }
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
    fn large_ones_are_not_kept() {
        let len = KEPT_LEN as u64 + 1;
        drop(Buffer::unfilled(len));
        assert!(SPARE.with_borrow(|spare| spare.iter().all(|bytes| bytes.len() <= KEPT_LEN)));
        assert!(Buffer::EMPTY.is_empty());
    }
}
