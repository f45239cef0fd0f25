//! How far long work is, and its end when the user asks for it.

use std::io::{self, IsTerminal as _};
use std::sync::Once;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qcow2_image::Monitor;

use super::args::OutputArgs;
use super::failure::Failure;
use crate::audit::Interrupt;

/// What is done sooner needs no bar.
const PATIENCE: Duration = Duration::from_millis(300);
/// How often the bar is drawn, at most.
const DRAWS_PER_SECOND: u8 = 10;

/// A bar on standard error, if that is a terminal and progress is wanted. Ctrl-C ends the work that it watches.
#[derive(Debug)]
pub(crate) struct Bar {
    drawn: ProgressBar,
    /// When it began, if it may be seen.
    started: Option<Instant>,
    shown: Once,
    interrupt: Interrupt,
}

impl Bar {
    /// A bar with a word in front of it.
    pub(crate) fn new(output: OutputArgs, what: &'static str) -> Result<Self, Failure> {
        let interrupt = Interrupt::listen().map_err(|error| Failure::of(&error))?;
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden());
        let visible = output.progress() && io::stderr().is_terminal();
        let style = ProgressStyle::with_template(
            "{prefix:>10} [{bar:24}] {bytes} of {total_bytes}, {eta} left",
        );
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what);
        Ok(Self {
            drawn: bar,
            started: visible.then(Instant::now),
            shown: Once::new(),
            interrupt,
        })
    }

    /// Wipes the bar away.
    pub(crate) fn end(&self) {
        self.drawn.finish_and_clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.end();
    }
}

impl Monitor for Bar {
    fn progress(&self, done: u64, total: u64) {
        let Some(started) = self.started else {
            return;
        };
        if started.elapsed() < PATIENCE {
            return;
        }
        self.shown.call_once(|| {
            self.drawn
                .set_draw_target(ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
        });
        if self.drawn.length() != Some(total) {
            self.drawn.set_length(total);
        }
        // Threads tell it in any order.
        self.drawn.set_position(self.drawn.position().max(done));
    }

    fn is_cancelled(&self) -> bool {
        self.interrupt.is_set()
    }
}
