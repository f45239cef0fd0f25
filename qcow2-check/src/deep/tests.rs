//! Images made by hand: damage, sharing, and claims without end.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_format::header::Version;
use qcow2_format::{Geometry, GuestCluster, HostOffset, L2Entry};
use qcow2_io::{Extent, Memory, Storage, ZeroFlags};

use super::*;
use crate::synth::{Builder, deflate};
use crate::{Monitor, Options, Report, Severity, Verdict, audit, load, walk};

const CLUSTER: usize = 4096;

fn options(threads: usize) -> Options<'static> {
    Options {
        threads,
        deep: true,
        ..Options::default()
    }
}

fn geometry() -> Geometry {
    Geometry::new(12, 4, false).unwrap()
}

fn builder(clusters: u64) -> Builder {
    Builder::new(Version::V3, geometry(), clusters << 12)
}

/// Some content that compresses, another one for each number.
fn content(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let noise = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    });
    let mut bytes: Vec<u8> = noise.take(CLUSTER / 4).collect();
    bytes.resize(CLUSTER, 0x11);
    bytes
}

fn stream(number: u64) -> Vec<u8> {
    deflate(&content(number))
}

/// An audit by one, two and four threads; the reports must be one.
fn deep(image: &dyn Storage) -> Report {
    let report = audit(image, &options(1));
    for threads in [2, 4] {
        let again = audit(image, &options(threads));
        assert_eq!(report.findings, again.findings);
        assert_eq!(report.totals, again.totals);
        assert_eq!(report.decoded, again.decoded);
    }
    report
}

/// What is said of clusters that don't decode: the guest offset, the snapshot and the detail.
fn lost(report: &Report) -> Vec<(u64, Option<u64>, String)> {
    let lost = report.findings.iter();
    lost.filter(|finding| finding.code == Code::CompressedUndecodable)
        .map(|finding| {
            let guest = finding.place.guest.unwrap();
            assert_eq!(guest.end - guest.start, CLUSTER as u64);
            (
                guest.start,
                finding.place.snapshot,
                finding.detail.to_string(),
            )
        })
        .collect()
}

