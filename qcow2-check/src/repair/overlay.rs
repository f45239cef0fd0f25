//! An image as it will be: the storage below, and layers of changes above it that nobody has written yet.
//!
//! A plan is made by repairing this. Each layer is a set of writes between two flushes, so the layers are also the order in
//! which a plan is applied. Changes are kept by sectors of 512 bytes, the unit that a crash leaves whole. What is filled with one
//! word, as refcounts mostly are, and what is copied from elsewhere in the file, takes next to no memory.

mod recrypt;

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard};

use qcow2_io::{
    Extent, ExtentKind, Limits, Operation, Result, Storage, StorageError, StorageErrorKind,
    ZeroFlags,
};

use super::key::DataCipher;
use crate::ByteRange;

/// Bytes in a sector.
const SECTOR: u64 = 512;
/// Bytes in a page: eight sectors.
const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;
const SECTOR_LEN: usize = 512;

/// What a page of a layer holds, where it holds anything.
#[derive(Clone, Debug)]
enum Content {
    /// One word of eight bytes over and over.
    Fill([u8; 8]),
    Bytes(Box<[u8; PAGE_LEN]>),
    /// What lies at this offset in the layers below.
    Copy(u64),
    /// The same, enciphered anew; it belongs at the second offset on the disk.
    Recrypted(u64, u64),
}

#[derive(Clone, Debug)]
struct Page {
    /// Sectors that the layer changes: bit 0 is the first.
    mask: u8,
    content: Content,
}

#[derive(Debug, Default)]
struct Layer {
    pages: BTreeMap<u64, Page>,
}

#[derive(Debug)]
struct State {
    len: u64,
    layers: Vec<Layer>,
}

/// A storage and changes above it.
#[derive(Debug)]
pub(super) struct Overlay<'a> {
    base: &'a dyn Storage,
    base_len: u64,
    state: RwLock<State>,
    /// Of guest data, once something encrypted is moved.
    cipher: OnceLock<Box<dyn DataCipher>>,
}

impl<'a> Overlay<'a> {
    pub(super) fn new(base: &'a dyn Storage) -> Result<Self> {
        let len = base.len()?;
        Ok(Self {
            base,
            base_len: len,
            state: RwLock::new(State {
                len,
                layers: Vec::new(),
            }),
            cipher: OnceLock::new(),
        })
    }

