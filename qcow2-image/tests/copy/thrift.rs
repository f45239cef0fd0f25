use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_format::{ClusterKind, EntryRules, L1Entry, L2Entry};
use qcow2_image::copy::{CopyOptions, Target, copy};
use qcow2_image::create::CreateOptions;
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{Extent, Memory, Result, Storage, ZeroFlags};

use crate::rig::{content, create, memory, open};

const LEN: usize = 16 << 20;
const CHUNK: u64 = 1 << 18;

/// Notes what is read, and can hold up the reads of one place.
#[derive(Debug)]
struct Watched {
    memory: Memory,
    reads: Mutex<Vec<Range<u64>>>,
    /// The read of the first byte waits until so many other bytes have been read.
    first_waits_for: u64,
    read: AtomicU64,
}

impl Watched {
    fn new(memory: Memory, first_waits_for: u64) -> Self {
        Self {
            memory,
            reads: Mutex::new(Vec::new()),
            first_waits_for,
            read: AtomicU64::new(0),
        }
    }
}

impl Storage for Watched {
    fn len(&self) -> Result<u64> {
        self.memory.len()
    }
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        let len = bufs.iter().map(|buf| buf.len() as u64).sum::<u64>();
        self.reads.lock().unwrap().push(offset..offset + len);
        if offset == 0 {
            while self.read.load(Ordering::Acquire) < self.first_waits_for {
                std::thread::yield_now();
            }
        }
        self.memory.read_vectored_at(bufs, offset)?;
        if offset > 0 {
            self.read.fetch_add(len, Ordering::AcqRel);
        }
        Ok(())
    }
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.memory.write_vectored_at(bufs, offset)
    }
    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.memory.write_zeroes(range, flags)
    }
    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.memory.discard(range)
    }
    fn flush(&self) -> Result<()> {
        self.memory.flush()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.memory.set_len(len)
    }
    fn extents(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        self.memory.extents(range, max)
    }
}

/// Where the streams of all compressed clusters lie, in the order of the guest.
fn streams(file: &Memory, image: &qcow2_image::Image) -> Vec<u64> {
    let word = |offset: u64| {
        let mut bytes = [0; 8];
        file.read_at(&mut bytes, offset).unwrap();
        bytes
    };
    let (header, geometry) = (image.header(), image.geometry());
    let rules = EntryRules {
        geometry,
        external_data: false,
        version2: false,
    };
    let mut found = Vec::new();
    for index in 0..u64::from(header.l1_entries) {
        let entry = L1Entry::from_be_bytes(word(header.l1_table_offset.get() + index * 8));
        let table = entry.l2_table().get();
        for index in (0..geometry.l2_entries()).filter(|_| table != 0) {
            let bits = u64::from_be_bytes(word(table + index * 8));
            if let ClusterKind::Compressed(extent) = L2Entry::from_bits(bits, 0).kind(rules) {
                found.push(extent.offset.get());
            }
        }
    }
    found
}

#[test]
fn streams_lie_in_the_order_of_the_guest_whoever_was_ready_first() {
    if !Codec::Zlib.is_available() {
        return;
    }
    for threads in [1, 4] {
        // With several threads, three other pieces are read before the first one is.
        let held_up = if threads > 1 { 3 * CHUNK } else { 0 };
        // No zeros, which nobody reads.
        let bytes: Vec<u8> = content(LEN, 8).iter().map(|byte| byte | 1).collect();
        let source = Watched::new(Memory::from(bytes), held_up);
        let file = create(&CreateOptions::new(LEN as u64).cluster_size(16384));
        let image = open(&file);
        let options = CopyOptions::new().threads(threads).chunk(CHUNK);
        let report = copy(&source, &image, &options.compress(Level::default())).unwrap();
        image.flush().unwrap();
        let streams = streams(&file, &image);
        assert_eq!(streams.len() as u64, report.compressed_clusters);
        assert!(streams.len() > 300 && streams.is_sorted());
    }
}

#[test]
fn no_more_pieces_are_under_way_than_there_is_memory_for() {
    if !Codec::Zlib.is_available() {
        return;
    }
    // The first piece comes back only when all others are ready that there can be: 8 parcels of 4 threads.
    let window = 7 * CHUNK;
    let source = Watched::new(Memory::from(vec![5; LEN]), window);
    let image = open(&create(&CreateOptions::new(LEN as u64)));
    let options = CopyOptions::new().threads(4).chunk(CHUNK);
    copy(&source, &image, &options.compress(Level::default())).unwrap();

    // One more, and it would wait for ever: so let it be the last that comes.
    let reads = source.reads.lock().unwrap();
    let before: Vec<_> = reads.iter().take(8).map(|read| read.start).collect();
    assert!(before.iter().all(|start| *start < 8 * CHUNK), "{before:?}");
    assert_eq!(reads.len() as u64, LEN as u64 / CHUNK);
}

#[test]
fn nothing_is_read_where_the_source_has_zeros() {
    let mut bytes = vec![0; LEN];
    for at in [0, 70_000, 5 << 20, LEN - 1] {
        bytes[at] = 1;
    }
    let source = Watched::new(memory(&bytes), 0);
    let extents = source.memory.extents(0..LEN as u64, 1000).unwrap();
    let is_data = |read: &Range<u64>| {
        extents.iter().any(|extent| {
            !extent.kind.reads_as_zeros() && extent.offset <= read.start && extent.end() >= read.end
        })
    };
    let image = open(&create(&CreateOptions::new(LEN as u64)));
    let target = Memory::new();
    let report = copy(&source, Target::Storage(&target), &CopyOptions::new()).unwrap();
    copy(&source, &image, &CopyOptions::new()).unwrap();
    if Codec::Zlib.is_available() {
        let image = open(&create(&CreateOptions::new(LEN as u64)));
        let options = CopyOptions::new().compress(Level::default());
        let report = copy(&source, &image, &options).unwrap();
        assert_eq!(report.compressed_clusters, 4);
    }
    let reads = source.reads.lock().unwrap();
    assert!(reads.iter().all(is_data), "{reads:?}");
    assert_eq!(report.stored_bytes, 4 * 4096);
    assert!(target.allocated_bytes() < 1 << 20);
}

#[test]
fn a_disk_of_holes_takes_no_time() {
    let image = open(&create(&CreateOptions::new(1 << 50).cluster_size(2 << 20)));
    let below = open(&create(&CreateOptions::new(1 << 50).cluster_size(2 << 20)));
    below.write_at(&[1; 4096], 1 << 45).unwrap();
    let report = copy(&below, &image, &CopyOptions::new()).unwrap();
    assert_eq!(report.read_bytes, 2 << 20);
    assert_eq!(report.stored_bytes, 4096);
    let mut byte = [0];
    image.read_at(&mut byte, (1 << 45) + 4095).unwrap();
    assert_eq!(byte, [1]);
}
