//! The face of `qemu-io`: requests to a disk, typed one by one.
//!
//! `session` keeps the disk and what is under way, `table` lists the commands; `transfer`, `space`, `inspect` and `control` carry them out,
//! `report` says what became of them.

mod control;
mod inspect;
mod report;
mod session;
mod space;
mod table;
mod transfer;

use std::ffi::OsString;
use std::io::BufRead as _;
use std::process::ExitCode;

use self::session::{Mode, Session};
use crate::words::getopt::{Long, Spec};
use crate::{Console, complain, say};

const SPEC: Spec = Spec {
    short: "hVc:d:f:rsnCmki:t:T:U",
    long: &[
        Long {
            name: "help",
            takes_value: false,
            code: 'h',
        },
        Long {
            name: "version",
            takes_value: false,
            code: 'V',
        },
        Long {
            name: "cmd",
            takes_value: true,
            code: 'c',
        },
        Long {
            name: "format",
            takes_value: true,
            code: 'f',
        },
        Long {
            name: "read-only",
            takes_value: false,
            code: 'r',
        },
        Long {
            name: "snapshot",
            takes_value: false,
            code: 's',
        },
        Long {
            name: "nocache",
            takes_value: false,
            code: 'n',
        },
        Long {
            name: "copy-on-read",
            takes_value: false,
            code: 'C',
        },
        Long {
            name: "misalign",
            takes_value: false,
            code: 'm',
        },
        Long {
            name: "native-aio",
            takes_value: false,
            code: 'k',
        },
        Long {
            name: "aio",
            takes_value: true,
            code: 'i',
        },
        Long {
            name: "discard",
            takes_value: true,
            code: 'd',
        },
        Long {
            name: "cache",
            takes_value: true,
            code: 't',
        },
        Long {
            name: "trace",
            takes_value: true,
            code: 'T',
        },
        Long {
            name: "force-share",
            takes_value: false,
            code: 'U',
        },
        Long {
            name: "object",
            takes_value: true,
            code: '\u{1}',
        },
        Long {
            name: "image-opts",
            takes_value: false,
            code: '\u{2}',
        },
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
  -k, --native-aio         taken, without effect
  -i, --aio MODE           threads, native or io_uring
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
    let args: Vec<String> = args
        .iter()
        .skip(1)
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let parsed = match SPEC.parse(&args) {
        Ok(parsed) => parsed,
        Err((error, _)) => {
            complain!(console, "{}: {error}\n{USAGE}", console.program());
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