    pub(super) fn base(&self) -> &'a dyn Storage {
        self.base
    }

    /// Bytes of the storage below.
    pub(super) fn base_len(&self) -> u64 {
        self.base_len
    }

    /// Bytes of the image as it will be.
    pub(super) fn new_len(&self) -> u64 {
        self.state().len
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a layer above all others, and gives its number.
    pub(super) fn layer(&self) -> usize {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.layers.push(Layer::default());
        state.layers.len() - 1
    }

    /// How many layers there are.
    pub(super) fn layers(&self) -> usize {
        self.state().layers.len()
    }

    /// Makes the image longer, if it is shorter than that.
    pub(super) fn grow(&self, len: u64) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.len = state.len.max(len);
    }

    /// Reads what the layers below number `above` show.
    fn read_below(&self, state: &State, above: usize, buf: &mut [u8], offset: u64) -> Result<()> {
        let inside = usize::try_from(self.base_len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (from_base, behind) = buf.split_at_mut(inside.min(buf.len()));
        behind.fill(0);
        let end = offset.saturating_add((from_base.len() + behind.len()) as u64);
        if !from_base.is_empty() {
            self.base.read_at(from_base, offset)?;
        }
        let pages = offset / PAGE..end.div_ceil(PAGE);
        for (number, layer) in state.layers.iter().take(above).enumerate() {
            for (page, patch) in layer.pages.range(pages.clone()) {
                self.lay_over(state, number, (*page, patch), buf, offset)?;
            }
        }
        Ok(())
    }

    /// Puts a page's changed sectors into a buffer that starts at `offset`.
    fn lay_over(
        &self,
        state: &State,
        layer: usize,
        (page, patch): (u64, &Page),
        buf: &mut [u8],
        offset: u64,
    ) -> Result<()> {
        let mut bytes = [0; PAGE_LEN];
        self.content(state, layer, page * PAGE, patch, &mut bytes)?;
        for (sector, content) in (0_u64..).zip(bytes.chunks_exact(SECTOR_LEN)) {
            if patch.mask >> sector & 1 == 0 {
                continue;
            }
            let start = page * PAGE + sector * SECTOR;
            let skip = usize::try_from(offset.saturating_sub(start)).unwrap_or(usize::MAX);
            let at = usize::try_from(start.saturating_sub(offset)).unwrap_or(usize::MAX);
            let content = content.get(skip..).unwrap_or_default();
            let to = buf.get_mut(at..).unwrap_or_default();
            for (to, from) in to.iter_mut().zip(content) {
                *to = *from;
            }
        }
        Ok(())
    }

    fn content(
        &self,
        state: &State,
        layer: usize,
        to: u64,
        patch: &Page,
        bytes: &mut [u8; PAGE_LEN],
    ) -> Result<()> {
        match &patch.content {
            Content::Fill(word) => {
                for chunk in bytes.as_chunks_mut::<8>().0 {
                    *chunk = *word;
                }
            }
            Content::Bytes(content) => bytes.copy_from_slice(&content[..]),
            Content::Copy(from) => self.read_below(state, layer, bytes, *from)?,
            Content::Recrypted(from, guest) => {
                self.read_below(state, layer, bytes, *from)?;
                self.recrypt(*from, to, *guest, bytes)?;
            }
        }
        Ok(())
    }

    /// Writes to a layer; sectors that stay as they are are left out. Layers above must not have the same bytes.
    pub(super) fn write(&self, layer: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let end = offset.saturating_add(bytes.len() as u64);
        let mut at = offset;
        while at < end {
            let page = at / PAGE;
            let stop = end.min((page + 1) * PAGE);
            let touched = (at - page * PAGE)..(stop - page * PAGE);
            let old = self.read_page(&state, layer, page, &touched)?;
            let mut new = old;
            let within = usize::try_from(at - page * PAGE).unwrap_or(PAGE_LEN);
            let taken = usize::try_from(at - offset).unwrap_or(usize::MAX);
            let part = bytes.get(taken..).unwrap_or_default();
            for (to, from) in new.iter_mut().skip(within).zip(part) {
                *to = *from;
            }
            let mut mask = 0;
            for (sector, (old, new)) in old
                .chunks_exact(SECTOR_LEN)
                .zip(new.chunks_exact(SECTOR_LEN))
                .enumerate()
            {
                mask |= u8::from(old != new) << sector;
            }
            if let Some(layer) = state.layers.get_mut(layer)
                && mask != 0
            {
                let before = layer.pages.get(&page).map_or(0, |page| page.mask);
                let words = new.as_chunks::<8>().0;
                let first = words.first().copied().unwrap_or_default();
                let content = if words.iter().all(|word| *word == first) {
                    Content::Fill(first)
                } else {
                    Content::Bytes(Box::new(new))
                };
                let mask = before | mask;
                layer.pages.insert(page, Page { mask, content });
            }
            at = stop;
        }
        state.len = state.len.max(end);
        Ok(())
    }

    /// A page as layer number `layer` shows it. Where that can't be read, the sectors that are `touched` must be readable, and those that the
    /// layer has are; the others don't matter, and are zeros.
    fn read_page(
        &self,
        state: &State,
        layer: usize,
        page: u64,
        touched: &Range<u64>,
    ) -> Result<[u8; PAGE_LEN]> {
        let mut bytes = [0; PAGE_LEN];
        let Err(error) = self.read_below(state, layer + 1, &mut bytes, page * PAGE) else {
            return Ok(bytes);
        };
        let known = state.layers.get(layer);
        let mask = known.and_then(|layer| layer.pages.get(&page));
        let mask = mask.map_or(0, |page| page.mask);
        bytes.fill(0);
        for (number, sector) in (0_u64..).zip(bytes.chunks_exact_mut(SECTOR_LEN)) {
            let start = number * SECTOR;
            let is_touched = start < touched.end && touched.start < start + SECTOR;
            if (is_touched || mask >> number & 1 != 0)
                && self
                    .read_below(state, layer + 1, sector, page * PAGE + start)
                    .is_err()
            {
                return Err(error);
            }
        }
        Ok(bytes)
    }

    /// Lets a layer have at `to` what the layers below have at `from`: `len` bytes, all of them sectors. What is there is changed,
    /// be it the same or not: nothing else may be there.
    pub(super) fn copy(&self, layer: usize, from: u64, to: u64, len: u64) -> Result<()> {
        if !to.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            self.read_below(&self.state(), layer, &mut bytes, from)?;
            return self.write(layer, to, &bytes);
        }
        self.put_pages(layer, to, len, |step| Content::Copy(from + step));
        Ok(())
    }

    /// Changes all bytes of a range of whole pages; `content` gives what is so far behind its beginning.
    fn put_pages(&self, layer: usize, to: u64, len: u64, content: impl Fn(u64) -> Content) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(layer) = state.layers.get_mut(layer) {
            for step in 0..len / PAGE {
                let page = Page {
                    mask: u8::MAX,
                    content: content(step * PAGE),
                };
                layer.pages.insert(to / PAGE + step, page);
            }
        }
        state.len = state.len.max(to.saturating_add(len));
    }

    /// The ranges that a layer changes, ascending and apart; all layers' together for `None`.
    pub(super) fn ranges(&self, layer: Option<usize>) -> Vec<ByteRange> {
        let state = self.state();
        let mut masks: BTreeMap<u64, u8> = BTreeMap::new();
        for (number, pages) in state.layers.iter().enumerate() {
            if layer.is_none_or(|layer| layer == number) {
                for (page, patch) in &pages.pages {
                    *masks.entry(*page).or_default() |= patch.mask;
                }
            }
        }
        let mut ranges: Vec<ByteRange> = Vec::new();
        for (page, mask) in masks {
            for sector in (0..8).filter(|sector| mask >> sector & 1 != 0) {
                let start = page * PAGE + sector * SECTOR;
                let end = (start + SECTOR).min(state.len);
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ if start < end => ranges.push(ByteRange { start, end }),
                    _ => {}
                }
            }
        }
        ranges
    }

    /// Whether all of a range can be read.
    pub(super) fn can_read(&self, offset: u64, len: u64) -> bool {
        let state = self.state();
        let mut buffer = vec![0; usize::try_from(len.min(1 << 20)).unwrap_or(0)];
        (0..len).step_by(1 << 20).all(|from| {
            let part = usize::try_from((len - from).min(1 << 20)).unwrap_or(0);
            let part = buffer.get_mut(..part).unwrap_or_default();
            let at = offset.saturating_add(from);
            let read = self.read_below(&state, state.layers.len(), part, at);
            read.is_ok()
        })
    }

    /// Reads what the layers up to and with number `layer` show.
    pub(super) fn read_layer(&self, layer: usize, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_below(&self.state(), layer + 1, buf, offset)
    }
}

