//! What the fuzz targets call, beside the code so that a plain test can replay their inputs.

#[cfg(feature = "encryption")]
mod luks;

use std::ops::Range;
use std::sync::Arc;

use qcow2_check::{Options, Verdict, check};
use qcow2_format::{Header, raw};
use qcow2_io::{ExtentKind, Memory, Storage, StorageErrorKind, ZeroFlags};

#[cfg(feature = "encryption")]
pub use luks::{LUKS_PASSPHRASE, luks_open};

use crate::{CacheOptions, Image, ImageOptions};

/// Requests in one input.
const REQUESTS: usize = 8;
/// Bytes of a request in the input.
const REQUEST_BYTES: usize = 6;
/// Bytes behind the image: settings, then requests.
const TAIL: usize = 8 + REQUESTS * REQUEST_BYTES;
/// Longest read or write; bytes. Two of the largest clusters would only cost time.
const DATA_MAX: u64 = 96 << 10;
/// Longest zero write, discard and stretch for extents; bytes.
const RANGE_MAX: u64 = 4 << 20;
/// What is looked at on both sides of a request; bytes.
const AROUND: u64 = 700;
/// Disks are not made larger than this; bytes.
const SIZE_MAX: u64 = 1 << 30;

/// Opens arbitrary bytes as an image, for reading and then for writing, and makes a few requests, mostly at borders.
///
/// The last bytes say what: how much longer than its content the file is, options, and the requests.
///
/// # Panics
///
/// If opening for reading, or a refusal, changes the file. And if the checker called the image sound: when it no longer is
/// afterwards, or something reads back other than it was written.
pub fn image(data: &[u8]) {
    let Some((content, tail)) = data.split_last_chunk::<TAIL>() else {
        return;
    };
    let Some((settings, requests)) = tail.split_first_chunk::<8>() else {
        return;
    };
    let [shift, factor, flags, caches, salt, ..] = *settings;
    let storage = Arc::new(Memory::from(content.to_vec()));
    let longer = u64::from(factor) << (shift % 32);
    let len = (content.len() as u64).saturating_add(longer);
    if storage.set_len(len).is_err() {
        return;
    }
    let Some(header) = decoded(&*storage) else {
        // Not even the header can be used; that has a target of its own.
        assert!(Image::options().open(storage).is_err());
        return;
    };
    let mut options = Image::options()
        .no_backing()
        .discard(flags & 1 == 0)
        .discard_no_unref(flags & 2 != 0)
        .pass_discard(crate::PassDiscard {
            request: flags & 4 == 0,
            snapshot: true,
            other: flags & 8 != 0,
        });
    if flags & 16 != 0 {
        options = options.lazy_refcounts(flags & 32 != 0);
    }
    if flags & 64 != 0 {
        let cache = CacheOptions::new().l2_bytes(u64::from(caches) << 9);
        options = options.cache(cache.l2_slice_bytes(512));
    }
    if header.incompatible.external_data() {
        options = options.data_file(Arc::new(Memory::new()));
    }
    let before = start_of(&*storage);
    let size = header.virtual_size();
    let requests: Vec<Request> = requests
        .chunks_exact(REQUEST_BYTES)
        .map(|bytes| Request::new(bytes, &header))
        .collect();

    let mut disk = Disk::default();
    if let Ok(image) = options.clone().read_only(true).open(storage.clone()) {
        for request in &requests {
            disk.look(&image, request, size);
        }
        assert!(image.write_at(&[1], 0).is_err());
        assert!(image.close().is_ok(), "there is nothing to write");
    }
    assert!(before == start_of(&*storage), "a reader wrote");

    let sound = check(&*storage, &Options::default()).verdict() == Verdict::Sound;
    let image = match options.clone().open(storage.clone()) {
        Ok(image) => image,
        Err(error) => {
            assert!(
                before == start_of(&*storage),
                "refused and written to: {error}"
            );
            return;
        }
    };
    let mut all_worked = true;
    for (request, number) in requests.iter().zip(salt..=u8::MAX) {
        all_worked &= disk.change(&image, request, number, sound);
    }
    assert!(!sound || !image.is_poisoned(), "it was sound");
    let closed = image.close();
    if !sound {
        return;
    }
    assert!(closed.is_ok(), "{closed:?}");
    let report = check(&*storage, &Options::default());
    let verdict = report.verdict();
    // What a request that failed had taken may be lost space, and bitmaps that are out of date are.
    let may_leak = !all_worked || header.autoclear.bitmaps();
    let fine = verdict == Verdict::Sound || verdict == Verdict::Leaks && may_leak;
    assert!(fine, "no longer sound: {:#?}", report.findings);
    reopened(&options, storage, &disk);
}

