//! Compressed clusters, decoded: can the guest read them?
//!
//! Many entries may refer to one piece of compressed data, so the pieces are gathered first, in the order of the file, and
//! each distinct one is decoded once. So that memory stays bounded, that goes in passes: each takes the next so many pieces,
//! decodes them, and looks at the tables again for those who have a piece that doesn't decode. The passes depend on the image
//! only, and so do the findings.

mod decode;
mod gather;
mod limits;
mod piece;
mod tables;
mod tell;

use qcow2_format::header::CompressionType;
use qcow2_io::codec::Codec;

use crate::image::Image;
use crate::walk::L1Scan;
use crate::{Code, Finding, Phase, Place, Run, Structure};
use limits::Limits;
use piece::Piece;
use tables::Tables;

/// Bytes of guest data that a pass decodes, about: what is found is told after each.
const PASS_BYTES: u64 = 64 << 30;
/// Pieces of a pass, at least and at most.
const PASS_PIECES: (u64, u64) = (1 << 16, 1 << 21);

/// Decodes all compressed clusters, and tells of those that don't decode. Gives the number of distinct pieces it decoded.
pub(crate) fn check(image: &Image<'_>, scan: &L1Scan, run: &Run<'_>) -> u64 {
    if image.rules.external_data {
        // Compressed entries are corrupt there, and no reader follows them.
        return 0;
    }
    let most = (PASS_BYTES / image.cluster_size()).clamp(PASS_PIECES.0, PASS_PIECES.1);
    let most = usize::try_from(most).unwrap_or(1);
    let codec = codec(image);
    passes(image, scan, run, most, codec, codec.is_available())
}

/// The passes, of `most` pieces each. Without a decoder they only count.
fn passes(
    image: &Image<'_>,
    scan: &L1Scan,
    run: &Run<'_>,
    most: usize,
    codec: Codec,
    available: bool,
) -> u64 {
    let tables = Tables::new(image, scan);
    let mut limits = Limits::new(codec, image.cluster_size());
    let mut missing = 0_u64;
    let mut decoded = 0_u64;
    let mut after = None;
    while !run.is_cancelled() {
        run.phase(Phase::Content, 0);
        let mut gathered = gather::gather(&tables, after, most, run);
        after = gathered.pieces.last().copied();
        if run.is_cancelled() || gathered.pieces.is_empty() {
            break;
        }
        if available {
            gathered.pieces.retain(|piece| limits.admit(image, *piece));
            let (count, failed) = decode::decode(image, codec, &gathered.pieces, run);
            decoded = decoded.saturating_add(count);
            drop(gathered.pieces);
            if !failed.is_empty() {
                tell::tell(&tables, &failed, run);
            }
        } else {
            missing = missing.saturating_add(gathered.pieces.len() as u64);
        }
        if !gathered.more {
            break;
        }
    }
    if missing > 0 {
        no_codec(codec, missing, run);
    }
    limits.tell(image, run);
    decoded
}

fn codec(image: &Image<'_>) -> Codec {
    match image.header.compression_type {
        CompressionType::Zlib => Codec::Zlib,
        CompressionType::Zstd => Codec::Zstd,
    }
}

/// Tells that this build can't decode the image's compressed clusters.
fn no_codec(codec: Codec, pieces: u64, run: &Run<'_>) {
    let place = Place::of(Structure::CompressedData);
    let detail = format!(
        "this build has no {codec} decoder, which is its feature `{codec}`: {pieces} pieces of compressed data were not decoded"
    );
    let finding = Finding::new(Code::CompressedUnchecked, place, detail);
    run.find(finding.times(pieces));
}

#[cfg(test)]
mod tests;
