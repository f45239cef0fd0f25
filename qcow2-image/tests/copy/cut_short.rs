//! Copies that are cut short by a crash of the target at any moment, or by any single fault of either side: the target is sound, and the
//! copy can be taken up from its last checkpoint, or made again.

use std::sync::{Arc, Mutex};

use qcow2_image::compact::CompactOptions;
use qcow2_image::copy::{Checkpoint, CopyOptions, copy};
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::{Overlay, Random, Record, Tape, damage, strike_everywhere};
use qcow2_image::{BitmapOptions, Image, Monitor, SnapshotKey, SnapshotOptions};
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{Faulty, Memory, Operation, Storage, ZeroFlags};

use crate::rig::{assert_reads, content, create, memory, open, options};

const LEN: usize = 200 << 10;

/// Who makes copies, and into what.
struct Case {
    name: String,
    copying: CopyOptions<'static>,
    bytes: Vec<u8>,
    /// What the target lies over, if it is to get changes only.
    below: Option<Arc<Memory>>,
    start: Vec<u8>,
}

/// Keeps checkpoints, each with the events on the tape by then.
struct Watcher<'a> {
    tape: &'a Tape,
    told: Mutex<Vec<(usize, Checkpoint)>>,
}

impl Monitor for Watcher<'_> {
    fn checkpoint(&self, checkpoint: &Checkpoint) {
        let told = (self.tape.position(), *checkpoint);
        self.told.lock().unwrap().push(told);
    }
}

fn cases() -> Vec<Case> {
    let bytes = content(LEN, 91);
    let mut other = bytes.clone();
    other[30_000..50_000].fill(7);
    other[90_000..120_000].fill(0);
    let copying = CopyOptions::new()
        .threads(1)
        .chunk(16 << 10)
        .checkpoints(50_000);
    let mut ways = vec![
        ("plain", copying, false),
        ("in order", copying.ordered(true), false),
        ("changes", copying.only_changes(true), true),
    ];
    if Codec::Zlib.is_available() {
        let packed = copying.compress(Level::default());
        ways.push(("compressed", packed, false));
        ways.push(("compressed changes", packed.only_changes(true), true));
    }
    let mut cases = Vec::new();
    for (name, copying, over) in ways {
        for cluster in [512, 4096, 16384] {
            let mut recipe = CreateOptions::new(LEN as u64)
                .cluster_size(cluster)
                .extended_l2(cluster == 16384);
            if over {
                recipe = recipe.backing_file("below", "raw");
            }
            cases.push(Case {
                name: format!("{name}, clusters of {cluster}"),
                copying,
                bytes: bytes.clone(),
                below: over.then(|| Arc::new(Memory::from(other.clone()))),
                start: create(&recipe).to_vec().unwrap(),
            });
        }
    }
    cases
}

impl Case {
    fn open(&self, file: &Arc<dyn Storage>) -> Image {
        let options = match &self.below {
            Some(below) => options().backing(below.clone()),
            None => options(),
        };
        options.open(Arc::clone(file)).unwrap()
    }

    /// The target must be sound, and the copy is made complete.
    fn look(&self, file: &Arc<dyn Storage>, from: Option<Checkpoint>, how: &str) {
        let name = &self.name;
        assert_eq!(damage(file, false), [], "{name}, {how}");
        let image = self.open(file);
        let source = memory(&self.bytes);
        if let Some(from) = from {
            let done = usize::try_from(from.offset()).unwrap();
            let mut found = vec![0; done];
            image.read_at(&mut found, 0).unwrap();
            assert!(found == self.bytes[..done], "{name}, {how}: before {done}");
        }
        let mut copying = self.copying;
        if let Some(from) = from {
            copying = copying.resume(from);
        }
        copy(&source, &image, &copying)
            .unwrap_or_else(|error| panic!("{name}, {how}, again: {error:?}"));
        assert_reads(&image, &self.bytes, &format!("{name}, {how}"));
        image.close().unwrap();
        assert_eq!(damage(file, false), [], "{name}, {how}, again");
        assert_reads(
            &self.open(file),
            &self.bytes,
            &format!("{name}, {how}, later"),
        );
    }
}

#[test]
fn after_a_crash_the_copy_is_taken_up_from_its_last_checkpoint() {
    let mut random = Random::new(92);
    let (mut fresh, mut resumed) = (0, 0);
    for case in cases() {
        let mut told = Vec::new();
        let record = Record::of_files(vec![case.start.clone()], |tape, files| {
            let image = case.open(&files[0]);
            let watcher = Watcher {
                tape,
                told: Mutex::default(),
            };
            let source = memory(&case.bytes);
            copy(&source, &image, &case.copying.monitor(&watcher)).unwrap();
            image.close().unwrap();
            told = watcher.told.into_inner().unwrap();
        });
        record.crash_about(60, &mut random, |crash| {
            let before = told.iter().rfind(|(position, _)| *position <= crash.events);
            let from = before.map(|(_, checkpoint)| *checkpoint);
            *(if from.is_some() {
                &mut resumed
            } else {
                &mut fresh
            }) += 1;
            case.look(&crash.files[0], from, &crash.how);
        });
    }
    assert!(fresh > 50 && resumed > 50, "{fresh} {resumed}");
}

