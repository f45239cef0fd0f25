//! The commands for zones, which only zoned block devices have. None of the disks here has any, so all of them fail as they do on a
//! regular file.

use super::request::number;
use super::session::{Done, Failed, Session};
use super::table::Command;
use crate::say;
use crate::words::getopt::Parsed;

/// Reads the numbers, and says that it can't be done.
fn refuse(session: &Session<'_>, what: &str, parsed: &Parsed) -> Done {
    for word in &parsed.operands {
        number(session, word)?;
    }
    say!(
        session.console,
        "zone {what} failed: Operation not supported"
    );
    Err(Failed)
}

/// `zone_append`
pub(super) fn append(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    refuse(session, "append", parsed)
}

/// `zone_close`
pub(super) fn close(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    refuse(session, "close", parsed)
}

/// `zone_finish`
pub(super) fn finish(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    refuse(session, "finish", parsed)
}

/// `zone_open`
pub(super) fn open(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    refuse(session, "open", parsed)
}

/// `zone_report`
pub(super) fn report(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    refuse(session, "report", parsed)
}

/// `zone_reset`
pub(super) fn reset(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    refuse(session, "reset", parsed)
}
