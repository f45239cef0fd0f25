//! Random images, compacted: the same content in as little space as there can be.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use qcow2_format::header::Version;
use qcow2_format::{RefcountBlock, RefcountTableEntry};
use qcow2_image::compact::{CompactMode, CompactOptions, CompactReport};
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::Random;
use qcow2_image::{Image, ImageOptions, Monitor, SnapshotKey, SnapshotOptions};
use qcow2_io::codec::Level;
use qcow2_io::{Memory, Storage, ZeroFlags};

use crate::oracle::{Folder, is_available};
use crate::rig::{assert_sound, noise, state};

/// Bytes of the disk.
const SIZE: u64 = 2 << 20;

/// What is in an image of one kind or another.
#[derive(Clone, Copy, Debug)]
struct Kind {
    compressed: bool,
    snapshots: bool,
}

const ALL: Kind = Kind {
    compressed: true,
    snapshots: true,
};

fn recipes() -> Vec<(CreateOptions, Kind)> {
    let new = || CreateOptions::new(SIZE);
    let plain = Kind {
        compressed: false,
        ..ALL
    };
    let alone = Kind {
        snapshots: false,
        ..ALL
    };
    vec![
        (new().cluster_size(4096), plain),
        (new().cluster_size(512), ALL),
        (new().cluster_size(4096), ALL),
        (new().cluster_size(16384).extended_l2(true), ALL),
        (new().cluster_size(1024).refcount_bits(64), ALL),
        (new().cluster_size(2048).refcount_bits(1), alone),
        (new().cluster_size(512).refcount_bits(4), ALL),
        (new().cluster_size(2048).version(Version::V2), ALL),
        (new().cluster_size(65536).lazy_refcounts(true), ALL),
    ]
}

/// An image that has been used for a while.
fn used(recipe: &CreateOptions, kind: Kind, seed: u64) -> Arc<Memory> {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, recipe).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    let mut random = Random::new(seed);
    let unit = image.geometry().cluster_size();
    let mut names: Vec<String> = Vec::new();
    for number in 0..60 + random.below(60) {
        let at = random.below(SIZE);
        let len = (random.below(60_000) + 1).min(SIZE - at);
        match random.below(12) {
            0..=4 => {
                let bytes = noise(seed ^ number, usize::try_from(len).unwrap());
                image.write_at(&bytes, at).unwrap();
            }
            5..=6 if kind.compressed => {
                let mut at = at / unit * unit;
                for part in 0..random.below(20) {
                    if at + unit > SIZE {
                        break;
                    }
                    let bytes = noise(number + part, usize::try_from(unit).unwrap());
                    image
                        .write_compressed(&bytes, at, Level::default())
                        .unwrap();
                    at += unit;
                }
            }
            7 => image.write_zeroes(at..at + len, ZeroFlags::NONE).unwrap(),
            8 | 9 => image.discard(at..at + len).unwrap(),
            10 if kind.snapshots && names.len() < 5 => {
                let name = format!("s{number}");
                // Narrow refcounts may not be able to count it.
                if image
                    .create_snapshot(&SnapshotOptions::new(name.clone()))
                    .is_ok()
                {
                    names.push(name);
                }
            }
            11 if !names.is_empty() => {
                let gone =
                    names.swap_remove(usize::try_from(random.below(names.len() as u64)).unwrap());
                image.delete_snapshot(&SnapshotKey::any(gone)).unwrap();
            }
            _ => {}
        }
    }
    image.close().unwrap();
    memory
}

/// Clusters in use, and one past the last of them.
pub(crate) fn usage(storage: &dyn Storage) -> (u64, u64) {
    usage_of(Image::options(), storage)
}

