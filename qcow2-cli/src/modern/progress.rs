//! How far long work is, and its end when the user asks for it.

use std::io::{self, IsTerminal as _};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qcow2_image::Monitor;

use super::args::OutputArgs;
use super::failure::Failure;
use crate::audit::Interrupt;

/// How often the bar is drawn, at most.
const DRAWS_PER_SECOND: u8 = 10;

/// A bar on standard error, if that is a terminal and progress is wanted. Ctrl-C ends the work that it watches.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
    interrupt: Interrupt,
}

impl Bar {
    /// A bar with a word in front of it.
    pub(crate) fn new(output: OutputArgs, what: &'static str) -> Result<Self, Failure> {
        let interrupt = Interrupt::listen().map_err(|error| Failure::of(&error))?;
        let bar = ProgressBar::with_draw_target(
            Some(0),
            if output.progress() && io::stderr().is_terminal() {
                ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND)
            } else {
                ProgressDrawTarget::hidden()
            },
        );
        let style = ProgressStyle::with_template(
            "{prefix:>10} [{bar:24}] {bytes} of {total_bytes}, {eta} left",
        );
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what);
        Ok(Self { bar, interrupt })
    }

    /// Wipes the bar away.
    pub(crate) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.end();
    }
}

impl Monitor for Bar {
    fn progress(&self, done: u64, total: u64) {
        if self.bar.is_hidden() {
            return;
        }
        self.bar.set_length(total);
        // Threads tell it in any order.
        self.bar.set_position(self.bar.position().max(done));
    }

    fn is_cancelled(&self) -> bool {
        self.interrupt.is_set()
    }
}
