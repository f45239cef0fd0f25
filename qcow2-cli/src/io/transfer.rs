//! Reading and writing.

use std::fs;
use std::time::Instant;

use qcow2_image::ImageError;
use qcow2_io::codec::Level;
use qcow2_io::{Operation, StorageError, StorageErrorKind, ZeroFlags};

use super::report;
use super::request::{
    Disk, READ_FILL, Switches, WRITE_FILL, buffers, extent, len_of, one_len, verify,
};
use super::session::{Done, Failed, Session};
use super::table::Command;
use crate::words::getopt::Parsed;
use crate::words::{outside, system};
use crate::{complain, say};

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

pub(super) fn zero_flags(switches: &Switches) -> ZeroFlags {
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

/// What a request that the mode or the disk refuses is told.
pub(super) fn read_only(operation: Operation) -> StorageError {
    StorageError::new(operation, StorageErrorKind::PermissionDenied)
}
