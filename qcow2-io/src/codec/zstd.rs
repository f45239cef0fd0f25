//! Zstandard (RFC 8878).
//!
//! Frames are decoded whole, straight into the cluster. So the cluster itself is the window, and a frame that claims a
//! huge one costs nothing.

use std::cell::RefCell;

use zstd_safe::zstd_sys::ZSTD_ErrorCode;
use zstd_safe::{CCtx, CParameter, DCtx, ErrorCode};

use super::{Codec, CodecError, keep, take};

thread_local! {
    static DECODER: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
    static ENCODER: RefCell<Option<(i32, CCtx<'static>)>> = const { RefCell::new(None) };
}

pub(super) fn decompress(input: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    let codec = Codec::Zstd;
    let kept = take(&DECODER).or_else(DCtx::try_create);
    let mut decoder = kept.ok_or(CodecError::NoMemory { codec })?;
    let result = frames(&mut decoder, input, out);
    keep(&DECODER, decoder);
    result
}

pub(super) fn compress(
    level: i32,
    cluster: &[u8],
    out: &mut [u8],
) -> Result<Option<usize>, CodecError> {
    let codec = Codec::Zstd;
    let mut encoder = match take(&ENCODER) {
        Some((same, encoder)) if same == level => encoder,
        _ => {
            let mut encoder = CCtx::try_create().ok_or(CodecError::NoMemory { codec })?;
            let set = encoder.set_parameter(CParameter::CompressionLevel(level));
            set.map_err(failed)?;
            encoder
        }
    };
    let result = encoder.compress2(out, cluster);
    keep(&ENCODER, (level, encoder));
    match result {
        Ok(len) => Ok(Some(len)),
        Err(code) if is(code, ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall) => Ok(None),
        Err(code) => Err(failed(code)),
    }
}

fn frames(decoder: &mut DCtx<'_>, input: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    let codec = Codec::Zstd;
    let expected = out.len();
    let (mut input, mut rest) = (input, out);
    while !rest.is_empty() {
        let found = expected.saturating_sub(rest.len());
        let fail = |code| {
            if is(code, ZSTD_ErrorCode::ZSTD_error_srcSize_wrong) {
                CodecError::EndsEarly {
                    codec,
                    found,
                    expected,
                }
            } else if is(code, ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall) {
                CodecError::TooLong { codec, expected }
            } else if is(code, ZSTD_ErrorCode::ZSTD_error_memory_allocation) {
                CodecError::NoMemory { codec }
            } else {
                CodecError::Damaged {
                    codec,
                    reason: zstd_safe::get_error_name(code),
                }
            }
        };
        // Never 0, so the loop ends with the input at the latest.
        let frame_len = zstd_safe::find_frame_compressed_size(input).map_err(fail)?;
        let (frame, behind) = input.split_at_checked(frame_len).unwrap_or((input, &[]));
        let done = decoder.decompress(rest, frame).map_err(fail)?;
        input = behind;
        rest = rest.get_mut(done..).unwrap_or_default();
    }
    Ok(())
}

/// An encoder's error other than a lack of room.
fn failed(code: ErrorCode) -> CodecError {
    let codec = Codec::Zstd;
    if is(code, ZSTD_ErrorCode::ZSTD_error_memory_allocation) {
        return CodecError::NoMemory { codec };
    }
    CodecError::Encoder {
        codec,
        reason: zstd_safe::get_error_name(code),
    }
}

/// Whether a result is this error: the library returns them negated, as a size.
fn is(code: ErrorCode, error: ZSTD_ErrorCode) -> bool {
    code == 0usize.wrapping_sub(error as usize)
}
