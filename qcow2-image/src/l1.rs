//! The active L1 table in memory.

use std::sync::OnceLock;

use qcow2_cache::sync::atomic::{AtomicU64, Ordering};
use qcow2_format::L1Entry;

/// Entries in the first chunk; each of the others is as long as all before it.
const FIRST: u64 = 1024;
/// Enough for the 2^22 entries that the format allows.
const CHUNKS: usize = 13;

/// Entries that are read without a lock, in a table that can grow while they are.
pub(crate) struct L1Table {
    len: AtomicU64,
    chunks: [OnceLock<Box<[AtomicU64]>>; CHUNKS],
}

impl L1Table {
    /// The table with these bytes.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let table = Self {
            len: AtomicU64::new(0),
            chunks: [const { OnceLock::new() }; CHUNKS],
        };
        let (entries, _) = bytes.as_chunks::<8>();
        table.set_len(entries.len() as u64);
        for (index, entry) in (0..).zip(entries) {
            table.set(index, L1Entry::from_be_bytes(*entry));
        }
        table
    }

    /// Chunk and place in it.
    #[inline]
    fn place(index: u64) -> (usize, usize) {
        let chunk = if index < FIRST {
            0
        } else {
            u64::BITS - (index / FIRST).leading_zeros()
        };
        let start = if chunk == 0 { 0 } else { FIRST << (chunk - 1) };
        (
            chunk as usize,
            usize::try_from(index - start).unwrap_or(usize::MAX),
        )
    }

    /// Entries in the table.
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// The entry numbered `index`; empty behind the end.
    #[inline]
    pub(crate) fn get(&self, index: u64) -> L1Entry {
        let (chunk, place) = Self::place(index);
        self.chunks
            .get(chunk)
            .and_then(OnceLock::get)
            .and_then(|chunk| chunk.get(place))
            .map_or_else(L1Entry::default, |entry| {
                L1Entry::from_bits(entry.load(Ordering::SeqCst))
            })
    }

    /// Stores an entry that is within the length.
    pub(crate) fn set(&self, index: u64, entry: L1Entry) {
        let (chunk, place) = Self::place(index);
        if let Some(cell) = self
            .chunks
            .get(chunk)
            .and_then(OnceLock::get)
            .and_then(|chunk| chunk.get(place))
        {
            cell.store(entry.bits(), Ordering::SeqCst);
        }
    }

    /// Makes the table longer, with empty entries.
    pub(crate) fn set_len(&self, len: u64) {
        if let Some(last) = len.checked_sub(1) {
            let (chunk, _) = Self::place(last);
            for (number, cell) in self.chunks.iter().enumerate().take(chunk + 1) {
                let entries = if number == 0 {
                    FIRST
                } else {
                    FIRST << (number - 1)
                };
                cell.get_or_init(|| (0..entries).map(|_| AtomicU64::new(0)).collect());
            }
        }
        self.len.store(len, Ordering::Release);
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use qcow2_format::HostOffset;

    use super::*;

    #[test]
    fn entries_are_found_again_in_every_chunk() {
        let table = L1Table::new(&[]);
        assert_eq!(table.get(0), L1Entry::default());
        table.set_len(1 << 22);
        let indices = [
            0,
            1,
            1023,
            1024,
            1025,
            2047,
            2048,
            4095,
            4096,
            (1 << 22) - 1,
        ];
        for index in indices {
            let entry = L1Entry::new(HostOffset::new((index + 1) << 16), true);
            table.set(index, entry);
        }
        for index in indices {
            assert_eq!(table.get(index).l2_table().get(), (index + 1) << 16);
        }
        assert_eq!(table.get(1 << 22), L1Entry::default());
    }

    #[test]
    fn growing_keeps_what_is_there() {
        let table = L1Table::new(&7_u64.to_be_bytes());
        assert_eq!((table.len(), table.get(0).bits()), (1, 7));
        table.set_len(5000);
        assert_eq!((table.len(), table.get(0).bits()), (5000, 7));
    }
}
