//! What commands share: naming a disk, opening it, and failing.

use std::fmt;
use std::process::ExitCode;

use crate::node::{Access, Node, NodeOptions, OpenError, Opener};
use crate::words::getopt::{Parsed, Spec};
use crate::{Console, Objects, complain};

/// Why a command ends before it is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What stands before the text: `qemu-img: ` or, for options, `qemu-img COMMAND: `.
    prefix: String,
    text: String,
    /// Lines below it, without prefix.
    hints: Vec<String>,
    code: u8,
}

impl Failure {
    /// A failure with exit code 1.
    pub(crate) fn new(text: impl fmt::Display) -> Self {
        Self {
            prefix: "qemu-img: ".into(),
            text: text.to_string(),
            hints: Vec::new(),
            code: 1,
        }
    }

    /// A command line that makes no sense; points at the command's help.
    pub(crate) fn usage(command: &str, text: impl fmt::Display) -> Self {
        let of = match command {
            "" => String::new(),
            command => format!(" {command}"),
        };
        Self::new(text).hint(format!("Try 'qemu-img{of} --help' for more info"))
    }

    /// A line below.
    pub(crate) fn hint(mut self, line: impl Into<String>) -> Self {
        self.hints.push(line.into());
        self
    }

    /// Another exit code.
    pub(crate) fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// Says it.
    pub(crate) fn report(&self, console: &Console) -> ExitCode {
        complain!(console, "{}{}", self.prefix, self.text);
        for hint in &self.hints {
            complain!(console, "{hint}");
        }
        ExitCode::from(self.code)
    }
}

/// Sorts the command line of a command.
pub(crate) fn parse(command: &str, spec: &Spec, args: &[String]) -> Result<Parsed, Failure> {
    spec.parse(args).map_err(|(error, _)| {
        let mut failure = Failure::usage(command, error);
        failure.prefix = format!("qemu-img {command}: ");
        failure
    })
}

/// How disks are named and opened, as most commands have it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Common {
    /// `--object`
    pub(crate) objects: Objects,
    /// `--image-opts`: names are lists of options.
    pub(crate) image_opts: bool,
}

impl Common {
    /// Opens a disk by what names it on the command line.
    pub(crate) fn open(
        &self,
        name: &str,
        format: Option<&str>,
        access: &Access,
    ) -> Result<Node, Failure> {
        let opener = Opener {
            objects: &self.objects,
        };
        let opened = if self.image_opts {
            if format.is_some() {
                return Err(Failure::new(
                    "--image-opts and --format are mutually exclusive",
                ));
            }
            opener.options(NodeOptions::from_list(name), access)
        } else {
            opener.name(name, format, access)
        };
        opened.map_err(|error| cannot_open(name, error))
    }
}

/// A disk that can't be opened.
pub(crate) fn cannot_open(name: &str, error: OpenError) -> Failure {
    let mut failure = Failure::new(format_args!("Could not open '{name}': {}", error.text));
    failure.hints = error.hints;
    failure
}
