//! Reading and writing.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::time::Instant;

use qcow2_image::{Image, ImageError};
use qcow2_io::codec::Level;
use qcow2_io::{Operation, Storage, StorageError, StorageErrorKind, ZeroFlags};
use rustix::io::Errno;

use super::report::{self, Style};
use super::session::{Done, Failed, Session};
use super::table::Command;
use crate::words::getopt::Parsed;
use crate::words::{outside, size, system};
use crate::{complain, say};

/// The longest request.
const MAX_LEN: u64 = 0x7fff_fe00;
/// What buffers hold where nothing else was asked for.
const READ_FILL: u8 = 0xab;
const WRITE_FILL: u8 = 0xcd;

/// The switches of a transfer.
#[derive(Clone, Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of its own"
)]
struct Switches {
    style: Style,
    pattern: Option<u8>,
    vm_state: bool,
    compressed: bool,
    durable: bool,
    zeros: bool,
    unmap: bool,
    no_fallback: bool,
    verbose: bool,
    /// Which part of what was read is verified: from here, so much.
    check_from: Option<u64>,
    check_len: Option<u64>,
    source: Option<String>,
}

/// A number of bytes or a place, as commands take it.
pub(super) fn number(session: &Session<'_>, text: &str) -> Result<u64, Failed> {
    let parsed = size::parse(text)
        .ok()
        .filter(|value| i64::try_from(*value).is_ok());
    parsed.ok_or_else(|| {
        match size::parse(text) {
            Ok(_) | Err(size::SizeError::Range) => {
                say!(
                    session.console,
                    "Parsing error: argument too large -- {text}"
                );
            }
            Err(_) => say!(
                session.console,
                "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
            ),
        }
        Failed
    })
}

fn pattern(session: &Session<'_>, text: &str) -> Result<u8, Failed> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u8::from_str_radix(hex, 16).ok(),
        None => match text.strip_prefix('0') {
            Some(octal) if !octal.is_empty() => u8::from_str_radix(octal, 8).ok(),
            _ => text.parse().ok(),
        },
    };
    parsed.ok_or_else(|| {
        say!(session.console, "{text} is not a valid pattern byte");
        Failed
    })
}

impl Switches {
    /// `-s` means another thing for reads than for writes.
    fn from(session: &Session<'_>, parsed: &Parsed, writes: bool) -> Result<Self, Failed> {
        let mut switches = Self::default();
        for (code, value) in &parsed.options {
            match code {
                'C' => switches.style.brief = true,
                'q' => switches.style.quiet = true,
                'P' => switches.pattern = Some(pattern(session, value)?),
                'b' => switches.vm_state = true,
                'c' => switches.compressed = true,
                'f' => switches.durable = true,
                'z' => switches.zeros = true,
                'u' => switches.unmap = true,
                'n' => switches.no_fallback = true,
                'v' => switches.verbose = true,
                's' if writes => switches.source = Some(value.clone()),
                's' => switches.check_from = Some(number(session, value)?),
                'l' => switches.check_len = Some(number(session, value)?),
                // Buffers are as the engine likes them.
                _ => {}
            }
        }
        Ok(switches)
    }

    /// What does not go together.
    fn check(&self, session: &Session<'_>) -> Done {
        let told = |text: &str| {
            say!(session.console, "{text}");
            Err(Failed)
        };
        if self.vm_state && self.zeros {
            return told("-b and -z cannot be specified at the same time");
        }
        if self.vm_state && self.compressed {
            return told("-b and -c cannot be specified at the same time");
        }
        if self.durable && (self.vm_state || self.compressed) {
            return told("-f and -b or -c cannot be specified at the same time");
        }
        if self.zeros && self.compressed {
            return told("-c and -z cannot be specified at the same time");
        }
        if self.no_fallback && !self.zeros {
            return told("-n requires -z to be specified");
        }
        if self.unmap && !self.zeros {
            return told("-u requires -z to be specified");
        }
        let contents = [self.zeros, self.pattern.is_some(), self.source.is_some()];
        if contents.into_iter().filter(|set| *set).count() > 1 {
            return told("Only one of -z, -P, and -s can be specified at the same time");
        }
        Ok(())
    }
}

