//! The face of `qemu-io`: requests to a disk, typed one by one.
//!
//! `session` keeps the disk and what is under way, `mode` how it is opened, `table` lists the commands; `transfer`, `space`, `inspect` and `control` carry them out,
//! `report` says what became of them, `help` what they are for.

mod aio;
mod control;
mod help;
mod inspect;
mod mode;
mod reopen;
mod report;
mod request;
mod session;
mod space;
mod table;
mod transfer;
mod zone;

use std::ffi::OsString;
use std::io::BufRead as _;
use std::process::ExitCode;

use self::mode::Mode;
use self::session::Session;
use crate::words::getopt::{Long, Spec};
use crate::words::outside;
use crate::{Console, complain, say};

const SPEC: Spec = Spec {
    short: "hVc:d:f:rsnCmki:t:T:U",
    long: &[
        Long::flag("help", 'h'),
        Long::flag("version", 'V'),
        Long::value("cmd", 'c'),
        Long::value("format", 'f'),
        Long::flag("read-only", 'r'),
        Long::flag("snapshot", 's'),
        Long::flag("nocache", 'n'),
        Long::flag("copy-on-read", 'C'),
        Long::flag("misalign", 'm'),
        Long::flag("native-aio", 'k'),
        Long::value("aio", 'i'),
        Long::value("discard", 'd'),
        Long::value("cache", 't'),
        Long::value("trace", 'T'),
        Long::flag("force-share", 'U'),
        Long::value("object", '\u{1}'),
        Long::flag("image-opts", '\u{2}'),
    ],
};

const USAGE: &str = "Usage: qemu-io [OPTION]... [-c COMMAND]... [FILE]

Try requests on a disk: the commands given, or those read from standard input.
  -c, --cmd COMMAND        carry out a command; may be given several times
  -f, --format FMT         format of FILE (default: what it looks like)
  --image-opts             FILE is a list of options
  -r, --read-only          open for reading only
  -s, --snapshot           write to a temporary overlay
  -n, --nocache            bypass the page cache, as -t none
  -C, --copy-on-read       keep what is read from backing files
  -m, --misalign           use buffers that are not aligned
  -k, --native-aio         as -i native
  -i, --aio MODE           threads, native (with -n only) or io_uring
  -t, --cache MODE         none, writeback, unsafe, directsync or writethrough
  -d, --discard MODE       ignore (off) or unmap (on)
  -T, --trace ...          taken, without effect
  -U, --force-share        read beside a program that writes
  --object OBJDEF          define an object, such as a secret
  -h, --help               show this
  -V, --version            show the version

`qemu-io -c help` lists the commands.";

/// Runs a command line, the program's name first.
pub fn main(args: &[OsString], console: &Console) -> ExitCode {
    let args: Vec<String> = args.iter().skip(1).map(|arg| outside::of_os(arg)).collect();
    let parsed = match SPEC.parse(&args) {
        Ok(parsed) => parsed,
        Err((error, _)) => {
            complain!(console, "{}: {error}", console.program());
            say!(console, "{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    let mut session = Session::new(console);
    let (mut mode, mut commands) = (Mode::default(), Vec::new());
    for (code, value) in parsed.options {
        let taken = match code {
            'h' => {
                say!(console, "{USAGE}");
                return ExitCode::SUCCESS;
            }
            'V' => {
                say!(
                    console,
                    "qemu-io version 10.0.0 (qcow2 {})",
                    env!("CARGO_PKG_VERSION")
                );
                return ExitCode::SUCCESS;
            }
            'c' => {
                commands.push(value);
                Ok(())
            }
            '\u{1}' => session.objects.add(&value).map_err(|error| error.0),
            code => mode.take(code, &value),
        };
        if let Err(text) = taken {
            complain!(console, "qemu-io: {text}");
            return ExitCode::FAILURE;
        }
    }
    if parsed.operands.len() > 1 {
        say!(console, "{USAGE}");
        return ExitCode::FAILURE;
    }
    session.default_format.clone_from(&mode.format);
    if let Some(name) = parsed.operands.first()
        && session.open(name, &mode).is_err()
    {
        return ExitCode::FAILURE;
    }
    let failed = if commands.is_empty() {
        interact(&mut session, console)
    } else {
        let mut failed = false;
        for command in &commands {
            failed |= session.run(command).is_err();
            if session.is_over {
                break;
            }
        }
        failed
    };
    session.wait_for_all();
    let closed = session.close();
    if failed || closed.is_err() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// Carries out what comes on standard input; whether anything failed.
fn interact(session: &mut Session<'_>, console: &Console) -> bool {
    let mut failed = false;
    let mut lines = std::io::stdin().lock().lines();
    while !session.is_over {
        console.out(format_args!("qemu-io> "));
        console.flush();
        match lines.next() {
            Some(Ok(line)) => failed |= session.run(&line).is_err(),
            _ => break,
        }
    }
    failed
}
