//! What the program says, and in which order it reaches whoever listens.

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, PoisonError};

use crate::words::outside::bytes as bytes_of;

/// Bytes of standard output that wait until somebody flushes, unless a terminal listens.
const BUFFER: usize = 4096;

/// Standard output and standard error.
///
/// Scripts often read both from one pipe, and know the order from programs whose standard output is kept back until a
/// buffer is full, where it is no terminal. So is this one; [`flush`](Self::flush) is called where such a program would.
/// A reader that is gone is no error.
#[derive(Clone, Debug)]
pub struct Console {
    /// What the program was called as.
    program: String,
    kept: Arc<Mutex<Kept>>,
    by_line: bool,
}

/// What waits, and why no more of it can be sent.
#[derive(Debug, Default)]
struct Kept {
    text: String,
    trouble: Option<io::ErrorKind>,
}

impl Console {
    /// The process's own, for a program that was called by this name.
    pub fn new(program: impl Into<String>) -> Self {
        Self {
            program: program.into(),
            kept: Arc::default(),
            by_line: io::stdout().is_terminal(),
        }
    }

    /// The same, for a program that goes by another name.
    #[must_use]
    pub fn renamed(&self, program: impl Into<String>) -> Self {
        Self {
            program: program.into(),
            ..self.clone()
        }
    }

    /// What the program was called as, for hints that name it.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Says something on standard output; line ends are the caller's.
    pub fn out(&self, text: fmt::Arguments<'_>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // Memory takes all.
        let _ = fmt::Write::write_fmt(&mut kept.text, text);
        if self.by_line || kept.text.len() >= BUFFER {
            send(&mut kept);
        }
    }

    /// Says something on standard error, at once; line ends are the caller's.
    pub fn err(&self, text: fmt::Arguments<'_>) {
        let _ = io::stderr().write_all(&bytes_of(&text.to_string()));
    }

    /// Says something on standard output at once, for who has no console at hand.
    pub fn tell(text: fmt::Arguments<'_>) {
        let mut out = io::stdout().lock();
        let _ = out
            .write_all(&bytes_of(&text.to_string()))
            .and_then(|()| out.flush());
    }

    /// As [`err`](Self::err), for who has no console at hand.
    pub fn warn(text: fmt::Arguments<'_>) {
        let _ = io::stderr().write_all(&bytes_of(&text.to_string()));
    }

    /// Why standard output takes no more, if so: `BrokenPipe` if nobody reads it.
    pub fn trouble(&self) -> Option<io::ErrorKind> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.trouble
    }

    /// Sends what is kept back.
    pub fn flush(&self) {
        send(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn send(kept: &mut Kept) {
    let mut out = io::stdout().lock();
    let sent = out
        .write_all(&bytes_of(&kept.text))
        .and_then(|()| out.flush());
    if let Err(error) = sent {
        kept.trouble = Some(error.kind());
    }
    kept.text.clear();
}

/// A line on standard output.
#[macro_export]
macro_rules! say {
    ($console:expr) => { $console.out(format_args!("\n")) };
    ($console:expr, $($text:tt)*) => { $console.out(format_args!("{}\n", format_args!($($text)*))) };
}

/// A line on standard error.
#[macro_export]
macro_rules! complain {
    ($console:expr, $($text:tt)*) => { $console.err(format_args!("{}\n", format_args!($($text)*))) };
}