/// Where a request goes.
#[derive(Clone)]
struct Disk {
    storage: Arc<dyn Storage>,
    image: Option<Arc<Image>>,
    writable: bool,
    write_through: bool,
    /// Zeros are looked for in what is written; `true`: and may be unmapped.
    detect_zeros: Option<bool>,
}

impl Disk {
    fn of(session: &Session<'_>) -> Result<Self, Failed> {
        Ok(Self {
            storage: session.storage()?,
            image: session.image(),
            writable: session.node()?.writable,
            write_through: session.mode().writes_through(),
            detect_zeros: match session.node()?.options.text("detect-zeroes") {
                Some("on") => Some(false),
                Some("unmap") => Some(true),
                _ => None,
            },
        })
    }

    /// Refuses what reaches beyond the end, which no request changes.
    fn check(&self, offset: u64, len: u64, operation: Operation) -> Result<(), StorageError> {
        let end = self.storage.len()?.next_multiple_of(512);
        match offset.checked_add(len) {
            Some(wanted) if wanted <= end => Ok(()),
            _ => Err(StorageError::from_io(operation, Errno::IO).at(offset, len)),
        }
    }

    fn check_writable(&self, operation: Operation) -> Result<(), StorageError> {
        if self.writable {
            return Ok(());
        }
        Err(StorageError::from_io(operation, Errno::PERM))
    }

    /// Whether what is written reads as zeros, and zeros are looked for.
    fn finds_zeros(&self, parts: &[Vec<u8>]) -> bool {
        self.detect_zeros.is_some() && parts.iter().flatten().all(|byte| *byte == 0)
    }

    fn read(&self, parts: &mut [Vec<u8>], offset: u64) -> Result<(), StorageError> {
        self.check(offset, len_of(parts), Operation::Read)?;
        let mut slices: Vec<_> = parts.iter_mut().map(|part| IoSliceMut::new(part)).collect();
        self.storage.read_vectored_at(&mut slices, offset)
    }

    fn write(&self, parts: &[Vec<u8>], offset: u64, durable: bool) -> Result<(), StorageError> {
        self.check_writable(Operation::Write)?;
        self.check(offset, len_of(parts), Operation::Write)?;
        if self.finds_zeros(parts) {
            let flags = match self.detect_zeros {
                Some(true) => ZeroFlags::MAY_UNMAP,
                _ => ZeroFlags::NONE,
            };
            return self.zero(offset, len_of(parts), flags, durable);
        }
        let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        self.storage.write_vectored_at(&slices, offset)?;
        self.settle(durable)
    }

    fn zero(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
        durable: bool,
    ) -> Result<(), StorageError> {
        self.check_writable(Operation::WriteZeroes)?;
        self.check(offset, len, Operation::WriteZeroes)?;
        self.storage.write_zeroes(offset..offset + len, flags)?;
        self.settle(durable)
    }

    /// What a request of the guest does in a mode that keeps nothing back.
    fn settle(&self, durable: bool) -> Result<(), StorageError> {
        if durable || self.write_through {
            self.storage.flush()?;
        }
        Ok(())
    }
}

fn len_of(parts: &[Vec<u8>]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}

/// Place and lengths of a request.
fn extent(session: &Session<'_>, parsed: &Parsed) -> Result<(u64, Vec<u64>), Failed> {
    let mut numbers = parsed.operands.iter();
    let offset = match numbers.next() {
        Some(text) => number(session, text)?,
        None => 0,
    };
    let lens: Result<Vec<u64>, Failed> = numbers.map(|text| number(session, text)).collect();
    Ok((offset, lens?))
}

fn buffers(session: &Session<'_>, lens: &[u64], fill: u8) -> Result<Vec<Vec<u8>>, Failed> {
    let total = lens.iter().fold(0_u64, |sum, len| sum.saturating_add(*len));
    if total > MAX_LEN {
        say!(session.console, "too large a request: {total} bytes");
        return Err(Failed);
    }
    Ok(lens
        .iter()
        .map(|len| vec![fill; usize::try_from(*len).unwrap_or(0)])
        .collect())
}

