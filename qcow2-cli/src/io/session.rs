//! The disk that requests go to, and what is under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use qcow2_image::{Image, ImageError, MetadataError};
use qcow2_io::Storage;

use super::{reopen, table};
use crate::node::{self, Access, Node, NodeOptions, Opener};
use crate::words::system;
use crate::{Console, Objects, complain};

/// A command failed, and has said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed;

/// What a command gives.
pub(super) type Done = Result<(), Failed>;

/// How a disk is opened.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of its own"
)]
pub(super) struct Mode {
    pub(super) format: Option<String>,
    pub(super) image_opts: bool,
    pub(super) read_only: bool,
    snapshot: bool,
    copy_on_read: bool,
    force_share: bool,
    direct: bool,
    native: bool,
    write_through: bool,
    unmap: bool,
}

impl Default for Mode {
    fn default() -> Self {
        Self {
            format: None,
            image_opts: false,
            read_only: false,
            snapshot: false,
            copy_on_read: false,
            force_share: false,
            direct: false,
            native: false,
            write_through: false,
            unmap: true,
        }
    }
}

impl Mode {
    /// Takes an option of the command line, or of `open`.
    pub(super) fn take(&mut self, code: char, value: &str) -> Result<(), String> {
        match code {
            'f' => self.format = Some(value.to_owned()),
            'r' => self.read_only = true,
            's' => self.snapshot = true,
            'C' => self.copy_on_read = true,
            'U' => self.force_share = true,
            'n' => self.cache("none")?,
            't' => self.cache(value)?,
            'd' => {
                self.unmap = match value {
                    "ignore" | "off" => false,
                    "unmap" | "on" => true,
                    other => return Err(format!("Invalid discard option: {other}")),
                }
            }
            'k' => self.native = true,
            'i' => {
                self.native = match value {
                    "native" => true,
                    "threads" | "io_uring" => false,
                    other => return Err(format!("Invalid aio option: {other}")),
                }
            }
            '\u{2}' => self.image_opts = true,
            _ => {}
        }
        Ok(())
    }

    /// Takes a cache mode.
    pub(super) fn cache(&mut self, name: &str) -> Result<(), String> {
        (self.direct, self.write_through) = match name {
            "none" | "off" => (true, false),
            // Durability is not given up, whoever would allow it.
            "writeback" | "unsafe" => (false, false),
            "directsync" => (true, true),
            "writethrough" => (false, true),
            other => return Err(format!("Invalid cache option: {other}")),
        };
        Ok(())
    }

    /// Whether each write is flushed.
    pub(super) fn writes_through(&self) -> bool {
        self.write_through
    }

    /// Whether discards have an effect.
    pub(super) fn unmaps(&self) -> bool {
        self.unmap
    }

    fn access(&self) -> Access {
        Access {
            write: !self.read_only,
            force_share: self.force_share,
            direct: self.direct,
            unmap: self.unmap,
            native: self.native,
            copy_on_read: self.copy_on_read,
            temporary_overlay: self.snapshot,
            ..Access::read()
        }
    }
}

/// The disk that requests go to, and what is under way.
pub(super) struct Session<'a> {
    pub(super) console: &'a Console,
    pub(super) objects: Objects,
    pub(super) default_format: Option<String>,
    pub(super) is_over: bool,
    node: Option<Node>,
    /// How it was opened: by what, and how.
    described: (NodeOptions, Mode),
    pending: Vec<JoinHandle<()>>,
    async_failed: Arc<AtomicBool>,
}

impl<'a> Session<'a> {
    pub(super) fn new(console: &'a Console) -> Self {
        Self {
            console,
            objects: Objects::default(),
            default_format: None,
            is_over: false,
            node: None,
            described: (NodeOptions::default(), Mode::default()),
            pending: Vec::new(),
            async_failed: Arc::default(),
        }
    }

    /// Opens a disk by its name, or by a list of options.
    pub(super) fn open(&mut self, name: &str, mode: &Mode) -> Done {
        if mode.image_opts {
            return self.open_options(NodeOptions::from_list(name), None, mode);
        }
        self.open_named(name, NodeOptions::default(), mode)
    }

    /// Opens what a name stands for, with more options.
    pub(super) fn open_named(&mut self, name: &str, more: NodeOptions, mode: &Mode) -> Done {
        let opener = Opener {
            objects: &self.objects,
        };
        match opener.describe(name, mode.format.as_deref()) {
            Ok(mut options) => {
                // The name spoke of a node that the options describe further.
                if more.text("driver").is_some()
                    && more.text("driver") == options.text("file.driver")
                {
                    let plain = options.text("file.image.driver") == Some("file");
                    let mut inner = more.clone();
                    options.lift("file");
                    if plain && inner.take("image.driver").is_some() {
                        options.take("image.driver");
                    }
                }
                // A fault injector in front of what the name stands for.
                if more.text("driver") == Some("blkdebug")
                    && options.text("file.driver") == Some("file")
                    && let Some(file) = options.take("file.filename")
                {
                    options.take("file.driver");
                    options.take("driver");
                    options.set("image.filename", file);
                }
                options.extend(more);
                self.open_options(options, Some(name), mode)
            }
            Err(error) => {
                complain!(
                    self.console,
                    "qemu-io: can't open device {name}: {}",
                    error.text
                );
                Err(Failed)
            }
        }
    }

