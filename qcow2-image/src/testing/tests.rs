//! The harness on disks without qcow2: right ones pass, and each wrong one is found out.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use qcow2_io::{Result as IoResult, Storage, StorageErrorKind, ZeroFlags};

use super::*;
use crate::create::Preallocation;

/// What a disk does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// Flushes go nowhere.
    FlushLost,
    /// Every third write is one byte short.
    WriteShort,
    /// What was cut off comes back.
    CutComesBack,
    /// Errors of flushes are kept quiet.
    FlushQuiet,
    /// Data is written in two steps, the first of them elsewhere.
    Smears,
    /// Extents are holes.
    AllHoles,
}

/// An engine that keeps the disk as it is, in the image or the data file.
#[derive(Debug)]
struct Flat(Wrong);

#[derive(Debug)]
struct FlatDisk {
    storage: Arc<dyn Storage>,
    wrong: Wrong,
    cluster: u64,
    cannot_discard: bool,
    state: Mutex<FlatState>,
}

/// What it needs to do things wrong.
#[derive(Debug, Default)]
struct FlatState {
    size: u64,
    writes: u64,
    cut: BTreeMap<u64, Vec<u8>>,
}

impl FlatDisk {
    fn cut(&self, range: &Range<u64>, kind: qcow2_io::Operation) -> IoResult<()> {
        if range.end > self.state.lock().unwrap().size {
            return Err(qcow2_io::StorageError::new(
                kind,
                StorageErrorKind::OutOfRange,
            ));
        }
        Ok(())
    }
}

