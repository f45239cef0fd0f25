//! All that is no request: opening, closing, waiting, and ends of all kinds.

use std::thread;
use std::time::Duration;

use qcow2_io::Storage;
use rustix::process::{Signal, getpid, kill_process};

use super::mode::Mode;
use super::reopen::Reopening;
use super::request::number;
use super::session::{Done, Failed, Session};
use super::table::Command;
use crate::node::NodeOptions;
use crate::words::getopt::Parsed;
use crate::words::system;
use crate::{complain, say};

/// `open`
pub(super) fn open(session: &mut Session<'_>, command: &Command, parsed: &Parsed) -> Done {
    let mut mode = Mode::default();
    mode.format.clone_from(&session.default_format);
    let mut lists = Vec::new();
    for (code, value) in &parsed.options {
        match code {
            'o' => lists.push(value.as_str()),
            code => mode.take(*code, value).map_err(|text| {
                complain!(session.console, "qemu-io: {text}");
                Failed
            })?,
        }
    }
    let name = match parsed.operands.as_slice() {
        [] if lists.is_empty() => return command.misused(session),
        [] => None,
        [name] => Some(name.as_str()),
        _ => return command.misused(session),
    };
    let mut more = NodeOptions::default();
    for list in lists {
        more.extend(NodeOptions::from_list(list));
    }
    match name {
        None => session.open_options(more, None, &mode),
        Some(name) => session.open_named(name, more, &mode),
    }
}

/// `close`
pub(super) fn close(session: &mut Session<'_>, _command: &Command, _parsed: &Parsed) -> Done {
    session.wait_for_all();
    session.close()
}

/// `reopen`
pub(super) fn reopen(session: &mut Session<'_>, command: &Command, parsed: &Parsed) -> Done {
    let mut change = Reopening::default();
    for (code, value) in &parsed.options {
        match code {
            'r' | 'w' if change.read_only.is_some() => {
                complain!(
                    session.console,
                    "qemu-io: Only one -r/-w option may be given"
                );
                return Err(Failed);
            }
            'r' => change.read_only = Some(true),
            'w' => change.read_only = Some(false),
            'c' => {
                let mut tried = Mode::default();
                tried.cache(value).map_err(|_| {
                    complain!(session.console, "qemu-io: Invalid cache option: {value}");
                    Failed
                })?;
                change.cache = Some(value.clone());
            }
            _ => change.more.extend(NodeOptions::from_list(value)),
        }
    }
    if !parsed.operands.is_empty() {
        return command.misused(session);
    }
    if let Some(text) = change.contradiction() {
        complain!(session.console, "qemu-io: {text}");
        return Err(Failed);
    }
    session.reopen(change)
}

/// `flush`
pub(super) fn flush(session: &mut Session<'_>, _command: &Command, _parsed: &Parsed) -> Done {
    if !session.node()?.writable {
        return Ok(());
    }
    session.storage()?.flush().map_err(|error| {
        say!(
            session.console,
            "flush failed: {}",
            system::describe(&error)
        );
        Failed
    })
}

/// `aio_flush`
#[expect(clippy::unnecessary_wraps, reason = "as all commands are")]
pub(super) fn aio_flush(session: &mut Session<'_>, _command: &Command, _parsed: &Parsed) -> Done {
    session.wait_for_all();
    Ok(())
}

/// `quit`
#[expect(clippy::unnecessary_wraps, reason = "as all commands are")]
pub(super) fn quit(session: &mut Session<'_>, _command: &Command, _parsed: &Parsed) -> Done {
    session.is_over = true;
    Ok(())
}

/// `sleep`
pub(super) fn sleep(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let text = parsed.operands.first().map_or("", String::as_str);
    let Ok(time) = text.parse::<u64>() else {
        say!(session.console, "{text} is not a valid number");
        return Err(Failed);
    };
    session.console.flush();
    thread::sleep(Duration::from_millis(time));
    Ok(())
}

/// `abort`
pub(super) fn abort(session: &mut Session<'_>, _command: &Command, _parsed: &Parsed) -> Done {
    session.console.flush();
    std::process::abort()
}

/// `sigraise`
pub(super) fn sigraise(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let text = parsed.operands.first().map_or("", String::as_str);
    let wanted = number(session, text)?;
    let signal = i32::try_from(wanted).ok().and_then(Signal::from_named_raw);
    let Some(signal) = signal else {
        say!(session.console, "sigraise: Invalid argument");
        return Err(Failed);
    };
    session.console.flush();
    kill_process(getpid(), signal).map_err(|_| Failed)
}

/// Asks the fault injector, where there is one.
fn with_injector(
    session: &Session<'_>,
    failure: &str,
    ask: impl FnOnce(&crate::node::Blkdebug) -> Result<(), &'static str>,
) -> Done {
    let injector = session.node()?.injector();
    let outcome = injector.map_or(Err("Operation not supported"), |injector| ask(injector));
    outcome.map_err(|text| {
        say!(session.console, "{failure}: {text}");
        Failed
    })
}

fn word(parsed: &Parsed, index: usize) -> &str {
    parsed.operands.get(index).map_or("", String::as_str)
}

/// `break`
pub(super) fn set_break(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    with_injector(session, "Could not set breakpoint", |injector| {
        injector.pause(word(parsed, 0), word(parsed, 1));
        Ok(())
    })
}

/// `remove_break`
pub(super) fn remove_break(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let tag = word(parsed, 0);
    with_injector(
        session,
        &format!("Could not remove breakpoint {tag}"),
        |injector| {
            if injector.forget(tag) {
                Ok(())
            } else {
                Err("No such file or directory")
            }
        },
    )
}

/// `resume`
pub(super) fn resume(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let console = session.console;
    with_injector(session, "Could not resume request", |injector| {
        if injector.resume(word(parsed, 0), console) {
            Ok(())
        } else {
            Err("No such file or directory")
        }
    })
}

/// `wait_break`
pub(super) fn wait_break(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    with_injector(session, "Could not wait for request", |injector| {
        injector.wait(word(parsed, 0));
        Ok(())
    })
}
