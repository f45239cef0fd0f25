use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use qcow2_image::create::CreateOptions;
use qcow2_image::testing::{Random, qemu};
use qcow2_image::{CacheOptions, Image, ResizeOptions};
use qcow2_io::{FileOptions, Memory, Op, Storage, ZeroFlags};

use crate::rig::assert_sound;

const BLOCK: u64 = 512;
const THREADS: u64 = 8;
/// Blocks that belong to one thread: no multiple of a cluster, so that neighbours meet in one.
const OWN: u64 = 301;
/// Blocks that all threads use, behind those of single threads.
const SHARED: u64 = 203;
/// Where the part begins that comes and goes with the size of the disk; blocks.
const TAIL: u64 = THREADS * OWN + SHARED;
/// Most blocks in the tail.
const TAIL_MAX: u64 = 400;
/// The writer of what the backing file holds.
const BELOW: u32 = 0x00be_1000;
/// Longest request in blocks.
const LONGEST: u64 = 40;

/// What is run: the kind of image, and where it lies.
#[derive(Clone, Copy, Debug)]
struct Case {
    cluster: u64,
    refcount_bits: u64,
    extended: bool,
    backing: bool,
    lazy: bool,
    in_file: bool,
}

const CASE: Case = Case {
    cluster: 4096,
    refcount_bits: 16,
    extended: false,
    backing: false,
    lazy: false,
    in_file: false,
};

/// A block that says where it belongs and who wrote it, in each of its words.
fn block(place: u64, tag: u32) -> Vec<u8> {
    let word = place << 32 | u64::from(tag);
    word.to_be_bytes().repeat(64)
}

fn blocks(first: u64, count: u64, tag: u32) -> Vec<u8> {
    (first..first + count)
        .flat_map(|place| block(place, tag))
        .collect()
}

/// Each block is zeros, or one that someone wrote to this place, as a whole.
fn assert_blocks(first: u64, bytes: &[u8], whole: bool) {
    for (place, block) in (first..).zip(bytes.chunks(BLOCK as usize)) {
        let (words, _) = block.as_chunks::<8>();
        for word in words {
            let found = u64::from_be_bytes(*word);
            let fits = found == 0 || found >> 32 == place && found as u32 != 0;
            assert!(fits, "block {place} has {found:#018x}");
            assert!(!whole || word == &words[0], "block {place} is torn");
        }
    }
}

/// One thread's view of the disk.
struct Worker<'a> {
    image: &'a Image,
    number: u64,
    random: Random,
    tag: u32,
    /// What the thread's own blocks hold.
    own: Vec<u8>,
    /// What the tail holds: that of the one thread that resizes.
    tail: Vec<u8>,
    whole: bool,
}

