//! The undo file: what a repair overwrote, and the way back.
//!
//! A file is a row of records, each with a checksum; what follows the first one that is not whole does not count. Each run of a
//! repair is a session: `Start` (which image, how long), the bytes that will be overwritten, `Sealed`. That much is
//! durable before the first byte of the image changes, so a session that is not sealed has changed nothing. `Done` ends it. Sessions are
//! only ever appended, and undone from the last to the first.

use std::path::{Path, PathBuf};

use qcow2_io::{Storage, StorageError};
use thiserror::Error;

use super::crc::{Crc, crc};
use crate::ByteRange;

const MAGIC: [u8; 8] = *b"QCOWUNDO";
/// Magic, kind, payload length, three numbers; the checksum follows.
const HEAD: usize = 48;
const RECORD_MIN: u64 = HEAD as u64 + 8;
/// Bytes that one record saves, at most.
const PIECE: u64 = 1 << 20;
/// Bytes of the image's beginning that identify it.
pub(super) const IDENTITY_LEN: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Kind {
    /// Length of the image, version of this format. The payload has the checksum of the image's first sector, and of all that the
    /// repair makes of it.
    Start = 1,
    /// Offset of the bytes in the payload.
    Bytes = 2,
    /// Offset and length of bytes that are the payload's eight over and over.
    Fill = 3,
    /// How many records the session has.
    Sealed = 4,
    /// Length of the repaired image, checksum of what is now where bytes were saved.
    Done = 5,
    /// The way back was begun.
    Undoing = 6,
    /// The way back came to its end.
    Undone = 7,
}

const KINDS: [Kind; 7] = [
    Kind::Start,
    Kind::Bytes,
    Kind::Fill,
    Kind::Sealed,
    Kind::Done,
    Kind::Undoing,
    Kind::Undone,
];
const VERSION: u64 = 1;

/// Why a repair could not be undone, or its undo file not written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UndoError {
    /// The image can't be read or written.
    #[error("the image failed")]
    Image(#[source] StorageError),
    /// The undo file can't be read or written.
    #[error("the undo file failed")]
    File(#[source] StorageError),
    /// The file has no whole record of a repair.
    #[error("this is no undo file, or its beginning is damaged")]
    NotUndo,
    /// The file holds a repair that came to its end, or that was undone: another one needs another file.
    #[error(
        "the undo file holds a repair that has come to its end; another one needs another file"
    )]
    Finished,
    /// The file was written for another image, or the image was changed since it was repaired.
    #[error("the undo file does not fit the image: {what}")]
    Mismatch {
        /// What differs.
        what: &'static str,
    },
}

/// What an undo file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndoSummary {
    /// Runs of a repair that may have changed the image.
    pub sessions: u64,
    /// Whether the last of them came to its end.
    pub finished: bool,
    /// Whether all of it was undone.
    pub undone: bool,
    /// Length of the image before the first of them, in bytes.
    pub original_len: u64,
    /// Bytes of the image that are saved, all sessions together.
    pub saved_bytes: u64,
}

/// Where the undo file of an image lies unless another place is named: beside the image, with `.undo` behind its name.
pub fn default_undo_path(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".undo");
    PathBuf::from(name)
}

/// A record's head, and where it is.
#[derive(Clone, Copy, Debug)]
struct Record {
    kind: Kind,
    numbers: [u64; 3],
    payload: u64,
    payload_len: u64,
}

/// One run of a repair.
#[derive(Debug, Default)]
struct Session {
    original_len: u64,
    /// Checksums of what the first sector may be.
    identities: Vec<u64>,
    saved: Vec<Record>,
    sealed: bool,
    /// Length and checksum after the repair.
    done: Option<(u64, u64)>,
    undoing: bool,
    undone: bool,
}

fn record(kind: Kind, numbers: [u64; 3], payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + payload.len() + 8);
    bytes.extend(MAGIC);
    bytes.extend((kind as u64).to_be_bytes());
    bytes.extend((payload.len() as u64).to_be_bytes());
    for number in numbers {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(payload);
    bytes.extend(crc(&bytes).to_be_bytes());
    bytes
}

