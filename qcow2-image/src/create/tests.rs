//! The order of writes, what a crash or an error leaves, storages of fixed length, and the rules.

use qcow2_check::{Options, Verdict, check};
use qcow2_format::Header;
use qcow2_format::header::{CompressionType, Version};
use qcow2_io::{
    Event, Fault, Faulty, Memory, Operation, Slice, Storage, StorageErrorKind, Trace, replay,
};

use super::layout::Layout;
use super::target::CHUNK;
use super::*;

const ALL: [Preallocation; 4] = [
    Preallocation::Off,
    Preallocation::Metadata,
    Preallocation::Falloc,
    Preallocation::Full,
];

fn verdict(storage: &dyn Storage) -> Verdict {
    check(storage, &Options::default()).verdict()
}

fn is_image(storage: &dyn Storage) -> bool {
    let mut magic = [0; 4];
    storage.read_at(&mut magic, 0).unwrap();
    magic == *b"QFI\xfb"
}

/// An image with a long name, so that its header is longer than a sector.
fn overlay(preallocation: Preallocation) -> CreateOptions {
    CreateOptions::new(3 << 20)
        .cluster_size(16384)
        .extended_l2(true)
        .backing_file(vec![b'b'; 900], "raw")
        .preallocation(preallocation)
}

fn old_image() -> Memory {
    let storage = Memory::new();
    let options = CreateOptions::new(1 << 20)
        .cluster_size(512)
        .preallocation(Preallocation::Metadata);
    write_image(&storage, None, &options).unwrap();
    storage
}

#[test]
fn the_first_sector_comes_last_behind_a_flush() {
    for preallocation in ALL {
        let trace = Trace::new(old_image());
        write_image(&trace, None, &overlay(preallocation)).unwrap();
        let events = trace.events();
        assert_eq!(events[..2], [Event::SetLen { len: 0 }, Event::Flush]);
        let [
            before @ ..,
            Event::Flush,
            Event::Write { offset: 0, bytes },
            Event::Flush,
        ] = &events[2..]
        else {
            panic!("{events:?}");
        };
        assert_eq!(bytes.len(), 512);
        for event in before {
            let start = match event {
                Event::Write { offset, .. } => *offset,
                Event::WriteZeroes { range, .. } => range.start,
                other => {
                    assert!(matches!(other, Event::SetLen { .. }), "{other:?}");
                    continue;
                }
            };
            assert!(start >= 512, "{event:?}");
        }
    }
}

#[test]
fn a_crash_leaves_no_image_or_a_whole_one() {
    for preallocation in ALL {
        // The old one as long as it is not emptied, the new one as soon as its first sector is there; each is met twice.
        let options = overlay(preallocation);
        assert_eq!(images_after_crashes(&options, old_image), 2 + 2);
        let device = || Slice::new(old_image(), 0, 8 << 20).unwrap();
        assert_eq!(images_after_crashes(&options, device), 2 + 2);
    }
}

/// Writes an image to what `old` makes, and for each flush that a crash prevents looks at what is there: none, one, all but
/// one, or all of the changes since the flush before. Counts the images found; all must be sound.
fn images_after_crashes<S: Storage>(options: &CreateOptions, old: impl Fn() -> S) -> usize {
    let trace = Trace::new(old());
    write_image(&trace, None, options).unwrap();
    let events = trace.events();
    let mut durable = 0;
    let mut images = 0;
    for part in events.split_inclusive(Event::is_flush) {
        let pending = &part[..part.len() - 1];
        for chosen in 0..=pending.len() {
            for wanted in [true, false] {
                let kept = (0..pending.len()).filter(|index| (*index == chosen) == wanted);
                let kept = kept.map(|index| &pending[index]);
                let storage = old();
                replay(events[..durable].iter().chain(kept), &storage).unwrap();
                if is_image(&storage) {
                    assert_eq!(verdict(&storage), Verdict::Sound);
                    images += 1;
                }
            }
        }
        durable += part.len();
    }
    images
}