fn u64_at(image: &dyn Storage, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    image.read_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

/// Where the L2 table of the first active L1 entry lies.
fn first_table(image: &dyn Storage) -> u64 {
    u64_at(image, u64_at(image, 40)) & 0x00ff_ffff_ffff_fe00
}

/// Where the compressed data of a guest cluster lies, by the first L2 table.
fn data_of(image: &dyn Storage, guest: u64) -> u64 {
    let entry = u64_at(image, first_table(image) + 8 * guest);
    assert!(L2Entry::from_bits(entry, 0).is_compressed());
    entry & ((1 << 58) - 1)
}

/// Makes the stream at an offset one that can't be: its first block is of a type that there is not.
fn damage(image: &dyn Storage, offset: u64) {
    image.write_at(&[7], offset).unwrap();
}

#[test]
fn what_does_not_decode_is_told_with_its_guest_cluster() {
    let image = Memory::new();
    let mut draft = builder(1 << 11);
    for guest in (0..600).filter(|guest| guest % 3 > 0) {
        let number = guest;
        draft
            .compressed(GuestCluster::new(guest), &stream(number))
            .unwrap();
    }
    draft.finish(&image).unwrap();
    let sound = deep(&image);
    assert_eq!(sound.verdict(), Verdict::Sound, "{:?}", sound.findings);
    assert_eq!(sound.decoded, Some(400));

    let at = data_of(&image, 7);
    damage(&image, at);
    let report = deep(&image);
    assert_eq!(report.verdict(), Verdict::Corrupt);
    assert_eq!(report.qemu_verdict(), Verdict::Sound);
    assert_eq!(report.counts, sound.counts);
    assert!(report.complete);
    let lost = lost(&report);
    assert_eq!(lost.len(), 1);
    assert_eq!((lost[0].0, lost[0].1), (7 << 12, None));
    assert!(
        lost[0].2.starts_with("the zlib stream is damaged"),
        "{lost:?}"
    );
    let finding = report
        .findings
        .iter()
        .find(|f| f.code == Code::CompressedUndecodable);
    assert_eq!(finding.unwrap().place.host.unwrap().start, at);

    let shallow = audit(&image, &Options::default());
    assert_eq!(shallow.verdict(), Verdict::Sound);
    assert_eq!(shallow.decoded, None);
}

#[test]
fn a_cluster_that_snapshots_share_is_decoded_once_and_told_once() {
    let image = Memory::new();
    let mut draft = builder(64);
    for guest in 0..3 {
        draft
            .compressed(GuestCluster::new(guest), &stream(guest))
            .unwrap();
    }
    draft.snapshot("a", &[]).unwrap();
    draft.snapshot("b", &[]).unwrap();
    // From here on the active disk has a table of its own, in which one entry differs.
    draft.compressed(GuestCluster::new(1), &stream(10)).unwrap();
    draft.finish(&image).unwrap();
    assert_eq!(deep(&image).decoded, Some(4));
    let ours = data_of(&image, 2);
    let theirs = {
        let snapshots = u64_at(&image, 64);
        let table = u64_at(&image, u64_at(&image, snapshots)) & 0x00ff_ffff_ffff_fe00;
        u64_at(&image, table + 8) & ((1 << 58) - 1)
    };
    assert_ne!(theirs, data_of(&image, 1));
    damage(&image, ours);
    damage(&image, theirs);
    let report = deep(&image);
    let lost = lost(&report);
    assert_eq!(report.total(Code::CompressedUndecodable), 2);
    assert_eq!(lost.len(), 2);
    assert_eq!((lost[0].0, lost[0].1), (1 << 12, Some(0)));
    assert!(lost[0].2.ends_with("; 1 more snapshot has it"), "{lost:?}");
    assert_eq!((lost[1].0, lost[1].1), (2 << 12, None));
    assert!(
        lost[1].2.ends_with("; 2 snapshots have it, too"),
        "{lost:?}"
    );
}

#[test]
fn the_file_may_end_inside_a_window_but_not_inside_a_stream() {
    let image = Memory::new();
    let mut draft = builder(64);
    draft.compressed(GuestCluster::new(5), &stream(1)).unwrap();
    draft.finish(&image).unwrap();
    let start = data_of(&image, 5);
    let len = stream(1).len() as u64;
    // The builder puts the tables in front or behind; only here is the data what the file ends with.
    let end = image.len().unwrap();
    let last = start + len;
    if end > last.next_multiple_of(CLUSTER as u64) {
        // Move the piece behind everything.
        let bytes = stream(1);
        image.write_at(&bytes, end).unwrap();
        let entry = L2Entry::compressed(geometry(), HostOffset::new(end), len).unwrap();
        let at = first_table(&image) + 40;
        image.write_at(&entry.word().to_be_bytes(), at).unwrap();
    }
    let start = data_of(&image, 5);
    image.set_len(start + len).unwrap();
    assert_eq!(deep(&image).total(Code::CompressedUndecodable), 0);
    image.set_len(start + len - 10).unwrap();
    let report = deep(&image);
    assert_eq!(lost(&report).len(), 1, "{:?}", report.findings);
    assert_eq!(lost(&report)[0].0, 5 << 12);
}

#[test]
fn compressed_clusters_of_encrypted_images_are_plain_and_decoded() {
    let image = Memory::new();
    let mut draft = builder(64);
    draft.luks();
    draft.compressed(GuestCluster::new(0), &stream(0)).unwrap();
    draft.compressed(GuestCluster::new(1), &stream(1)).unwrap();
    draft.finish(&image).unwrap();
    let sound = deep(&image);
    assert_eq!((sound.verdict(), sound.decoded), (Verdict::Sound, Some(2)));
    damage(&image, data_of(&image, 1));
    assert_eq!(lost(&deep(&image)).len(), 1);
}

/// Runs the passes on an image as a check would, with other numbers.
fn in_passes(image: &Memory, threads: usize, most: usize, available: bool) -> (u64, Report) {
    let options = options(threads);
    Run::start(&options, |run| {
        let loaded = load::load(image, &run).unwrap();
        let scan = walk::scan(&loaded.image, &run);
        let codec = codec(&loaded.image);
        let decoded = passes(&loaded.image, &scan, &run, most, codec, available);
        let (counts, found) = run.finish();
        let (findings, totals) = found.finish();
        let report = Report {
            counts,
            findings,
            totals,
            ..Report::default()
        };
        (decoded, report)
    })
    .unwrap()
}

#[test]
fn passes_leave_nothing_out_and_do_nothing_twice() {
    let image = Memory::new();
    let mut draft = builder(1 << 11);
    for guest in 0..700 {
        draft
            .compressed(GuestCluster::new(guest * 2), &stream(guest))
            .unwrap();
    }
    draft.finish(&image).unwrap();
    let bad = [0, 17, 18, 230];
    for guest in bad {
        damage(&image, data_of(&image, guest * 2));
    }
    let (_, whole) = in_passes(&image, 1, 10_000, true);
    assert_eq!(
        lost(&whole).iter().map(|lost| lost.0).collect::<Vec<_>>(),
        bad.map(|guest| guest << 13)
    );
    for (most, threads) in [(1, 1), (7, 4), (100, 2), (699, 1), (700, 2), (701, 4)] {
        let (decoded, report) = in_passes(&image, threads, most, true);
        assert_eq!(decoded, 700, "{most} at once");
        assert_eq!(report.findings, whole.findings, "{most} at once");
    }
}

#[test]
fn a_missing_decoder_is_told_and_named() {
    let image = Memory::new();
    let mut draft = builder(64);
    draft.header.compression_type = CompressionType::Zstd;
    draft.compressed(GuestCluster::new(0), &[1; 100]).unwrap();
    draft.compressed(GuestCluster::new(1), &[1; 100]).unwrap();
    draft.finish(&image).unwrap();
    let (decoded, report) = in_passes(&image, 2, 1000, false);
    assert_eq!(decoded, 0);
    assert_eq!(report.total(Code::CompressedUnchecked), 2);
    let told = report
        .findings
        .iter()
        .find(|f| f.code == Code::CompressedUnchecked);
    assert!(told.unwrap().detail.contains("feature `zstd`"));
    assert_eq!(report.verdict(), Verdict::Incomplete);

    let none = Memory::new();
    builder(64).finish(&none).unwrap();
    let (_, report) = in_passes(&none, 2, 1000, false);
    assert_eq!(report.totals, []);
}

/// Counts what is read, and fails to read some bytes.
#[derive(Debug)]
struct Watched {
    inner: Memory,
    read: AtomicU64,
    broken: Range<u64>,
}

impl Watched {
    fn new(inner: Memory) -> Self {
        Self {
            inner,
            read: AtomicU64::new(0),
            broken: 0..0,
        }
    }
}

impl Storage for Watched {
    fn len(&self) -> qcow2_io::Result<u64> {
        self.inner.len()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> qcow2_io::Result<()> {
        let len: u64 = bufs.iter().map(|buf| buf.len() as u64).sum();
        self.read.fetch_add(len, Ordering::Relaxed);
        if offset < self.broken.end && offset + len > self.broken.start {
            // Any error will do: nobody can address this.
            return self.inner.write_at(&[0], u64::MAX);
        }
        self.inner.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> qcow2_io::Result<()> {
        self.inner.write_vectored_at(bufs, offset)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> qcow2_io::Result<()> {
        self.inner.write_zeroes(range, flags)
    }

    fn discard(&self, range: Range<u64>) -> qcow2_io::Result<()> {
        self.inner.discard(range)
    }

    fn flush(&self) -> qcow2_io::Result<()> {
        self.inner.flush()
    }

    fn set_len(&self, len: u64) -> qcow2_io::Result<()> {
        self.inner.set_len(len)
    }

    fn extents(&self, range: Range<u64>, max: usize) -> qcow2_io::Result<Vec<Extent>> {
        self.inner.extents(range, max)
    }
}

#[test]
fn what_can_not_be_read_is_not_called_corrupt_and_hides_no_neighbour() {
    let memory = Memory::new();
    let mut draft = builder(64);
    for guest in 0..8 {
        draft
            .compressed(GuestCluster::new(guest), &stream(guest))
            .unwrap();
    }
    draft.finish(&memory).unwrap();
    damage(&memory, data_of(&memory, 6));
    let at = data_of(&memory, 2);
    let mut image = Watched::new(memory);
    image.broken = at + 600..at + 601;
    let report = deep(&image);
    assert_eq!(report.verdict(), Verdict::Incomplete);
    assert_eq!(report.decoded, Some(7));
    assert_eq!(lost(&report).len(), 1);
    let unread = report
        .findings
        .iter()
        .find(|f| f.code == Code::CompressedUnchecked);
    assert_eq!(unread.unwrap().place.guest.unwrap().start, 2 << 12);
}

/// An image of clusters of 2 MiB whose only L2 table is filled with these entries; behind it there is nothing but `tail`.
fn claims(tail: &[u8], entry: impl Fn(u64) -> (u64, u64)) -> Watched {
    let geometry = Geometry::new(21, 4, false).unwrap();
    let memory = Memory::new();
    let mut draft = Builder::new(Version::V3, geometry, 1 << 39);
    draft.compressed(GuestCluster::new(0), &[7; 64]).unwrap();
    draft.finish(&memory).unwrap();
    let start = memory.len().unwrap();
    memory.write_at(tail, start).unwrap();
    let table = first_table(&memory);
    let bytes: Vec<u8> = (0..1 << 18)
        .flat_map(|number| {
            let (at, len) = entry(number);
            let entry = L2Entry::compressed(geometry, HostOffset::new(start + at), len);
            entry.unwrap().word().to_be_bytes()
        })
        .collect();
    memory.write_at(&bytes, table).unwrap();
    Watched::new(memory)
}

#[test]
fn a_piece_that_all_entries_share_is_decoded_once() {
    let image = claims(&[7; 512], |_| (0, 64));
    let report = audit(&image, &options(2));
    assert_eq!(report.decoded, Some(1));
    assert_eq!(report.total(Code::CompressedUndecodable), 1 << 18);
    let kept = report
        .findings
        .iter()
        .filter(|f| f.code == Code::CompressedUndecodable);
    assert_eq!(kept.count(), 100);
}

#[test]
fn windows_on_top_of_each_other_are_not_all_decoded() {
    // Each byte starts a stream, of two clusters.
    let image = claims(&vec![7; 1 << 20], |number| (number, 1 << 20));
    let report = audit(&image, &options(2));
    assert_eq!(report.total(Code::CheckLimited), 1);
    assert!(report.decoded.unwrap() < 2000, "{:?}", report.decoded);
    // Four tables, and what is decoded is read at most twice.
    let read = image.read.load(Ordering::Relaxed);
    assert!(read < 256 << 20, "{read} bytes read");
    assert_eq!(report.verdict(), Verdict::Incomplete);
}

#[test]
fn windows_in_a_hole_cost_a_look_each() {
    let step = 8 << 20;
    let image = claims(&[1], |number| (step * (number % 10_000), 4 << 20));
    image.inner.set_len(step * 10_002).unwrap();
    let report = audit(&image, &options(2));
    assert_eq!(report.decoded, Some(10_000));
    assert_eq!(report.total(Code::CompressedUndecodable), 1 << 18);
    let read = image.read.load(Ordering::Relaxed);
    assert!(read < 128 << 20, "{read} bytes read");
}

/// Ends the check when compressed data begins to be decoded.
struct Impatient(AtomicU64);

impl Monitor for Impatient {
    fn phase(&self, phase: Phase, bytes: u64) {
        if phase == Phase::Content && bytes > 0 {
            self.0.store(1, Ordering::Relaxed);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

#[test]
fn decoding_ends_when_the_monitor_says_so() {
    let image = Memory::new();
    let mut draft = builder(1 << 11);
    for guest in 0..500 {
        draft
            .compressed(GuestCluster::new(guest), &stream(guest))
            .unwrap();
    }
    draft.finish(&image).unwrap();
    for threads in [1, 4] {
        let monitor = Impatient(AtomicU64::new(0));
        let options = Options {
            monitor: Some(&monitor),
            ..options(threads)
        };
        let report = audit(&image, &options);
        assert!(report.cancelled);
        assert_eq!(report.decoded, Some(0));
        assert_eq!(report.total_of(Severity::Corruption), 0);
    }
}
