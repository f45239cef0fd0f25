//! Looking at a disk.

use qcow2_image::map::map as rows;
use qcow2_io::Storage;

use super::report;
use super::request::number;
use super::session::{Done, Failed, Session};
use super::table::Command;
use crate::img::Facts;
use crate::node::Node;
use crate::say;
use crate::words::getopt::Parsed;
use crate::words::system;

/// `length`
pub(super) fn length(session: &mut Session<'_>, _command: &Command, _parsed: &Parsed) -> Done {
    match session.storage()?.len() {
        Ok(len) => {
            say!(
                session.console,
                "{}",
                report::size(len.next_multiple_of(512))
            );
            Ok(())
        }
        Err(error) => {
            say!(session.console, "getlength: {}", system::describe(&error));
            Err(Failed)
        }
    }
}

/// `info`
pub(super) fn info(session: &mut Session<'_>, _command: &Command, _parsed: &Parsed) -> Done {
    let node = session.node()?;
    let console = session.console;
    say!(console, "format name: {}", node.driver);
    if is_protocol(node) {
        // Once as a format, once as a protocol.
        say!(console, "format name: {}", node.driver);
    }
    let Some(image) = node.image() else {
        if ends_in_nothing(node) {
            return Err(Failed);
        }
        say!(console, "cluster size: 0 bytes");
        say!(console, "vm state offset: 0 bytes");
        return Ok(());
    };
    let geometry = image.geometry();
    say!(
        console,
        "cluster size: {}",
        report::size(geometry.cluster_size())
    );
    // Machine states lie behind the last L2 table that the disk needs.
    let behind = geometry
        .l1_entries_for(image.virtual_size())
        .saturating_mul(geometry.l2_coverage());
    say!(console, "vm state offset: {}", report::size(behind));
    say!(console, "Format specific information:");
    console.out(format_args!("{}", Facts::of(node).specific_text()));
    Ok(())
}

/// Whether a driver is one that bytes come from, not one that says what they mean.
fn is_protocol(node: &Node) -> bool {
    !matches!(
        node.driver,
        "qcow2" | "raw" | "copy-on-read" | "compress" | "quorum"
    )
}

/// Whether what is asked of a node goes to a disk that keeps nothing, and has nothing to tell.
fn ends_in_nothing(node: &Node) -> bool {
    let mut below = node.child("file").or(node.child("image"));
    node.driver.starts_with("null-") || below.take().is_some_and(ends_in_nothing)
}

/// Stretches of the disk, and whether the top layer says something of them.
fn stretches(session: &Session<'_>, from: u64, to: u64) -> Result<Vec<(u64, u64, bool)>, Failed> {
    let Some(image) = session.image() else {
        return Ok(vec![(from, to.saturating_sub(from), true)]);
    };
    let failed = |error: &qcow2_image::ImageError| {
        say!(
            session.console,
            "Failed to get allocation status: {}",
            system::describe(error)
        );
        Failed
    };
    let mut found: Vec<(u64, u64, bool)> = Vec::new();
    let all = rows(image.chain().above(1), from..to).map_err(|error| failed(&error))?;
    for row in all {
        let row = row.map_err(|error| failed(&error))?;
        match found.last_mut() {
            Some((_, len, present)) if *present == row.present => *len += row.len,
            _ => found.push((row.start, row.len, row.present)),
        }
    }
    Ok(found)
}

/// `map`
pub(super) fn map(session: &mut Session<'_>, _command: &Command, _parsed: &Parsed) -> Done {
    let len = session.storage()?.len().unwrap_or(0).next_multiple_of(512);
    for (start, len, present) in stretches(session, 0, len)? {
        say!(
            session.console,
            "{} ({len:#x}) bytes {} at offset {} ({start:#x})",
            report::size(len),
            if present {
                "    allocated"
            } else {
                "not allocated"
            },
            report::size(start)
        );
    }
    Ok(())
}

/// `alloc`
pub(super) fn alloc(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let place = |index: usize, default: u64| match parsed.operands.get(index) {
        Some(text) => number(session, text),
        None => Ok(default),
    };
    let (offset, count) = (place(0, 0)?, place(1, 512)?);
    let len = session.storage()?.len().unwrap_or(0).next_multiple_of(512);
    let end = offset.saturating_add(count).min(len);
    let count = end.saturating_sub(offset);
    let allocated: u64 = match count {
        0 => 0,
        _ => stretches(session, offset, end)?
            .iter()
            .filter(|(_, _, present)| *present)
            .map(|(_, len, _)| len)
            .sum(),
    };
    say!(
        session.console,
        "{allocated}/{count} bytes allocated at offset {}",
        report::size(offset)
    );
    Ok(())
}
