use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_image::copy::{CopyError, CopyOptions, Monitor, Target, copy};
use qcow2_image::create::CreateOptions;
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{Extent, Fault, Faulty, Memory, Operation, Result, Storage, ZeroFlags};

use crate::rig::{assert_reads, assert_sound, content, create, open, options};

const LEN: usize = 8 << 20;

fn all_options() -> Vec<(usize, bool)> {
    let mut all = vec![(1, false), (4, false)];
    if Codec::Zlib.is_available() {
        all.extend([(1, true), (4, true)]);
    }
    all
}

fn copy_options<'a>(threads: usize, compress: bool) -> CopyOptions<'a> {
    let options = CopyOptions::new().threads(threads).chunk(1 << 18);
    if compress {
        options.compress(Level::default())
    } else {
        options
    }
}

/// Copies into a new image.
fn to_image(source: &dyn Storage, options: &CopyOptions<'_>) -> std::result::Result<(), CopyError> {
    let image = open(&create(&CreateOptions::new(LEN as u64)));
    copy(source, &image, options).map(drop)
}

#[test]
fn a_source_that_fails_is_named_with_the_place() {
    let bytes = vec![7; LEN];
    for (threads, compress) in all_options() {
        let source = Faulty::new(Memory::from(bytes.clone()));
        source.add(Fault::on(Operation::Read).within(5 << 20..(5 << 20) + 1));
        let error = to_image(&source, &copy_options(threads, compress)).unwrap_err();
        let CopyError::Source { offset, len, .. } = error else {
            panic!("{error}");
        };
        assert!(
            (offset..offset + len).contains(&(5 << 20)),
            "{offset} {len}"
        );

        let source = Faulty::new(Memory::from(bytes.clone()));
        source.add(Fault::on(Operation::Extents));
        let error = to_image(&source, &copy_options(threads, compress)).unwrap_err();
        assert!(matches!(error, CopyError::Source { .. }), "{error}");
    }
}

#[test]
fn a_target_that_fails_is_named_with_the_place() {
    let source = Memory::from(content(LEN, 4));
    for (threads, compress) in all_options() {
        let file = create(&CreateOptions::new(LEN as u64));
        let faulty = Arc::new(Faulty::new(file));
        let image = options().open(faulty.clone()).unwrap();
        // Far enough for some data to be there, and near enough for compressed data to come so far.
        faulty.add(Fault::on(Operation::Write).within(600 << 10..3 << 20));
        let error = copy(&source, &image, &copy_options(threads, compress)).unwrap_err();
        let CopyError::Target { offset, len, .. } = error else {
            panic!("{error}");
        };
        assert!(len > 0 && offset + len <= LEN as u64, "{offset} {len}");
        // The image is what it was up to there.
        image.close().unwrap();
        let mut file = vec![0; usize::try_from(faulty.len().unwrap()).unwrap()];
        faulty.read_at(&mut file, 0).unwrap();
        assert_sound(&Memory::from(file), "what was begun");
    }
    let target = Faulty::new(Memory::from(vec![1; LEN]));
    target.add(Fault::on(Operation::WriteZeroes));
    let error = copy(
        &Memory::with_len(LEN as u64).unwrap(),
        Target::Storage(&target),
        &CopyOptions::new(),
    )
    .unwrap_err();
    assert!(
        matches!(error, CopyError::Target { offset: 0, .. }),
        "{error}"
    );
}

/// Ends the copy after some pieces, and counts.
#[derive(Default)]
struct Impatient {
    pieces: AtomicU64,
    last: AtomicU64,
    ends_after: u64,
}

impl Monitor for Impatient {
    fn progress(&self, done: u64, total: u64) {
        assert!(done <= total && total == LEN as u64);
        self.pieces.fetch_add(1, Ordering::Relaxed);
        self.last.fetch_max(done, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.pieces.load(Ordering::Relaxed) >= self.ends_after
    }
}

#[test]
fn a_copy_can_be_watched_and_cancelled() {
    let source = Memory::from(content(LEN, 5));
    for (threads, compress) in all_options() {
        let patient = Impatient {
            ends_after: u64::MAX,
            ..Impatient::default()
        };
        to_image(&source, &copy_options(threads, compress).monitor(&patient)).unwrap();
        assert_eq!(patient.last.load(Ordering::Relaxed), LEN as u64);

        let monitor = Impatient {
            ends_after: 3,
            ..Impatient::default()
        };
        let options = copy_options(threads, compress).monitor(&monitor);
        let error = to_image(&source, &options).unwrap_err();
        assert!(matches!(error, CopyError::Cancelled), "{error}");
        // What was under way comes to its end.
        assert!(monitor.pieces.load(Ordering::Relaxed) < 32);
    }
}

/// Panics when a place is read.
#[derive(Debug)]
struct Panicking(Memory, u64);

impl Storage for Panicking {
    fn len(&self) -> Result<u64> {
        self.0.len()
    }
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let len: usize = bufs.iter().map(|buf| buf.len()).sum();
        assert!(
            !(offset..offset + len as u64).contains(&self.1),
            "read at the wrong place"
        );
        self.0.read_vectored_at(bufs, offset)
    }
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.0.write_vectored_at(bufs, offset)
    }
    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags)
    }
    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.0.discard(range)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }
    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.0.extents(range, max)
    }
}

#[test]
fn a_panic_ends_all_threads() {
    for (threads, compress) in all_options() {
        let source = Panicking(Memory::from(vec![3; LEN]), 4 << 20);
        let options = copy_options(threads, compress);
        let copied = catch_unwind(AssertUnwindSafe(|| to_image(&source, &options)));
        assert!(copied.is_err(), "{threads} threads");
    }
}

#[test]
fn a_copy_that_failed_can_be_made_again() {
    let bytes = content(LEN, 6);
    for (threads, compress) in all_options() {
        let source = Faulty::new(Memory::from(bytes.clone()));
        source.add(Fault::on(Operation::Read).nth(7));
        let file = create(&CreateOptions::new(LEN as u64));
        let image = open(&file);
        copy(&source, &image, &copy_options(threads, compress)).unwrap_err();
        copy(&source, &image, &copy_options(threads, compress)).unwrap();
        assert_reads(&image, &bytes, "the second try");
        image.close().unwrap();
        assert_sound(&file, "the second try");
    }
}
