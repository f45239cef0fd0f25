use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex as StdMutex};

use qcow2_check::{Options, Verdict, check};
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, ImageOptions};
use qcow2_io::{Extent, Memory, Result, Storage, ZeroFlags};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::thread;

use crate::explore::explore;

const CLUSTER: u64 = 4096;
const LEN: usize = CLUSTER as usize;

/// Memory at which threads take turns, and what of it a flush has made durable.
#[derive(Debug, Default)]
struct Turns {
    memory: Memory,
    point: AtomicU64,
    durable: StdMutex<Vec<Vec<u8>>>,
}

impl Turns {
    /// Waits, as long as a disk would take in which others do a lot.
    fn turn(&self) -> &Memory {
        for _ in 0..6 {
            self.point.load(Ordering::SeqCst);
        }
        &self.memory
    }
}

impl Storage for Turns {
    fn len(&self) -> Result<u64> {
        self.memory.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.turn().read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.turn().write_vectored_at(bufs, offset)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.turn().write_zeroes(range, flags)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.turn().discard(range)
    }

    fn flush(&self) -> Result<()> {
        let content = self.turn().to_vec()?;
        self.durable.lock().unwrap().push(content);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.turn().set_len(len)
    }

    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.memory.extents(range, max)
    }
}

struct Disk {
    storage: Arc<Turns>,
    image: Arc<Image>,
}

impl Disk {
    fn new(create: &CreateOptions, options: ImageOptions) -> Self {
        let storage = Arc::new(Turns::default());
        Image::create(&storage.memory, create).unwrap();
        let image = Arc::new(options.open(storage.clone()).unwrap());
        Self { storage, image }
    }

    fn plain() -> Self {
        let create = CreateOptions::new(16 * CLUSTER).cluster_size(CLUSTER);
        Self::new(&create, Image::options())
    }

    fn spawn(&self, work: impl FnOnce(&Image) + Send + 'static) -> thread::JoinHandle<()> {
        let image = self.image.clone();
        thread::spawn(move || work(&image))
    }

    /// Closes the image, and looks at it and at all that crashes could have left.
    fn finish(self) {
        let Self { storage, image } = self;
        Arc::into_inner(image).unwrap().close().unwrap();
        let verdict = |storage: &Memory| check(storage, &Options::default()).verdict();
        assert_eq!(verdict(&storage.memory), Verdict::Sound);
        for content in storage.durable.lock().unwrap().drain(..) {
            let verdict = verdict(&Memory::from(content));
            assert!(matches!(verdict, Verdict::Sound | Verdict::Leaks));
        }
    }

    /// What is there after a crash now.
    fn crashed(&self) -> Image {
        let content = self.storage.durable.lock().unwrap().last().unwrap().clone();
        let options = Image::options().read_only(true);
        options.open(Arc::new(Memory::from(content))).unwrap()
    }
}

fn fill(image: &impl Storage, cluster: u64, byte: u8) {
    image.write_at(&[byte; LEN], cluster * CLUSTER).unwrap();
}

fn read(image: &impl Storage, cluster: u64) -> Vec<u8> {
    let mut bytes = vec![0xa5; LEN];
    image.read_at(&mut bytes, cluster * CLUSTER).unwrap();
    bytes
}

#[test]
fn two_first_writes_to_one_cluster_both_survive() {
    explore(250, || two_first_writes(false));
}

#[test]
fn two_first_writes_to_subclusters_both_survive() {
    explore(250, || two_first_writes(true));
}

fn two_first_writes(extended: bool) {
    let cluster = 16384_u64;
    let below: Vec<u8> = (0..2 * cluster).map(|at| (at % 251) as u8).collect();
    let create = CreateOptions::new(2 * cluster)
        .cluster_size(cluster)
        .extended_l2(extended)
        .backing_file("below.raw", "raw");
    let backing = Arc::new(Memory::from(below.clone()));
    let disk = Disk::new(&create, Image::options().backing(backing));
    let one = disk.spawn(|image| image.write_at(&[0xf1; 700], 100).unwrap());
    let two = disk.spawn(|image| image.write_at(&[0xf2; 700], 900).unwrap());
    let mut found = vec![0; 2 * cluster as usize];
    one.join().unwrap();
    two.join().unwrap();
    disk.image.read_at(&mut found, 0).unwrap();
    let mut expected = below;
    expected[100..800].fill(0xf1);
    expected[900..1600].fill(0xf2);
    assert!(found == expected);
    disk.finish();
}

