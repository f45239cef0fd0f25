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
    /// Hundredths of a percent that were shown last. Threads tell their steps in any order.
    last: Mutex<Option<u64>>,
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
        let part = match self.total {
            0 => 10_000,
            total => u64::try_from(u128::from(done) * 10_000 / u128::from(total)).unwrap_or(10_000),
        };
        let asked = self.asked.swap(false, Ordering::Relaxed);
        if !self.shown && !asked {
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // A step that nobody can see is none, nor is one back; the last one always shows.
        let is_step = match *last {
            None => true,
            Some(last) => part >= last.saturating_add(100) || part == 10_000,
        };
        if !asked && !is_step {
            return;
        }
        *last = Some(part.max(last.unwrap_or(0)));
        let (whole, rest) = (part / 100, part % 100);
        let end = if self.shown { '\r' } else { '\n' };
        self.console
            .out(format_args!("    ({whole}.{rest:02}/100%){end}"));
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

impl Monitor for Progress<'_> {
    fn progress(&self, done: u64, _total: u64) {
        self.at(done.min(self.total));
    }
}
