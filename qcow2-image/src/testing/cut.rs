//! Deeds that are cut short, by a crash at any moment or by any single fault; and what may be wrong with an image then.

use std::fmt;
use std::sync::Arc;

use qcow2_check::{Code, Options, Severity, check};
use qcow2_io::{Fault, Operation, Storage, StorageErrorKind};

use super::crash::{Entry, Moment, Overlay, Tape};
use super::random::Random;

/// How many of the last events a crash follows in any case: what makes a deed valid comes at its end.
const LAST: usize = 8;

/// What a deed did, event by event.
#[derive(Debug)]
pub struct Record {
    /// What its files held before.
    start: Vec<Vec<u8>>,
    entries: Vec<Entry>,
}

impl Record {
    /// Records what `act` does to a file of this content.
    pub fn of(start: &[u8], act: impl FnOnce(Arc<dyn Storage>)) -> Self {
        Self::of_files(vec![start.to_vec()], |_, files| {
            act(Arc::clone(&files[0]));
        })
    }

    /// The same with several files, and with a look at the tape.
    pub fn of_files(start: Vec<Vec<u8>>, act: impl FnOnce(&Tape, &[Arc<dyn Storage>])) -> Self {
        let tape = Tape::new();
        let files: Vec<_> = start
            .iter()
            .enumerate()
            .map(|(number, bytes)| {
                tape.record(number, Arc::new(Overlay::new(Arc::new(bytes.clone()))))
            })
            .collect();
        act(&tape, &files);
        let entries = tape.take();
        Self { start, entries }
    }

    /// Shows what a crash may leave of the files, once after each event.
    pub fn crash_everywhere(&self, random: &mut Random, look: impl FnMut(&Crash)) {
        self.crash_after(random, 1, look);
    }

    /// The same after about `count` of the events, the last ones among them.
    pub fn crash_about(&self, count: usize, random: &mut Random, look: impl FnMut(&Crash)) {
        self.crash_after(random, self.entries.len().div_ceil(count), look);
    }

    /// The same after every `step`th event and the last ones.
    pub fn crash_after(&self, random: &mut Random, step: usize, mut look: impl FnMut(&Crash)) {
        let mut moment = Moment::new(self.start.clone());
        for (number, entry) in self.entries.iter().enumerate() {
            moment.advance(entry);
            if !number.is_multiple_of(step) && number + LAST < self.entries.len() {
                continue;
            }
            let crash = moment.crash(random);
            let (files, loss) = crash.unwrap_or_else(|failure| panic!("{failure}"));
            look(&Crash {
                events: number + 1,
                files,
                how: format!("crash after {number}, {loss}"),
            });
        }
    }
}

/// What a crash has left.
#[derive(Debug)]
pub struct Crash {
    /// Events before it.
    pub events: usize,
    /// The files.
    pub files: Vec<Arc<dyn Storage>>,
    /// What it did, in words.
    pub how: String,
}

/// An operation of a storage that fails once.
#[derive(Clone, Copy, Debug)]
pub struct Strike {
    /// What fails.
    pub operation: Operation,
    kind: StorageErrorKind,
    after_effect: bool,
    nth: u64,
}

/// What can fail, and how; `true` if it has had its effect by then.
const STRIKES: [(Operation, StorageErrorKind, bool); 9] = [
    (Operation::Read, StorageErrorKind::Io, false),
    (Operation::Write, StorageErrorKind::NoSpace, false),
    (Operation::Write, StorageErrorKind::Io, true),
    (Operation::WriteZeroes, StorageErrorKind::Io, false),
    (Operation::Discard, StorageErrorKind::Io, false),
    (Operation::Flush, StorageErrorKind::Io, false),
    (Operation::Len, StorageErrorKind::Io, false),
    (Operation::SetLen, StorageErrorKind::Io, false),
    (Operation::Extents, StorageErrorKind::Io, false),
];

impl Strike {
    /// For the storage that is to fail.
    pub fn fault(&self) -> Fault {
        let fault = Fault::on(self.operation).nth(self.nth).kind(self.kind);
        if self.after_effect {
            fault.after_effect()
        } else {
            fault
        }
    }

    /// Asserts that who asked for the deed was `told`, if what failed was to make something durable: other failures may be got
    /// around.
    pub fn assert_told(&self, told: bool, what: impl fmt::Display) {
        let must_tell = matches!(self.operation, Operation::Write | Operation::Flush);
        assert!(told || !must_tell, "{what}, {self}: nobody was told");
    }
}

impl fmt::Display for Strike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            operation,
            kind,
            after_effect,
            nth,
        } = self;
        let when = if *after_effect {
            " after its effect"
        } else {
            ""
        };
        write!(f, "{operation} {nth} fails{when} ({kind:?})")
    }
}

/// Has a deed done again and again, while each kind of operation fails in turn: the first, then each `step`th after it, until
/// the deed says that it wasn't struck. Tells how often it was.
pub fn strike_everywhere(
    step: impl Fn(Operation) -> usize,
    mut deed: impl FnMut(Strike) -> bool,
) -> u64 {
    let mut met = 0;
    for (operation, kind, after_effect) in STRIKES {
        for nth in (1..).step_by(step(operation)) {
            let strike = Strike {
                operation,
                kind,
                after_effect,
                nth,
            };
            if !deed(strike) {
                break;
            }
            met += 1;
        }
    }
    met
}

/// What is wrong with an image that was cut short. Leaks may be; so may, if `announced` says so, what a dirty bit announces.
pub fn damage(image: &dyn Storage, announced: bool) -> Vec<(Code, u64)> {
    let report = check(image, &Options::default());
    let behind = [Code::RefcountLow, Code::RefcountMissing, Code::CopiedWrong];
    let is_dirty = announced && report.total(Code::FeatureDirty) > 0;
    let totals = report.totals.iter().copied();
    totals
        .filter(|(code, count)| {
            let is_bad = matches!(code.severity(), Severity::Corruption | Severity::Error);
            *count > 0 && is_bad && !(is_dirty && behind.contains(code))
        })
        .collect()
}
