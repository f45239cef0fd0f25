//! Giving space back, and other sizes.

use std::time::Instant;

use qcow2_image::{ImageError, ResizeOptions};
use qcow2_io::{Operation, Storage, StorageErrorKind};

use super::report::{self, Style};
use super::request::number;
use super::session::{Done, Failed, Session};
use super::table::Command;
use super::transfer::read_only;
use crate::node::{Content, storage_error};
use crate::say;
use crate::words::getopt::Parsed;
use crate::words::system;

/// `discard`
pub(super) fn discard(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let mut style = Style::default();
    for (code, _) in &parsed.options {
        match code {
            'C' => style.brief = true,
            _ => style.quiet = true,
        }
    }
    let place = |index: usize| {
        let text = parsed.operands.get(index).map_or("", String::as_str);
        number(session, text)
    };
    let (offset, len) = (place(0)?, place(1)?);
    let storage = session.storage()?;
    let began = Instant::now();
    let size = storage.len().unwrap_or(0).next_multiple_of(512);
    let outcome = if !session.node()?.writable {
        Err(system::describe(&read_only(Operation::Discard)))
    } else if offset.checked_add(len).is_none_or(|end| end > size) {
        Err("Input/output error".to_owned())
    } else if !session.mode().unmaps() {
        Ok(())
    } else {
        // Parts of clusters keep what they have: it is no more than a hint.
        let discarded = match &session.node()?.content {
            Content::Image(image) => image
                .discard_whole(offset..offset + len)
                .map_err(|error| storage_error(Operation::Discard, &error)),
            _ => storage.discard(offset..offset + len),
        };
        match discarded {
            // A discard is a hint: who can't follow it may leave things as they are.
            Err(error) if error.kind() == StorageErrorKind::Unsupported => Ok(()),
            outcome => outcome.map_err(|error| system::describe(&error)),
        }
    };
    if let Err(text) = outcome {
        say!(session.console, "discard failed: {text}");
        return Err(Failed);
    }
    report::tell(
        session.console,
        style,
        "discard",
        offset,
        len,
        len,
        began.elapsed(),
    );
    Ok(())
}

/// `truncate`
pub(super) fn truncate(session: &mut Session<'_>, command: &Command, parsed: &Parsed) -> Done {
    let mut options = ResizeOptions {
        shrink: true,
        ..ResizeOptions::default()
    };
    for (_, value) in &parsed.options {
        use qcow2_image::create::Preallocation;
        options.preallocation = match value.as_str() {
            "off" => Preallocation::Off,
            "metadata" => Preallocation::Metadata,
            "falloc" => Preallocation::Falloc,
            "full" => Preallocation::Full,
            _ => return command.misused(session),
        };
    }
    let text = parsed.operands.first().map_or("", String::as_str);
    let len = number(session, text)?;
    let outcome = match session.image() {
        Some(image) => image.resize(len, options).map_err(|error| match &error {
            ImageError::Option { why, .. } => why.clone(),
            ImageError::Unsupported { what } => (*what).to_owned(),
            error => system::describe(error),
        }),
        None => session
            .storage()?
            .set_len(len)
            .map_err(|error| system::describe(&error)),
    };
    outcome.map_err(|text| {
        say!(session.console, "qemu-io: {text}");
        Failed
    })
}