#[test]
fn an_error_of_the_storage_is_told_and_leaves_no_image() {
    let operations = [
        Operation::SetLen,
        Operation::Flush,
        Operation::Write,
        Operation::WriteZeroes,
    ];
    for preallocation in ALL {
        let whole = Faulty::new(old_image());
        write_image(&whole, None, &overlay(preallocation)).unwrap();
        for operation in operations {
            let count = whole.count(operation);
            assert!(count > 0 || operation == Operation::WriteZeroes);
            for nth in 1..=count {
                let storage = Faulty::new(old_image());
                let fault = Fault::on(operation).kind(StorageErrorKind::NoSpace);
                storage.add(fault.nth(nth));
                let error = write_image(&storage, None, &overlay(preallocation)).unwrap_err();
                assert_eq!(storage.struck(), 1, "{operation} {nth} of {count}");
                assert_eq!(error.kind(), CreateErrorKind::Storage);
                assert!(matches!(error, CreateError::Storage { .. }), "{error:?}");
                // Only what comes before the old image is gone, and behind the new one is whole.
                let first = operation == Operation::SetLen && nth == 1;
                let last = operation == Operation::Flush && nth == count;
                assert_eq!(is_image(&storage), first || last, "{operation} {nth}");
            }
        }
    }
}

#[test]
fn stale_bytes_of_a_device_do_not_show_through() {
    let len = 8 << 20;
    for preallocation in ALL {
        for options in [
            CreateOptions::new((3 << 20) + 512).preallocation(preallocation),
            CreateOptions::new(40 << 10)
                .cluster_size(512)
                .refcount_bits(64)
                .preallocation(preallocation),
            overlay(preallocation),
        ] {
            let memory = Memory::from(vec![0xa5; len]);
            let device = Slice::new(&memory, 0, len as u64).unwrap();
            write_image(&device, None, &options).unwrap();
            assert_eq!(device.len().unwrap(), len as u64);
            // The checker measures a file by its length: what lies behind the image is not its business here.
            let plan = plan::Plan::new(&options).unwrap();
            let layout = plan.layout;
            let end = layout.clusters() * layout.geometry().cluster_size();
            let image = Slice::new(&memory, 0, end).unwrap();
            assert_eq!(verdict(&image), Verdict::Sound, "{options:?}");
            if preallocation != Preallocation::Off && !options.extended_l2 {
                for cluster in 0..layout.geometry().clusters_for(plan.size) {
                    let mut bytes = vec![1; layout.geometry().cluster_len()];
                    image
                        .read_at(&mut bytes, layout.data(cluster).get())
                        .unwrap();
                    assert!(bytes.iter().all(|byte| *byte == 0), "{cluster}");
                }
            }
            let mut l1_rest = vec![1; 8];
            image.read_at(&mut l1_rest, layout.tables_end()).unwrap();
            assert_eq!(l1_rest, [0; 8]);
        }
    }
}

#[test]
fn a_device_that_is_too_small_stays_as_it_is() {
    let memory = Memory::from(vec![0xa5; 1 << 20]);
    let device = Slice::new(&memory, 0, 1 << 20).unwrap();
    let options = CreateOptions::new(1 << 20).preallocation(Preallocation::Metadata);
    let error = write_image(&device, None, &options).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the image needs 1376256 bytes, its storage keeps its length of 1048576"
    );
    assert_eq!(error.kind(), CreateErrorKind::Storage);
    assert!(memory.to_vec().unwrap().iter().all(|byte| *byte == 0xa5));
    write_image(&device, None, &CreateOptions::new(1 << 20)).unwrap();
}

#[test]
fn a_raw_data_file_is_the_disk() {
    let options = CreateOptions::new(5 << 20)
        .data_file("d.raw")
        .data_file_raw(true);
    let image = Memory::new();
    let data = Memory::from(vec![7; 6 << 20]);
    write_image(&image, Some(&data), &options).unwrap();
    assert_eq!(data.to_vec().unwrap(), vec![0; 5 << 20]);
    assert_eq!(verdict(&image), Verdict::Sound);

    // A device as data file keeps its length and is wiped as far as the disk goes.
    let memory = Memory::from(vec![7; 6 << 20]);
    let device = Slice::new(&memory, 0, 6 << 20).unwrap();
    write_image(&image, Some(&device), &options).unwrap();
    let bytes = memory.to_vec().unwrap();
    assert!(bytes[..5 << 20].iter().all(|byte| *byte == 0));
    assert!(bytes[5 << 20..].iter().all(|byte| *byte == 7));
}

#[test]
fn no_write_is_longer_than_a_chunk_or_a_cluster() {
    for (cluster_size, size) in [(512, 40 << 20), (65536, 1 << 30), (2 << 20, 4 << 40)] {
        let trace = Trace::new(Memory::new());
        let options = CreateOptions::new(size)
            .cluster_size(cluster_size)
            .preallocation(Preallocation::Metadata);
        write_image(&trace, None, &options).unwrap();
        let events = trace.events();
        let longest = events.iter().map(|event| match event {
            Event::Write { bytes, .. } => bytes.len(),
            _ => 0,
        });
        assert!(longest.max().unwrap() <= CHUNK.max(usize::try_from(cluster_size).unwrap()));
        assert_eq!(verdict(&trace), Verdict::Sound);
    }
}