/// The same, opened in a special way.
fn usage_of(options: ImageOptions, storage: &dyn Storage) -> (u64, u64) {
    let image = options
        .read_only(true)
        .no_backing()
        .open(Arc::new(Memory::from(bytes_of(storage))))
        .unwrap();
    let (header, geometry) = (image.header(), image.geometry());
    let mut table = vec![0; header.refcount_table_clusters as usize * geometry.cluster_len()];
    storage
        .read_at(&mut table, header.refcount_table_offset.get())
        .unwrap();
    let (mut used, mut end) = (0, 0);
    for (number, entry) in (0..).zip(table.as_chunks::<8>().0) {
        let block = RefcountTableEntry::from_be_bytes(*entry).block();
        if block.get() == 0 {
            continue;
        }
        let mut bytes = vec![0; geometry.cluster_len()];
        storage.read_at(&mut bytes, block.get()).unwrap();
        let first: u64 = number << geometry.refcount_block_bits();
        for (cluster, count) in (first..).zip(RefcountBlock::new(&bytes, geometry).iter()) {
            if count > 0 {
                used += 1;
                end = cluster + 1;
            }
        }
    }
    (used, end)
}

fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn compact(memory: &Arc<Memory>, options: &CompactOptions<'_>) -> CompactReport {
    let image = Image::options().open(memory.clone()).unwrap();
    let report = image.compact(options).unwrap();
    image.close().unwrap();
    report
}

#[test]
fn nothing_is_lost_and_no_hole_is_left() {
    let mut moved = 0;
    for (number, (recipe, kind)) in (0..).zip(recipes()) {
        for seed in 0..3 {
            let memory = used(&recipe, kind, number * 100 + seed);
            assert_sound(&memory);
            let shared: Arc<dyn Storage> = memory.clone();
            let before = state(Image::options, &shared);
            let (used_before, _) = usage(&memory);
            let unit = Image::options().open(memory.clone()).unwrap();
            let unit = unit.geometry().cluster_size();
            for (mode, slice) in [
                (CompactMode::Truncate, 1 << 20),
                (CompactMode::Sequential, 50_000),
                (CompactMode::Sequential, 1 << 20),
                (CompactMode::Truncate, 1),
            ] {
                let how = format!("{number} {seed} {mode:?}");
                let copy = Arc::new(Memory::from(memory.to_vec().unwrap()));
                let options = CompactOptions::new().mode(mode).slice(slice);
                let report = compact(&copy, &options);
                assert!(report.complete, "{how}");
                assert_sound(&copy);
                let shared: Arc<dyn Storage> = copy.clone();
                assert!(state(Image::options, &shared) == before, "{how}");
                let (used, end) = usage(&copy);
                if kind.compressed {
                    // Compressed data may be packed a little less closely.
                    let most = used_before + used_before / 8 + 4;
                    assert!(used <= most, "{how}: {used_before} {used}");
                } else {
                    assert!(used <= used_before, "{how}: {used_before} {used}");
                }
                assert_eq!(used, end, "{how}");
                assert_eq!(report.bytes_after.div_ceil(unit), end, "{how}");
                moved += report.moved_bytes;
                // What is compact already is left alone.
                let again = compact(&copy, &options);
                if !kind.compressed {
                    assert_eq!(again.moved_bytes, 0, "{how}");
                }
            }
        }
    }
    assert!(moved > 0);
}

#[test]
fn the_disk_lies_in_order_afterwards() {
    for (number, (recipe, kind)) in (0..).zip(recipes()) {
        let memory = used(&recipe, kind, number + 1000);
        let options = CompactOptions::new().mode(CompactMode::Sequential);
        let report = compact(&memory, &options);
        let image = Image::options().open(memory).unwrap();
        let tables = SIZE.div_ceil(image.geometry().l2_coverage());
        assert!(
            report.fragments_after <= report.fragments_before,
            "{report:?}"
        );
        if !kind.compressed {
            // A stretch for each table, and one more around each structure that was in the way.
            assert!(report.fragments_after <= tables + 10, "{report:?}");
        }
    }
}

