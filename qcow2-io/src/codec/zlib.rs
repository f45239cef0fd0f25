//! Raw deflate (RFC 1951).

use std::cell::RefCell;

use zlib_rs::{
    Deflate, DeflateConfig, DeflateError, DeflateFlush, Inflate, InflateError, InflateFlush, Status,
};

use super::{Codec, CodecError, keep, take};

/// The longest back-reference that is read, as a power of two: writers with any window are understood.
const WINDOW_BITS: u8 = 15;
/// The longest that is written, with the sign that asks for a stream without header: there are readers that know no more.
const WRITTEN_WINDOW_BITS: i32 = -12;
/// Room for symbols before a block must end; the most there is.
const MEM_LEVEL: i32 = 9;

thread_local! {
    static DECODER: RefCell<Option<Inflate>> = const { RefCell::new(None) };
    static ENCODER: RefCell<Option<(i32, Deflate)>> = const { RefCell::new(None) };
}

pub(super) fn decompress(input: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    let mut decoder = take(&DECODER).unwrap_or_else(|| Inflate::new(false, WINDOW_BITS));
    let result = inflate(&mut decoder, input, out);
    keep(&DECODER, decoder);
    result
}

pub(super) fn compress(
    level: i32,
    cluster: &[u8],
    out: &mut [u8],
) -> Result<Option<usize>, CodecError> {
    let codec = Codec::Zlib;
    let mut encoder = match take(&ENCODER) {
        Some((same, mut encoder)) if same == level => {
            encoder.reset();
            encoder
        }
        _ => Deflate::new_with_config(DeflateConfig {
            level,
            window_bits: WRITTEN_WINDOW_BITS,
            mem_level: MEM_LEVEL,
            ..DeflateConfig::default()
        }),
    };
    match encoder.compress(cluster, out, DeflateFlush::Finish) {
        Ok(Status::StreamEnd) => {
            let len = usize::try_from(encoder.total_out()).unwrap_or(usize::MAX);
            keep(&ENCODER, (level, encoder));
            Ok(Some(len))
        }
        // No room. The encoder goes: one that stopped inside a stream may not be used again, not even reset.
        Ok(Status::Ok | Status::BufError) => Ok(None),
        Err(DeflateError::MemError) => Err(CodecError::NoMemory { codec }),
        Err(error) => Err(CodecError::Encoder {
            codec,
            reason: error.as_str(),
        }),
    }
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