#[test]
fn refcount_blocks_count_themselves_however_many_there_are() {
    for (cluster_size, refcount_bits, size, preallocation) in [
        (512, 64, 128 << 30, Preallocation::Off),
        (512, 64, 50 << 20, Preallocation::Metadata),
        (512, 1, 50 << 20, Preallocation::Metadata),
        (4096, 64, 1 << 30, Preallocation::Metadata),
    ] {
        let image = Memory::new();
        let options = CreateOptions::new(size)
            .cluster_size(cluster_size)
            .refcount_bits(refcount_bits)
            .preallocation(preallocation);
        let layout = plan::Plan::new(&options).unwrap().layout;
        assert!(layout.refcount_blocks() > 1);
        assert_eq!(layout.refcount_table_clusters() > 1, refcount_bits == 64);
        write_image(&image, None, &options).unwrap();
        assert_eq!(verdict(&image), Verdict::Sound, "{options:?}");
    }
}

#[test]
fn the_layout_of_a_huge_preallocated_disk_is_found_without_writing_it() {
    let geometry = qcow2_format::Geometry::new(16, 4, false).unwrap();
    let layout = Layout::new(geometry, 1 << 50, Preallocation::Metadata, false, 0, 0).unwrap();
    let data_clusters = 1_u64 << 34;
    let tables = data_clusters / 8192;
    assert_eq!(layout.l2_tables(), tables);
    let clusters = layout.clusters();
    assert_eq!(layout.refcount_blocks(), clusters.div_ceil(32768));
    assert_eq!(
        layout.refcount_table_clusters(),
        layout.refcount_blocks().div_ceil(8192)
    );
    assert_eq!(layout.preallocated().end, clusters << 16);
    assert_eq!(
        layout.data(data_clusters - 1).get(),
        layout.preallocated().end - 65536
    );
    // 2 PiB of data and as many clusters of refcounts as there can be don't go together.
    let error = Layout::new(geometry, 2 << 50, Preallocation::Full, false, 0, 0).unwrap_err();
    assert_eq!(error.kind(), CreateErrorKind::TooLarge);
    assert!(
        error
            .to_string()
            .starts_with("preallocation=full needs a refcount table of more")
    );
    let geometry = qcow2_format::Geometry::new(21, 0, false).unwrap();
    let error = Layout::new(geometry, 1 << 57, Preallocation::Falloc, true, 0, 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "preallocation=falloc needs offsets of up to 144115188075855872, the limit is 72057594037927936"
    );
}