#[test]
fn a_fault_of_either_side_is_told_and_the_copy_can_be_made_again() {
    let mut met = [0, 0];
    for case in cases() {
        let base = Arc::new(case.start.clone());
        for side in [0, 1] {
            met[side] += strike_everywhere(
                |_| 1,
                |strike| {
                    let target = Arc::new(Faulty::new(Overlay::new(Arc::clone(&base))));
                    let file: Arc<dyn Storage> = target.clone();
                    let source = Faulty::new(memory(&case.bytes));
                    let image = case.open(&file);
                    if side == 0 {
                        source.add(strike.fault());
                    } else {
                        target.add(strike.fault());
                    }
                    let result = copy(&source, &image, &case.copying).map(drop);
                    let closed = image.close();
                    let struck = source.struck() + target.struck() > 0;
                    target.clear();
                    let is_done = result.is_ok() && closed.is_ok();
                    let how = format!("side {side}, {strike}: {result:?} {closed:?}");
                    assert!(struck || is_done, "{}, {how}", case.name);
                    if struck {
                        strike.assert_told(!is_done, &case.name);
                        let must_tell = side == 0 && strike.operation == Operation::Read;
                        assert!(!is_done || !must_tell, "{}, {how}", case.name);
                        case.look(&file, None, &how);
                    }
                    struck
                },
            );
        }
    }
    assert!(met[0] > 50 && met[1] > 300, "{met:?}");
}

/// An image that can be compacted, with a snapshot and a bitmap.
fn scattered() -> (Arc<Memory>, Vec<u8>) {
    let file = create(&CreateOptions::new(LEN as u64).cluster_size(4096));
    let image = open(&file);
    let bytes = content(LEN, 93);
    image.create_bitmap(b"b", &BitmapOptions::new()).unwrap();
    for (number, piece) in (0_u64..).zip(bytes.chunks(10_000)).step_by(2) {
        image.write_at(piece, number * 10_000).unwrap();
    }
    for name in ["gone", "kept"] {
        image.create_snapshot(&SnapshotOptions::new(name)).unwrap();
        image.write_at(&vec![9; 30_000], 55_000).unwrap();
    }
    image.delete_snapshot(&SnapshotKey::any("gone")).unwrap();
    image
        .write_zeroes(100_000..150_000, ZeroFlags::MAY_UNMAP)
        .unwrap();
    let mut disk = vec![0; LEN];
    image.read_at(&mut disk, 0).unwrap();
    image.close().unwrap();
    (file, disk)
}

/// A compacted copy is no image, or a sound one with all that the source has.
fn look_at_compacted(file: &Arc<dyn Storage>, disk: &[u8], how: &str) -> bool {
    let mut magic = [0; 4];
    let len = file.len().unwrap();
    if len >= 4 {
        file.read_at(&mut magic, 0).unwrap();
    }
    if magic != *b"QFI\xfb" {
        return false;
    }
    assert_eq!(damage(file, false), [], "{how}");
    let image = options().open(Arc::clone(file)).unwrap();
    assert_reads(&image, disk, how);
    assert_eq!(image.snapshots().unwrap().len(), 1, "{how}");
    assert_eq!(image.bitmaps().unwrap().len(), 1, "{how}");
    image.close().unwrap();
    true
}

#[test]
fn a_compacted_copy_that_is_cut_short_is_none_or_a_whole_one() {
    let (file, disk) = scattered();
    let before = file.to_vec().unwrap();
    let compacting = CompactOptions::new();
    let record = Record::of(&[], |target| {
        open(&file)
            .compact_into(target, options(), &compacting)
            .unwrap();
    });
    let mut found = [0, 0];
    record.crash_everywhere(&mut Random::new(94), |crash| {
        let is_whole = look_at_compacted(&crash.files[0], &disk, &crash.how);
        found[usize::from(is_whole)] += 1;
    });
    assert!(found[0] > 0 && found[1] > 0, "{found:?}");
    strike_everywhere(
        |_| 1,
        |strike| {
            let target = Arc::new(Faulty::new(Overlay::new(Arc::new(Vec::new()))));
            target.add(strike.fault());
            let done = open(&file).compact_into(target.clone(), options(), &compacting);
            let struck = target.struck() > 0;
            target.clear();
            assert!(struck || done.is_ok(), "{strike}: {done:?}");
            if struck {
                strike.assert_told(done.is_err(), "a compacted copy");
                let storage: Arc<dyn Storage> = target;
                look_at_compacted(&storage, &disk, &format!("{strike}: {done:?}"));
            }
            struck
        },
    );
    assert!(file.to_vec().unwrap() == before, "the source has changed");
}
