//! Random chains, and what becomes of their disks.

use std::sync::Arc;

use qcow2_image::chain::{BackingFile, ChainError};
use qcow2_image::commit::CommitOptions;
use qcow2_image::create::CreateOptions;
use qcow2_image::difference::{Changes, Comparison, Differences, ExportOptions, export};
use qcow2_image::rebase::RebaseOptions;
use qcow2_image::testing::Random;
use qcow2_image::{Image, ImageOptions, Monitor, SnapshotKey, SnapshotOptions};
use qcow2_io::codec::Level;
use qcow2_io::{Memory, Storage, ZeroFlags};

use crate::rig::{Pile, Spec, difference, flaws, read};

/// Where the top of a pile may go to.
fn new_backing(random: &mut Random, pile: &Pile) -> (Pile, usize) {
    match random.below(4) {
        0 => (Pile::default(), 0),
        1 | 2 if pile.layers.len() > 1 => {
            let count = random.within(1..pile.layers.len() as u64);
            (pile.clone(), usize::try_from(count).unwrap())
        }
        _ => {
            let count = usize::try_from(random.within(1..4)).unwrap();
            (Pile::random(random, count, "new"), count)
        }
    }
}

fn pile_with_image_on_top(random: &mut Random) -> Pile {
    let count = usize::try_from(random.within(1..4)).unwrap();
    let mut pile = Pile::random(random, count, "old");
    let spec = Spec::random(random, false);
    pile.add("top".to_owned(), spec);
    pile.fill(random);
    pile
}

#[test]
fn a_rebase_keeps_the_disk() {
    for seed in 0..60 {
        let random = &mut Random::new(seed);
        let mut pile = pile_with_image_on_top(random);
        let count = pile.layers.len();
        for round in 0..2 {
            let (new, new_count) = new_backing(
                random,
                &Pile {
                    layers: pile.layers[..pile.layers.len() - 1].to_vec(),
                },
            );
            let to = (new_count > 0).then(|| new.backing(new_count));
            let mut image = pile.open(pile.layers.len(), &[pile.layers.len() - 1]);
            let mut options = RebaseOptions::new().threads(2);
            if random.one_in(3) {
                options = options.compress(Level::default());
            }
            let name = format!("seed {seed}, round {round}, {count} layers");
            let report = image.rebase(to.as_ref(), &options).unwrap();
            let top = pile.layers.pop().unwrap();
            // The open image goes on over the new file.
            assert_eq!(
                difference(&read(&image), &top.view),
                None,
                "{name}: {report:?}"
            );
            let header = image.header();
            assert_eq!(
                header.backing_name.as_deref(),
                to.as_ref().map(BackingFile::name)
            );
            assert_eq!(
                header.backing_format(),
                to.as_ref().map(BackingFile::format)
            );
            assert_eq!(image.chain().layers().len(), new_count + 1);
            image.close().unwrap();
            assert_eq!(flaws(&*top.file), [], "{name}");
            pile = new;
            pile.layers.truncate(new_count);
            pile.layers.push(top);
            let image = pile.open(pile.layers.len(), &[]);
            assert_eq!(
                difference(&read(&image), &pile.top().view),
                None,
                "{name}, opened again"
            );
            drop(image);
            // What is written later lies over the new file, too.
            pile.fill(random);
            let image = pile.open(pile.layers.len(), &[]);
            assert_eq!(
                difference(&read(&image), &pile.top().view),
                None,
                "{name}, written to"
            );
        }
    }
}