    /// Opens what options describe; `name` is for messages.
    pub(super) fn open_options(
        &mut self,
        options: NodeOptions,
        name: Option<&str>,
        mode: &Mode,
    ) -> Done {
        if self.node.is_some() {
            complain!(self.console, "qemu-io: file open already, try 'help close'");
            return Err(Failed);
        }
        let opener = Opener {
            objects: &self.objects,
        };
        if mode.force_share && !mode.read_only {
            let device = name
                .map(|name| format!(" device {name}"))
                .unwrap_or_default();
            complain!(
                self.console,
                "qemu-io: can't open{device}: force-share=on can only be used with read-only images"
            );
            return Err(Failed);
        }
        let guesses = !options.contains("driver") && !mode.read_only;
        match opener.options(options.clone(), &mode.access()) {
            Ok(node) => {
                if let Some(name) = name
                    && guesses
                    && node.driver == "raw"
                {
                    crate::node::warn_of_guess(name);
                }
                self.node = Some(node);
                self.described = (options, mode.clone());
                Ok(())
            }
            Err(error) => {
                let device = name
                    .map(|name| format!(" device {name}"))
                    .unwrap_or_default();
                complain!(self.console, "qemu-io: can't open{device}: {}", error.text);
                for hint in &error.hints {
                    complain!(self.console, "{hint}");
                }
                Err(Failed)
            }
        }
    }

    /// Opens the disk anew, with more options or another mode.
    pub(super) fn reopen(&mut self, mut more: NodeOptions, change: impl FnOnce(&mut Mode)) -> Done {
        if let Err(key) = reopen::check(self.node()?, &mut more) {
            complain!(self.console, "qemu-io: Cannot change the option '{key}'");
            return Err(Failed);
        }
        let (old_options, old_mode) = self.described.clone();
        let (mut options, mut mode) = (old_options.clone(), old_mode.clone());
        options.extend(more);
        change(&mut mode);
        self.wait_for_all();
        self.close()?;
        // Options that make no sense are told without the usual words around.
        let opener = Opener {
            objects: &self.objects,
        };
        if let Err(error) = opener.options(options.clone(), &mode.access()) {
            complain!(self.console, "qemu-io: {}", error.text);
            for hint in &error.hints {
                complain!(self.console, "{hint}");
            }
            self.open_options(old_options, None, &old_mode)?;
            return Err(Failed);
        }
        self.open_options(options, None, &mode).or_else(|_| {
            self.open_options(old_options, None, &old_mode)?;
            Err(Failed)
        })
    }

    /// Whether a disk is open.
    pub(super) fn is_open(&self) -> bool {
        self.node.is_some()
    }

    /// Whether it can be written to.
    pub(super) fn mode(&self) -> &Mode {
        &self.described.1
    }

    /// The open disk. Commands that need one are not run without.
    pub(super) fn node(&self) -> Result<&Node, Failed> {
        self.node.as_ref().ok_or(Failed)
    }

    /// The disk as bytes.
    pub(super) fn storage(&self) -> Result<Arc<dyn Storage>, Failed> {
        Ok(self.node()?.storage())
    }

    /// The disk as image, if it is one.
    pub(super) fn image(&self) -> Option<Arc<Image>> {
        self.node.as_ref()?.image().cloned()
    }

    /// Carries out one command.
    pub(super) fn run(&mut self, line: &str) -> Done {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let done = match words.split_first() {
            None => Ok(()),
            Some((name, rest)) => table::run(self, name, rest),
        };
        self.console.flush();
        done
    }

    /// Lets a request run beside what comes next.
    pub(super) fn begin(&mut self, request: impl FnOnce() -> bool + Send + 'static) {
        let failed = Arc::clone(&self.async_failed);
        let run = move || {
            if !request() {
                failed.store(true, Ordering::Relaxed);
            }
        };
        self.pending.push(thread::spawn(run));
    }

    /// Waits for all requests under way.
    pub(super) fn wait_for_all(&mut self) {
        for request in self.pending.drain(..) {
            // One that panicked has said so.
            let _ = request.join();
        }
        self.console.flush();
    }

    /// Closes the disk, if one is open.
    pub(super) fn close(&mut self) -> Done {
        let Some(node) = self.node.take() else {
            return Ok(());
        };
        if !node.writable {
            return Ok(());
        }
        // While the image is one of the tree, a fault injector below knows its tables; alone, it is not found any more.
        let flushed = match node.image() {
            Some(image) => image.flush(),
            None => Ok(()),
        };
        let name = node.unfiltered().name().to_owned();
        let closed = match node.into_image() {
            Some((image, _)) => match image.close() {
                // Whoever found that out was told.
                Err(ImageError::Metadata(MetadataError::Poisoned)) => Ok(()),
                Ok(()) => flushed.map_err(|error| system::describe(&error)),
                Err(error) => match node::lost_bitmaps(&error, &name) {
                    Some(text) => {
                        complain!(self.console, "qemu-io: {text}");
                        Ok(())
                    }
                    None => Err(system::describe(&error)),
                },
            },
            None => Ok(()),
        };
        closed.map_err(|text| {
            // What is left in memory then is of both kinds.
            for cache in ["L2 table", "refcount block"] {
                complain!(
                    self.console,
                    "qemu-io: Failed to flush the {cache} cache: {text}"
                );
            }
            Failed
        })
    }
}
