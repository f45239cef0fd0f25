//! Faults: one operation of the storage fails, and the program goes on.
//!
//! The error must reach the caller, later operations work or fail cleanly, and when the fault is over the image is free of
//! corruption and holds all that was flushed; what failed may be there or not, byte by byte.

use std::fmt;
use std::sync::Arc;

use qcow2_io::{Fault, Faulty, Operation, Slice, Storage, StorageErrorKind};

use super::action::{Action, Program};
use super::crash::Overlay;
use super::engine::{Engine, Tolerance};
use super::failure::{Failure, OrFail};
use super::files::{Files, First};
use super::ledger::Ledger;
use super::play::{Manner, Player};
use super::random::Random;
use super::snapshots::compare_snapshots;

/// A tag that no action of a program has.
const TAG_AFTER: u32 = 500;

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultCase {
    /// One operation fails.
    Once {
        /// Of the image (0) or the data file (1).
        storage: usize,
        /// Which operation.
        operation: Operation,
        /// Which one of them, counted from 1.
        nth: u64,
        /// With which error.
        kind: StorageErrorKind,
        /// Whether it takes place all the same.
        after_effect: bool,
    },
    /// The image lies on a device that is full after so many more bytes.
    Short {
        /// How many.
        spare: u64,
    },
}

impl fmt::Display for FaultCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Once {
                storage,
                operation,
                nth,
                kind,
                after_effect,
            } => {
                let file = if *storage == 0 { "image" } else { "data file" };
                let how = if *after_effect {
                    ", done all the same"
                } else {
                    ""
                };
                write!(f, "{operation} {nth} of the {file} fails ({kind:?}{how})")
            }
            Self::Short { spare } => write!(f, "a device with {spare} bytes to spare"),
        }
    }
}

/// A program, and its image as it is before.
pub struct FaultRuns<'a> {
    engine: &'a dyn Engine,
    program: &'a Program,
    files: &'a Files,
    first: First,
    start: Vec<Arc<Vec<u8>>>,
}

impl<'a> FaultRuns<'a> {
    /// Prepares runs of a program whose image lies in `files`, and stays as it is there.
    ///
    /// # Errors
    ///
    /// When the files can't be read.
    pub fn new(
        engine: &'a dyn Engine,
        program: &'a Program,
        files: &'a Files,
    ) -> Result<Self, Failure> {
        let mut start = Vec::new();
        for storage in [Some(&files.image), files.data.as_ref()]
            .into_iter()
            .flatten()
        {
            let len = storage.len().or_fail("asking for the length")?;
            let mut bytes = vec![0; len as usize];
            storage.read_at(&mut bytes, 0).or_fail("reading")?;
            start.push(Arc::new(bytes));
        }
        Ok(Self {
            engine,
            program,
            files,
            first: First::of(&program.shape),
            start,
        })
    }

    /// All single faults that the program can meet, and a few full devices. Runs it once.
    ///
    /// # Errors
    ///
    /// What is wrong without any fault.
    pub fn cases(&self) -> Result<Vec<FaultCase>, Failure> {
        let storages = self.storages();
        let files = self.files_of(&storages, |storage| storage);
        let (mut player, _) = self.play(&files, Manner::Strict, &|| 0)?;
        player.compare()?;
        player.close()?;
        let mut cases = Vec::new();
        for (number, storage) in storages.iter().enumerate() {
            for (operation, kind, after_effect) in FAULTS {
                for nth in 1..=storage.count(operation) {
                    cases.push(FaultCase::Once {
                        storage: number,
                        operation,
                        nth,
                        kind,
                        after_effect,
                    });
                }
            }
        }
        let cluster = self.program.shape.format.cluster_size();
        for clusters in [0, 1, 2, 3, 5, 8, 13, 21, 34] {
            cases.push(FaultCase::Short {
                spare: clusters * cluster,
            });
        }
        Ok(cases)
    }

    /// Runs the program with this fault. Tells whether the fault was met.
    ///
    /// # Errors
    ///
    /// What is wrong with what comes of it.
    pub fn run(&self, case: FaultCase) -> Result<bool, Failure> {
        let storages = self.storages();
        let mut wrap: Box<Wrap> = Box::new(|storage| storage);
        match case {
            FaultCase::Once {
                storage,
                operation,
                nth,
                kind,
                after_effect,
            } => {
                let fault = Fault::on(operation).nth(nth).kind(kind);
                let fault = if after_effect {
                    fault.after_effect()
                } else {
                    fault
                };
                storages
                    .get(storage)
                    .ok_or_else(|| Failure::new("no such storage"))?
                    .add(fault);
            }
            FaultCase::Short { spare } => {
                let len = self.start[0].len() as u64 + spare;
                wrap = Box::new(move |storage| {
                    Arc::new(Slice::new(storage, 0, len).expect("a device of sane length"))
                });
            }
        }
        let files = self.files_of(&storages, wrap);
        let struck = || storages.iter().map(|storage| storage.struck()).sum::<u64>();
        let (mut player, told) = self.play(&files, Manner::Tolerant, &struck)?;
        if player.refusals.is_empty() && struck() > 0 && must_be_told(case) {
            return Err(Failure::new("nobody was told of the error"));
        }
        let met = !player.refusals.is_empty() || struck() > 0;
        player.close()?;
        // A crash of the program instead of a close is for the crash tests.
        let ledger = player.ledger.clone();
        drop(player);
        for storage in &storages {
            storage.clear();
        }
        let files = self.files_of(&storages, |storage| storage);
        self.look(&files, ledger)
            .map_err(|failure| failure.during(told))?;
        Ok(met)
    }