#[test]
fn a_commit_brings_the_disk_down_and_keeps_it() {
    let mut emptied = 0;
    for seed in 0..60 {
        let random = &mut Random::new(seed ^ 0xc0);
        let pile = pile_with_image_on_top(random);
        let count = pile.layers.len();
        let depth = usize::try_from(random.within(1..count as u64)).unwrap();
        let (base, top) = (&pile.layers[count - 1 - depth], pile.top());
        let mut wanted = top.view.clone();
        wanted.extend(base.view.iter().skip(top.view.len()));
        let keep = random.one_in(3);
        let mut image = pile.open(count, &[count - 1, count - 1 - depth]);
        let snapshots = image.snapshots().unwrap();
        let options = CommitOptions::new().base(depth).keep(keep).threads(2);
        let name = format!("seed {seed}, into {depth} of {count} layers, keeps: {keep}");
        let result = image.commit(&options);
        assert_eq!(difference(&read(&image), &top.view), None, "{name}");
        if base.spec.old && base.view.len() < top.view.len() && result.is_err() {
            // Version 2 can't grow while it has snapshots.
            continue;
        }
        result.unwrap();
        let above = image.chain().above(1);
        let left = above.map(0..u64::MAX, 100).unwrap();
        if !keep && depth == 1 {
            emptied += 1;
            assert_eq!(left.len(), 1, "{name}: {left:?}");
            assert!(left[0].kind.reads_as_zeros());
            assert_eq!(image.snapshots().unwrap(), snapshots);
        }
        drop(above);
        image.close().unwrap();
        assert_eq!(flaws(&*top.file), [], "{name}");
        let below = if base.spec.raw {
            read(&base.file)
        } else {
            assert_eq!(flaws(&*base.file), [], "{name}");
            read(&pile.open(count - depth, &[]))
        };
        assert_eq!(difference(&below, &wanted), None, "{name}, base");
        let image = pile.open(count, &[]);
        assert_eq!(
            difference(&read(&image), &top.view),
            None,
            "{name}, opened again"
        );
        drop(image);
        // It takes new data, and still reads through elsewhere.
        let mut pile = pile.clone();
        pile.fill(random);
        let image = pile.open(count, &[]);
        assert_eq!(
            difference(&read(&image), &pile.top().view),
            None,
            "{name}, written to"
        );
    }
    assert!(emptied > 10, "{emptied}");
}

#[test]
fn differences_are_where_contents_differ() {
    for seed in 0..60 {
        let random = &mut Random::new(seed ^ 0xd1ff);
        let pile = pile_with_image_on_top(random);
        let (other, other_count) = new_backing(random, &pile);
        if other_count == 0 || other.layers[other_count - 1].spec.raw {
            continue;
        }
        let (new, old) = (
            pile.open(pile.layers.len(), &[]),
            other.open(other_count, &[]),
        );
        let (new_view, mut old_view) =
            (&pile.top().view, other.layers[other_count - 1].view.clone());
        old_view.resize(new_view.len(), 0);
        let (new_chain, old_chain) = (new.chain(), old.chain());
        let find = |comparison| -> Vec<_> {
            Differences::new(&old_chain, &new_chain, 0..u64::MAX, comparison)
                .unwrap()
                .map(Result::unwrap)
                .collect()
        };
        let covers = |found: &[qcow2_image::difference::Difference]| {
            let mut covered = vec![false; new_view.len()];
            for one in found {
                let range =
                    usize::try_from(one.offset).unwrap()..usize::try_from(one.end()).unwrap();
                covered[range.clone()].fill(true);
                if one.is_zero {
                    assert!(
                        new_view[range].iter().all(|byte| *byte == 0),
                        "seed {seed}: {one:?}"
                    );
                }
            }
            covered
        };
        let structure = covers(&find(Comparison::Structure));
        let exact = covers(&find(Comparison::Exact(512)));
        for at in 0..new_view.len() {
            let differs = new_view[at] != old_view[at];
            assert!(structure[at] || !differs, "seed {seed}: {at}");
            let piece = at / 512 * 512;
            let end = (piece + 512).min(new_view.len());
            assert_eq!(
                exact[at],
                new_view[piece..end] != old_view[piece..end],
                "seed {seed}: {at}"
            );
        }
        for (comparison, compress) in [
            (Comparison::Structure, false),
            (Comparison::Exact(4096), true),
        ] {
            let spec = Spec {
                raw: false,
                size: new_view.len() as u64,
                ..Spec::random(random, false)
            };
            let backup = Arc::new(Memory::new());
            Image::create(&backup, &spec.options(Some(("old", "qcow2")))).unwrap();
            let target = Image::options()
                .backing(Arc::new(Memory::new()))
                .open(backup.clone())
                .unwrap();
            let mut options = ExportOptions::new().threads(2);
            if compress {
                options = options.compress(Level::default());
            }
            let changes = Changes::Between {
                old: &old_chain,
                comparison,
            };
            export(&new_chain, changes, &target, &options).unwrap();
            target.close().unwrap();
            assert_eq!(flaws(&backup), []);
            let below = Arc::new(other.open(other_count, &[]));
            let image = Image::options().backing_image(below).open(backup).unwrap();
            assert_eq!(
                difference(&read(&image), new_view),
                None,
                "seed {seed}, {comparison:?}, {spec:?}"
            );
        }
    }
}

