//! What commands share: naming a disk, opening it, and failing.

use std::fmt;
use std::ops::RangeInclusive;
use std::process::ExitCode;

use qcow2_image::Image;

use crate::node::{self, Access, Node, NodeOptions, OpenError, Opener};
use crate::words::getopt::{Parsed, Spec};
use crate::words::size::{self, SizeError};
use crate::words::system;
use crate::{Console, Objects, complain};

/// Why a command ends before it is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    text: String,
    /// Lines below it, without prefix.
    hints: Vec<String>,
    code: u8,
    /// The command whose help may tell more; empty for the program's.
    see_help_of: Option<String>,
    /// The command was not even understood: what it was called as stands before the text.
    misspelt: bool,
}

impl Failure {
    /// A failure with exit code 1.
    pub(crate) fn new(text: impl fmt::Display) -> Self {
        Self {
            text: text.to_string(),
            hints: Vec::new(),
            code: 1,
            see_help_of: None,
            misspelt: false,
        }
    }

    /// A command line that makes no sense; points at the command's help.
    pub(crate) fn usage(command: &str, text: impl fmt::Display) -> Self {
        Self {
            see_help_of: Some(command.to_owned()),
            ..Self::new(text)
        }
    }

    /// A line below.
    pub(crate) fn hint(mut self, line: impl Into<String>) -> Self {
        self.hints.push(line.into());
        self
    }

    /// Another failure told behind it, which was its consequence.
    pub(crate) fn then(mut self, next: Self) -> Self {
        self.hints.push(format!("qemu-img: {}", next.text));
        self.hints.extend(next.hints);
        self
    }

    /// Without an empty name before its text.
    pub(crate) fn without_name(mut self) -> Self {
        if let Some(text) = self.text.strip_prefix(": ") {
            self.text = text.to_owned();
        }
        self
    }

    /// Another exit code.
    pub(crate) fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// Says it.
    pub(crate) fn report(&self, console: &Console) -> ExitCode {
        let program = console.program();
        match &self.see_help_of {
            Some(command) if self.misspelt => {
                let space = if command.is_empty() { "" } else { " " };
                complain!(console, "{program}{space}{command}: {}", self.text);
            }
            _ => complain!(console, "qemu-img: {}", self.text),
        }
        for hint in &self.hints {
            complain!(console, "{hint}");
        }
        if let Some(command) = &self.see_help_of {
            let space = if command.is_empty() { "" } else { " " };
            complain!(
                console,
                "Try '{program}{space}{command} --help' for more info"
            );
        }
        ExitCode::from(self.code)
    }
}

/// Sorts the command line of a command.
pub(crate) fn parse(command: &str, spec: &Spec, args: &[String]) -> Result<Parsed, Failure> {
    spec.parse(args).map_err(|(error, _)| Failure {
        misspelt: true,
        ..Failure::usage(command, error)
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
        let guesses = format.is_none() && !self.image_opts && access.write;
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
        let opened = opened.map_err(|error| cannot_open(name, error))?;
        if guesses && opened.driver == "raw" && !name.starts_with("json:") {
            node::warn_of_guess(name);
        }
        Ok(opened)
    }
}

impl Common {
    /// Opens the file that an image lies in, and not the image.
    pub(crate) fn open_file(
        &self,
        name: &str,
        format: Option<&str>,
        access: &Access,
    ) -> Result<Node, Failure> {
        let opener = Opener {
            objects: &self.objects,
        };
        let mut options = if self.image_opts {
            NodeOptions::from_list(name)
        } else {
            opener
                .describe(name, format)
                .map_err(|error| cannot_open(name, error))?
        };
        let (mut file, _) = options.take_child("file");
        file.set_default("driver", "file");
        opener
            .options(file, access)
            .map_err(|error| cannot_open(name, error))
    }
}

/// A disk that can't be opened.
pub(crate) fn cannot_open(name: &str, error: OpenError) -> Failure {
    let mut failure = if error.text.starts_with("Failed to load snapshot") {
        Failure::new(&error.text)
    } else {
        Failure::new(format_args!("Could not open '{name}': {}", error.text))
    };
    failure.hints = error.hints;
    failure
}

/// A list of options as `-o` takes it.
pub(crate) fn option_list(list: String) -> Result<String, Failure> {
    if super::choices::is_list(&list) {
        Ok(list)
    } else {
        Err(Failure::new(format_args!("Invalid option list: {list}")))
    }
}

/// How an answer is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

impl Output {
    /// What `--output` names.
    pub(crate) fn from_name(command: &str, name: &str) -> Result<Self, Failure> {
        match name {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(Failure::usage(
                command,
                format_args!("--output expects 'human' or 'json' not '{other}'"),
            )),
        }
    }
}

/// A number of bytes, or of something else, that an option or operand gives.
pub(crate) fn number(what: &str, text: &str, allowed: RangeInclusive<u64>) -> Result<u64, Failure> {
    // What is less than nothing is a number, too.
    let parsed = match text.trim_start().strip_prefix('-') {
        Some(digits) => size::parse(digits).map(|_| None),
        None => size::parse(text).map(Some),
    };
    match parsed {
        Ok(Some(value)) if allowed.contains(&value) => Ok(value),
        Err(SizeError::Invalid) => Err(Failure::new(format_args!(
            "Invalid {what} specified: '{text}'."
        ))),
        Ok(_) | Err(SizeError::Range) => Err(Failure::new(format_args!(
            "Invalid {what} specified. Must be between {} and {}.",
            allowed.start(),
            allowed.end()
        ))),
    }
}

/// What is allowed where nothing but the type of a number limits it.
pub(crate) const ANY_BYTES: RangeInclusive<u64> = 0..=i64::MAX.unsigned_abs();

/// How files are cached: `-t` for what is written, `-T` for what is only read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CacheMode {
    /// Past the page cache.
    pub(crate) direct: bool,
    /// Each write is flushed.
    pub(crate) write_through: bool,
    /// Flushes do nothing.
    pub(crate) no_flush: bool,
}

