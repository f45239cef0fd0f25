//! Raw deflate (RFC 1951).

use std::cell::RefCell;

use zlib_rs::{Inflate, InflateError, InflateFlush, Status};

use super::{Codec, CodecError, with_decoder};

/// The longest back-reference, as a power of two: writers with smaller windows are read as well.
const WINDOW_BITS: u8 = 15;

thread_local! {
    static DECODER: RefCell<Option<Inflate>> = const { RefCell::new(None) };
}

pub(super) fn decompress(input: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    with_decoder(
        &DECODER,
        || Ok(Inflate::new(false, WINDOW_BITS)),
        |decoder| inflate(decoder, input, out),
    )
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