#[test]
fn snapshots_differ_where_something_was_written_since() {
    let file = Arc::new(Memory::new());
    Image::create(&file, &CreateOptions::new(1 << 40).cluster_size(4096)).unwrap();
    let image = Image::options().open(file.clone()).unwrap();
    image.write_at(&[1; 8192], 0).unwrap();
    image.write_at(&[1; 8192], 1 << 39).unwrap();
    image.create_snapshot(&SnapshotOptions::new("one")).unwrap();
    image.write_at(&[2; 100], 4096).unwrap();
    image
        .write_zeroes(1 << 39..(1 << 39) + 4096, ZeroFlags::NONE)
        .unwrap();
    image.write_at(&[1; 4096], (1 << 39) + 4096).unwrap();
    image.write_at(&[3; 4096], 1 << 38).unwrap();
    image.flush().unwrap();
    let snapshot = Image::options().snapshot(SnapshotKey::any("one"));
    let snapshot = snapshot.open(file.clone()).unwrap();
    let find = |comparison| -> Vec<(u64, u64, bool)> {
        let found = Differences::new(&snapshot.chain(), &image.chain(), 0..u64::MAX, comparison);
        let found = found.unwrap().map(Result::unwrap);
        found
            .map(|one| (one.offset, one.len, one.is_zero))
            .collect()
    };
    let (low, high) = (1_u64 << 38, 1_u64 << 39);
    assert_eq!(
        find(Comparison::Structure),
        [
            (4096, 4096, false),
            (low, 4096, false),
            (high, 4096, true),
            (high + 4096, 4096, false)
        ]
    );
    assert_eq!(
        find(Comparison::Exact(512)),
        [(4096, 512, false), (low, 4096, false), (high, 4096, true)]
    );
}

#[test]
fn an_overlay_has_the_size_of_what_it_lies_over() {
    let below = Memory::from(vec![5; 100_001]);
    let backing = BackingFile::raw("below", Arc::new(below));
    let file = Arc::new(Memory::new());
    Image::create_overlay(&file, &backing, &CreateOptions::default()).unwrap();
    let image = Image::options()
        .backing_file(&backing)
        .open(file.clone())
        .unwrap();
    let mut wanted = vec![5; 100_001];
    wanted.resize(100_352, 0);
    assert_eq!(difference(&read(&image), &wanted), None);
    let header = image.header();
    assert_eq!(header.backing_name.as_deref(), Some(&b"below"[..]));
    assert_eq!(header.backing_format(), Some(&b"raw"[..]));
    drop(image);
    Image::create_overlay(&file, &backing, &CreateOptions::new(512)).unwrap();
    let image = Image::options().backing_file(&backing).open(file).unwrap();
    assert_eq!(read(&image), [5; 512]);
}

#[test]
fn what_someone_knows_to_have_changed_is_exported() {
    let random = &mut Random::new(5);
    let pile = pile_with_image_on_top(random);
    let new = pile.open(pile.layers.len(), &[]);
    let view = &pile.top().view;
    let backup = Arc::new(Memory::new());
    let options = CreateOptions::new(view.len() as u64)
        .cluster_size(4096)
        .backing_file("old", "raw");
    Image::create(&backup, &options).unwrap();
    let open = |old: Vec<u8>| {
        let old: Arc<dyn Storage> = Arc::new(Memory::from(old));
        Image::options().backing(old).open(backup.clone()).unwrap()
    };
    let mut ranges = [Ok(0..5000_u64), Ok(5000..5001), Ok(100_000..123_456)].into_iter();
    let target = open(vec![0xee; view.len()]);
    let report = export(
        &new.chain(),
        Changes::Ranges(&mut ranges),
        &target,
        &ExportOptions::new(),
    )
    .unwrap();
    assert_eq!(report.stored_bytes + report.zeroed_bytes, 8192 + 28_672);
    target.close().unwrap();
    let mut wanted = vec![0xee; view.len()];
    for range in [0..8192, 98_304..126_976] {
        wanted[range.clone()].copy_from_slice(&view[range]);
    }
    let found = read(&open(vec![0xee; view.len()]));
    assert_eq!(difference(&found, &wanted), None);
}

