use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use qcow2_image::create::CreateOptions;
use qcow2_image::{BitmapOptions, BitmapRecovery, Image};
use qcow2_io::{Memory, Result, Storage, ZeroFlags};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::thread;

use crate::explore::explore;

const SECTOR: u64 = 512;
/// What guests write here, and nothing else has.
const MARK: u8 = 0xd5;

/// What crashes could leave while the guest's data is being written: what is durable, and all that is written.
struct Moment {
    sector: u64,
    files: [Vec<u8>; 2],
}

/// Memory that looks at each write of the guest.
#[derive(Default)]
struct Watched {
    memory: Memory,
    point: AtomicU64,
    durable: StdMutex<Vec<u8>>,
    moments: StdMutex<Vec<Moment>>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched").finish_non_exhaustive()
    }
}

impl Watched {
    fn turn(&self) -> &Memory {
        for _ in 0..3 {
            self.point.load(Ordering::SeqCst);
        }
        &self.memory
    }
}

impl Storage for Watched {
    fn len(&self) -> Result<u64> {
        self.memory.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.turn().read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        if bufs[0].first() == Some(&MARK) {
            let files = [self.durable.lock().unwrap().clone(), self.memory.to_vec()?];
            let sector = u64::from(bufs[0][1]);
            self.moments.lock().unwrap().push(Moment { sector, files });
        }
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
        *self.durable.lock().unwrap() = content;
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.turn().set_len(len)
    }
}

fn sectors(image: &Image) -> Vec<u64> {
    let found = image.bitmap_extents(b"b", 0..u64::MAX, usize::MAX).unwrap();
    found
        .into_iter()
        .flat_map(|range| range.start / SECTOR..range.end / SECTOR)
        .collect()
}

fn write(image: &Image, sector: u64) {
    let mut bytes = [MARK; SECTOR as usize];
    bytes[1] = sector as u8;
    image.write_at(&bytes, sector * SECTOR).unwrap();
}

#[test]
fn no_write_begins_before_the_file_tells_of_it() {
    explore(150, || {
        let storage = Arc::new(Watched::default());
        let create = CreateOptions::new(1 << 16).cluster_size(4096);
        Image::create(&storage.memory, &create).unwrap();
        let options = Image::options().bitmap_interval(Duration::ZERO);
        let image = Arc::new(options.open(storage.clone()).unwrap());
        image.write_at(&[1; 4096], 0).unwrap();
        let sectors_each = BitmapOptions::new().granularity(SECTOR);
        image.create_bitmap(b"b", &sectors_each).unwrap();
        let programs: [&[u64]; 2] = [&[3, 5, 3], &[5, 6]];
        let writers = programs.map(|program| {
            let image = image.clone();
            thread::spawn(move || program.iter().for_each(|sector| write(&image, *sector)))
        });
        let flusher = {
            let image = image.clone();
            thread::spawn(move || (0..3).for_each(|_| image.flush().unwrap()))
        };
        for thread in writers {
            thread.join().unwrap();
        }
        flusher.join().unwrap();
        assert_eq!(sectors(&image), [3, 5, 6]);
        let moments = std::mem::take(&mut *storage.moments.lock().unwrap());
        assert_eq!(moments.len(), 5);
        for Moment { sector, files } in moments {
            for file in files {
                let crashed = Image::options().open(Arc::new(Memory::from(file))).unwrap();
                crashed
                    .recover_bitmap(b"b", BitmapRecovery::AsStored)
                    .unwrap();
                assert!(sectors(&crashed).contains(&sector), "{sector}");
            }
        }
        Arc::into_inner(image).unwrap().close().unwrap();
        let image = Image::options().open(storage.clone()).unwrap();
        assert_eq!(sectors(&image), [3, 5, 6]);
    });
}