/// The checksum that stands for an image's first sector.
pub(super) fn identity(image: &dyn Storage) -> Result<u64, UndoError> {
    let mut sector = [0; IDENTITY_LEN];
    image.read_at(&mut sector, 0).map_err(UndoError::Image)?;
    Ok(crc(&sector))
}

/// Writes a session.
pub(super) struct Writer<'a> {
    file: &'a dyn Storage,
    end: u64,
    records: u64,
    buffer: Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Starts a session behind those that the file has. What follows the last whole record is overwritten.
    /// `sectors` are the checksums of what becomes of the image's first sector.
    pub(super) fn start(
        file: &'a dyn Storage,
        image: &dyn Storage,
        sectors: &[u64],
    ) -> Result<Self, UndoError> {
        let len = file.len().map_err(UndoError::File)?;
        let end = if len == 0 {
            0
        } else {
            let (sessions, end) = read(file)?;
            if end == 0 {
                return Err(UndoError::NotUndo);
            }
            if sessions.iter().any(|s| s.done.is_some() || s.undoing) {
                return Err(UndoError::Finished);
            }
            end
        };
        let mut writer = Self {
            file,
            end,
            records: 0,
            buffer: Vec::new(),
        };
        let len = image.len().map_err(UndoError::Image)?;
        let identities = [identity(image)?]
            .into_iter()
            .chain(sectors.iter().copied());
        let payload: Vec<u8> = identities.flat_map(u64::to_be_bytes).collect();
        writer.add(Kind::Start, [len, VERSION, 0], &payload)?;
        Ok(writer)
    }

    fn add(&mut self, kind: Kind, numbers: [u64; 3], payload: &[u8]) -> Result<(), UndoError> {
        self.buffer.extend(record(kind, numbers, payload));
        self.records += 1;
        if self.buffer.len() as u64 >= PIECE {
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), UndoError> {
        let written = self.file.write_at(&self.buffer, self.end);
        written.map_err(UndoError::File)?;
        self.end += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Saves what the image has in these ranges, as far as it reaches, and makes that durable.
    pub(super) fn save(
        &mut self,
        image: &dyn Storage,
        ranges: &[ByteRange],
    ) -> Result<(), UndoError> {
        let len = image.len().map_err(UndoError::Image)?;
        let mut bytes = Vec::new();
        for range in ranges {
            let end = range.end.min(len);
            let mut at = range.start;
            while at < end {
                let piece = (end - at).min(PIECE);
                bytes.resize(usize::try_from(piece).unwrap_or(0), 0);
                image.read_at(&mut bytes, at).map_err(UndoError::Image)?;
                let (words, rest) = bytes.as_chunks::<8>();
                match words.first() {
                    Some(first) if rest.is_empty() && words.iter().all(|word| word == first) => {
                        self.add(Kind::Fill, [at, piece, 0], &first[..])?;
                    }
                    _ => self.add(Kind::Bytes, [at, piece, 0], &bytes)?,
                }
                at += piece;
            }
        }
        let records = self.records;
        self.add(Kind::Sealed, [records, 0, 0], &[])?;
        self.finish()
    }

    /// Says that the repair has come to its end.
    pub(super) fn done(
        &mut self,
        image: &dyn Storage,
        ranges: &[ByteRange],
    ) -> Result<(), UndoError> {
        let len = image.len().map_err(UndoError::Image)?;
        self.add(Kind::Done, [len, sum(image, ranges)?, 0], &[])?;
        self.finish()
    }

    fn finish(&mut self) -> Result<(), UndoError> {
        self.write()?;
        // A session of an earlier run that was longer, and torn, must not follow this one.
        self.file.set_len(self.end).map_err(UndoError::File)?;
        self.file.flush().map_err(UndoError::File)
    }
}

/// The checksum of what the image has in these ranges.
fn sum(image: &dyn Storage, ranges: &[ByteRange]) -> Result<u64, UndoError> {
    let mut sum = Crc::new();
    let mut bytes = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let piece = (range.end - at).min(PIECE);
            bytes.resize(usize::try_from(piece).unwrap_or(0), 0);
            image.read_at(&mut bytes, at).map_err(UndoError::Image)?;
            sum.add(&bytes);
            at += piece;
        }
    }
    Ok(sum.finish())
}