impl Worker<'_> {
    fn next_tag(&mut self) -> u32 {
        self.tag += 1;
        (self.number as u32 + 1) << 24 | self.tag
    }

    /// Some of the blocks `0..limit`.
    fn some(&mut self, limit: u64) -> (u64, u64) {
        let first = self.random.below(limit);
        let longest = if self.random.one_in(4) { LONGEST } else { 4 };
        (first, 1 + self.random.below(longest.min(limit - first)))
    }

    /// Changes blocks; gives what they hold then.
    fn change(&mut self, first: u64, count: u64) -> Vec<u8> {
        let range = first * BLOCK..(first + count) * BLOCK;
        match self.random.below(8) {
            0 => self.image.discard(range).unwrap(),
            1 => self
                .image
                .write_zeroes(range, ZeroFlags::MAY_UNMAP)
                .unwrap(),
            2 => self.image.write_zeroes(range, ZeroFlags::NONE).unwrap(),
            kind => {
                let bytes = blocks(first, count, self.next_tag());
                if kind == 3 && count > 1 {
                    let (one, two) = bytes.split_at(BLOCK as usize);
                    let start = range.start;
                    let mut ops = [Op::write(one, start), Op::write(two, start + BLOCK)];
                    self.image.submit(&mut ops);
                    for op in &mut ops {
                        op.take_result().unwrap().unwrap();
                    }
                } else {
                    self.image.write_at(&bytes, range.start).unwrap();
                }
                return bytes;
            }
        }
        vec![0; (count * BLOCK) as usize]
    }

    fn read(&self, first: u64, count: u64) -> Vec<u8> {
        let mut bytes = vec![0xa5; (count * BLOCK) as usize];
        self.image.read_at(&mut bytes, first * BLOCK).unwrap();
        bytes
    }

    fn step(&mut self) {
        match self.random.below(20) {
            0 => self.image.flush().unwrap(),
            1 if self.number == 0 => self.resize(),
            2 if self.number == 0 && !self.tail.is_empty() => {
                let (first, count) = self.some(self.tail.len() as u64 / BLOCK);
                let bytes = self.change(TAIL + first, count);
                self.tail[(first * BLOCK) as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            3..9 => {
                let (first, count) = self.some(SHARED);
                let first = THREADS * OWN + first;
                if self.random.one_in(2) {
                    self.change(first, count);
                } else {
                    assert_blocks(first, &self.read(first, count), self.whole);
                }
            }
            9..14 => {
                let (first, count) = self.some(OWN);
                let found = self.read(self.number * OWN + first, count);
                let expected = &self.own[(first * BLOCK) as usize..][..found.len()];
                assert!(
                    found == expected,
                    "blocks {first}+{count} of {}",
                    self.number
                );
            }
            _ => {
                let (first, count) = self.some(OWN);
                let bytes = self.change(self.number * OWN + first, count);
                self.own[(first * BLOCK) as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
    }

    fn resize(&mut self) {
        let blocks = self.random.below(TAIL_MAX);
        let options = ResizeOptions {
            shrink: true,
            ..ResizeOptions::default()
        };
        let size = (TAIL + blocks) * BLOCK;
        self.image.resize(size, options).unwrap();
        self.tail.resize((blocks * BLOCK) as usize, 0);
        let found = self.read(TAIL, blocks);
        assert!(found == self.tail, "the tail after a resize to {size}");
    }
}

impl Case {
    fn below(self) -> Vec<u8> {
        if self.backing {
            // Shorter than the disk, and it ends in the middle of a cluster.
            blocks(0, TAIL - 37, BELOW)
        } else {
            Vec::new()
        }
    }

    fn open(self, storage: &Arc<dyn Storage>) -> Image {
        let cache = CacheOptions::new().l2_slice_bytes(512).l2_bytes(1024);
        let mut options = Image::options().cache(cache);
        if self.backing {
            options = options.backing(Arc::new(Memory::from(self.below())));
        }
        options.open(storage.clone()).unwrap()
    }

    fn run(self, seed: u64, steps: u64) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.qcow2");
        let storage: Arc<dyn Storage> = if self.in_file {
            let options = FileOptions::new().write(true).create(true);
            Arc::new(options.open(&path).unwrap())
        } else {
            Arc::new(Memory::new())
        };
        let mut create = CreateOptions::new(TAIL * BLOCK)
            .cluster_size(self.cluster)
            .refcount_bits(self.refcount_bits)
            .extended_l2(self.extended)
            .lazy_refcounts(self.lazy);
        if self.backing {
            create = create.backing_file("below.raw", "raw");
        }
        Image::create(&*storage, &create).unwrap();
        let image = self.open(&storage);
        let mut below = self.below();
        below.resize((TAIL * BLOCK) as usize, 0);
        let (owned, tail) = thread::scope(|scope| {
            let start = |number: u64| {
                let bytes = OWN * BLOCK;
                let mut worker = Worker {
                    image: &image,
                    number,
                    random: Random::new(seed << 8 | number),
                    tag: 0,
                    own: below[(number * bytes) as usize..][..bytes as usize].to_vec(),
                    tail: Vec::new(),
                    whole: !self.in_file,
                };
                scope.spawn(move || {
                    (0..steps).for_each(|_| worker.step());
                    (worker.own, worker.tail)
                })
            };
            let threads: Vec<_> = (0..THREADS).map(start).collect();
            let mut owned = Vec::new();
            let mut tail = Vec::new();
            for thread in threads {
                let (own, its_tail) = thread.join().unwrap();
                owned.extend(own);
                tail.extend(its_tail);
            }
            (owned, tail)
        });
        let compare = |image: &Image| {
            let mut found = vec![0xa5; image.virtual_size() as usize];
            image.read_at(&mut found, 0).unwrap();
            let (own, rest) = found.split_at((THREADS * OWN * BLOCK) as usize);
            let (shared, end) = rest.split_at((SHARED * BLOCK) as usize);
            assert!(own == owned, "{self:?}, seed {seed}");
            assert!(end == tail, "{self:?}, seed {seed}");
            assert_blocks(THREADS * OWN, shared, true);
        };
        compare(&image);
        image.close().unwrap();
        assert_sound(&*storage);
        let image = self.open(&storage);
        compare(&image);
        drop(image);
        self.ask_qemu(storage, &path);
    }

    /// The other checker finds nothing, either.
    fn ask_qemu(self, storage: Arc<dyn Storage>, path: &Path) {
        if !qemu::is_available() {
            return;
        }
        if !self.in_file {
            let mut bytes = vec![0; storage.len().unwrap() as usize];
            storage.read_at(&mut bytes, 0).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        drop(storage);
        std::fs::write(path.with_file_name("below.raw"), self.below()).unwrap();
        let mut command = Command::new("qemu-img");
        let output = command.args(["check", "-f", "qcow2"]).arg(path).output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{self:?}: {said}");
    }
}

/// Runs a case, as often as `QCOW2_STRESS` says: once if it says nothing.
fn stress(case: Case) {
    let rounds = std::env::var("QCOW2_STRESS").map_or(1, |times| times.parse().unwrap());
    for seed in 0..rounds {
        case.run(seed, 600);
    }
}

#[test]
fn clusters_of_common_size() {
    stress(CASE);
}

#[test]
fn smallest_clusters_and_widest_refcounts() {
    stress(Case {
        cluster: 512,
        refcount_bits: 64,
        ..CASE
    });
}

#[test]
fn over_a_backing_file() {
    stress(Case {
        backing: true,
        ..CASE
    });
}

#[test]
fn with_lazy_refcounts() {
    stress(Case {
        lazy: true,
        backing: true,
        ..CASE
    });
}

#[test]
fn with_subclusters() {
    stress(Case {
        cluster: 16384,
        extended: true,
        ..CASE
    });
}

#[test]
fn with_subclusters_over_a_backing_file() {
    stress(Case {
        cluster: 16384,
        extended: true,
        backing: true,
        ..CASE
    });
}

#[test]
fn in_a_file() {
    stress(Case {
        in_file: true,
        backing: true,
        ..CASE
    });
}

#[test]
fn in_a_file_with_subclusters() {
    stress(Case {
        in_file: true,
        cluster: 16384,
        extended: true,
        ..CASE
    });
}