#[test]
fn qemu_reads_what_was_compacted() {
    if !is_available(recipes().len() * 2, "compacted images") {
        return;
    }
    let folder = Folder::new();
    for (number, (recipe, kind)) in (0..).zip(recipes()) {
        let memory = used(&recipe, kind, number + 2000);
        std::fs::write(folder.path("a"), memory.to_vec().unwrap()).unwrap();
        for mode in [CompactMode::Truncate, CompactMode::Sequential] {
            let copy = Arc::new(Memory::from(memory.to_vec().unwrap()));
            compact(&copy, &CompactOptions::new().mode(mode));
            std::fs::write(folder.path("b"), copy.to_vec().unwrap()).unwrap();
            let image = Image::options().open(copy).unwrap();
            let snapshots = image.snapshots().unwrap();
            let names: Vec<String> = snapshots
                .iter()
                .map(|snapshot| String::from_utf8(snapshot.name.clone()).unwrap())
                .collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            folder.assert_sound("b");
            folder.assert_same("a", "b", &names);
        }
    }
}

#[test]
fn a_copy_has_everything_and_no_hole() {
    for (number, (recipe, kind)) in (0..).zip(recipes()) {
        let memory = used(&recipe, kind, number + 3000);
        let before = memory.to_vec().unwrap();
        for (mode, read_only) in [
            (CompactMode::Truncate, true),
            (CompactMode::Sequential, false),
        ] {
            let source = Image::options().read_only(read_only);
            let source = source.open(memory.clone()).unwrap();
            let target = Arc::new(Memory::from(vec![0xee; 100_000]));
            let options = CompactOptions::new().mode(mode);
            let report = source
                .compact_into(target.clone(), Image::options(), &options)
                .unwrap();
            assert!(report.complete);
            assert_eq!(report.bytes_before, before.len() as u64);
            drop(source);
            assert_sound(&target);
            let (used, end) = usage(&target);
            assert_eq!(used, end);
            let (memory, target): (Arc<dyn Storage>, Arc<dyn Storage>) = (memory.clone(), target);
            assert!(state(Image::options, &memory) == state(Image::options, &target));
        }
        assert!(
            memory.to_vec().unwrap() == before,
            "the source is as it was"
        );
    }
}

#[test]
#[cfg(feature = "encryption")]
fn what_is_encrypted_is_enciphered_for_its_new_place() {
    use qcow2_image::luks::{KeyCost, LuksOptions};
    use qcow2_io::cipher::Secret;

    let secret = || Secret::new(b"s".to_vec());
    let luks = LuksOptions::new().cost(KeyCost::Iterations(1000));
    let new = || CreateOptions::new(SIZE);
    let recipes = [
        new().cluster_size(4096).luks(luks, secret()),
        new().cluster_size(1024).legacy_aes(secret()),
    ];
    for (number, recipe) in (0..).zip(recipes) {
        let memory = Arc::new(Memory::new());
        Image::create(&memory, &recipe).unwrap();
        let open = || Image::options().secret(secret());
        let image = open().open(memory.clone()).unwrap();
        for part in 0..40_u64 {
            let at = (part * 77_777) % (SIZE - 50_000);
            image.write_at(&noise(part + number, 20_000), at).unwrap();
            if part % 10 == 3 {
                let name = format!("s{part}");
                image.create_snapshot(&SnapshotOptions::new(name)).unwrap();
            }
            image.discard(at / 2..at / 2 + 10_000).unwrap();
        }
        image.delete_snapshot(&SnapshotKey::any("s13")).unwrap();
        image.close().unwrap();
        for mode in [CompactMode::Truncate, CompactMode::Sequential] {
            let copy = Arc::new(Memory::from(memory.to_vec().unwrap()));
            let image = open().open(copy.clone()).unwrap();
            let report = image.compact(&CompactOptions::new().mode(mode)).unwrap();
            image.close().unwrap();
            assert!(report.moved_bytes > 0);
            assert_sound(&copy);
            let (used, end) = usage_of(open(), &copy);
            assert_eq!(used, end);
            let (old, new): (Arc<dyn Storage>, Arc<dyn Storage>) = (memory.clone(), copy);
            assert!(state(open, &old) == state(open, &new), "{number} {mode:?}");
        }
    }
}

