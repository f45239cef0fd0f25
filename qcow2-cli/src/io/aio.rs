//! Reads and writes that nothing waits for.

use std::time::Instant;

use super::report;
use super::request::{Disk, READ_FILL, Switches, WRITE_FILL, buffers, extent, len_of, verify};
use super::session::{Done, Failed, Session};
use super::table::Command;
use super::transfer::zero_flags;
use crate::say;
use crate::words::getopt::Parsed;
use crate::words::system;

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