    fn storages(&self) -> Vec<Arc<Faulty<Overlay>>> {
        let storage = |bytes: &Arc<Vec<u8>>| Faulty::new(Overlay::new(Arc::clone(bytes)));
        self.start.iter().map(|b| Arc::new(storage(b))).collect()
    }

    fn files_of(
        &self,
        storages: &[Arc<Faulty<Overlay>>],
        wrap: impl Fn(Arc<dyn Storage>) -> Arc<dyn Storage>,
    ) -> Files {
        let as_dyn = |storage: &Arc<Faulty<Overlay>>| Arc::clone(storage) as Arc<dyn Storage>;
        Files {
            image: wrap(as_dyn(&storages[0])),
            data: storages.get(1).map(as_dyn),
            ..self.files.clone()
        }
    }

    /// Plays all of the program. Tells where the fault was met, for the words of a failure.
    fn play<'b>(
        &'b self,
        files: &'b Files,
        manner: Manner,
        struck: &dyn Fn() -> u64,
    ) -> Result<(Player<'b>, String), Failure> {
        let ledger = Ledger::new(self.first.disk.clone());
        let shape = &self.program.shape;
        let mut player = Player::open(self.engine, shape, files, ledger, manner)?;
        let mut told = if struck() > 0 {
            "fault at open".to_owned()
        } else {
            String::new()
        };
        for (number, action) in self.program.actions.iter().enumerate() {
            player
                .play(action)
                .map_err(|failure| failure.during(format_args!("{told}; action {number}")))?;
            if told.is_empty() && struck() > 0 {
                told = format!("fault in action {number} {action:?}");
            }
        }
        Ok((player, told))
    }

    /// Looks at the image when all is over.
    fn look(&self, files: &Files, ledger: Ledger) -> Result<(), Failure> {
        let (engine, shape) = (self.engine, &self.program.shape);
        engine.check(files, Tolerance::Interrupted)?;
        compare_snapshots(engine, shape, files, &self.first.snapshots)?;
        let mut player = Player::open(engine, shape, files, ledger, Manner::Strict)?;
        player
            .compare()
            .map_err(|failure| failure.during("opened again"))?;
        let random = Random::new(self.program.seed);
        for action in Program::more(shape, random, 3, TAG_AFTER) {
            player
                .play(&action)
                .map_err(|failure| failure.during("opened again"))?;
        }
        player.play(&Action::Flush)?;
        player.compare()?;
        player.close()?;
        engine.check(files, Tolerance::Recovered)
    }
}

/// What is put around a storage.
type Wrap = dyn Fn(Arc<dyn Storage>) -> Arc<dyn Storage>;

/// The operations that fail, and how.
const FAULTS: [(Operation, StorageErrorKind, bool); 12] = [
    (Operation::Read, StorageErrorKind::Io, false),
    (Operation::Write, StorageErrorKind::Io, false),
    (Operation::Write, StorageErrorKind::NoSpace, false),
    (Operation::Write, StorageErrorKind::Io, true),
    (Operation::WriteZeroes, StorageErrorKind::Io, false),
    (Operation::WriteZeroes, StorageErrorKind::NoSpace, true),
    (Operation::Discard, StorageErrorKind::Io, false),
    (Operation::Flush, StorageErrorKind::Io, false),
    (Operation::Flush, StorageErrorKind::NoSpace, true),
    (Operation::SetLen, StorageErrorKind::Io, false),
    (Operation::Len, StorageErrorKind::Io, false),
    (Operation::Extents, StorageErrorKind::Io, false),
];

/// Whether the error must reach the caller: where nothing can make good for what failed.
fn must_be_told(case: FaultCase) -> bool {
    match case {
        FaultCase::Once {
            operation, storage, ..
        } => match operation {
            Operation::Flush => true,
            Operation::Write => storage == 0,
            _ => false,
        },
        FaultCase::Short { .. } => false,
    }
}
