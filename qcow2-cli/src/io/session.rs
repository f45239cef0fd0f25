//! The disk that requests go to, and what is under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use qcow2_image::{Image, ImageError, MetadataError};
use qcow2_io::Storage;

use super::mode::Mode;
use super::reopen::{self, Reopening};
use super::table;
use crate::node::{self, Node, NodeOptions, OpenError, Opener};
use crate::words::system;
use crate::{Console, Objects, complain};

/// A command failed, and has said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed;

/// What a command gives.
pub(super) type Done = Result<(), Failed>;

/// The disk that requests go to, and what is under way.
pub(super) struct Session<'a> {
    pub(super) console: &'a Console,
    pub(super) objects: Objects,
    pub(super) default_format: Option<String>,
    pub(super) is_over: bool,
    node: Option<Node>,
    /// What `open` was given, from which each `reopen` starts, and how the disk is open now.
    described: (NodeOptions, Mode),
    /// What it is open by now.
    current: NodeOptions,
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
            current: NodeOptions::default(),
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
        let device = name
            .map(|name| format!(" device {name}"))
            .unwrap_or_default();
        let mut mode = mode.clone();
        let opened = self.node_of(&options, &mut mode);
        match opened {
            Ok(node) => {
                let guesses = !options.contains("driver") && !mode.read_only;
                if let Some(name) = name
                    && guesses
                    && node.driver == "raw"
                {
                    crate::node::warn_of_guess(name);
                }
                self.node = Some(node);
                self.current = options.clone();
                self.described = (options, mode);
                Ok(())
            }
            Err(error) => {
                complain!(self.console, "qemu-io: can't open{device}: {}", error.text);
                for hint in &error.hints {
                    complain!(self.console, "{hint}");
                }
                Err(Failed)
            }
        }
    }

    /// The tree that options describe; they may say `mode` otherwise.
    fn node_of(&self, options: &NodeOptions, mode: &mut Mode) -> Result<Node, OpenError> {
        match options.clone().take_switch("read-only")? {
            Some(true) if !mode.read_only => {
                return Err(OpenError::new("Block node is read-only"));
            }
            Some(false) => mode.read_only = false,
            _ => {}
        }
        if mode.force_share && !mode.read_only {
            return Err(OpenError::new(
                "force-share=on can only be used with read-only images",
            ));
        }
        let opener = Opener {
            objects: &self.objects,
        };
        opener.options(options.clone(), &mode.access())
    }

    /// Opens the disk anew, as `open` did and with more options or another mode.
    pub(super) fn reopen(&mut self, change: Reopening) -> Done {
        let Reopening {
            mut more,
            read_only,
            cache,
        } = change;
        if let Err(key) = reopen::check(self.node()?, &mut more) {
            complain!(self.console, "qemu-io: Cannot change the option '{key}'");
            return Err(Failed);
        }
        let (mut base, old_mode) = self.described.clone();
        let mut mode = old_mode.clone();
        // What a switch of the command says, an option of `open` no longer does.
        if let Some(read_only) = read_only {
            base.take("read-only");
            mode.read_only = read_only;
        }
        if let Some(cache) = &cache {
            base.take("cache.direct");
            base.take("cache.no-flush");
            // It was tried before.
            let _ = mode.cache(cache);
        }
        let mut options = base.clone();
        options.extend(more);
        let old = self.current.clone();
        self.wait_for_all();
        self.close()?;
        match self.node_of(&options, &mut mode) {
            Ok(node) => {
                self.node = Some(node);
                self.current = options;
                self.described = (base, mode);
                Ok(())
            }
            Err(error) => {
                // Told without the words around that a name would have.
                complain!(self.console, "qemu-io: {}", error.text);
                for hint in &error.hints {
                    complain!(self.console, "{hint}");
                }
                let start = self.described.0.clone();
                self.open_options(old, None, &old_mode)?;
                self.described.0 = start;
                Err(Failed)
            }
        }
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
        // Of what failed before something is always left to be written, where that can't be.
        let stuck = node.injector().and_then(|injector| injector.stuck());
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
            None => return Ok(()),
        };
        let closed = closed.and_then(|()| match stuck {
            Some(errno) => Err(system::text(errno)),
            None => Ok(()),
        });
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
