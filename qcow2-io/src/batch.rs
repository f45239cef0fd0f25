//! Batches of requests.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use crate::{Result, Storage, ZeroFlags};

/// What one operation of a batch asks for.
#[derive(Debug)]
#[non_exhaustive]
pub enum Request<'a> {
    /// Fill a buffer.
    Read {
        /// Where the bytes go.
        buf: &'a mut [u8],
        /// First byte to read.
        offset: u64,
    },
    /// Fill several buffers from consecutive bytes.
    ReadVectored {
        /// Where the bytes go.
        bufs: Vec<IoSliceMut<'a>>,
        /// First byte to read.
        offset: u64,
    },
    /// Store a buffer.
    Write {
        /// The bytes.
        buf: &'a [u8],
        /// First byte to write.
        offset: u64,
    },
    /// Store several buffers one after the other.
    WriteVectored {
        /// The bytes.
        bufs: Vec<IoSlice<'a>>,
        /// First byte to write.
        offset: u64,
    },
    /// Make a range read as zeros.
    WriteZeroes {
        /// The bytes meant.
        range: Range<u64>,
        /// How it may be done.
        flags: ZeroFlags,
    },
    /// Give a range back.
    Discard {
        /// The bytes meant.
        range: Range<u64>,
    },
}

/// One operation of a batch for [`Storage::submit`], and its result afterwards.
#[derive(Debug)]
pub struct Op<'a> {
    request: Request<'a>,
    result: Option<Result<()>>,
}

impl<'a> Op<'a> {
    /// An operation that asks for `request` and has no result yet.
    pub fn new(request: Request<'a>) -> Self {
        Self {
            request,
            result: None,
        }
    }

    /// A read of `buf.len()` bytes at `offset`.
    pub fn read(buf: &'a mut [u8], offset: u64) -> Self {
        Self::new(Request::Read { buf, offset })
    }

    /// A write of `buf` at `offset`.
    pub fn write(buf: &'a [u8], offset: u64) -> Self {
        Self::new(Request::Write { buf, offset })
    }

    /// A write of zeros.
    pub fn write_zeroes(range: Range<u64>, flags: ZeroFlags) -> Self {
        Self::new(Request::WriteZeroes { range, flags })
    }

    /// A discard.
    pub fn discard(range: Range<u64>) -> Self {
        Self::new(Request::Discard { range })
    }

    /// What it asks for.
    pub fn request(&self) -> &Request<'a> {
        &self.request
    }

    /// What it asks for, with access to the buffers. A backend that runs batches itself works on this and then calls [`complete`](Self::complete).
    pub fn request_mut(&mut self) -> &mut Request<'a> {
        &mut self.request
    }

    /// Stores the result.
    pub fn complete(&mut self, result: Result<()>) {
        self.result = Some(result);
    }

    /// The result, once the batch was submitted.
    pub fn result(&self) -> Option<&Result<()>> {
        self.result.as_ref()
    }

    /// Takes the result out.
    pub fn take_result(&mut self) -> Option<Result<()>> {
        self.result.take()
    }

    /// Runs it by plain calls of `storage` and stores the result.
    pub fn run(&mut self, storage: &(impl Storage + ?Sized)) {
        let result = match &mut self.request {
            Request::Read { buf, offset } => storage.read_at(buf, *offset),
            Request::ReadVectored { bufs, offset } => storage.read_vectored_at(bufs, *offset),
            Request::Write { buf, offset } => storage.write_at(buf, *offset),
            Request::WriteVectored { bufs, offset } => storage.write_vectored_at(bufs, *offset),
            Request::WriteZeroes { range, flags } => storage.write_zeroes(range.clone(), *flags),
            Request::Discard { range } => storage.discard(range.clone()),
        };
        self.complete(result);
    }
}
