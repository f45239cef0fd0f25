//! Crashes: a program is recorded, and the image looked at as it may be after a crash at any moment.
//!
//! At each moment a storage holds all events before its last flush, and any subset of those since, torn at 512 bytes, in any
//! order. In each such state the image must be free of corruption, open, and hold all that a completed flush
//! acknowledged; what came after that may be there or not, byte by byte, but nothing else may be there.

mod overlay;
mod states;
mod tape;

use std::sync::Arc;

use qcow2_io::Storage;

use super::action::{Action, Program};
use super::engine::{Engine, Tolerance};
use super::failure::{Failure, OrFail};
use super::files::{Files, First};
use super::ledger::{Ledger, View};
use super::play::{Manner, Player};
use super::random::Random;
use super::snapshots::compare_snapshots;

pub use overlay::Overlay;
pub use states::Moment;
pub use tape::{Entry, Tape};

/// A tag that no action of a program has.
const TAG_AFTER: u32 = 500;

/// A program that was played, event by event.
struct Recording {
    /// Content of the image and, where there is one, the data file before the first event.
    start: Vec<Vec<u8>>,
    entries: Vec<Entry>,
    scenes: Vec<Scene>,
}

/// How things stood after an action.
struct Scene {
    /// Events so far.
    end: usize,
    /// Whether the action makes things durable, and so changes nothing by itself.
    flushes: bool,
    /// What the disk must hold.
    ledger: Ledger,
}

/// Plays a program and looks at `states` states that a crash may leave. Tells how many there were, which is less if so
/// many don't exist.
///
/// # Errors
///
/// The first state in which something is wrong.
pub fn crash_states(
    engine: &dyn Engine,
    program: &Program,
    files: &Files,
    states: usize,
) -> Result<usize, Failure> {
    let first = First::of(&program.shape);
    let recording = record(engine, program, files, &first)?;
    let mut random = Random::new(program.seed ^ 0xc4a5);
    let cuts = cuts(&recording.entries, states, &mut random);

    let mut moment = Moment::new(recording.start.clone());
    let mut position = 0;
    let mut looked_at = 0;
    for cut in cuts {
        while position < cut {
            moment.advance(&recording.entries[position]);
            position += 1;
        }
        let (storages, loss) = moment.crash(&mut random)?;
        let after = after_crash(engine, program, files, &storages, &first);
        after
            .look(ledger_at(&recording.scenes, cut), &mut random)
            .map_err(|failure| {
                let action = recording.scenes.iter().filter(|s| s.end <= cut).count();
                failure.during(format_args!(
                    "crash after {cut} of {} events, in action {action}, {loss}",
                    recording.entries.len()
                ))
            })?;
        looked_at += 1;
    }
    Ok(looked_at)
}

/// Plays the program on recorded storages.
fn record(
    engine: &dyn Engine,
    program: &Program,
    files: &Files,
    first: &First,
) -> Result<Recording, Failure> {
    let mut start = vec![content(&*files.image)?];
    if let Some(data) = &files.data {
        start.push(content(&**data)?);
    }
    let tape = Tape::new();
    let recorded = |number: usize| {
        let base = Arc::new(start[number].clone());
        tape.record(number, Arc::new(Overlay::new(base)))
    };
    let files = Files {
        image: recorded(0),
        data: files.data.as_ref().map(|_| recorded(1)),
        ..files.clone()
    };
    let ledger = Ledger::new(first.disk.clone());
    let shape = &program.shape;
    let mut scenes = vec![Scene {
        end: 0,
        flushes: true,
        ledger: ledger.clone(),
    }];
    let mut player = Player::open(engine, shape, &files, ledger, Manner::Strict)?;
    for (number, action) in program.actions.iter().enumerate() {
        player
            .play(action)
            .map_err(|failure| failure.during(format_args!("action {number}")))?;
        scenes.push(Scene {
            end: tape.position(),
            flushes: matches!(action, Action::Flush | Action::Reopen),
            ledger: player.ledger.clone(),
        });
    }
    player.close()?;
    let tolerance = player.tolerance();
    scenes.push(Scene {
        end: tape.position(),
        flushes: true,
        ledger: player.ledger.clone(),
    });
    drop(player);
    engine.check(&files, tolerance)?;
    Ok(Recording {
        start,
        entries: tape.take(),
        scenes,
    })
}

