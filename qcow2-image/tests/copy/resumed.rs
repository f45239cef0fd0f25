use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use qcow2_image::Monitor;
use qcow2_image::copy::{Checkpoint, CopyError, CopyOptions, Target, copy};
use qcow2_image::create::CreateOptions;
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{Fault, Faulty, Memory, Operation, Result, Storage, ZeroFlags};

use crate::rig::{assert_reads, assert_sound, content, create, memory, open, options};

const LEN: usize = (4 << 20) + 1536;

/// Ends a copy after some pieces, and keeps the last checkpoint.
#[derive(Default)]
struct Interrupter {
    pieces: AtomicU64,
    ends_after: u64,
    told: Mutex<Vec<Checkpoint>>,
}

impl Monitor for Interrupter {
    fn progress(&self, _done: u64, _total: u64) {
        self.pieces.fetch_add(1, Ordering::Relaxed);
    }
    fn is_cancelled(&self) -> bool {
        self.pieces.load(Ordering::Relaxed) >= self.ends_after
    }
    fn checkpoint(&self, checkpoint: &Checkpoint) {
        self.told.lock().unwrap().push(*checkpoint);
    }
}

fn copying(threads: usize, compress: bool) -> CopyOptions<'static> {
    let options = CopyOptions::new()
        .threads(threads)
        .chunk(100_000)
        .checkpoints(300_000);
    if compress {
        options.compress(Level::default())
    } else {
        options
    }
}

fn kinds() -> Vec<(usize, bool)> {
    let mut all = vec![(1, false), (4, false)];
    if Codec::Zlib.is_available() {
        all.extend([(1, true), (4, true)]);
    }
    all
}

#[test]
fn a_copy_is_taken_up_wherever_it_was_cut() {
    let bytes = content(LEN, 61);
    let source = memory(&bytes);
    for (threads, compress) in kinds() {
        let mut resumed = 0;
        for ends_after in [0, 1, 2, 5, 9, 14, 20, 27] {
            let file = create(&CreateOptions::new(LEN as u64));
            let image = open(&file);
            let monitor = Interrupter {
                ends_after,
                ..Interrupter::default()
            };
            let options = copying(threads, compress);
            let error = copy(&source, &image, &options.monitor(&monitor)).unwrap_err();
            assert!(matches!(error, CopyError::Cancelled), "{error}");
            // As after a crash: the image is not closed, and its file cut off from it.
            let told = monitor.told.into_inner().unwrap();
            assert!(told.is_sorted_by_key(Checkpoint::offset));
            std::mem::forget(image);
            let image = open(&file);
            let Some(last) = told.last() else {
                copy(&source, &image, &options).unwrap();
                continue;
            };
            resumed += 1;
            let mut found = vec![0; LEN];
            image.read_at(&mut found, 0).unwrap();
            let done = last.offset() as usize;
            assert!(done > 0 && found[..done] == bytes[..done], "{done}");
            let last = last.to_string().parse().unwrap();
            let report = copy(&source, &image, &options.resume(last)).unwrap();
            assert!(report.read_bytes <= (LEN - done) as u64 + 200_000);
            assert_reads(&image, &bytes, "image");
            image.close().unwrap();
            assert_sound(&file, "image");
        }
        assert!(resumed >= 4, "{resumed}");
    }
}

/// A disk that takes its time, as disks do: with memory alone, one thread that the system lets wait for a moment holds a piece
/// while the others copy all the rest, and there is nothing to make checkpoints of.
#[derive(Debug)]
struct Slow(Memory);

impl Storage for Slow {
    fn len(&self) -> Result<u64> {
        self.0.len()
    }
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        thread::sleep(Duration::from_millis(2));
        self.0.read_vectored_at(bufs, offset)
    }
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.0.write_vectored_at(bufs, offset)
    }
    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags)
    }
    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.0.discard(range)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }
}

#[test]
fn what_a_checkpoint_covers_has_been_flushed() {
    /// Whether the target was flushed since it was last written below a place.
    #[derive(Default)]
    struct Watch {
        told: Mutex<Vec<u64>>,
    }
    impl Monitor for Watch {
        fn checkpoint(&self, checkpoint: &Checkpoint) {
            self.told.lock().unwrap().push(checkpoint.offset());
        }
    }
    let bytes: Vec<u8> = content(LEN, 62).iter().map(|byte| byte | 1).collect();
    let source = Slow(Memory::from(bytes));
    for threads in [1, 4] {
        let target = Faulty::new(Memory::new());
        let watch = Watch::default();
        let options = copying(threads, false).monitor(&watch);
        copy(&source, Target::Storage(&target), &options).unwrap();
        let told = watch.told.into_inner().unwrap();
        assert!(told.len() >= 5 && told.is_sorted(), "{told:?}");
        assert_eq!(target.count(Operation::Flush), told.len() as u64);

        // No flush, no checkpoint.
        let target = Faulty::new(Memory::new());
        target.add(Fault::on(Operation::Flush).forever());
        let watch = Watch::default();
        let options = copying(threads, false).monitor(&watch);
        let error = copy(&source, Target::Storage(&target), &options).unwrap_err();
        assert!(matches!(error, CopyError::Target { .. }), "{error}");
        assert!(watch.told.into_inner().unwrap().is_empty());
    }
}

#[test]
fn a_failure_leaves_a_checkpoint_too() {
    let bytes: Vec<u8> = content(LEN, 63).iter().map(|byte| byte | 1).collect();
    let source = Faulty::new(Memory::from(bytes.clone()));
    source.add(Fault::on(Operation::Read).within(3_000_000..3_000_001));
    let file = Arc::new(Memory::new());
    qcow2_image::Image::create(&file, &CreateOptions::new(LEN as u64)).unwrap();
    let image = options().open(file).unwrap();
    let monitor = Interrupter {
        ends_after: u64::MAX,
        ..Interrupter::default()
    };
    let options = copying(1, false);
    copy(&source, &image, &options.monitor(&monitor)).unwrap_err();
    let last = *monitor.told.lock().unwrap().last().unwrap();
    assert!((2_800_000..=3_000_000).contains(&last.offset()));
    copy(&source, &image, &options.resume(last)).unwrap();
    assert_reads(&image, &bytes, "image");
    let shorter = Memory::from(bytes[..LEN - 1].to_vec());
    let error = copy(&shorter, &image, &options.resume(last)).unwrap_err();
    assert!(matches!(error, CopyError::Checkpoint { .. }), "{error}");
}