#[test]
fn nothing_is_stored_or_read_without_need() {
    let base = |byte: u8| {
        let file = Arc::new(Memory::new());
        Image::create(&file, &CreateOptions::new(64 << 20)).unwrap();
        let image = Image::options().open(file.clone()).unwrap();
        image.write_at(&vec![byte; 1 << 20], 1 << 20).unwrap();
        image.write_at(&vec![7; 1 << 20], 8 << 20).unwrap();
        image.write_at(&vec![0; 1 << 20], 16 << 20).unwrap();
        image.close().unwrap();
        Arc::new(Image::options().read_only(true).open(file).unwrap())
    };
    let (one, two) = (base(1), base(2));
    let file = Arc::new(Memory::new());
    let options = CreateOptions::new(64 << 20).backing_file("one", "qcow2");
    Image::create(&file, &options).unwrap();
    let options = Image::options().backing_image(Arc::clone(&one));
    let mut image = options.open(file).unwrap();
    // The same file under another name.
    let same = BackingFile::image("two", one);
    let report = image.rebase(Some(&same), &RebaseOptions::new()).unwrap();
    assert_eq!(
        (report.read_bytes, report.stored_bytes, report.zeroed_bytes),
        (0, 0, 0)
    );
    let other = BackingFile::image("three", two);
    let report = image.rebase(Some(&other), &RebaseOptions::new()).unwrap();
    assert_eq!(
        (report.read_bytes, report.stored_bytes, report.zeroed_bytes),
        (6 << 20, 1 << 20, 0)
    );
    let report = image.rebase(None, &RebaseOptions::new()).unwrap();
    assert_eq!(
        (report.read_bytes, report.stored_bytes, report.zeroed_bytes),
        (2 << 20, 1 << 20, 0)
    );
    let found = read(&image);
    assert!(found[1 << 20..2 << 20].iter().all(|byte| *byte == 1));
    assert!(found[8 << 20..9 << 20].iter().all(|byte| *byte == 7));
    assert!(found[16 << 20..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_can_not_be_done_is_refused_before_anything_is_written() {
    let random = &mut Random::new(9);
    let mut pile = Pile::random(random, 1, "old");
    let spec = Spec {
        raw: false,
        cluster: 4096,
        extended: false,
        old: false,
        ..Spec::random(random, false)
    };
    pile.add("top".to_owned(), spec);
    pile.fill(random);
    let before = read(&pile.top().file);
    let mut image = pile.open(2, &[1]);
    let said = |result: Result<_, ChainError>| {
        let _: qcow2_image::chain::Transferred = match result {
            Err(error) => return error.to_string(),
            Ok(report) => report,
        };
        String::new()
    };
    let commit = |image: &mut Image, options: CommitOptions<'_>| said(image.commit(&options));
    assert_eq!(
        commit(&mut image, CommitOptions::new().base(2)),
        "there is no layer 2: the chain has 2"
    );
    assert_eq!(
        commit(&mut image, CommitOptions::new().base(0)),
        "there is no layer 0: the chain has 2"
    );
    let long = BackingFile::raw(vec![b'x'; 1024], Arc::new(Memory::new()));
    let rebase =
        |image: &mut Image, to: &BackingFile| said(image.rebase(Some(to), &RebaseOptions::new()));
    assert_eq!(rebase(&mut image, &long), "the header is refused");
    drop(image);
    let no_backing = Image::options().no_backing();
    let mut image = no_backing.open(pile.top().file.clone()).unwrap();
    let other = BackingFile::raw("other", Arc::new(Memory::new()));
    assert!(rebase(&mut image, &other).starts_with("without the old backing file"));
    drop(image);
    let mut image = pile.open(2, &[]);
    let reading = "the image is open for reading only";
    assert_eq!(rebase(&mut image, &other), reading);
    assert_eq!(commit(&mut image, CommitOptions::new()), reading);
    drop(image);
    assert_eq!(difference(&read(&pile.top().file), &before), None);
}

#[test]
fn damaged_layers_end_with_an_error_or_are_read() {
    let (mut refused, mut read_through) = (0, 0);
    for seed in 0..40 {
        let random = &mut Random::new(seed ^ 0xbad);
        let pile = pile_with_image_on_top(random);
        let mut damaged = pile.clone();
        for layer in damaged.layers.iter_mut().filter(|layer| !layer.spec.raw) {
            let mut bytes = read(&layer.file);
            let (unit, len) = (layer.spec.cluster, bytes.len() as u64);
            // Behind the header, where tables are.
            for _ in 0..random.pick(&[5, 400]) {
                let at = random.within(unit..len.min(unit * 16).max(unit + 1));
                if let Some(byte) = bytes.get_mut(usize::try_from(at).unwrap()) {
                    *byte ^= 1 << random.below(8);
                }
            }
            layer.file = Arc::new(Memory::from(bytes));
        }
        let old = pile.open(pile.layers.len(), &[]);
        let mut below: Option<BackingFile> = None;
        for layer in &damaged.layers {
            let options = Image::options().read_only(true);
            let options = below.iter().fold(options, ImageOptions::backing_file);
            below = match options.open(Arc::clone(&layer.file)) {
                Ok(image) => Some(BackingFile::image("damaged", Arc::new(image))),
                Err(_) if layer.spec.raw => {
                    Some(BackingFile::raw("damaged", Arc::clone(&layer.file)))
                }
                Err(_) => None,
            };
            if below.is_none() {
                break;
            }
        }
        let Some(below) = below else { continue };
        let (old, new) = (old.chain(), below.chain());
        let mut outcomes = vec![new.map(0..u64::MAX, usize::MAX).map(drop).is_ok()];
        for comparison in [Comparison::Structure, Comparison::Exact(4096)] {
            let mut found = Differences::new(&old, &new, 0..u64::MAX, comparison).unwrap();
            outcomes.push(found.all(|one| one.is_ok()));
            // An error is the last item.
            assert_eq!(found.count(), 0);
        }
        for is_ok in outcomes {
            if is_ok {
                read_through += 1;
            } else {
                refused += 1;
            }
        }
    }
    assert!(
        refused > 10 && read_through > 10,
        "{refused}, {read_through}"
    );
}

/// Ends the work after some steps.
struct Impatient(std::sync::atomic::AtomicU64, u64);

impl Monitor for Impatient {
    fn progress(&self, done: u64, total: u64) {
        assert!(done <= total);
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed) >= self.1
    }
}

#[test]
fn who_watches_can_end_it_and_it_can_be_done_again() {
    let base = Arc::new(Memory::from(vec![1; 8 << 20]));
    let file = Arc::new(Memory::new());
    let options = CreateOptions::new(8 << 20).backing_file("base", "raw");
    Image::create(&file, &options).unwrap();
    let mut image = Image::options().backing(base.clone()).open(file).unwrap();
    image.write_at(&vec![2; 4 << 20], 4 << 20).unwrap();
    let view = read(&image);
    let few = Impatient(0.into(), 2);
    let result = image.commit(&CommitOptions::new().threads(1).monitor(&few));
    assert!(matches!(result, Err(ChainError::Cancelled)), "{result:?}");
    assert_eq!(difference(&read(&image), &view), None);
    let half = read(&base);
    assert_eq!((half[4 << 20], half[(8 << 20) - 1]), (2, 1));
    let all = Impatient(0.into(), u64::MAX);
    image.commit(&CommitOptions::new().monitor(&all)).unwrap();
    assert_eq!(difference(&read(&base), &view), None);
    assert!(all.0.into_inner() >= 4);

    let few = Impatient(0.into(), 3);
    let result = image.rebase(None, &RebaseOptions::new().threads(1).monitor(&few));
    assert!(matches!(result, Err(ChainError::Cancelled)), "{result:?}");
    assert_eq!(image.header().backing_name.as_deref(), Some(&b"base"[..]));
    assert_eq!(difference(&read(&image), &view), None);
    image.rebase(None, &RebaseOptions::new()).unwrap();
    assert_eq!(image.header().backing_name, None);
    assert_eq!(difference(&read(&image), &view), None);
}
