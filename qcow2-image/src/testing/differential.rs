//! Programs on two disks at once: the engine's and plain bytes; and what QEMU says of the image.

use std::path::Path;
use std::sync::Arc;

use qcow2_io::Storage;

use super::action::{Action, Program};
use super::content::Content;
use super::engine::{Engine, Tolerance};
use super::failure::{Failure, OrFail};
use super::files::{DATA_NAME, Files, First};
use super::ledger::{Ledger, State, View};
use super::play::{Manner, Player};
use super::prepare;
use super::qemu::Qemu;
use super::shape::{DataFile, Encryption, Origin};
use super::snapshots::compare_snapshots;
use crate::create::Preallocation;

/// Runs a program in memory, without QEMU.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn run_in_memory(engine: &dyn Engine, program: &Program) -> Result<(), Failure> {
    let files = prepare::in_memory(engine, &program.shape, None)?;
    run(engine, program, &files).map(|_| ())
}

/// Runs a program on files in an empty folder, and then asks QEMU what it thinks of them.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn run_beside_qemu(
    engine: &dyn Engine,
    program: &Program,
    folder: &Path,
) -> Result<(), Failure> {
    let files = prepare::in_folder(engine, &program.shape, folder)?;
    let disk = run(engine, program, &files)?;
    drop(files);
    let qemu = Qemu::new(folder, program.shape.encryption);
    qemu.check()?;
    same(&qemu.read(None)?, &disk).map_err(|failure| failure.during("as QEMU reads it"))?;
    for (number, expected) in First::of(&program.shape).snapshots.iter().enumerate() {
        let name = format!("s{}", number + 1);
        // QEMU shows as much of a snapshot as the disk has now.
        let mut found = qemu.read(Some(&name))?;
        let common = found.len().min(expected.len());
        found.truncate(common);
        same(&found, &expected[..common])
            .map_err(|failure| failure.during(format_args!("snapshot {name} as QEMU reads it")))?;
    }
    Ok(())
}

/// Lets QEMU make the image and play the program, and reads what it wrote.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn run_by_qemu(engine: &dyn Engine, program: &Program, folder: &Path) -> Result<(), Failure> {
    let program = for_qemu(program);
    let shape = &program.shape;
    drop(prepare::in_folder(engine, shape, folder)?);
    Qemu::new(folder, shape.encryption).play(&program)?;
    let first = First::of(shape);
    let mut ledger = Ledger::new(first.disk.clone());
    for action in &program.actions {
        note(&mut ledger, &program, action);
    }
    ledger.flushed();
    let files = Files::reopen(shape, folder)?;
    engine.check(&files, Tolerance::Closed)?;
    compare_snapshots(engine, shape, &files, &first.snapshots)?;
    read_only(engine, &program, &files, &ledger)?;
    // A disk that is only read must stay as it is, also when it is open for writing.
    let mut player = Player::open(engine, shape, &files, ledger, Manner::Strict)?;
    player.compare()?;
    player.close()?;
    engine.check(&files, Tolerance::Closed)
}

/// Runs a program and gives what the disk holds in the end.
fn run(engine: &dyn Engine, program: &Program, files: &Files) -> Result<Vec<u8>, Failure> {
    let shape = &program.shape;
    let below: Vec<Vec<u8>> = files
        .backing
        .iter()
        .map(content)
        .collect::<Result<_, _>>()?;
    let first = First::of(shape);
    let ledger = Ledger::new(first.disk.clone());
    let mut player = Player::open(engine, shape, files, ledger, Manner::Strict)?;
    player
        .compare()
        .map_err(|failure| failure.during("before the program"))?;
    for (number, action) in program.actions.iter().enumerate() {
        player
            .play(action)
            .map_err(|failure| failure.during(format_args!("action {number} {action:?}")))?;
    }
    player
        .compare()
        .map_err(|failure| failure.during("after the program"))?;
    player.close()?;
    let (ledger, tolerance) = (player.ledger.clone(), player.tolerance());
    drop(player);
    engine.check(files, tolerance)?;
    read_only(engine, program, files, &ledger)?;
    compare_snapshots(engine, shape, files, &first.snapshots)?;
    for (storage, before) in files.backing.iter().zip(&below) {
        same(&content(storage)?, before).map_err(|failure| failure.during("a backing file"))?;
    }
    if let (DataFile::Raw, Some(data)) = (shape.data_file, &files.data) {
        let mut found = content(data)?;
        found.resize(ledger.size() as usize, 0);
        ledger
            .admit(0, &found, View::Running)
            .map_err(|failure| failure.during(DATA_NAME))?;
    }
    Ok(ledger.content())
}

