//! How far long work is: `-p`, and the signal that asks for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use qcow2_image::Monitor;

use crate::Console;

/// Shows how far work is: all along, or once whenever SIGUSR1 comes.
pub(crate) struct Progress<'a> {
    console: &'a Console,
    shown: bool,
    asked: Arc<AtomicBool>,
    /// Percent that were shown last. Threads tell their steps in any order.
    last: Mutex<Option<f64>>,
    /// What the whole is that a part of the work is counted in.
    total: u64,
}

impl<'a> Progress<'a> {
    /// For work on `total` bytes; `shown` for `-p`.
    pub(crate) fn new(console: &'a Console, shown: bool, total: u64) -> Self {
        let asked = Arc::default();
        // Where signals can't be had, nobody can ask.
        let _ = signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&asked));
        let progress = Self {
            console,
            shown,
            asked,
            last: Mutex::default(),
            total,
        };
        progress.at(0);
        progress
    }

    /// So many bytes are done.
    pub(crate) fn at(&self, done: u64) {
        self.part(done, self.total);
    }

    /// So much of a whole is done.
    fn part(&self, done: u64, total: u64) {
        let asked = self.asked.swap(false, Ordering::Relaxed);
        if !self.shown && !asked {
            return;
        }
        let percent = percent(done, total);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // A step that nobody can see is none, nor is one back; the last one always shows.
        let is_step = match *last {
            None => true,
            Some(last) => percent >= last + 1.0 || done >= total,
        };
        if !asked && !is_step {
            return;
        }
        *last = Some(percent.max(last.unwrap_or(0.0)));
        let end = if self.shown { '\r' } else { '\n' };
        self.console
            .out(format_args!("    ({percent:.2}/100%){end}"));
        self.console.flush();
    }

    /// All is done.
    pub(crate) fn end(&self) {
        self.at(self.total);
        self.end_here();
    }

    /// It ends, whether or not all is done.
    pub(crate) fn end_here(&self) {
        if self.shown {
            self.console.out(format_args!("\n"));
            self.console.flush();
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
fn percent(done: u64, total: u64) -> f64 {
    if done >= total {
        100.0
    } else {
        done as f64 * 100.0 / total as f64
    }
}

/// Progress of work that counts in units of its own.
pub(crate) struct Parts<'a, 'p>(pub(crate) &'a Progress<'p>);

impl Monitor for Parts<'_, '_> {
    fn progress(&self, done: u64, total: u64) {
        self.0.part(done, total);
    }
}

impl Monitor for Progress<'_> {
    fn progress(&self, done: u64, _total: u64) {
        self.at(done.min(self.total));
    }
}
