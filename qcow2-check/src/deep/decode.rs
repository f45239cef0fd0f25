//! Decoding pieces, on all threads.

use qcow2_io::codec::{Codec, CodecError};

use super::Piece;
use crate::Run;
use crate::image::Image;
use crate::reader::is_zero;

/// Bytes of guest data that make a unit of work.
const UNIT_BYTES: u64 = 8 << 20;
/// Pieces of a unit, at least and at most.
const UNIT_PIECES: (u64, u64) = (4, 4096);
/// Bytes of the file read at once where pieces lie side by side.
const READ_BYTES: u64 = 1 << 20;
/// Bytes between two pieces that are read for nothing.
const GAP_BYTES: u64 = 4096;
/// Of a window longer than this, a bit is looked at first.
const LONG_BYTES: u64 = 64 << 10;
const BIT_BYTES: usize = 4096;

/// A piece that gives no cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    pub(super) piece: Piece,
    pub(super) why: Why,
}

/// Why a piece gives no cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// It is no stream for a cluster.
    Undecodable(CodecError),
    /// Nobody knows whether it is one: the storage can't give it, or there is no memory for a decoder.
    Unknown(&'static str),
}

/// Decodes pieces, which are in order and distinct. Gives how many it decoded, and those that gave no cluster, in order.
pub(super) fn decode(
    image: &Image<'_>,
    codec: Codec,
    pieces: &[Piece],
    run: &Run<'_>,
) -> (u64, Vec<Failed>) {
    let bytes = pieces.iter().map(|piece| piece.len(image));
    run.phase(crate::Phase::Content, bytes.fold(0, u64::saturating_add));
    let size = (UNIT_BYTES / image.cluster_size()).clamp(UNIT_PIECES.0, UNIT_PIECES.1);
    let size = usize::try_from(size).unwrap_or(1);
    let decoders = run.share_out(
        pieces.len().div_ceil(size) as u64,
        || Decoder {
            image,
            codec,
            run,
            input: Vec::new(),
            out: vec![0; image.geometry.cluster_len()],
            decoded: 0,
            failed: Vec::new(),
        },
        |decoder, unit| {
            let unit = usize::try_from(unit).unwrap_or(usize::MAX);
            if let Some(pieces) = pieces.chunks(size).nth(unit) {
                decoder.unit(pieces);
            }
            run.progress(image.reader.bytes_read());
        },
    );
    let mut decoded = 0;
    let mut failed = Vec::new();
    for mut decoder in decoders {
        decoded += decoder.decoded;
        failed.append(&mut decoder.failed);
    }
    failed.sort_unstable_by_key(|failed| failed.piece);
    (decoded, failed)
}

struct Decoder<'a, 'i> {
    image: &'a Image<'i>,
    codec: Codec,
    run: &'a Run<'a>,
    /// Bytes of the file.
    input: Vec<u8>,
    /// A cluster.
    out: Vec<u8>,
    decoded: u64,
    failed: Vec<Failed>,
}

impl Decoder<'_, '_> {
    fn unit(&mut self, mut pieces: &[Piece]) {
        while let Some(first) = pieces.first() {
            if self.run.is_cancelled() {
                return;
            }
            let (near, rest) = pieces.split_at(self.side_by_side(*first, pieces));
            pieces = rest;
            match near {
                [alone] => self.alone(*alone),
                several => self.together(first.offset(self.image), several),
            }
        }
    }

    /// How many pieces, which start with `first`, are worth to be read at once; at least one.
    fn side_by_side(&self, first: Piece, pieces: &[Piece]) -> usize {
        let start = first.offset(self.image);
        let mut end = first.end(self.image);
        let others = pieces.iter().skip(1).take_while(|piece| {
            let near = piece.offset(self.image) <= end.saturating_add(GAP_BYTES);
            end = end.max(piece.end(self.image));
            near && end.saturating_sub(start) <= READ_BYTES
        });
        1 + others.count()
    }

    /// Reads pieces at once, and decodes each.
    fn together(&mut self, start: u64, pieces: &[Piece]) {
        let image = self.image;
        let ends = pieces.iter().map(|piece| piece.end(image));
        let len = ends.max().unwrap_or(start).saturating_sub(start);
        let mut input = std::mem::take(&mut self.input);
        input.resize(usize::try_from(len).unwrap_or(0), 0);
        if image.reader.read(&mut input, start).is_ok() {
            for piece in pieces {
                let from = usize::try_from(piece.offset(image).saturating_sub(start));
                let len = usize::try_from(piece.len(image));
                let (from, len) = (from.unwrap_or(usize::MAX), len.unwrap_or(0));
                let window = input.get(from..from.saturating_add(len));
                self.decode(*piece, window.unwrap_or_default());
            }
            self.input = input;
        } else {
            // One of them can't be read: find out which.
            self.input = input;
            for piece in pieces {
                self.alone(*piece);
            }
        }
    }

    /// Reads one piece, and decodes it.
    fn alone(&mut self, piece: Piece) {
        let image = self.image;
        let (offset, len) = (piece.offset(image), piece.len(image));
        let mut input = std::mem::take(&mut self.input);
        input.resize(usize::try_from(len).unwrap_or(0), 0);
        let mut read = 0;
        let mut result = Ok(());
        if len > LONG_BYTES
            && let Some(bit) = input.get_mut(..BIT_BYTES)
        {
            result = image.reader.read(bit, offset);
            read = BIT_BYTES;
            if result.is_ok() && is_zero(bit) {
                // No stream starts so, whatever follows: what claims to lie in a large hole costs a look.
                input.truncate(BIT_BYTES);
            }
        }
        if let Some(rest) = input.get_mut(read..).filter(|rest| !rest.is_empty())
            && result.is_ok()
        {
            result = image.reader.read(rest, offset.saturating_add(read as u64));
        }
        match result {
            Ok(()) => self.decode(piece, &input),
            Err(_) => self.failed(piece, Why::Unknown("the storage can't give it")),
        }
        self.input = input;
    }

    fn decode(&mut self, piece: Piece, window: &[u8]) {
        self.decoded += 1;
        match self.codec.decompress(window, &mut self.out) {
            Ok(()) => {}
            Err(CodecError::NoMemory { .. }) => {
                self.failed(piece, Why::Unknown("there is no memory for a decoder"));
            }
            Err(error) => self.failed(piece, Why::Undecodable(error)),
        }
    }

    fn failed(&mut self, piece: Piece, why: Why) {
        self.failed.push(Failed { piece, why });
    }
}
