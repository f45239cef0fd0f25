//! What a disk may hold after a crash: all that was flushed, and any part of the rest.

use std::fmt::Write as _;
use std::sync::Arc;

use qcow2_io::{Event, Storage};

use super::overlay::Overlay;
use super::tape::Entry;
use crate::testing::failure::{Failure, OrFail};
use crate::testing::random::Random;

/// Media write this many bytes at once, or not at all.
const SECTOR: u64 = 512;

/// Storages at one moment: what is durable, and what is not yet.
#[derive(Debug)]
pub struct Moment {
    durable: Vec<Arc<Vec<u8>>>,
    /// Since the last flush of their storage.
    pending: Vec<Entry>,
}

impl Moment {
    /// The beginning: all of it durable.
    pub fn new(storages: Vec<Vec<u8>>) -> Self {
        Self {
            durable: storages.into_iter().map(Arc::new).collect(),
            pending: Vec::new(),
        }
    }

    /// Goes on by one event.
    pub fn advance(&mut self, entry: &Entry) {
        if !entry.event.is_flush() {
            self.pending.push(entry.clone());
            return;
        }
        let number = entry.storage;
        let bytes = Arc::make_mut(&mut self.durable[number]);
        self.pending.retain(|entry| {
            if entry.storage == number {
                apply(&entry.event, bytes);
            }
            entry.storage != number
        });
    }

    /// Events that a crash may lose.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The storages after a crash now, and what the crash did, in words.
    ///
    /// # Errors
    ///
    /// When an event can't be done again.
    pub fn crash(&self, random: &mut Random) -> Result<(Vec<Arc<dyn Storage>>, String), Failure> {
        let loss = Loss::random(random, self.pending.len());
        let mut survivors: Vec<(usize, Event)> = Vec::new();
        let mut words = String::new();
        for (number, entry) in self.pending.iter().enumerate() {
            let pieces = pieces(&entry.event);
            let all = pieces.len();
            let kept: Vec<Event> = loss.survivors(number, pieces, random);
            if kept.len() < all {
                let what = describe(entry);
                _ = write!(words, "; {what}: {} of {all} lost", all - kept.len());
            }
            survivors.extend(kept.into_iter().map(|event| (entry.storage, event)));
        }
        if random.one_in(4) {
            random.shuffle(&mut survivors);
            words.push_str("; the rest reordered");
        }
        let storages: Vec<Overlay> = self
            .durable
            .iter()
            .map(|bytes| Overlay::new(Arc::clone(bytes)))
            .collect();
        for (storage, event) in &survivors {
            event.apply(&storages[*storage]).or_fail("a crash")?;
        }
        let storages = storages
            .into_iter()
            .map(|storage| Arc::new(storage) as Arc<dyn Storage>)
            .collect();
        Ok((
            storages,
            format!("{loss:?} of {}{words}", self.pending.len()),
        ))
    }
}

/// Which events a crash loses.
#[derive(Clone, Copy, Debug)]
enum Loss {
    All,
    None,
    /// Only this one is lost.
    Only(usize),
    /// Only this one survives.
    AllBut(usize),
    /// Those before survive, those from it on don't.
    From(usize),
    /// Each as a whole, one in so many survives.
    Whole(u64),
    /// Each sector of each, one in so many is lost.
    Torn(u64),
}

impl Loss {
    fn random(random: &mut Random, events: usize) -> Self {
        let one = random.below(events as u64) as usize;
        match random.below(12) {
            0 => Self::All,
            1 => Self::None,
            2 | 3 => Self::Only(one),
            4 | 5 => Self::AllBut(one),
            6 => Self::From(one),
            7 => Self::Whole(2),
            8 => Self::Whole(4),
            9 => Self::Torn(2),
            10 => Self::Torn(8),
            _ => Self::Torn(30),
        }
    }

    fn survivors(self, number: usize, pieces: Vec<Event>, random: &mut Random) -> Vec<Event> {
        let whole = match self {
            Self::All => false,
            Self::None => true,
            Self::Only(one) => number != one,
            Self::AllBut(one) => number == one,
            Self::From(one) => number < one,
            Self::Whole(n) => random.one_in(n),
            Self::Torn(n) => {
                return pieces.into_iter().filter(|_| !random.one_in(n)).collect();
            }
        };
        if whole { pieces } else { Vec::new() }
    }
}

/// The parts of an event that can be lost alone.
fn pieces(event: &Event) -> Vec<Event> {
    let (range, make): (_, &dyn Fn(std::ops::Range<u64>) -> Event) = match event {
        Event::WriteZeroes { range, flags } => (range, &|range| Event::WriteZeroes {
            range,
            flags: *flags,
        }),
        Event::Discard { range } => (range, &|range| Event::Discard { range }),
        other => return other.torn(SECTOR),
    };
    // Long ones in at most this many parts.
    let unit = ((range.end - range.start) / 128)
        .next_multiple_of(SECTOR)
        .max(SECTOR);
    let mut parts = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let end = (start / SECTOR * SECTOR + unit).min(range.end);
        parts.push(make(start..end));
        start = end;
    }
    parts
}

fn describe(entry: &Entry) -> String {
    let storage = if entry.storage == 0 { "" } else { "data " };
    match &entry.event {
        Event::Write { offset, bytes } => format!("{storage}write {offset:#x}+{:#x}", bytes.len()),
        other => format!("{storage}{other:?}"),
    }
}

/// Does an event to plain bytes.
fn apply(event: &Event, bytes: &mut Vec<u8>) {
    let mut put = |start: u64, end: u64, fill: &dyn Fn(&mut [u8])| {
        if bytes.len() < end as usize {
            bytes.resize(end as usize, 0);
        }
        fill(&mut bytes[start as usize..end as usize]);
    };
    match event {
        Event::Write { offset, bytes: new } if !new.is_empty() => {
            put(*offset, offset + new.len() as u64, &|part| {
                part.copy_from_slice(new);
            });
        }
        Event::WriteZeroes { range, .. } if range.start < range.end => {
            put(range.start, range.end, &|part| part.fill(0));
        }
        Event::Discard { range } => {
            let end = range.end.min(bytes.len() as u64);
            if range.start < end {
                bytes[range.start as usize..end as usize].fill(0);
            }
        }
        Event::SetLen { len } => bytes.resize(*len as usize, 0),
        _ => {}
    }
}