fn one_len(
    session: &Session<'_>,
    lens: &[u64],
    text: Option<&String>,
    zeros: bool,
) -> Result<u64, Failed> {
    let len = lens.first().copied().unwrap_or(0);
    if len > MAX_LEN && !zeros {
        let given = text.map_or("", String::as_str);
        say!(
            session.console,
            "length cannot exceed {MAX_LEN} without -n, given {given}"
        );
        return Err(Failed);
    }
    Ok(len)
}

/// Looks whether a part of what was read is what it should be.
fn verify(console: &crate::Console, bytes: &[u8], offset: u64, switches: &Switches) -> bool {
    let Some(pattern) = switches.pattern else {
        return true;
    };
    let from = switches.check_from.unwrap_or(0);
    let len = switches
        .check_len
        .unwrap_or((bytes.len() as u64).saturating_sub(from));
    let range = usize::try_from(from).unwrap_or(usize::MAX)
        ..usize::try_from(from.saturating_add(len)).unwrap_or(usize::MAX);
    let same = bytes
        .get(range)
        .is_some_and(|part| part.iter().all(|byte| *byte == pattern));
    if !same {
        say!(
            console,
            "Pattern verification failed at offset {}, {len} bytes",
            offset.saturating_add(from)
        );
    }
    same
}

/// `read`
pub(super) fn read(session: &mut Session<'_>, command: &Command, parsed: &Parsed) -> Done {
    let switches = Switches::from(session, parsed, false)?;
    if switches.pattern.is_none() && (switches.check_from.is_some() || switches.check_len.is_some())
    {
        return command.misused(session);
    }
    let (offset, lens) = extent(session, parsed)?;
    let len = one_len(session, &lens, parsed.operands.get(1), false)?;
    let (from, part) = (switches.check_from.unwrap_or(0), switches.check_len);
    if from.saturating_add(part.unwrap_or(0)) > len {
        say!(
            session.console,
            "pattern verification range exceeds end of read data"
        );
        return Err(Failed);
    }
    if switches.vm_state {
        aligned(session, "offset", offset)?;
        aligned(session, "count", len)?;
    }
    let mut parts = buffers(session, &[len], READ_FILL)?;
    let disk = Disk::of(session)?;
    let began = Instant::now();
    let outcome = match (&disk.image, switches.vm_state) {
        (Some(image), true) => {
            let bytes = parts.first_mut().map(Vec::as_mut_slice).unwrap_or_default();
            image
                .read_vm_state(bytes, offset)
                .map_err(|error| system::describe(&error))
        }
        (None, true) => Err("Operation not supported".to_owned()),
        (_, false) => disk
            .read(&mut parts, offset)
            .map_err(|error| system::describe(&error)),
    };
    finish_read(session, "read", &switches, offset, &parts, began, outcome)
}

fn finish_read(
    session: &Session<'_>,
    name: &str,
    switches: &Switches,
    offset: u64,
    parts: &[Vec<u8>],
    began: Instant,
    outcome: Result<(), String>,
) -> Done {
    let time = began.elapsed();
    let console = session.console;
    if let Err(text) = outcome {
        say!(console, "{name} failed: {text}");
        return Err(Failed);
    }
    let bytes = parts.concat();
    let same = verify(console, &bytes, offset, switches);
    if switches.verbose && !switches.style.quiet {
        report::dump(console, offset, &bytes);
    }
    let total = bytes.len() as u64;
    report::tell(console, switches.style, "read", offset, total, total, time);
    if same { Ok(()) } else { Err(Failed) }
}

fn aligned(session: &Session<'_>, what: &str, value: u64) -> Done {
    if value.is_multiple_of(512) {
        return Ok(());
    }
    say!(
        session.console,
        "{value} is not a sector-aligned value for '{what}'"
    );
    Err(Failed)
}