fn read_only(operation: Operation) -> StorageError {
    StorageError::new(operation, StorageErrorKind::ReadOnly)
}

impl Storage for Overlay<'_> {
    fn len(&self) -> Result<u64> {
        Ok(self.new_len())
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let state = self.state();
        let mut at = offset;
        for buf in bufs {
            self.read_below(&state, state.layers.len(), buf, at)?;
            at = at.saturating_add(buf.len() as u64);
        }
        Ok(())
    }

    fn write_vectored_at(&self, _bufs: &[IoSlice<'_>], _offset: u64) -> Result<()> {
        Err(read_only(Operation::Write))
    }

    fn write_zeroes(&self, _range: Range<u64>, _flags: ZeroFlags) -> Result<()> {
        Err(read_only(Operation::WriteZeroes))
    }

    fn discard(&self, _range: Range<u64>) -> Result<()> {
        Err(read_only(Operation::Discard))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Err(read_only(Operation::SetLen))
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        if range.start >= range.end || max == 0 {
            return Ok(Vec::new());
        }
        let state = self.state();
        let page = range.start / PAGE;
        let changed = state
            .layers
            .iter()
            .filter_map(|layer| layer.pages.range(page..).next())
            .map(|(page, _)| page * PAGE)
            .min();
        let one = |end: u64, kind| vec![Extent::new(range.start, end - range.start, kind)];
        match changed {
            Some(start) if start <= range.start => {
                Ok(one(range.end.min((page + 1) * PAGE), ExtentKind::Data))
            }
            start => {
                let end = range.end.min(start.unwrap_or(u64::MAX));
                if range.start >= self.base_len {
                    return Ok(one(end, ExtentKind::Hole));
                }
                let found = self.base.extents(range.start..end, 1)?;
                Ok(match found.first() {
                    Some(extent) => one(extent.end().min(end), extent.kind),
                    None => one(end, ExtentKind::Data),
                })
            }
        }
    }

    fn limits(&self) -> Limits {
        self.base.limits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_io::Memory;

    #[test]
    fn layers_show_the_topmost_change_and_keep_what_lies_between() {
        let base = Memory::from(vec![1; 10_000]);
        let overlay = Overlay::new(&base).unwrap();
        let below = overlay.layer();
        let above = overlay.layer();
        overlay.write(below, 1000, &[2; 100]).unwrap();
        overlay.copy(above, 0, 12_288, 4096).unwrap();
        overlay.write(above, 1050, &[3; 10]).unwrap();
        let mut all = vec![9; 16_384];
        overlay.read_at(&mut all, 0).unwrap();
        let mut expected = vec![1; 10_000];
        expected[1000..1100].fill(2);
        let copied = expected[..4096].to_vec();
        expected[1050..1060].fill(3);
        expected.resize(12_288, 0);
        expected.extend(copied);
        assert!(all == expected);
        assert_eq!(
            overlay.ranges(Some(below)),
            [ByteRange::new(512, 1024)],
            "two sectors"
        );
        assert_eq!(overlay.ranges(Some(above)).len(), 2);
        assert_eq!(overlay.new_len(), 16_384);
        let mut unchanged = vec![0; 10_000];
        base.read_at(&mut unchanged, 0).unwrap();
        assert!(unchanged.iter().all(|byte| *byte == 1));
    }

    #[test]
    fn what_stays_as_it_is_is_no_change() {
        let base = Memory::from(vec![7; 8192]);
        let overlay = Overlay::new(&base).unwrap();
        let layer = overlay.layer();
        overlay.write(layer, 100, &[7; 5000]).unwrap();
        assert_eq!(overlay.ranges(None), []);
        overlay.write(layer, 4096, &[0; 4096]).unwrap();
        assert_eq!(overlay.ranges(None), [ByteRange::new(4096, 4096)]);
    }
}
