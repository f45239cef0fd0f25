//! Work that is cut short: the disk reads the same whatever happens, and the work can be done again.

use std::sync::Arc;

use qcow2_image::Image;
use qcow2_image::chain::{BackingFile, ChainError};
use qcow2_image::commit::CommitOptions;
use qcow2_image::rebase::RebaseOptions;
use qcow2_image::testing::{Overlay, Random, Record, damage, strike_everywhere};
use qcow2_io::codec::Level;
use qcow2_io::{Fault, Faulty, Operation, Storage, StorageErrorKind};

use crate::rig::{Pile, Spec, difference, read};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Rebase,
    RebaseToNone,
    Commit,
    CommitAndKeep,
}

const DEEDS: [Deed; 4] = [
    Deed::Rebase,
    Deed::RebaseToNone,
    Deed::Commit,
    Deed::CommitAndKeep,
];

/// A chain, and another that it may go to.
struct Case {
    deed: Deed,
    name: String,
    pile: Pile,
    other: Pile,
    /// Which layers change.
    changed: Vec<usize>,
}

impl Case {
    fn new(deed: Deed, seed: u64) -> Self {
        let random = &mut Random::new(seed);
        let spec = |random: &mut Random, raw: bool| {
            let old = random.one_in(4);
            let extended = !old && random.one_in(4);
            Spec {
                raw,
                size: random.within(60..120) << 10,
                cluster: if extended {
                    16384
                } else {
                    random.pick(&[512, 2048, 4096, 16384])
                },
                extended,
                old,
                lazy: !old && random.one_in(4),
            }
        };
        let mut pile = Pile::default();
        let base = spec(random, seed.is_multiple_of(3));
        pile.add("base".to_owned(), base);
        pile.fill(random);
        let top = spec(random, false);
        pile.add("top".to_owned(), top);
        pile.fill(random);
        let mut other = Pile::default();
        let new = spec(random, false);
        other.add("new".to_owned(), new);
        other.fill(random);
        let changed = match deed {
            Deed::Rebase | Deed::RebaseToNone => vec![1],
            Deed::Commit | Deed::CommitAndKeep => vec![0, 1],
        };
        let name = format!("{deed:?}, seed {seed}, {base:?}, {top:?}");
        Self {
            deed,
            name,
            pile,
            other,
            changed,
        }
    }

    /// The chain with other files for the layers that change.
    fn with(&self, files: &[Arc<dyn Storage>]) -> Pile {
        let mut pile = self.pile.clone();
        for (number, file) in self.changed.iter().zip(files) {
            pile.layers[*number].file = Arc::clone(file);
        }
        pile
    }

    fn start(&self) -> Vec<Vec<u8>> {
        let files = self
            .changed
            .iter()
            .map(|number| &self.pile.layers[*number].file);
        files.map(|file| read(file)).collect()
    }

    fn run(&self, image: &mut Image) -> Result<(), ChainError> {
        let rebase = RebaseOptions::new().threads(1);
        let commit = CommitOptions::new().threads(1);
        match self.deed {
            Deed::Rebase => {
                let to = self.other.backing(1);
                image.rebase(Some(&to), &rebase).map(drop)
            }
            Deed::RebaseToNone => image
                .rebase(None, &rebase.compress(Level::default()))
                .map(drop),
            Deed::Commit => image.commit(&commit).map(drop),
            Deed::CommitAndKeep => image.commit(&commit.keep(true)).map(drop),
        }
    }

    /// The chain as the header of the top image tells.
    fn follow(&self, pile: &Pile) -> (Pile, bool) {
        let top = pile.top().clone();
        let options = Image::options().read_only(true).no_backing();
        let header = options.open(Arc::clone(&top.file)).unwrap().header();
        let mut followed = match header.backing_name.as_deref() {
            Some(b"base") => return (pile.clone(), false),
            Some(b"new") => self.other.clone(),
            None => Pile::default(),
            other => panic!("{}: {other:?}", self.name),
        };
        let format = header.backing_format();
        assert_eq!(format, followed.layers.first().map(|_| &b"qcow2"[..]));
        followed.layers.push(top);
        (followed, true)
    }

