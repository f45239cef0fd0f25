//! Reading metadata: zeros past the end, holes found once and skipped afterwards, bytes counted.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{OnceLock, RwLock};

use qcow2_io::{ExtentKind, Storage, StorageError};

use crate::ByteRange;

/// What a disk reads or fails to read as one.
const SECTOR_LEN: usize = 512;
/// Zero tables met before the storage is asked where its holes are. Sound images have few.
const ZERO_TABLES: u64 = 16;
/// Most zero tables between two questions.
const PAUSE_MAX: u64 = 1 << 14;
/// Holes remembered.
const HOLES_MAX: usize = 1 << 16;

/// Reads an image's metadata.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    storage: &'a dyn Storage,
    len: u64,
    read: AtomicU64,
    zero_tables: AtomicU64,
    /// Zero tables to be met before the storage is asked again.
    ask_at: AtomicU64,
    /// How many zero tables the last vain question was worth.
    pause: AtomicU64,
    any_hole: AtomicBool,
    holes: RwLock<BTreeMap<u64, u64>>,
    /// The first read that failed.
    failure: OnceLock<(u64, String)>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(storage: &'a dyn Storage) -> Result<Self, StorageError> {
        Ok(Self {
            storage,
            len: storage.len()?,
            read: AtomicU64::new(0),
            zero_tables: AtomicU64::new(0),
            ask_at: AtomicU64::new(ZERO_TABLES),
            pause: AtomicU64::new(1),
            any_hole: AtomicBool::new(false),
            holes: RwLock::new(BTreeMap::new()),
            failure: OnceLock::new(),
        })
    }

    /// Length of the file in bytes when the check began.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn storage(&self) -> &'a dyn Storage {
        self.storage
    }

    /// Bytes read up to now.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Fills `buf` from `offset` on, with zeros past the end of the file.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), StorageError> {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (inside, outside) = buf.split_at_mut(left.min(buf.len()));
        outside.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        self.read.fetch_add(inside.len() as u64, Ordering::Relaxed);
        let read = self.storage.read_at(inside, offset);
        if let Err(error) = &read {
            self.failure.get_or_init(|| (offset, error.to_string()));
        }
        read
    }

    /// As [`read`](Self::read), but what can't be read is told sector by sector, and filled with zeros: the caller must not take them for what
    /// is there.
    pub(crate) fn read_parts(
        &self,
        buf: &mut [u8],
        offset: u64,
        mut failed: impl FnMut(ByteRange, &StorageError),
    ) {
        if self.read(buf, offset).is_ok() {
            return;
        }
        let mut bad: Option<(ByteRange, StorageError)> = None;
        let mut at = offset;
        for sector in buf.chunks_mut(SECTOR_LEN) {
            let range = ByteRange::new(at, sector.len() as u64);
            at = range.end;
            let Err(error) = self.read(sector, range.start) else {
                if let Some((range, error)) = bad.take() {
                    failed(range, &error);
                }
                continue;
            };
            sector.fill(0);
            bad = Some(match bad {
                Some((known, error)) => (
                    ByteRange {
                        end: range.end,
                        ..known
                    },
                    error,
                ),
                None => (range, error),
            });
        }
        if let Some((range, error)) = bad {
            failed(range, &error);
        }
    }

    /// Reads ahead: fills `buf` as far as that can be done, and tells how many bytes that are. What fails behind the first `wanted` bytes
    /// is nobody's concern yet.
    ///
    /// # Errors
    ///
    /// The first `wanted` bytes can't be read.
    pub(crate) fn read_ahead(
        &self,
        buf: &mut [u8],
        wanted: usize,
        offset: u64,
    ) -> Result<usize, StorageError> {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (inside, outside) = buf.split_at_mut(left.min(buf.len()));
        outside.fill(0);
        let whole = if inside.is_empty() {
            Ok(())
        } else {
            self.storage.read_at(inside, offset)
        };
        let Err(failed) = whole else {
            self.read.fetch_add(inside.len() as u64, Ordering::Relaxed);
            return Ok(buf.len());
        };
        let mut filled = 0;
        for sector in inside.chunks_mut(SECTOR_LEN) {
            let at = offset.saturating_add(filled as u64);
            if filled < wanted {
                self.read(sector, at)?;
            } else if self.storage.read_at(sector, at).is_err() {
                return Ok(filled);
            }
            filled += sector.len();
        }
        // It can be read after all. Why it could not be before nobody knows, so that is not passed over.
        self.failure.get_or_init(|| (offset, failed.to_string()));
        Err(failed)
    }

    /// Where the first read that failed was, and why it did. Whoever reads reports failures where they matter; this is for
    /// those that would go unnoticed.
    pub(crate) fn failure(&self) -> Option<&(u64, String)> {
        self.failure.get()
    }

    /// Whether a table is known to read as zero without reading it.
    pub(crate) fn is_known_zero(&self, offset: u64, len: u64) -> bool {
        if offset >= self.len {
            return true;
        }
        if !self.any_hole.load(Ordering::Relaxed) {
            return false;
        }
        let end = offset.saturating_add(len).min(self.len);
        self.known_hole_end(offset)
            .is_some_and(|hole_end| hole_end >= end)
    }

    /// End of the known hole that a byte lies in.
    fn known_hole_end(&self, offset: u64) -> Option<u64> {
        let holes = self.holes.read().ok()?;
        holes
            .range(..=offset)
            .next_back()
            .map(|(_, end)| *end)
            .filter(|end| *end > offset)
    }

    /// Says that a table read as zero. After some of them the storage is asked for the hole it lies in, so that what an
    /// image claims to keep in a hole costs a look and no reading.
    ///
    /// Asking costs, too: a file system may look at every page of the data that it finds instead of a hole. So each vain
    /// question doubles the number of tables until the next.
    pub(crate) fn met_zero_table(&self, offset: u64) {
        let met = self.zero_tables.fetch_add(1, Ordering::Relaxed);
        if met < self.ask_at.load(Ordering::Relaxed)
            || offset >= self.len
            || self.known_hole_end(offset).is_some()
        {
            return;
        }
        let Ok(extents) = self.storage.extents(offset..self.len, 1) else {
            return;
        };
        if let Some(hole) = extents.first().filter(|e| e.kind != ExtentKind::Data) {
            self.pause.store(1, Ordering::Relaxed);
            if let Ok(mut holes) = self.holes.write()
                && holes.len() < HOLES_MAX
            {
                holes.insert(offset, offset.saturating_add(hole.len));
                self.any_hole.store(true, Ordering::Relaxed);
            }
        } else {
            let pause = self
                .pause
                .load(Ordering::Relaxed)
                .saturating_mul(2)
                .min(PAUSE_MAX);
            self.pause.store(pause, Ordering::Relaxed);
            self.ask_at
                .store(met.saturating_add(pause), Ordering::Relaxed);
        }
    }
}

/// Whether all bytes are zero.
#[inline]
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |a, b| a | b) == 0)
        && rest.iter().all(|b| *b == 0)
}