/// The sessions of a file, and where its last whole record ends.
fn read(file: &dyn Storage) -> Result<(Vec<Session>, u64), UndoError> {
    let len = file.len().map_err(UndoError::File)?;
    let mut sessions: Vec<Session> = Vec::new();
    let mut at = 0_u64;
    let mut bytes = Vec::new();
    let mut records = 0;
    while len.saturating_sub(at) >= RECORD_MIN {
        let Some(record) = whole(file, at, len, &mut bytes)? else {
            break;
        };
        let [a, b, _] = record.numbers;
        match (record.kind, sessions.last_mut()) {
            (Kind::Start, _) if b == VERSION => {
                records = 0;
                let words = bytes.as_chunks::<8>().0.iter().skip(HEAD / 8);
                let words = words.take(usize::try_from(record.payload_len / 8).unwrap_or(0));
                sessions.push(Session {
                    original_len: a,
                    identities: words.copied().map(u64::from_be_bytes).collect(),
                    ..Session::default()
                });
            }
            (Kind::Bytes | Kind::Fill, Some(session)) if !session.sealed => {
                session.saved.push(record);
            }
            (Kind::Sealed, Some(session)) if a == records => session.sealed = true,
            (Kind::Done, Some(session)) if session.sealed => session.done = Some((a, b)),
            (Kind::Undoing, Some(session)) => session.undoing = true,
            (Kind::Undone, Some(session)) => session.undone = true,
            _ => break,
        }
        records += 1;
        at = record.payload + record.payload_len + 8;
    }
    Ok((sessions, at))
}

/// The record that starts at `at`, if its checksum is right.
fn whole(
    file: &dyn Storage,
    at: u64,
    len: u64,
    bytes: &mut Vec<u8>,
) -> Result<Option<Record>, UndoError> {
    bytes.resize(HEAD, 0);
    file.read_at(bytes, at).map_err(UndoError::File)?;
    let mut words = bytes.as_chunks::<8>().0.iter().copied();
    let magic = words.next();
    let mut number = || words.next().map_or(0, u64::from_be_bytes);
    let (kind, payload_len) = (number(), number());
    let numbers = [number(), number(), number()];
    let Some(kind) = KINDS.into_iter().find(|known| *known as u64 == kind) else {
        return Ok(None);
    };
    if magic != Some(MAGIC) || payload_len > PIECE || len - at < RECORD_MIN + payload_len {
        return Ok(None);
    }
    let total = HEAD + usize::try_from(payload_len).unwrap_or(0) + 8;
    bytes.resize(total, 0);
    file.read_at(bytes, at).map_err(UndoError::File)?;
    let (content, sum) = bytes.split_at(total - 8);
    let fits = match kind {
        Kind::Bytes => payload_len == numbers[1],
        Kind::Fill => payload_len == 8 && numbers[1].is_multiple_of(8),
        Kind::Start => payload_len.is_multiple_of(8),
        _ => payload_len == 0,
    };
    if !fits || crc(content).to_be_bytes() != sum {
        return Ok(None);
    }
    Ok(Some(Record {
        kind,
        numbers,
        payload: at + HEAD as u64,
        payload_len,
    }))
}

fn sealed(file: &dyn Storage) -> Result<Vec<Session>, UndoError> {
    let (mut sessions, end) = read(file)?;
    if end == 0 || sessions.is_empty() {
        return Err(UndoError::NotUndo);
    }
    sessions.retain(|session| session.sealed);
    Ok(sessions)
}