/// `readv`
pub(super) fn readv(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let switches = Switches::from(session, parsed, false)?;
    let (offset, lens) = extent(session, parsed)?;
    let mut parts = buffers(session, &lens, READ_FILL)?;
    let disk = Disk::of(session)?;
    let began = Instant::now();
    let outcome = disk
        .read(&mut parts, offset)
        .map_err(|error| system::describe(&error));
    finish_read(session, "readv", &switches, offset, &parts, began, outcome)
}

/// `write`
pub(super) fn write(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let switches = Switches::from(session, parsed, true)?;
    switches.check(session)?;
    let (offset, lens) = extent(session, parsed)?;
    let len = one_len(session, &lens, parsed.operands.get(1), switches.zeros)?;
    if switches.vm_state || switches.compressed {
        aligned(session, "offset", offset)?;
        aligned(session, "count", len)?;
    }
    let disk = Disk::of(session)?;
    let parts = match (&switches.source, switches.zeros) {
        (_, true) => Vec::new(),
        (Some(path), false) => vec![from_file(session, path, len)?],
        (None, false) => buffers(session, &[len], switches.pattern.unwrap_or(WRITE_FILL))?,
    };
    let bytes = parts.first().map(Vec::as_slice).unwrap_or_default();
    let began = Instant::now();
    let outcome = if switches.zeros {
        disk.zero(offset, len, zero_flags(&switches), switches.durable)
            .map_err(|error| of_write(session, &error))
    } else if switches.vm_state {
        match &disk.image {
            Some(image) => image
                .write_vm_state(bytes, offset)
                .map_err(|error| system::describe(&error)),
            None => Err("Operation not supported".to_owned()),
        }
    } else if switches.compressed {
        compress(&disk, bytes, offset)
    } else {
        disk.write(&parts, offset, switches.durable)
            .map_err(|error| of_write(session, &error))
    };
    finish_write(session, "write", &switches, offset, len, began, outcome)
}

/// Why a write failed. That tables of snapshots are missed is told first.
fn of_write(session: &Session<'_>, error: &StorageError) -> String {
    let text = system::describe(error);
    let cause = std::error::Error::source(error).and_then(|cause| {
        let image = cause.downcast_ref::<std::io::Error>()?.get_ref()?;
        image.downcast_ref::<ImageError>()
    });
    if let Some(ImageError::SnapshotL1 { .. }) = cause {
        complain!(
            session.console,
            "qemu-io: Failed to flush the refcount block cache: {text}"
        );
    }
    text
}

fn zero_flags(switches: &Switches) -> ZeroFlags {
    let mut flags = ZeroFlags::NONE;
    if switches.unmap {
        flags = flags | ZeroFlags::MAY_UNMAP;
    }
    if switches.no_fallback {
        flags = flags | ZeroFlags::NO_FALLBACK;
    }
    flags
}

/// Compresses into clusters that have nothing yet.
fn compress(disk: &Disk, bytes: &[u8], offset: u64) -> Result<(), String> {
    let Some(image) = &disk.image else {
        return Err("Operation not supported".to_owned());
    };
    disk.check_writable(Operation::Write)
        .and_then(|()| disk.check(offset, bytes.len() as u64, Operation::Write))
        .map_err(|error| system::describe(&error))?;
    image
        .write_compressed(bytes, offset, Level::default())
        .map_err(|error| match error {
            qcow2_image::ImageError::Unaligned { .. } => "Invalid argument".to_owned(),
            error => system::describe(&error),
        })
}

/// The bytes of a file, over and over.
fn from_file(session: &Session<'_>, path: &str, len: u64) -> Result<Vec<u8>, Failed> {
    let found = fs::read(outside::path(path)).map_err(|error| {
        complain!(session.console, "{path}: {}", system::describe(&error));
        Failed
    })?;
    if found.is_empty() {
        say!(session.console, "{path}: file is empty");
        return Err(Failed);
    }
    let len = usize::try_from(len).unwrap_or(0);
    Ok(found.iter().copied().cycle().take(len).collect())
}

