//! An image on a storage that is no single file: striped over two files, with its requests counted.
//!
//! ```text
//! custom_storage PART PART     makes both files, and an image that is spread over them
//! ```
//!
//! The engine asks nothing of where an image lies except [`Storage`]: object stores, network servers, or another
//! image's disk do as well. What a storage must keep to stands on that trait, and `qcow2_io::conformance` tests it.
#![expect(
    clippy::print_stderr,
    reason = "a program tells its user what went wrong"
)]

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{
    FileOptions, MAX_LEN, Operation, Result as StorageResult, Storage, StorageError,
    StorageErrorKind, ZeroFlags,
};

/// Bytes that lie together in one part.
const STRIPE: u64 = 64 << 10;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let Err(error) = run(&args, &mut io::stdout().lock()) else {
        return ExitCode::SUCCESS;
    };
    eprintln!("custom_storage: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        eprintln!("  because: {cause}");
        source = cause.source();
    }
    ExitCode::FAILURE
}

/// The program. What it prints goes to `out`.
pub(crate) fn run(args: &[OsString], out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let [first, second] = args else {
        return Err("usage: custom_storage PART PART".into());
    };
    let new = FileOptions::new().write(true).create_new(true);
    let storage = Arc::new(Striped::new([new.open(first)?, new.open(second)?]));

    Image::create(&storage, &CreateOptions::new(1 << 30))?;
    let image = Image::options().open(storage.clone())?;
    let data: Vec<u8> = (0..=250).cycle().take(1 << 20).collect();
    image.write_at(&data, 123_456)?;
    image.close()?;

    let image = Image::options().read_only(true).open(storage.clone())?;
    let mut found = vec![0; data.len()];
    image.read_at(&mut found, 123_456)?;
    if found != data {
        return Err("other bytes come back than were written".into());
    }
    for (number, part) in storage.parts.iter().enumerate() {
        writeln!(out, "part {number}: {} bytes", part.len()?)?;
    }
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    writeln!(
        out,
        "{} reads, {} writes, {} flushes",
        count(&storage.reads),
        count(&storage.writes),
        count(&storage.flushes)
    )?;
    Ok(())
}

/// Two storages that take turns, [`STRIPE`] bytes each.
#[derive(Debug)]
pub(crate) struct Striped<S> {
    parts: [S; 2],
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
}

impl<S: Storage> Striped<S> {
    pub(crate) fn new(parts: [S; 2]) -> Self {
        Self {
            parts,
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
        }
    }

    /// The part that has a byte, the byte's place in there, and how many follow in the same stripe, this one included.
    fn place(&self, offset: u64) -> (&S, u64, u64) {
        let [even, odd] = &self.parts;
        let (stripe, within) = (offset / STRIPE, offset % STRIPE);
        let part = if stripe.is_multiple_of(2) { even } else { odd };
        (part, stripe / 2 * STRIPE + within, STRIPE - within)
    }

    /// The range as ranges of the parts.
    fn split(&self, range: Range<u64>) -> impl Iterator<Item = (&S, Range<u64>)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let (part, start, room) = self.place(at);
            let len = room.min(range.end - at);
            at += len;
            Some((part, start..start + len))
        })
    }
}

/// The end of a request, if there can be such a place.
fn check(operation: Operation, offset: u64, len: u64) -> StorageResult<u64> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_LEN => Ok(end),
        _ => Err(StorageError::new(operation, StorageErrorKind::OutOfRange).at(offset, len)),
    }
}

fn check_range(operation: Operation, range: &Range<u64>) -> StorageResult<()> {
    let len = range.end.checked_sub(range.start).ok_or_else(|| {
        StorageError::new(operation, StorageErrorKind::Invalid).at(range.start, 0)
    })?;
    check(operation, range.start, len).map(|_| ())
}

impl<S: Storage> Storage for Striped<S> {
    fn len(&self) -> StorageResult<u64> {
        // The part that reaches further says where the end is; the other one may be short of it.
        let mut end = 0;
        for (part, number) in self.parts.iter().zip(0..) {
            if let Some(last) = part.len()?.checked_sub(1) {
                let stripe = last / STRIPE * 2 + number;
                end = end.max(stripe * STRIPE + last % STRIPE + 1);
            }
        }
        Ok(end)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], mut offset: u64) -> StorageResult<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
        check(Operation::Read, offset, len)?;
        for buf in bufs {
            let mut rest: &mut [u8] = buf;
            while !rest.is_empty() {
                let (part, at, room) = self.place(offset);
                let room = usize::try_from(room).unwrap_or(usize::MAX);
                let (now, later) = rest.split_at_mut(room.min(rest.len()));
                part.read_at(now, at)?;
                offset += now.len() as u64;
                rest = later;
            }
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], mut offset: u64) -> StorageResult<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
        check(Operation::Write, offset, len)?;
        for buf in bufs {
            let mut rest: &[u8] = buf;
            while !rest.is_empty() {
                let (part, at, room) = self.place(offset);
                let room = usize::try_from(room).unwrap_or(usize::MAX);
                let (now, later) = rest.split_at(room.min(rest.len()));
                part.write_at(now, at)?;
                offset += now.len() as u64;
                rest = later;
            }
        }
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> StorageResult<()> {
        check_range(Operation::WriteZeroes, &range)?;
        for (part, range) in self.split(range) {
            part.write_zeroes(range, flags)?;
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> StorageResult<()> {
        check_range(Operation::Discard, &range)?;
        // What lies behind the end may be discarded, however much it is.
        let end = range.end.min(self.len()?);
        for (part, range) in self.split(range.start..end) {
            part.discard(range)?;
        }
        Ok(())
    }

    fn flush(&self) -> StorageResult<()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.parts.iter().try_for_each(Storage::flush)
    }

    fn set_len(&self, len: u64) -> StorageResult<()> {
        check(Operation::SetLen, 0, len)?;
        let (pairs, rest) = (len / (2 * STRIPE), len % (2 * STRIPE));
        let [even, odd] = &self.parts;
        even.set_len(pairs * STRIPE + rest.min(STRIPE))?;
        odd.set_len(pairs * STRIPE + rest.saturating_sub(STRIPE))
    }
}