fn decoded(storage: &dyn Storage) -> Option<Header> {
    let mut prefix = [0; raw::Header::LEN as usize];
    storage.read_at(&mut prefix, 0).ok()?;
    let mut cluster = vec![0; Header::probe(&prefix).ok()?];
    storage.read_at(&mut cluster, 0).ok()?;
    Header::decode(&cluster).ok()
}

/// What was closed reads as before.
fn reopened(options: &ImageOptions, storage: Arc<Memory>, disk: &Disk) {
    let options = options.clone().read_only(true);
    match options.open(storage) {
        Ok(image) => disk.compare(&image, 0..u64::MAX),
        Err(error) => panic!("what was closed does not open: {error}"),
    }
}

/// The part of the file that an input has bytes for.
fn start_of(storage: &dyn Storage) -> (u64, Vec<u8>) {
    let len = storage.len().unwrap_or(0);
    let mut bytes = vec![0; usize::try_from(len.min(512 << 10)).unwrap_or(0)];
    let read = storage.read_at(&mut bytes, 0);
    assert!(read.is_ok(), "memory can be read");
    (len, bytes)
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write,
    Zero(ZeroFlags),
    Discard,
    DiscardWhole,
    Flush,
    Resize,
    Extents,
}

#[derive(Clone, Debug)]
struct Request {
    kind: Kind,
    range: Range<u64>,
}

impl Request {
    fn new(bytes: &[u8], header: &Header) -> Self {
        let [kind, place, index, shift, len, more] = *bytes else {
            return Self {
                kind: Kind::Flush,
                range: 0..0,
            };
        };
        let geometry = header.geometry;
        let (kind, max) = match kind % 12 {
            0 => (Kind::Read, DATA_MAX),
            1..4 => (Kind::Write, DATA_MAX),
            4 => (Kind::Zero(ZeroFlags::NONE), RANGE_MAX),
            5 => (Kind::Zero(ZeroFlags::MAY_UNMAP), RANGE_MAX),
            6 => (Kind::Zero(ZeroFlags::NO_FALLBACK), RANGE_MAX),
            7 => (Kind::Discard, RANGE_MAX),
            8 => (Kind::DiscardWhole, RANGE_MAX),
            9 => (Kind::Flush, 0),
            10 => (Kind::Resize, 0),
            _ => (Kind::Extents, RANGE_MAX),
        };
        let index = u64::from(index);
        // Somewhere on a border, and a little beside it.
        let border = match place % 6 {
            0 => 0,
            1 => header.virtual_size(),
            2 => index.saturating_mul(geometry.cluster_size()),
            3 => index.saturating_mul(geometry.l2_coverage()),
            4 => index.saturating_mul(geometry.subcluster_size()),
            _ => index << (shift % 56),
        };
        let beside = u64::from(shift % 8) * if shift < 128 { 1 } else { 511 };
        let start = match place / 6 % 3 {
            0 => border,
            1 => border.saturating_add(beside),
            _ => border.saturating_sub(beside),
        };
        let unit = [1, 512, geometry.subcluster_size(), geometry.cluster_size()];
        let unit = unit.get(usize::from(more % 4)).copied().unwrap_or(1);
        let len = u64::from(len).saturating_mul(unit).min(max);
        Self {
            kind,
            range: start..start.saturating_add(len),
        }
    }
}

/// What is known of the disk: some stretches, each as a place and its bytes.
#[derive(Debug, Default)]
struct Disk {
    known: Vec<(u64, Vec<u8>)>,
}

impl Disk {
    /// Reads what is around a request and its extents, from an image that has not changed yet.
    fn look(&mut self, image: &Image, request: &Request, size: u64) {
        let start = request.range.start.saturating_sub(AROUND);
        let end = request.range.end.saturating_add(AROUND).min(size);
        let end = end.min(start.saturating_add(DATA_MAX + 2 * AROUND));
        if let Some(len) = end.checked_sub(start) {
            let mut bytes = vec![0xee; usize::try_from(len).unwrap_or(0)];
            // Compressed data may be damaged, and any of it where the image is.
            if image.read_at(&mut bytes, start).is_ok() {
                self.known.push((start, bytes));
            }
        }
        self.extents(image, &request.range, true);
    }

