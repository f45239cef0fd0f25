//! A bar on the terminal while an image is checked, and the end of the check when the user asks for it.

use std::io::{self, IsTerminal as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Once, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qcow2_check::{Monitor, Phase};

/// A check that is done sooner needs no bar.
const PATIENCE: Duration = Duration::from_millis(300);
/// How often the bar is drawn, at most.
const DRAWS_PER_SECOND: u8 = 10;

/// Whether the user has had enough.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on Ctrl-C is a request to come to an end; a second one kills.
    ///
    /// # Errors
    ///
    /// Signals can't be caught.
    pub fn listen() -> Result<Self> {
        /// One for all: what was asked for while one thing was done is meant for the next one, too.
        static HEARD: OnceLock<Interrupt> = OnceLock::new();
        if let Some(interrupt) = HEARD.get() {
            return Ok(interrupt.clone());
        }
        let interrupt = Self::default();
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            let flag = || Arc::clone(&interrupt.0);
            // In this order: the first signal finds the flag clear and sets it.
            signal_hook::flag::register_conditional_default(signal, flag())
                .and_then(|_| signal_hook::flag::register(signal, flag()))
                .context("signals can't be caught")?;
        }
        Ok(HEARD.get_or_init(|| interrupt).clone())
    }

    /// Asks something of somebody: at the question Ctrl-C ends the program, there being no work to bring to an end.
    pub(crate) fn while_asking<T>(&self, ask: impl FnOnce() -> T) -> T {
        let before = self.0.swap(true, Ordering::Relaxed);
        let answer = ask();
        self.0.store(before, Ordering::Relaxed);
        answer
    }

    /// Whether it happened.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Watches the check of one image.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    started: Instant,
    shown: Once,
    /// Bytes read when the phase began.
    base: AtomicU64,
    read: AtomicU64,
    /// Bytes that the phase will read; the bar's own copy is behind a lock.
    length: AtomicU64,
    interrupt: Interrupt,
    visible: bool,
}

impl Progress {
    /// A bar on standard error, if that is a terminal and `visible`.
    pub(crate) fn new(visible: bool, interrupt: &Interrupt) -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template(
            "{prefix:>10} [{bar:24}] {bytes} of {total_bytes}, {eta} left",
        ) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self {
            bar,
            started: Instant::now(),
            shown: Once::new(),
            base: AtomicU64::new(0),
            read: AtomicU64::new(0),
            length: AtomicU64::new(0),
            interrupt: interrupt.clone(),
            visible: visible && io::stderr().is_terminal(),
        }
    }

    /// Wipes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Monitor for Progress {
    fn phase(&self, phase: Phase, bytes: u64) {
        self.base
            .store(self.read.load(Ordering::Relaxed), Ordering::Relaxed);
        self.length.store(bytes, Ordering::Relaxed);
        self.bar.set_prefix(phase.to_string());
        self.bar.set_length(bytes);
        self.bar.set_position(0);
        self.bar.reset_eta();
    }

    fn progress(&self, bytes: u64) {
        if !self.visible {
            return;
        }
        let before = self.read.fetch_max(bytes, Ordering::Relaxed);
        let done = bytes.max(before) - self.base.load(Ordering::Relaxed).min(before);
        // What a phase will read is an estimate.
        if self.length.fetch_max(done, Ordering::Relaxed) < done {
            self.bar.set_length(done);
        }
        self.bar.set_position(done);
        if self.started.elapsed() > PATIENCE {
            self.shown.call_once(|| {
                self.bar
                    .set_draw_target(ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
            });
        }
    }

    fn is_cancelled(&self) -> bool {
        self.interrupt.is_set()
    }
}

#[cfg(test)]
mod tests {
    use qcow2_check::{Options, Verdict, audit, synth};
    use qcow2_io::Memory;

    use super::*;

    #[test]
    fn an_interrupt_ends_the_check_and_is_told() {
        let image = Memory::new();
        synth::demo(&image).unwrap();
        let interrupt = Interrupt::default();
        let progress = Progress::new(true, &interrupt);
        let options = Options {
            monitor: Some(&progress),
            ..Options::default()
        };
        assert!(!audit(&image, &options).cancelled);
        interrupt.0.store(true, Ordering::Relaxed);
        let report = audit(&image, &options);
        assert!(report.cancelled);
        assert_eq!(report.verdict(), Verdict::Incomplete);
    }
}
