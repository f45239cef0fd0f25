//! Bits in the order of deflate: from the lowest of each byte up.

/// Writes to a slice that must have room; what has none is lost, so callers ask first.
pub(super) struct BitWriter<'o> {
    out: &'o mut [u8],
    /// Whole bytes written.
    at: usize,
    /// Bits that are not yet written, the first one lowest.
    held: u64,
    /// How many.
    count: u32,
}

impl<'o> BitWriter<'o> {
    pub(super) fn new(out: &'o mut [u8]) -> Self {
        Self {
            out,
            at: 0,
            held: 0,
            count: 0,
        }
    }

    /// Bits there is still room for.
    pub(super) fn room(&self) -> usize {
        (self.out.len() - self.at) * 8 - self.count as usize
    }

    /// Bits up to the next whole byte.
    pub(super) fn padding(&self) -> usize {
        self.count.wrapping_neg() as usize & 7
    }

    /// Holds some more bits: 56 at most between two flushes.
    #[inline(always)]
    pub(super) fn add(&mut self, bits: u64, count: u32) {
        self.held |= bits << self.count;
        self.count += count;
    }

    /// Writes all whole bytes. What lies behind them in the slice is overwritten too.
    #[inline(always)]
    pub(super) fn flush(&mut self) {
        let whole = (self.count >> 3) as usize;
        let rest = self.out.get_mut(self.at..).unwrap_or_default();
        if let Some(eight) = rest.first_chunk_mut() {
            *eight = self.held.to_le_bytes();
        } else {
            let bytes = self.held.to_le_bytes();
            for (to, from) in rest.iter_mut().zip(bytes).take(whole) {
                *to = from;
            }
        }
        self.at += whole;
        self.held >>= self.count & !7;
        self.count &= 7;
    }

    /// Adds few bits, and writes what is whole.
    pub(super) fn put(&mut self, bits: u32, count: u32) {
        self.add(bits.into(), count);
        self.flush();
    }

    /// Fills the last byte with zeros.
    pub(super) fn align(&mut self) {
        self.count = self.count.next_multiple_of(8);
        self.flush();
    }

    /// Writes bytes as they are, after [`Self::align`].
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        let to = self.out.get_mut(self.at..).unwrap_or_default();
        for (to, from) in to.iter_mut().zip(bytes) {
            *to = *from;
        }
        self.at += bytes.len();
    }

    /// Bytes of the stream, the last one filled.
    pub(super) fn finish(mut self) -> usize {
        self.align();
        self.at
    }
}
