//! Exports of changes that are cut short: the overlay is sound and shows the old state or the new one at each byte, and the export can be
//! done again.

use std::ops::Range;
use std::sync::Arc;

use qcow2_image::chain::ChainError;
use qcow2_image::difference::{Changes, Comparison, Differences, ExportOptions, export};
use qcow2_image::testing::{Overlay, Random, Record, damage, strike_everywhere};
use qcow2_image::{Image, ImageError};
use qcow2_io::codec::Level;
use qcow2_io::{Fault, Faulty, Operation, Storage};

use crate::rig::{Pile, Spec, difference, read};

/// What is stored.
#[derive(Clone, Copy, Debug)]
enum Deed {
    /// What may differ, by the tables.
    Structure,
    /// What differs.
    Exact,
    /// What differs, compressed.
    Compressed,
    /// What someone knows to have changed, as a bitmap does.
    Listed,
}

const DEEDS: [Deed; 4] = [Deed::Structure, Deed::Exact, Deed::Compressed, Deed::Listed];

/// An old state, a new one above it, and an overlay that is to get what differs.
struct Case {
    deed: Deed,
    name: String,
    old: Pile,
    new: Pile,
    changed: Vec<Range<u64>>,
    target: Pile,
}

impl Case {
    fn new(deed: Deed, seed: u64) -> Self {
        let random = &mut Random::new(seed ^ 0xe4);
        let size = random.within(60..120) << 10;
        let spec = |random: &mut Random, raw| {
            let extended = random.one_in(4);
            Spec {
                raw,
                size,
                cluster: if extended {
                    16384
                } else {
                    random.pick(&[512, 2048, 4096, 16384])
                },
                extended,
                old: !extended && random.one_in(4),
                lazy: false,
            }
        };
        let mut old = Pile::default();
        old.add("base".to_owned(), spec(random, seed.is_multiple_of(3)));
        old.fill(random);
        old.add("old".to_owned(), spec(random, false));
        old.fill(random);
        let mut new = old.clone();
        new.add("new".to_owned(), spec(random, false));
        new.fill(random);
        let mut target = old.clone();
        let target_spec = spec(random, false);
        target.add("target".to_owned(), target_spec);
        let mut case = Self {
            deed,
            name: format!("{deed:?}, seed {seed}, {target_spec:?}"),
            old,
            new,
            changed: Vec::new(),
            target,
        };
        let (one, two) = (case.old.open(2, &[]), case.new.open(3, &[]));
        let whole = 0..size;
        let exact = Comparison::Exact(512);
        let found = Differences::new(&one.chain(), &two.chain(), whole, exact).unwrap();
        let ranges = found.map(|found| found.map(|found| found.offset..found.end()));
        case.changed = ranges.collect::<Result<_, _>>().unwrap();
        case
    }

    fn with(&self, file: &Arc<dyn Storage>) -> Pile {
        let mut target = self.target.clone();
        target.layers[2].file = Arc::clone(file);
        target
    }

    fn run(&self, image: &Image) -> Result<(), ChainError> {
        let (old, new) = (self.old.open(2, &[]), self.new.open(3, &[]));
        self.run_between(&old, &new, image)
    }

    fn run_between(&self, old: &Image, new: &Image, image: &Image) -> Result<(), ChainError> {
        let old = old.chain();
        let mut ranges = self.changed.iter().cloned().map(Ok::<_, ImageError>);
        let between = |comparison| Changes::Between {
            old: &old,
            comparison,
        };
        let options = ExportOptions::new().threads(1);
        let (changes, options) = match self.deed {
            Deed::Structure => (between(Comparison::Structure), options),
            Deed::Exact => (between(Comparison::Exact(512)), options),
            Deed::Compressed => (
                between(Comparison::Exact(512)),
                options.compress(Level::default()),
            ),
            Deed::Listed => (Changes::Ranges(&mut ranges), options),
        };
        export(&new.chain(), changes, image, &options).map(drop)
    }