impl Storage for FlatDisk {
    fn len(&self) -> IoResult<u64> {
        Ok(self.state.lock().unwrap().size)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> IoResult<()> {
        self.storage.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> IoResult<()> {
        let mut bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.to_vec()).collect();
        let range = offset..offset + bytes.len() as u64;
        self.cut(&range, qcow2_io::Operation::Write)?;
        let mut state = self.state.lock().unwrap();
        state.writes += 1;
        if self.wrong == Wrong::WriteShort && state.writes.is_multiple_of(3) {
            bytes.pop();
        }
        if self.wrong == Wrong::Smears && offset >= 4096 {
            let mut kept = vec![0; bytes.len()];
            self.storage.read_at(&mut kept, offset - 4096)?;
            self.storage.write_at(&bytes, offset - 4096)?;
            self.storage.write_at(&kept, offset - 4096)?;
        }
        self.storage.write_at(&bytes, offset)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> IoResult<()> {
        self.storage.write_zeroes(range, flags)
    }

    fn discard(&self, range: Range<u64>) -> IoResult<()> {
        if self.cannot_discard {
            let kind = StorageErrorKind::Unsupported;
            return Err(qcow2_io::StorageError::new(
                qcow2_io::Operation::Discard,
                kind,
            ));
        }
        self.storage.write_zeroes(range, ZeroFlags::NONE)
    }

    fn flush(&self) -> IoResult<()> {
        match self.wrong {
            Wrong::FlushLost => Ok(()),
            Wrong::FlushQuiet => self.storage.flush().or(Ok(())),
            _ => self.storage.flush(),
        }
    }

    fn set_len(&self, len: u64) -> IoResult<()> {
        self.storage.set_len(len)
    }

    fn extents(&self, range: Range<u64>, _max: usize) -> IoResult<Vec<qcow2_io::Extent>> {
        let kind = match self.wrong {
            Wrong::AllHoles => qcow2_io::ExtentKind::Hole,
            _ => qcow2_io::ExtentKind::Data,
        };
        let len = range.end - range.start;
        Ok(vec![qcow2_io::Extent::new(range.start, len, kind)])
    }
}

impl Subject for FlatDisk {
    fn disk(&self) -> &dyn Storage {
        self
    }

    fn discard_whole(&self, range: Range<u64>) -> Result<(), Refusal> {
        if self.cannot_discard {
            return Ok(());
        }
        let size = self.state.lock().unwrap().size;
        let whole = differential::whole_clusters(&range, self.cluster, size);
        if whole.start < whole.end {
            self.storage.write_zeroes(whole, ZeroFlags::NONE)?;
        }
        Ok(())
    }

    fn pack(&self, bytes: &[u8], offset: u64) -> Result<(), Refusal> {
        Ok(self.disk().write_at(bytes, offset)?)
    }

    fn resize(&self, size: u64, _preallocation: Preallocation) -> Result<(), Refusal> {
        let mut state = self.state.lock().unwrap();
        let old = state.size;
        if size < old {
            let mut bytes = vec![0; (old - size) as usize];
            self.storage.read_at(&mut bytes, size)?;
            state.cut.insert(size, bytes);
        }
        self.storage.set_len(size)?;
        state.size = size;
        if self.wrong == Wrong::CutComesBack
            && let Some(bytes) = state.cut.get(&old)
        {
            let back = bytes.len().min(size.saturating_sub(old) as usize);
            self.storage.write_at(&bytes[..back], old)?;
        }
        Ok(())
    }

    fn close(self: Box<Self>) -> Result<(), Refusal> {
        Ok(self.flush()?)
    }
}

impl Engine for Flat {
    fn create(&self, shape: &Shape, files: &Files) -> Result<(), Refusal> {
        files.image.write_at(&First::of(shape).disk, 0)?;
        Ok(())
    }

    fn open(&self, shape: &Shape, files: &Files, _: bool) -> Result<Box<dyn Subject>, Refusal> {
        Ok(Box::new(FlatDisk {
            storage: Arc::clone(&files.image),
            wrong: self.0,
            cluster: shape.format.cluster_size(),
            cannot_discard: shape.cannot_discard(),
            state: Mutex::new(FlatState {
                size: files.image.len()?,
                ..FlatState::default()
            }),
        }))
    }

    fn check(&self, _: &Files, _: Tolerance) -> Result<(), Failure> {
        Ok(())
    }
}

/// A program of the seed whose image has nothing that only qcow2 has.
fn program(seed: u64) -> Program {
    let mut program = Program::random(seed, Scale::Small, false);
    program.shape.origin = Origin::Engine;
    program.shape.data_file = DataFile::None;
    program
}

fn crashes(wrong: Wrong, seed: u64) -> Result<usize, Failure> {
    let mut program = program(seed);
    // A plain file does not switch its length in one step.
    program
        .actions
        .retain(|action| !matches!(action, Action::Resize { .. }));
    let files = in_memory(&Flat(wrong), &program.shape, None)?;
    crash_states(&Flat(wrong), &program, &files, 60)
}

fn faults(wrong: Wrong, seed: u64) -> Result<usize, Failure> {
    let (engine, program) = (Flat(wrong), program(seed));
    let files = in_memory(&engine, &program.shape, None)?;
    let runs = FaultRuns::new(&engine, &program, &files)?;
    let mut met = 0;
    for case in runs.cases()? {
        // A plain file's size is that of its device.
        if matches!(case, FaultCase::Short { .. }) {
            continue;
        }
        let during = |failure: Failure| failure.during(case);
        met += usize::from(runs.run(case).map_err(during)?);
    }
    Ok(met)
}

#[test]
fn a_right_disk_passes() {
    for seed in 0..40 {
        run_in_memory(&Flat(Wrong::Nothing), &program(seed)).unwrap();
    }
    for seed in 0..10 {
        assert!(crashes(Wrong::Nothing, seed).unwrap() > 20);
    }
    let met: usize = (0..10)
        .map(|seed| faults(Wrong::Nothing, seed).unwrap())
        .sum();
    assert!(met > 200, "only {met} faults were met");
}

#[test]
fn a_short_write_is_found() {
    let found =
        (0..40).any(|seed| run_in_memory(&Flat(Wrong::WriteShort), &program(seed)).is_err());
    assert!(found);
}

#[test]
fn bytes_that_come_back_are_found() {
    let wrong = Flat(Wrong::CutComesBack);
    assert!((0..200).any(|seed| run_in_memory(&wrong, &program(seed)).is_err()));
}

#[test]
fn a_wrong_hole_is_found() {
    assert!((0..20).any(|seed| run_in_memory(&Flat(Wrong::AllHoles), &program(seed)).is_err()));
}

#[test]
fn a_flush_that_does_nothing_is_found() {
    assert!((0..20).any(|seed| crashes(Wrong::FlushLost, seed).is_err()));
}

#[test]
fn a_write_that_is_not_in_place_is_found() {
    assert!((0..20).any(|seed| crashes(Wrong::Smears, seed).is_err()));
}

#[test]
fn an_error_kept_quiet_is_found() {
    let failure = faults(Wrong::FlushQuiet, 1).unwrap_err();
    assert!(failure.to_string().contains("nobody was told"), "{failure}");
}