#[test]
fn beside_an_external_data_file_only_metadata_moves() {
    let data = Arc::new(Memory::new());
    let recipe = CreateOptions::new(64 << 20)
        .cluster_size(4096)
        .data_file("data")
        .data_file_storage(data.clone());
    let memory = Arc::new(Memory::new());
    Image::create(&memory, &recipe).unwrap();
    let open = || Image::options().data_file(data.clone());
    let image = open().open(memory.clone()).unwrap();
    for part in (0..32_u64).rev() {
        image.write_at(&noise(part, 10_000), part << 21).unwrap();
    }
    // The tables of what is cut off are gone with it.
    image.set_len(40 << 20).unwrap();
    image.close().unwrap();
    let shared: Arc<dyn Storage> = memory.clone();
    let before = state(open, &shared);
    let data_before = data.to_vec().unwrap();
    let image = open().open(memory.clone()).unwrap();
    let options = CompactOptions::new().mode(CompactMode::Sequential);
    let report = image.compact(&options).unwrap();
    let refused = image.compact_into(Arc::new(Memory::new()), open(), &options);
    assert!(refused.is_err());
    image.close().unwrap();
    assert!(report.moved_bytes > 0);
    assert!(state(open, &shared) == before);
    assert!(data.to_vec().unwrap() == data_before);
    let (used, end) = usage_of(open(), &memory);
    assert_eq!(used, end);
}

/// Ends the work after so many looks.
struct Impatient(AtomicU64);

impl Monitor for Impatient {
    fn is_cancelled(&self) -> bool {
        let left = self.0.load(Ordering::Relaxed);
        self.0.store(left.saturating_sub(1), Ordering::Relaxed);
        left == 0
    }
}

#[test]
fn who_cancels_can_go_on_later() {
    let recipe = CreateOptions::new(SIZE).cluster_size(512);
    let memory = used(&recipe, ALL, 4000);
    let shared: Arc<dyn Storage> = memory.clone();
    let before = state(Image::options, &shared);
    let options = CompactOptions::new().mode(CompactMode::Sequential);
    let options = options.slice(20_000);
    let mut rounds = 0;
    loop {
        let monitor = Impatient(AtomicU64::new(1 + rounds));
        let report = compact(&memory, &options.monitor(&monitor));
        assert_sound(&memory);
        assert!(state(Image::options, &shared) == before, "{rounds}");
        if report.complete {
            break;
        }
        rounds += 1;
    }
    assert!(rounds > 1, "{rounds}");
    let (used, end) = usage(&memory);
    assert_eq!(used, end);
}

#[test]
fn guests_go_on_between_slices() {
    let recipe = CreateOptions::new(SIZE).cluster_size(512);
    let memory = used(&recipe, ALL, 5000);
    let image = Image::options().open(memory.clone()).unwrap();
    let done = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let (image, done, written) = (&image, &done, &written);
        for thread in 0..2_u64 {
            scope.spawn(move || {
                // Each has a half of the disk to itself.
                let mut random = Random::new(thread);
                while !done.load(Ordering::Acquire) {
                    let at = thread * SIZE / 2 + random.below(SIZE / 2 - 4000);
                    let bytes = noise(at, 3000);
                    image.write_at(&bytes, at).unwrap();
                    let mut read = vec![0; 3000];
                    image.read_at(&mut read, at).unwrap();
                    assert!(read == bytes);
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for mode in [CompactMode::Sequential, CompactMode::Truncate] {
            let options = CompactOptions::new().mode(mode).slice(20_000);
            assert!(image.compact(&options).unwrap().complete);
        }
        done.store(true, Ordering::Release);
    });
    assert!(written.load(Ordering::Relaxed) > 0);
    let snapshots = image.snapshots().unwrap().len();
    image.close().unwrap();
    assert_sound(&memory);
    let shared: Arc<dyn Storage> = memory;
    let found = state(Image::options, &shared).snapshots.len();
    assert_eq!(found, snapshots);
}