/// Tells what an undo file holds.
///
/// # Errors
///
/// The file can't be read, or is none.
pub fn read_undo(file: &dyn Storage) -> Result<UndoSummary, UndoError> {
    let sessions = sealed(file)?;
    let saved = sessions.iter().flat_map(|session| &session.saved);
    Ok(UndoSummary {
        sessions: sessions.len() as u64,
        finished: sessions.last().is_none_or(|last| last.done.is_some()),
        undone: sessions.last().is_some_and(|last| last.undone),
        original_len: sessions.first().map_or(0, |first| first.original_len),
        saved_bytes: saved.fold(0, |sum, record| sum.saturating_add(record.numbers[1])),
    })
}

/// Brings back what the image was before the first repair that the undo file tells of: each byte, and the length.
///
/// It may be done again, and after a crash in its middle it has to be. If the last repair came to its end, the image must be as that left it,
/// where it wrote; `force` goes back all the same.
///
/// # Errors
///
/// The image or the file fails, the file is no undo file, or does not fit the image. In the last two cases nothing was written.
///
/// # Durability
///
/// When it returns, all of it is durable.
pub fn undo(
    image: &dyn Storage,
    file: &dyn Storage,
    force: bool,
) -> Result<UndoSummary, UndoError> {
    let summary = read_undo(file)?;
    let sessions = sealed(file)?;
    if let (Some(first), Some(last), false) = (sessions.first(), sessions.last(), force) {
        fits(image, first, last)?;
    }
    note(file, Kind::Undoing)?;
    let mut bytes = Vec::new();
    for session in sessions.iter().rev() {
        for record in &session.saved {
            let [at, len, _] = record.numbers;
            bytes.resize(usize::try_from(record.payload_len).unwrap_or(0), 0);
            let read = file.read_at(&mut bytes, record.payload);
            read.map_err(UndoError::File)?;
            if record.kind == Kind::Fill {
                let times = usize::try_from(len / 8).unwrap_or(0);
                bytes = bytes.repeat(times);
            }
            image.write_at(&bytes, at).map_err(UndoError::Image)?;
        }
    }
    if let Some(first) = sessions.first() {
        let cut = image.set_len(first.original_len);
        cut.map_err(UndoError::Image)?;
    }
    image.flush().map_err(UndoError::Image)?;
    note(file, Kind::Undone)?;
    Ok(summary)
}

/// Adds a record without content, and makes it durable.
fn note(file: &dyn Storage, kind: Kind) -> Result<(), UndoError> {
    let (_, end) = read(file)?;
    let written = file.write_at(&record(kind, [0; 3], &[]), end);
    written.map_err(UndoError::File)?;
    file.flush().map_err(UndoError::File)
}

/// Whether the undo file is this image's.
fn fits(image: &dyn Storage, first: &Session, last: &Session) -> Result<(), UndoError> {
    let len = image.len().map_err(UndoError::Image)?;
    let mismatch = |what| Err(UndoError::Mismatch { what });
    if last.undone {
        return mismatch("the repair was undone before");
    }
    if last.undoing {
        return Ok(());
    }
    let Some((done_len, done_sum)) = last.done else {
        // Cut short: its bytes may be the old or the new ones, but it never makes a file shorter.
        return if len < first.original_len {
            mismatch("the image is shorter than it was")
        } else if last.identities.contains(&identity(image)?) {
            Ok(())
        } else {
            mismatch("its header is none that the repair had before it")
        };
    };
    if len != done_len {
        return mismatch("the image has another length than after the repair");
    }
    if sum(image, &saved_ranges(last))? != done_sum {
        return mismatch("the image was changed after the repair");
    }
    Ok(())
}

/// The ranges that a session saved, ascending; neighbours joined.
fn saved_ranges(session: &Session) -> Vec<ByteRange> {
    let mut ranges: Vec<ByteRange> = Vec::new();
    for record in &session.saved {
        let range = ByteRange::new(record.numbers[0], record.numbers[1]);
        match ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range),
        }
    }
    ranges
}
