//! The commands: names, what they take, what they are for.

use super::help::details;
use super::session::{Done, Failed, Session};
use super::{aio, control, inspect, space, transfer, zone};
use crate::words::getopt::{Parsed, Spec};
use crate::{complain, say};

/// A command.
pub(super) struct Command {
    name: &'static str,
    alias: &'static str,
    /// How many operands it takes.
    least: usize,
    most: usize,
    /// Its options, as getopt has them.
    short: &'static str,
    usage: &'static str,
    what: &'static str,
    /// Whether a disk must be open.
    needs_disk: bool,
    /// Whether the disk must be open for writing.
    writes: bool,
    run: fn(&mut Session<'_>, &Command, &Parsed) -> Done,
}

impl Command {
    /// Whether it knows at once how many words it takes, options among them.
    fn counts_words(&self) -> bool {
        self.short.is_empty() || self.name == "open" || self.name.starts_with("zone_")
    }

    /// Says how it is used, after it was not.
    pub(super) fn misused(&self, session: &Session<'_>) -> Done {
        say!(session.console, "{}", self.line(self.name));
        Err(Failed)
    }

    /// How it is used, by the name that it was called.
    fn line(&self, name: &str) -> String {
        let space = if self.usage.is_empty() { "" } else { " " };
        format!("{name}{space}{} -- {}", self.usage, self.what)
    }

    /// The command's name.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }
}

const ANY: usize = usize::MAX;

macro_rules! command {
    ($name:literal $alias:literal $least:literal..=$most:expr, $short:literal, $usage:literal, $what:literal, $needs:literal, $run:path) => {
        Command {
            name: $name,
            alias: $alias,
            least: $least,
            most: $most,
            short: $short,
            usage: $usage,
            what: $what,
            needs_disk: $needs,
            writes: matches!(
                $name.as_bytes(),
                [b'w', b'r', ..] | b"aio_write" | b"discard" | b"truncate"
            ),
            run: $run,
        }
    };
}

/// In the order of their names.
const COMMANDS: &[Command] = &[
    command!("abort" "" 0..=0, "", "", "simulate a program crash using abort(3)", false, control::abort),
    command!("aio_flush" "" 0..=0, "", "", "completes all outstanding aio requests", true, control::aio_flush),
    command!("aio_read" "" 2..=ANY, "CP:iqrv", "[-Ciqrv] [-P pattern] off len [len..]", "asynchronously reads a number of bytes", true, aio::aio_read),
    command!("aio_write" "" 2..=ANY, "CfiP:qruz", "[-Cfiqruz] [-P pattern] off len [len..]", "asynchronously writes a number of bytes", true, aio::aio_write),
    command!("alloc" "" 1..=2, "", "offset [count]", "checks if offset is allocated in the file", true, inspect::alloc),
    command!("break" "" 2..=2, "", "event tag", "sets a breakpoint on event and tags the stopped request as tag", true, control::set_break),
    command!("close" "c" 0..=0, "", "", "close the current open file", true, control::close),
    command!("discard" "d" 2..=2, "Cq", "[-Cq] off len", "discards a number of bytes at a specified offset", true, space::discard),
    command!("flush" "f" 0..=0, "", "", "flush all in-core file state to disk", true, control::flush),
    command!("help" "?" 0..=1, "", "[command]", "help for one or all commands", false, help),
    command!("info" "i" 0..=0, "", "", "prints information about the current file", true, inspect::info),
    command!("length" "l" 0..=0, "", "", "gets the length of the current file", true, inspect::length),
    command!("map" "" 0..=0, "", "", "prints the allocated areas of a file", true, inspect::map),
    command!("open" "o" 1..=ANY, "snCro:ki:t:d:U", "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]", "open the file specified by path", false, control::open),
    command!("quit" "q" 0..=0, "", "", "exit the program", false, control::quit),
    command!("read" "r" 2..=2, "bCl:pP:qs:vr", "[-abCqrv] [-P pattern [-s off] [-l len]] off len", "reads a number of bytes at a specified offset", true, transfer::read),
    command!("readv" "" 2..=ANY, "CP:qrv", "[-Cqrv] [-P pattern] off len [len..]", "reads a number of bytes at a specified offset", true, transfer::readv),
    command!("remove_break" "" 1..=1, "", "tag", "remove a breakpoint by tag", true, control::remove_break),
    command!("reopen" "" 0..=ANY, "c:o:rw", "[(-r|-w)] [-c cache] [-o options]", "reopens an image with new options", true, control::reopen),
    command!("resume" "" 1..=1, "", "tag", "resumes the request tagged as tag", true, control::resume),
    command!("sigraise" "" 1..=1, "", "signal", "raises a signal", false, control::sigraise),
    command!("sleep" "" 1..=1, "", "", "waits for the given value in milliseconds", false, control::sleep),
    command!("truncate" "t" 1..=1, "m:", "[-m prealloc_mode] off", "truncates the current file at the given offset", true, space::truncate),
    command!("wait_break" "" 1..=1, "", "tag", "waits for the suspension of a request", true, control::wait_break),
    command!("write" "w" 2..=2, "bcCfnpP:qruzs:", "[-bcCfnqruz] [-P pattern | -s source_file] off len", "writes a number of bytes at a specified offset", true, transfer::write),
    command!("writev" "" 2..=ANY, "CfqP:r", "[-Cfqr] [-P pattern] off len [len..]", "writes a number of bytes at a specified offset", true, transfer::writev),
    command!("zone_append" "zap" 3..=4, "p", "offset len [len..]", "append write a number of bytes at a specified offset", true, zone::append),
    command!("zone_close" "zc" 2..=2, "", "offset len", "close a range of zones in zone block device", true, zone::close),
    command!("zone_finish" "zf" 2..=2, "", "offset len", "finish a range of zones in zone block device", true, zone::finish),
    command!("zone_open" "zo" 2..=2, "", "offset len", "explicit open a range of zones in zone block device", true, zone::open),
    command!("zone_report" "zrp" 2..=2, "", "offset number", "report zone information", true, zone::report),
    command!("zone_reset" "zrs" 2..=2, "", "offset len", "reset a zone write pointer in zone block device", true, zone::reset),
];

fn find(name: &str) -> Option<&'static Command> {
    COMMANDS
        .iter()
        .find(|command| command.name == name || (!name.is_empty() && command.alias == name))
}