    /// The top must read as before, whatever it lies over, and the work can be done again. Tells whether it had been done.
    fn look(&self, files: &[Arc<dyn Storage>], how: &str) -> bool {
        let name = &self.name;
        let pile = self.with(files);
        for number in &self.changed {
            let Spec { raw, old, .. } = pile.layers[*number].spec;
            if !raw {
                let mut found = damage(&*pile.layers[*number].file, true);
                if old {
                    // Without a dirty bit nothing announces flags that are clear.
                    found.retain(|(code, _)| *code != qcow2_check::Code::CopiedWrong);
                }
                assert_eq!(found, [], "{name}, {how}: layer {number}");
            }
        }
        let (followed, done) = self.follow(&pile);
        let count = followed.layers.len();
        let image = followed.open(count, &[]);
        assert_eq!(
            difference(&read(&image), &pile.top().view),
            None,
            "{name}, {how}"
        );
        drop(image);
        let mut image = if done {
            followed.open(count, &[count - 1])
        } else {
            followed.open(2, &[0, 1])
        };
        assert_eq!(
            difference(&read(&image), &pile.top().view),
            None,
            "{name}, {how}, writable"
        );
        if !done {
            self.run(&mut image)
                .unwrap_or_else(|error| panic!("{name}, {how}, again: {error:?}"));
            assert_eq!(
                difference(&read(&image), &pile.top().view),
                None,
                "{name}, {how}, again"
            );
        }
        image.close().unwrap();
        let (followed, _) = self.follow(&pile);
        let image = followed.open(followed.layers.len(), &[]);
        assert_eq!(
            difference(&read(&image), &pile.top().view),
            None,
            "{name}, {how}, later"
        );
        if matches!(self.deed, Deed::Commit | Deed::CommitAndKeep) {
            let base = &pile.layers[0];
            let view = if base.spec.raw {
                read(&base.file)
            } else {
                read(&pile.open(1, &[]))
            };
            let top = &pile.top().view;
            assert_eq!(
                difference(&view[..top.len()], top),
                None,
                "{name}, {how}, base"
            );
            assert!(view[top.len()..] == base.view[top.len().min(base.view.len())..]);
        }
        done
    }
}

#[test]
fn a_crash_leaves_the_disk_as_it_was() {
    let mut random = Random::new(77);
    let mut states = 0;
    for deed in DEEDS {
        let mut done = [0, 0];
        for seed in 0..6 {
            let case = Case::new(deed, seed);
            let record = Record::of_files(case.start(), |_, files| {
                let mut image = case.with(files).open(2, &[0, 1]);
                case.run(&mut image).unwrap();
                image.close().unwrap();
            });
            record.crash_about(40, &mut random, |crash| {
                let found = case.look(&crash.files, &crash.how);
                done[usize::from(found)] += 1;
                states += 1;
            });
        }
        if matches!(deed, Deed::Rebase | Deed::RebaseToNone) {
            assert!(done[0] > 0 && done[1] > 0, "{deed:?}: {done:?}");
        }
    }
    assert!(states > 300, "{states}");
}

#[test]
fn a_fault_leaves_the_disk_as_it_was() {
    let mut met = 0;
    for deed in DEEDS {
        for seed in 10..13 {
            let case = Case::new(deed, seed);
            let start: Vec<_> = case.start().into_iter().map(Arc::new).collect();
            for number in 0..start.len() {
                met += strike_everywhere(
                    |operation| if operation == Operation::Read { 3 } else { 1 },
                    |strike| {
                        let storages: Vec<_> = start
                            .iter()
                            .map(|bytes| Arc::new(Faulty::new(Overlay::new(Arc::clone(bytes)))))
                            .collect();
                        let files: Vec<_> = storages
                            .iter()
                            .map(|one| Arc::clone(one) as Arc<dyn Storage>)
                            .collect();
                        let mut image = case.with(&files).open(2, &[0, 1]);
                        let faulty = &storages[number];
                        faulty.add(strike.fault());
                        let result = case.run(&mut image);
                        let in_work = faulty.struck() > 0;
                        let closed = image.close();
                        let struck = faulty.struck() > 0;
                        faulty.clear();
                        let is_done = result.is_ok() && closed.is_ok();
                        let how = format!("file {number}, {strike}: {result:?} {closed:?}");
                        assert!(struck || is_done, "{}, {how}", case.name);
                        if struck {
                            // A base is dropped, not closed; nothing of it is at stake then.
                            if in_work || number + 1 == start.len() {
                                strike.assert_told(!is_done, &case.name);
                            }
                            case.look(&files, &how);
                        }
                        struck
                    },
                );
            }
        }
    }
    assert!(met > 300, "{met}");
}

#[test]
fn a_new_backing_file_that_fails_changes_nothing() {
    let case = Case::new(Deed::Rebase, 21);
    let file = Arc::new(Faulty::new(Overlay::new(Arc::new(vec![9; 1 << 20]))));
    let to = BackingFile::raw("new", file.clone());
    file.add(Fault::on(Operation::Read).nth(1).kind(StorageErrorKind::Io));
    let before = case.start();
    let mut image = case.pile.open(2, &[0, 1]);
    let result = image.rebase(Some(&to), &RebaseOptions::new());
    assert!(
        matches!(
            result,
            Err(ChainError::Read {
                what: "new backing file",
                ..
            })
        ),
        "{result:?}"
    );
    image.close().unwrap();
    assert!(!case.look(
        &[Arc::new(Overlay::new(Arc::new(before[0].clone())))],
        "untouched"
    ));
    assert!(!case.look(&[Arc::clone(&case.pile.top().file)], "after a failure"));
}
