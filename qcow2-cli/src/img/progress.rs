//! How far long work is: `-p`, and the signal that asks for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use qcow2_image::Monitor;

use crate::Console;

/// Shows how far work is: all along, or once whenever SIGUSR1 comes.
pub(crate) struct Progress<'a> {
    console: &'a Console,
    shown: bool,
    asked: Arc<AtomicBool>,
    /// Hundredths of a percent that were shown last.
    last: AtomicU64,
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
            last: AtomicU64::new(u64::MAX),
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
        let last = self.last.swap(part, Ordering::Relaxed);
        // A step that nobody can see is none; the last one always shows.
        if asked
            || last == u64::MAX
            || part.saturating_sub(last) >= 100
            || (part == 10_000 && last != part)
        {
            let (whole, rest) = (part / 100, part % 100);
            let end = if self.shown { '\r' } else { '\n' };
            self.console
                .out(format_args!("    ({whole}.{rest:02}/100%){end}"));
            self.console.flush();
        } else {
            self.last.store(last, Ordering::Relaxed);
        }
    }

    /// All is done.
    pub(crate) fn end(&self) {
        self.at(self.total);
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