    /// Each byte is that of the old state or of the new one. Tells whether all are those of the new one.
    fn look(&self, file: &Arc<dyn Storage>, how: &str) -> bool {
        let name = &self.name;
        let target = self.with(file);
        let found = |file| {
            let mut found = damage(file, true);
            // Version 2 has no dirty bit to announce flags that are clear.
            found.retain(|(code, _)| *code != qcow2_check::Code::CopiedWrong);
            found
        };
        assert_eq!(found(file), [], "{name}, {how}");
        let (old, new) = (&self.old.top().view, &self.new.top().view);
        let now = read(&target.open(3, &[]));
        let states = now.iter().zip(old.iter().zip(new));
        let wrong = states
            .clone()
            .position(|(now, (old, new))| now != old && now != new);
        assert_eq!(wrong, None, "{name}, {how}: neither old nor new");
        let done = now == *new;
        let image = target.open(3, &[2]);
        self.run(&image)
            .unwrap_or_else(|error| panic!("{name}, {how}, again: {error:?}"));
        image.close().unwrap();
        assert_eq!(found(file), [], "{name}, {how}, again");
        let later = read(&target.open(3, &[]));
        assert_eq!(difference(&later, new), None, "{name}, {how}, again");
        done
    }
}

#[test]
fn a_crash_leaves_an_overlay_that_can_be_completed() {
    let mut random = Random::new(81);
    let mut states = 0;
    for deed in DEEDS {
        let mut done = [0, 0];
        for seed in 0..8 {
            let case = Case::new(deed, seed);
            let record = Record::of(&read(&case.target.top().file), |file| {
                let image = case.with(&file).open(3, &[2]);
                case.run(&image).unwrap();
                image.close().unwrap();
            });
            record.crash_everywhere(&mut random, |crash| {
                let found = case.look(&crash.files[0], &crash.how);
                done[usize::from(found)] += 1;
                states += 1;
            });
        }
        assert!(done[0] > 0 && done[1] > 0, "{deed:?}: {done:?}");
    }
    assert!(states > 300, "{states}");
}

#[test]
fn a_fault_of_the_target_leaves_an_overlay_that_can_be_completed() {
    let mut met = 0;
    for deed in DEEDS {
        for seed in 10..14 {
            let case = Case::new(deed, seed);
            let start = Arc::new(read(&case.target.top().file));
            met += strike_everywhere(
                |_| 1,
                |strike| {
                    let faulty = Arc::new(Faulty::new(Overlay::new(Arc::clone(&start))));
                    let file: Arc<dyn Storage> = faulty.clone();
                    let image = case.with(&file).open(3, &[2]);
                    faulty.add(strike.fault());
                    let result = case.run(&image);
                    let closed = image.close();
                    let struck = faulty.struck() > 0;
                    faulty.clear();
                    let is_done = result.is_ok() && closed.is_ok();
                    let how = format!("{strike}: {result:?} {closed:?}");
                    assert!(struck || is_done, "{}, {how}", case.name);
                    if struck {
                        strike.assert_told(!is_done, &case.name);
                        case.look(&file, &how);
                    }
                    struck
                },
            );
        }
    }
    assert!(met > 300, "{met}");
}

#[test]
fn a_fault_of_a_state_is_told_and_the_export_can_be_done_again() {
    let mut met = 0;
    for deed in DEEDS {
        for seed in 20..24 {
            let case = Case::new(deed, seed);
            let start = Arc::new(read(&case.target.top().file));
            for (layer, operation) in [
                (1, Operation::Read),
                (2, Operation::Read),
                (2, Operation::Len),
            ] {
                for nth in 1.. {
                    let bytes = read(&case.new.layers[layer].file);
                    let faulty = Arc::new(Faulty::new(Overlay::new(Arc::new(bytes))));
                    let (mut old, mut new) = (case.old.clone(), case.new.clone());
                    new.layers[layer].file = faulty.clone();
                    if layer == 1 {
                        old.layers[layer].file = faulty.clone();
                    }
                    let (old, new) = (old.open(2, &[]), new.open(3, &[]));
                    let file: Arc<dyn Storage> = Arc::new(Overlay::new(Arc::clone(&start)));
                    let image = case.with(&file).open(3, &[2]);
                    faulty.add(Fault::on(operation).nth(nth));
                    let result = case.run_between(&old, &new, &image);
                    image.close().unwrap();
                    if faulty.struck() == 0 {
                        assert!(result.is_ok(), "{}: {result:?}", case.name);
                        break;
                    }
                    met += 1;
                    let how = format!("{operation} {nth} of layer {layer} fails: {result:?}");
                    assert!(result.is_err(), "{}, {how}: nobody was told", case.name);
                    case.look(&file, &how);
                }
            }
        }
    }
    assert!(met > 30, "{met}");
}
