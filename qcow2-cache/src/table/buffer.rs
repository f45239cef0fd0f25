//! What a slice is read into: one buffer for each thread, so that a miss neither asks for memory nor clears it.

use std::cell::Cell;

/// A larger buffer is given back; bytes.
const MAX_KEPT: usize = 64 << 10;

thread_local! {
    static KEPT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// The thread's buffer, or another one while that is in use. What is in it at first is of no meaning.
pub(super) struct Buffer {
    bytes: Vec<u8>,
    len: usize,
}

impl Buffer {
    pub(super) fn take(len: usize) -> Self {
        let mut bytes = KEPT.try_with(Cell::take).unwrap_or_default();
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
        Self { bytes, len }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.len).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.len() <= MAX_KEPT {
            // A thread that is at its end keeps nothing.
            let _ = KEPT.try_with(|kept| kept.set(std::mem::take(&mut self.bytes)));
        }
    }
}