/// Reads the image opened read-only.
fn read_only(
    engine: &dyn Engine,
    program: &Program,
    files: &Files,
    ledger: &Ledger,
) -> Result<(), Failure> {
    let subject = engine.open(&program.shape, files, true)?;
    let size = subject.disk().len().or_fail("asking for the size")?;
    if size != ledger.size() {
        let known = ledger.size();
        return Err(Failure::new(format!("the size is {size}, not {known}")));
    }
    let mut bytes = vec![0x5a; size as usize];
    subject.disk().read_at(&mut bytes, 0).or_fail("reading")?;
    ledger
        .admit(0, &bytes, View::Running)
        .map_err(|failure| failure.during("opened read-only"))
}

/// The program as QEMU can play it.
fn for_qemu(program: &Program) -> Program {
    let mut program = program.clone();
    if !matches!(program.shape.origin, Origin::Qemu(_)) {
        program.shape.origin = Origin::Qemu(Vec::new());
    }
    if program.shape.encryption != Encryption::None {
        // QEMU's preallocated clusters show deciphered zeros.
        program.shape.preallocation = Preallocation::Off;
        for action in &mut program.actions {
            if let Action::Resize { preallocation, .. } = action {
                *preallocation = Preallocation::Off;
            }
        }
    }
    let cluster = program.shape.format.cluster_size();
    if program.shape.cannot_discard() {
        // Nor can QEMU hide what a longer backing file has.
        let resizes = |action: &Action| matches!(action, Action::Resize { .. });
        program.actions.retain(|action| !resizes(action));
    }
    for action in &mut program.actions {
        make_plain(action);
        // QEMU leaves what was cut off within a cluster; it comes back when the disk grows.
        if let Action::Resize { size, .. } = action {
            *size = size.next_multiple_of(cluster);
        }
    }
    program
}

/// Content of one byte, as qemu-io can write it.
fn make_plain(action: &mut Action) {
    match action {
        Action::Write { content, .. } | Action::Pack { content, .. } => {
            if let Content::Tagged(tag) = *content {
                *content = Content::Byte(tag as u8);
            }
        }
        Action::Batch(actions) => actions.iter_mut().for_each(make_plain),
        _ => {}
    }
}

/// What an action that QEMU played makes of the disk.
fn note(ledger: &mut Ledger, program: &Program, action: &Action) {
    let size = ledger.size();
    let cut = |range: &std::ops::Range<u64>| {
        let start = range.start.min(size);
        start..range.end.clamp(start, size)
    };
    match action {
        Action::Write { range, content, .. } | Action::Pack { range, content } => {
            ledger.add(cut(range), *content, State::Done);
        }
        Action::Zero { range, .. } => ledger.add(cut(range), Content::Zeros, State::Done),
        Action::DiscardWhole { range } if !program.shape.cannot_discard() => {
            let range = whole_clusters(&cut(range), program.shape.format.cluster_size(), size);
            ledger.add(range, Content::Zeros, State::Done);
        }
        Action::Resize { size, .. } => ledger.resize(*size, State::Done),
        Action::Batch(actions) => {
            for action in actions {
                note(ledger, program, action);
            }
        }
        _ => {}
    }
}

/// The whole clusters of a range; the last one of a disk of `size` bytes is whole where the disk ends.
pub(super) fn whole_clusters(
    range: &std::ops::Range<u64>,
    cluster: u64,
    size: u64,
) -> std::ops::Range<u64> {
    let start = range.start.next_multiple_of(cluster);
    let end = if range.end == size {
        size
    } else {
        range.end / cluster * cluster
    };
    start..end
}

fn content(storage: &Arc<dyn Storage>) -> Result<Vec<u8>, Failure> {
    let len = storage.len().or_fail("asking for the length")?;
    let mut bytes = vec![0; len as usize];
    storage.read_at(&mut bytes, 0).or_fail("reading")?;
    Ok(bytes)
}

fn same(found: &[u8], expected: &[u8]) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    Err(Failure::new(match differs {
        Some(at) => format!(
            "byte {at:#x} is {:#04x}, not {:#04x}",
            found[at], expected[at]
        ),
        None => format!("{} bytes, not {}", found.len(), expected.len()),
    }))
}