    /// Makes a request; tells whether it worked. In a sound image nothing else changes.
    fn change(&mut self, image: &Image, request: &Request, salt: u8, sound: bool) -> bool {
        let range = request.range.clone();
        let mut fill = None;
        let result = match request.kind {
            Kind::Read => {
                let len = usize::try_from(range.end - range.start).unwrap_or(0);
                image.read_at(&mut vec![0; len], range.start)
            }
            Kind::Write => {
                fill = Some(salt | 1);
                let len = usize::try_from(range.end - range.start).unwrap_or(0);
                image.write_at(&vec![salt | 1; len], range.start)
            }
            Kind::Zero(flags) => {
                fill = Some(0);
                image.write_zeroes(range.clone(), flags)
            }
            Kind::Discard => {
                fill = Some(0);
                image.discard(range.clone())
            }
            Kind::DiscardWhole => {
                // Which part of the range becomes zeros depends on the image.
                self.forget(&range);
                return image.discard_whole(range).is_ok();
            }
            Kind::Flush => image.flush(),
            Kind::Resize => {
                let old = image.virtual_size();
                let size = request.range.start / 512 * 512;
                if size > old.max(SIZE_MAX) {
                    return true;
                }
                let result = image.set_len(size);
                // What is behind the smaller of them is gone.
                let kept = image.virtual_size().min(old).min(size);
                match result {
                    Ok(()) => self.fill(&(kept..u64::MAX), 0),
                    Err(_) => self.forget(&(kept..u64::MAX)),
                }
                if sound && result.is_ok() {
                    assert_eq!(image.virtual_size(), size);
                }
                result
            }
            Kind::Extents => {
                self.extents(image, &range, sound);
                Ok(())
            }
        };
        let worked = result.is_ok();
        if let Some(byte) = fill {
            match &result {
                Ok(()) => self.fill(&range, byte),
                // What is refused does nothing.
                Err(error) if error.kind() == StorageErrorKind::Unsupported => {}
                Err(_) if image.virtual_size() < range.end => {}
                Err(_) => self.forget(&range),
            }
        }
        if sound {
            self.compare(image, range);
        }
        worked
    }

    fn fill(&mut self, range: &Range<u64>, byte: u8) {
        for (start, bytes) in &mut self.known {
            let from = range.start.saturating_sub(*start);
            let to = range.end.saturating_sub(*start).min(bytes.len() as u64);
            let (from, to) = (usize::try_from(from), usize::try_from(to));
            if let (Ok(from), Ok(to)) = (from, to)
                && let Some(part) = bytes.get_mut(from..to)
            {
                part.fill(byte);
            }
        }
    }

    fn forget(&mut self, range: &Range<u64>) {
        self.known.retain(|(start, bytes)| {
            range.end <= *start || start.saturating_add(bytes.len() as u64) <= range.start
        });
    }

    /// Compares what is known of a range with what the image gives.
    fn compare(&self, image: &Image, range: Range<u64>) {
        for (start, expected) in &self.known {
            let end = start.saturating_add(expected.len() as u64);
            if range.end < *start || end < range.start {
                continue;
            }
            let mut found = vec![0xee; expected.len()];
            let read = image.read_at(&mut found, *start);
            assert!(read.is_ok(), "it could be read before: {read:?}");
            let differs = expected.iter().zip(&found).position(|(a, b)| a != b);
            assert_eq!(differs, None, "of {} bytes at {start:#x}", expected.len());
        }
    }

    /// Asks for extents, which must follow each other in a short list and, where what is known can be relied on, agree with it.
    fn extents(&self, image: &Image, range: &Range<u64>, reliable: bool) {
        let Ok(extents) = image.extents(range.clone(), 16) else {
            return;
        };
        assert!(extents.len() <= 16);
        let mut at = range.start;
        for extent in extents {
            assert_eq!(extent.offset, at);
            assert!(extent.len > 0);
            at = extent.end();
            if extent.kind == ExtentKind::Data || !reliable {
                continue;
            }
            for (start, bytes) in &self.known {
                let from = extent.offset.saturating_sub(*start);
                let to = at.saturating_sub(*start).min(bytes.len() as u64);
                let (from, to) = (usize::try_from(from), usize::try_from(to));
                if let (Ok(from), Ok(to)) = (from, to) {
                    let part = bytes.get(from..to).unwrap_or_default();
                    assert!(part.iter().all(|byte| *byte == 0), "no zeros at {start:#x}");
                }
            }
        }
        assert!(at <= range.end);
    }
}