/// The moments to crash at, in order; one may come several times. Just before a flush most is at stake.
fn cuts(entries: &[Entry], count: usize, random: &mut Random) -> Vec<usize> {
    let mut before_flush = Vec::new();
    let mut with_pending = Vec::new();
    let mut pending = false;
    for (position, entry) in entries.iter().enumerate() {
        if entry.event.is_flush() {
            if pending {
                before_flush.push(position);
            }
            pending = false;
        } else {
            pending = true;
            with_pending.push(position + 1);
        }
    }
    if with_pending.is_empty() {
        return Vec::new();
    }
    random.shuffle(&mut before_flush);
    let mut cuts: Vec<usize> = (0..count)
        .map(
            |number| match before_flush.get(number / 2 % before_flush.len().max(1)) {
                Some(cut) if number % 2 == 0 => *cut,
                _ => random.pick(&with_pending),
            },
        )
        .collect();
    cuts.sort_unstable();
    cuts
}

/// What the disk may hold after a crash at `cut`.
fn ledger_at(scenes: &[Scene], cut: usize) -> &Ledger {
    let done = scenes.iter().filter(|scene| scene.end <= cut).count();
    // What the action under way has done counts as what may be there. A flush under way has acknowledged nothing.
    match scenes.get(done) {
        Some(scene) if !scene.flushes => &scene.ledger,
        _ => &scenes[done - 1].ledger,
    }
}

fn content(storage: &dyn Storage) -> Result<Vec<u8>, Failure> {
    let len = storage.len().or_fail("asking for the length")?;
    let mut bytes = vec![0; len as usize];
    storage.read_at(&mut bytes, 0).or_fail("reading")?;
    Ok(bytes)
}

/// An image after a crash.
struct AfterCrash<'a> {
    engine: &'a dyn Engine,
    program: &'a Program,
    files: Files,
    first: &'a First,
}

fn after_crash<'a>(
    engine: &'a dyn Engine,
    program: &'a Program,
    files: &Files,
    storages: &[Arc<dyn Storage>],
    first: &'a First,
) -> AfterCrash<'a> {
    AfterCrash {
        engine,
        program,
        files: Files {
            image: Arc::clone(&storages[0]),
            data: storages.get(1).cloned(),
            ..files.clone()
        },
        first,
    }
}

impl AfterCrash<'_> {
    /// Checks the image, reads all of it, and now and then goes on using it.
    fn look(&self, ledger: &Ledger, random: &mut Random) -> Result<(), Failure> {
        let (engine, shape) = (self.engine, &self.program.shape);
        engine.check(&self.files, Tolerance::Interrupted)?;
        compare_snapshots(engine, shape, &self.files, &self.first.snapshots)?;
        if random.one_in(4) {
            let subject = engine.open(shape, &self.files, true)?;
            return admit(subject.disk(), ledger)
                .map(|_| ())
                .map_err(|failure| failure.during("opened read-only"));
        }
        let ledger = ledger.clone();
        let mut player = Player::open(engine, shape, &self.files, ledger, Manner::Strict)?;
        let disk = admit(player.disk(), &player.ledger)?;
        player.ledger.restart(disk);
        if random.one_in(3) {
            let random = Random::new(random.draw());
            for action in Program::more(shape, random, 4, TAG_AFTER) {
                player.play(&action).map_err(|failure| {
                    failure.during(format_args!("after the crash, {action:?}"))
                })?;
            }
            player.play(&Action::Flush)?;
            player
                .compare()
                .map_err(|failure| failure.during("after the crash"))?;
        }
        player.close()?;
        engine
            .check(&self.files, Tolerance::Recovered)
            .map_err(|failure| failure.during("opened and closed after the crash"))?;
        compare_snapshots(engine, shape, &self.files, &self.first.snapshots)
    }
}

/// Compares the disk and gives its content.
fn admit(disk: &dyn Storage, ledger: &Ledger) -> Result<Vec<u8>, Failure> {
    let size = disk.len().or_fail("asking for the size")?;
    if !ledger.sizes().contains(&size) {
        let sizes = ledger.sizes();
        return Err(Failure::new(format!(
            "the size is {size}, not in {sizes:?}"
        )));
    }
    let bytes = content(disk)?;
    ledger.admit(0, &bytes, View::Crashed)?;
    Ok(bytes)
}