#[test]
fn a_write_in_place_never_hits_the_next_owner() {
    explore(600, || {
        let disk = Disk::plain();
        fill(&*disk.image, 0, 0xa1);
        disk.image.flush().unwrap();
        let writer = disk.spawn(|image| image.write_at(&[0xd4; 512], 512).unwrap());
        disk.image.discard(0..CLUSTER).unwrap();
        disk.image.flush().unwrap();
        for cluster in [5, 7, 9] {
            fill(&*disk.image, cluster, 0xb2);
        }
        writer.join().unwrap();
        for cluster in [5, 7, 9] {
            assert!(read(&*disk.image, cluster) == [0xb2; LEN]);
        }
        let mut late = [0; LEN];
        late[512..1024].fill(0xd4);
        let found = read(&*disk.image, 0);
        assert!(found == [0; LEN] || found == late);
        disk.finish();
    });
}

#[test]
fn a_hole_is_never_punched_into_a_cluster_of_another() {
    explore(400, || {
        let disk = Disk::plain();
        fill(&*disk.image, 0, 0xa1);
        disk.image.flush().unwrap();
        disk.image.discard(0..CLUSTER).unwrap();
        let flusher = disk.spawn(|image| image.flush().unwrap());
        for cluster in [5, 7, 9] {
            fill(&*disk.image, cluster, 0xb2);
        }
        flusher.join().unwrap();
        for cluster in [5, 7, 9] {
            assert!(read(&*disk.image, cluster) == [0xb2; LEN]);
        }
        disk.finish();
    });
}

#[test]
fn a_reader_sees_old_bytes_or_zeros_and_never_the_next_owner() {
    explore(600, || {
        let disk = Disk::plain();
        fill(&*disk.image, 0, 0xa1);
        disk.image.flush().unwrap();
        let reader = disk.spawn(|image| {
            for _ in 0..6 {
                let found = read(image, 0);
                assert!(found == [0xa1; LEN] || found == [0; LEN]);
            }
        });
        disk.image.discard(0..CLUSTER).unwrap();
        disk.image.flush().unwrap();
        for cluster in [5, 7, 9] {
            fill(&*disk.image, cluster, 0xb2);
        }
        reader.join().unwrap();
        disk.finish();
    });
}

#[test]
fn a_flush_covers_what_came_before_while_others_allocate() {
    explore(300, || {
        let create = CreateOptions::new(64 << 10)
            .cluster_size(512)
            .refcount_bits(64);
        let disk = Disk::new(&create, Image::options());
        // Nearly all that the first refcount block describes.
        let some = vec![0xa1; 50 * 512];
        disk.image.write_at(&some, 0).unwrap();
        let other = disk.spawn(|image| {
            for number in 0..4 {
                let place = 40_000 + number * 4096;
                image.write_at(&[0xb2; 1536], place).unwrap();
            }
        });
        let third = disk.spawn(|image| {
            image.write_at(&[0xc3; 512], 60_000).unwrap();
            image.flush().unwrap();
        });
        disk.image.write_at(&[0xd4; 512], 0).unwrap();
        disk.image.flush().unwrap();
        let mut found = vec![0; 50 * 512];
        disk.crashed().read_at(&mut found, 0).unwrap();
        assert!(found[..512] == [0xd4; 512] && found[512..] == some[512..]);
        other.join().unwrap();
        third.join().unwrap();
        disk.crashed().read_at(&mut found[..512], 60_000).unwrap();
        assert!(found[..512] == [0xc3; 512]);
        disk.finish();
    });
}

#[test]
fn a_resize_and_other_requests_do_not_mix() {
    explore(300, || {
        let disk = Disk::plain();
        fill(&*disk.image, 1, 0xa1);
        fill(&*disk.image, 15, 0xa2);
        let flusher = disk.spawn(|image| image.flush().unwrap());
        let writer = disk.spawn(|image| {
            fill(image, 2, 0xb2);
            assert!(read(image, 1) == [0xa1; LEN]);
        });
        disk.image.set_len(8 * CLUSTER).unwrap();
        disk.image.set_len(16 * CLUSTER).unwrap();
        flusher.join().unwrap();
        writer.join().unwrap();
        assert!(read(&*disk.image, 2) == [0xb2; LEN]);
        assert!(read(&*disk.image, 15) == [0; LEN]);
        disk.finish();
    });
}
