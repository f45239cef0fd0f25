//! Raw deflate (RFC 1951).

use std::cell::RefCell;

use zlib_rs::{Inflate, InflateError, InflateFlush, Status};

use super::deflate::Encoder;
use super::{Codec, CodecError, keep, take};

/// The longest back-reference that is read, as a power of two: writers with any window are understood.
const WINDOW_BITS: u8 = 15;

thread_local! {
    static DECODER: RefCell<Option<Inflate>> = const { RefCell::new(None) };
    static ENCODER: RefCell<Option<Box<Encoder>>> = const { RefCell::new(None) };
}

pub(super) fn decompress(input: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    let mut decoder = take(&DECODER).unwrap_or_else(|| Inflate::new(false, WINDOW_BITS));
    let result = inflate(&mut decoder, input, out);
    keep(&DECODER, decoder);
    result
}

pub(super) fn compress(level: i32, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut encoder = take(&ENCODER).unwrap_or_else(|| Box::new(Encoder::new()));
    let len = encoder.compress(level, cluster, out);
    keep(&ENCODER, encoder);
    len
}

fn inflate(decoder: &mut Inflate, input: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    let codec = Codec::Zlib;
    if out.is_empty() {
        return Ok(());
    }
    decoder.reset(false);
    let status = decoder
        .decompress(input, out, InflateFlush::Finish)
        .map_err(|error| match error {
            InflateError::MemError => CodecError::NoMemory { codec },
            // Also when the cluster is complete but a broken block header follows: the stream as a whole can't be trusted.
            error => CodecError::Damaged {
                codec,
                reason: decoder.error_message().unwrap_or(error.as_str()),
            },
        })?;
    let found = usize::try_from(decoder.total_out()).unwrap_or(usize::MAX);
    match status {
        // `Ok` and `BufError`: the stream would go on, but there is no room, or no input, for more.
        Status::StreamEnd | Status::Ok | Status::BufError if found == out.len() => Ok(()),
        _ => Err(CodecError::EndsEarly {
            codec,
            found,
            expected: out.len(),
        }),
    }
}