impl CacheMode {
    /// The mode of this name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        let (direct, write_through, no_flush) = match name {
            "none" | "off" => (true, false, false),
            "directsync" => (true, true, false),
            "writeback" => (false, false, false),
            "writethrough" => (false, true, false),
            "unsafe" => (false, false, true),
            _ => return None,
        };
        Some(Self {
            direct,
            write_through,
            no_flush,
        })
    }

    /// What `-t` names.
    pub(crate) fn of_target(name: &str) -> Result<Self, Failure> {
        Self::from_name(name)
            .ok_or_else(|| Failure::new(format_args!("Invalid cache option: {name}")))
    }

    /// What `-T` names.
    pub(crate) fn of_source(name: &str) -> Result<Self, Failure> {
        Self::from_name(name)
            .ok_or_else(|| Failure::new(format_args!("Invalid source cache option: {name}")))
    }
}

/// Closes what was written to, which can fail. That bitmaps have no place any more is told, but is no failure of a command that is not
/// about them.
pub(crate) fn close(node: Node) -> Result<(), Failure> {
    close_strictly(node, |text| {
        tell(text);
        Ok(())
    })
}

/// The same; what becomes of bitmaps without a place is for `lost` to say, who gets the words for them.
pub(super) fn close_strictly(
    node: Node,
    lost: impl FnOnce(&str) -> Result<(), Failure>,
) -> Result<(), Failure> {
    if !node.writable {
        return Ok(());
    }
    let storage = node.storage();
    storage
        .flush()
        .map_err(|error| Failure::new(system::describe(&error)))?;
    drop(storage);
    let name = node.unfiltered().name().to_owned();
    match node.into_image() {
        Some((image, _)) => finish(image, &name, lost),
        None => Ok(()),
    }
}

/// Closes the image of a node with this name; bitmaps without a place are told, no more.
pub(super) fn close_image(image: Image, name: &str) -> Result<(), Failure> {
    finish(image, name, |text| {
        tell(text);
        Ok(())
    })
}

fn tell(text: &str) {
    Console::warn(format_args!("qemu-img: {text}\n"));
}

fn finish(
    image: Image,
    name: &str,
    lost: impl FnOnce(&str) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let Err(error) = image.close() else {
        return Ok(());
    };
    match node::lost_bitmaps(&error, name) {
        Some(text) => lost(&text),
        None => Err(Failure::new(system::describe(&error))),
    }
}

/// That closing failed for it, as it is told behind the reason.
pub(super) const NOT_CLOSED: &str = "qemu-img: Error while closing the image: Invalid argument";

/// Closes what lies below an image that has been closed: layers may have been written to, too.
pub(super) fn close_below(below: Vec<(&'static str, Node)>) -> Result<(), Failure> {
    for (_, node) in below {
        if node.writable
            && let name = node.unfiltered().name().to_owned()
            && let Some((image, below)) = node.into_image()
        {
            image
                .close()
                .map_err(|error| match node::lost_bitmaps(&error, &name) {
                    // It is tried twice.
                    Some(text) => Failure::new(&text)
                        .hint(format!("qemu-img: {text}"))
                        .hint(NOT_CLOSED),
                    None => Failure::new(format_args!(
                        "Error while closing the image: {}",
                        system::describe(&error)
                    )),
                })?;
            close_below(below)?;
        }
    }
    Ok(())
}