/// Carries out a command with the words behind its name.
pub(super) fn run(session: &mut Session<'_>, name: &str, words: &[&str]) -> Done {
    let console = session.console;
    let Some(command) = find(name) else {
        complain!(console, "command \"{name}\" not found");
        return Err(Failed);
    };
    if command.needs_disk && !session.is_open() {
        complain!(console, "no file open, try 'help open'");
        return Err(Failed);
    }
    let args: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    let spec = Spec {
        short: command.short,
        long: &[],
    };
    // Counted before options are told from operands, as in the reference program.
    let (least, most) = (command.least, command.most);
    if args.len() < least || (command.counts_words() && args.len() > most) {
        bad_count(session, command, name, args.len());
        return Err(Failed);
    }
    let parsed = match spec.parse(&args) {
        Ok(parsed) => parsed,
        Err((error, _)) => {
            complain!(console, "{name}: {error}");
            return command.misused(session);
        }
    };
    let count = parsed.operands.len();
    if !command.counts_words() && (count < least || count > most) {
        return command.misused(session);
    }
    if command.writes && !session.node()?.writable {
        complain!(console, "qemu-io: Block node is read-only");
        return Err(Failed);
    }
    (command.run)(session, command, &parsed)
}

fn bad_count(session: &Session<'_>, command: &Command, name: &str, found: usize) {
    let (least, most) = (command.least, command.most);
    let expected = if most == ANY || !command.counts_words() {
        format!("at least {least}")
    } else if least == most {
        format!("{least}")
    } else {
        format!("between {least} and {most}")
    };
    complain!(
        session.console,
        "bad argument count {found} to {name}, expected {expected} arguments"
    );
}

fn help(session: &mut Session<'_>, _command: &Command, parsed: &Parsed) -> Done {
    let console = session.console;
    if let Some(name) = parsed.operands.first() {
        if let Some(command) = find(name) {
            say!(console, "{}", command.line(name));
            if let Some((what, options)) = details(command.name) {
                say!(console, "\n {what}");
                for (letter, meaning) in options {
                    say!(console, " -{letter}, -- {meaning}");
                }
                say!(console, "");
            }
            Ok(())
        } else {
            say!(console, "command {name} not found");
            Err(Failed)
        }
    } else {
        for command in COMMANDS {
            say!(console, "{}", command.line(command.name));
        }
        say!(console, "\nUse 'help commandname' for extended help.");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_explains_each_option_that_a_command_takes() {
        for command in COMMANDS {
            // Of those that only few use the line says enough.
            let Some((_, explained)) = details(command.name) else {
                assert!(matches!(command.short, "" | "m:" | "p"), "{}", command.name);
                continue;
            };
            let taken = command.short.chars().filter(|letter| *letter != ':');
            let mut taken: Vec<char> = taken.collect();
            let mut explained: Vec<char> = explained.iter().map(|(letter, _)| *letter).collect();
            taken.sort_unstable();
            explained.sort_unstable();
            assert_eq!(taken, explained, "{}", command.name);
        }
    }
}