fn finish_write(
    session: &Session<'_>,
    name: &str,
    switches: &Switches,
    offset: u64,
    len: u64,
    began: Instant,
    outcome: Result<(), String>,
) -> Done {
    let time = began.elapsed();
    if let Err(text) = outcome {
        say!(session.console, "{name} failed: {text}");
        return Err(Failed);
    }
    report::tell(
        session.console,
        switches.style,
        "wrote",
        offset,
        len,
        len,
        time,
    );
    Ok(())
}

/// `writev`
pub(super) fn writev(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let switches = Switches::from(session, parsed, true)?;
    let (offset, lens) = extent(session, parsed)?;
    let parts = buffers(session, &lens, switches.pattern.unwrap_or(WRITE_FILL))?;
    let disk = Disk::of(session)?;
    let began = Instant::now();
    let outcome = disk
        .write(&parts, offset, switches.durable)
        .map_err(|error| system::describe(&error));
    finish_write(
        session,
        "writev",
        &switches,
        offset,
        len_of(&parts),
        began,
        outcome,
    )
}

/// `-i` counts an invalid request, for statistics that nobody keeps here, and does nothing.
fn is_only_counted(session: &Session<'_>, parsed: &Parsed, what: &str) -> bool {
    let counted = parsed.options.iter().any(|(code, _)| *code == 'i');
    if counted {
        say!(session.console, "injecting invalid {what} request");
    }
    counted
}

/// `aio_read`
pub(super) fn aio_read(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let switches = Switches::from(session, parsed, false)?;
    if is_only_counted(session, parsed, "read") {
        return Ok(());
    }
    let (offset, lens) = extent(session, parsed)?;
    let mut parts = buffers(session, &lens, READ_FILL)?;
    let disk = Disk::of(session)?;
    let console = session.console.clone();
    session.begin(move || {
        let began = Instant::now();
        if let Err(error) = disk.read(&mut parts, offset) {
            say!(console, "readv failed: {}", system::describe(&error));
            return false;
        }
        let time = began.elapsed();
        let bytes = parts.concat();
        let same = verify(&console, &bytes, offset, &switches);
        if switches.verbose && !switches.style.quiet {
            report::dump(&console, offset, &bytes);
        }
        let total = bytes.len() as u64;
        report::tell(&console, switches.style, "read", offset, total, total, time);
        same
    });
    Ok(())
}

/// `aio_write`
pub(super) fn aio_write(session: &mut Session<'_>, command: &Command, parsed: &Parsed) -> Done {
    let switches = Switches::from(session, parsed, true)?;
    if switches.zeros && parsed.operands.len() != 2 {
        say!(
            session.console,
            "-z supports only a single length parameter"
        );
        return Err(Failed);
    }
    if switches.unmap && !switches.zeros {
        say!(session.console, "-u requires -z to be specified");
        return Err(Failed);
    }
    if switches.zeros && switches.pattern.is_some() {
        say!(
            session.console,
            "-z and -P cannot be specified at the same time"
        );
        return Err(Failed);
    }
    if is_only_counted(session, parsed, "write") {
        return Ok(());
    }
    let (offset, lens) = extent(session, parsed)?;
    let zero_len = lens.first().copied().unwrap_or(0);
    let parts = if switches.zeros {
        Vec::new()
    } else {
        buffers(session, &lens, switches.pattern.unwrap_or(WRITE_FILL))?
    };
    let disk = Disk::of(session)?;
    let console = session.console.clone();
    let name = command.name();
    session.begin(move || {
        let began = Instant::now();
        let outcome = if switches.zeros {
            disk.zero(offset, zero_len, zero_flags(&switches), switches.durable)
        } else {
            disk.write(&parts, offset, switches.durable)
        };
        if let Err(error) = outcome {
            say!(console, "{name} failed: {}", system::describe(&error));
            return false;
        }
        let len = if switches.zeros {
            zero_len
        } else {
            len_of(&parts)
        };
        report::tell(
            &console,
            switches.style,
            "wrote",
            offset,
            len,
            len,
            began.elapsed(),
        );
        true
    });
    Ok(())
}

/// What a request that the mode or the disk refuses is told.
pub(super) fn read_only(operation: Operation) -> StorageError {
    StorageError::new(operation, StorageErrorKind::PermissionDenied)
}