#[test]
fn each_broken_rule_is_named_with_its_option_and_value() {
    let disk = || CreateOptions::new(1 << 20);
    let v2 = || disk().version(Version::V2);
    let name = |len| vec![b'n'; len];
    let cases = [
        (CreateOptions::default(), "size is missing"),
        (
            CreateOptions::new((128 << 30) + 1).cluster_size(512),
            "size is 137438953473, at most 137438953472 bytes are possible with cluster_size=512",
        ),
        (
            CreateOptions::new(u64::MAX).extended_l2(true),
            "size is 18446744073709551615, at most 1125899906842624 bytes are possible with cluster_size=65536 and extended_l2=on",
        ),
        (
            disk().cluster_size(65537),
            "cluster_size is 65537, allowed are powers of two from 512 to 2097152 bytes",
        ),
        (
            disk().cluster_size(8192).extended_l2(true),
            "cluster_size is 8192, extended_l2=on needs 16384 bytes or more",
        ),
        (
            disk().refcount_bits(128),
            "refcount_bits is 128, allowed are 1, 2, 4, 8, 16, 32 and 64",
        ),
        (
            v2().refcount_bits(8),
            "refcount_bits=8 needs compat=1.1, it can't be had with compat=0.10",
        ),
        (
            v2().lazy_refcounts(true),
            "lazy_refcounts=on needs compat=1.1, it can't be had with compat=0.10",
        ),
        (
            v2().extended_l2(true),
            "extended_l2=on needs compat=1.1, it can't be had with compat=0.10",
        ),
        (
            v2().compression_type(CompressionType::Zstd),
            "compression_type=zstd needs compat=1.1, it can't be had with compat=0.10",
        ),
        (
            v2().data_file("d\n"),
            "data_file=d\\n needs compat=1.1, it can't be had with compat=0.10",
        ),
        (disk().backing_file("", "raw"), "backing_file is empty"),
        (disk().backing_file("b", ""), "backing_fmt is empty"),
        (
            disk().backing_file("b\0c", "raw"),
            "backing_file contains a zero byte",
        ),
        (
            disk().backing_file(name(1024), "raw"),
            "backing_file has 1024 bytes, at most 1023 are allowed",
        ),
        (
            disk().backing_file("b", name(16)),
            "backing_fmt has 16 bytes, at most 15 are allowed",
        ),
        (
            disk().cluster_size(512).backing_file(name(377), "raw"),
            "header and names need 513 bytes, cluster_size is 512",
        ),
        (
            disk()
                .backing_file("b", "raw")
                .preallocation(Preallocation::Metadata),
            "preallocation=metadata with backing_file needs extended_l2=on",
        ),
        (
            disk().data_file_raw(true),
            "data_file_raw=on needs data_file",
        ),
        (
            disk()
                .data_file("d")
                .data_file_raw(true)
                .backing_file("b", "raw"),
            "data_file_raw=on can't be had with backing_file",
        ),
        (
            disk().data_file("d"),
            "data_file is named, but no storage is given for it",
        ),
        (
            CreateOptions::new(128 << 30)
                .cluster_size(512)
                .refcount_bits(64)
                .preallocation(Preallocation::Metadata),
            "preallocation=metadata needs a refcount table of more than 8388608 bytes; larger clusters or fewer refcount_bits need less",
        ),
    ];
    for (options, message) in cases {
        let storage = Memory::from(vec![1; 1000]);
        let error = write_image(&storage, None, &options).unwrap_err();
        assert_eq!(error.to_string(), message);
        assert_eq!(storage.to_vec().unwrap(), vec![1; 1000], "{message}");
    }
    let mut options = disk();
    options.set("backing_fmt", "raw").unwrap();
    let error = write_image(&Memory::new(), None, &options).unwrap_err();
    assert_eq!(error.to_string(), "backing_fmt needs backing_file");
    let mut options = disk();
    options.set("backing_file", "b").unwrap();
    let error = write_image(&Memory::new(), None, &options).unwrap_err();
    assert_eq!(
        error.to_string(),
        "backing_file needs backing_fmt, the format is not guessed"
    );
    let error = write_image(&Memory::new(), Some(&Memory::new()), &disk()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a storage is given for data_file, but data_file has no name"
    );
}

#[test]
fn the_header_says_what_was_chosen() {
    let image = Memory::new();
    let mut options = CreateOptions::default();
    for (key, value) in [
        ("size", "1.5G"),
        ("compat", "1.1"),
        ("cluster_size", "128k"),
        ("refcount_bits", "8"),
        ("lazy_refcounts", "on"),
        ("extended_l2", "yes"),
        ("compression_type", "zstd"),
        ("backing_file", "base.img"),
        ("backing_fmt", "raw"),
        ("data_file", "data.img"),
        ("data_file_raw", "off"),
        ("preallocation", "metadata"),
    ] {
        options.set(key, value).unwrap();
    }
    let data = std::sync::Arc::new(Memory::new());
    let options = options.data_file_storage(data.clone());
    write_image(&image, None, &options).unwrap();
    assert_eq!(data.len().unwrap(), 3 << 29);
    let mut cluster = vec![0; 128 << 10];
    image.read_at(&mut cluster, 0).unwrap();
    let header = Header::decode(&cluster).unwrap();
    assert_eq!(header.virtual_size(), 3 << 29);
    assert_eq!(header.geometry.cluster_bits(), 17);
    assert_eq!(header.geometry.refcount_bits(), 8);
    assert!(header.geometry.extended_l2());
    assert!(header.compatible.lazy_refcounts());
    assert_eq!(header.compression_type, CompressionType::Zstd);
    assert_eq!(header.backing_name.as_deref(), Some(&b"base.img"[..]));
    assert_eq!(header.backing_format(), Some(&b"raw"[..]));
    assert_eq!(header.data_file_name(), Some(&b"data.img"[..]));
    assert!(!header.autoclear.raw_external_data());
    assert_eq!(verdict(&image), Verdict::Sound);
    let (name, format) = options.chosen_backing();
    assert_eq!((name, format), (Some(&b"base.img"[..]), Some(&b"raw"[..])));
    assert_eq!(options.chosen_size(), Some(3 << 29));
    assert_eq!(options.chosen_data_file(), Some(&b"data.img"[..]));
    assert!(options.chosen_data_storage().is_some());
}
