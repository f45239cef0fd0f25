//! Snapshot tables with damage: what is refused, in which terms, and that the file stays as it is.

use std::sync::Arc;

use qcow2_check::{Code, Options, check};
use qcow2_format::SnapshotError;
use qcow2_format::header::Version;
use qcow2_image::amend::AmendOptions;
use qcow2_image::create::CreateOptions;
use qcow2_image::{
    Image, ImageError, ImageOptions, SnapshotKey, SnapshotL1Problem, SnapshotOptions,
};
use qcow2_io::{Memory, Storage, StorageErrorKind};

const CLUSTER: u64 = 1 << 16;

/// An image with data in its first cluster and the snapshot `one`, and where the entry of that lies.
fn image() -> (Vec<u8>, usize) {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, &CreateOptions::new(64 << 20)).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    image.write_at(&[7; 512], 0).unwrap();
    image.create_snapshot(&SnapshotOptions::new("one")).unwrap();
    let table = image.header().snapshot_table_offset.get();
    image.close().unwrap();
    let table = usize::try_from(table).unwrap();
    (memory.to_vec().unwrap(), table)
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    let place = bytes.get_mut(at..at + new.len());
    place.unwrap_or_default().copy_from_slice(new);
}

fn open(bytes: &[u8], options: ImageOptions) -> (Arc<Memory>, Image) {
    let memory = Arc::new(Memory::from(bytes.to_vec()));
    let image = options.open(memory.clone()).unwrap();
    (memory, image)
}

#[test]
fn the_entry_that_is_refused_is_named() {
    let (sound, table) = image();
    let mut bytes = sound.clone();
    put(&mut bytes, table + 36, &0x10000_u32.to_be_bytes());
    let (_, image) = open(&bytes, Image::options().read_only(true));
    let error = image.snapshots().unwrap_err();
    assert!(
        matches!(
            error,
            ImageError::SnapshotEntry {
                entry: 0,
                count: 1,
                source: SnapshotError::ExtraDataTooLong { found: 0x10000, .. }
            }
        ),
        "{error:?}"
    );
    assert_eq!(error.kind(), StorageErrorKind::OutOfRange);

    // Entries with 65,535 bytes of name each: 1,023 of them fit, and one more does not.
    let mut bytes = sound;
    put(&mut bytes, table + 14, &u16::MAX.to_be_bytes());
    let mut entry = bytes[table..table + 40].to_vec();
    entry.resize((40 + 24 + 1 + 65535_usize).next_multiple_of(8), b'x');
    bytes.truncate(table);
    for _ in 0..1030 {
        bytes.extend(&entry);
    }
    put(&mut bytes, 60, &1030_u32.to_be_bytes());
    let (_, image) = open(&bytes, Image::options().read_only(true));
    let error = image.snapshots().unwrap_err();
    let ImageError::SnapshotEntry {
        entry,
        count,
        source: SnapshotError::TableTooLarge { found, limit },
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!((entry, count, limit), (1023, 1030, 64 << 20));
    assert!(found > limit);
}

#[test]
fn no_more_snapshots_than_there_may_be_are_taken() {
    let (mut bytes, _) = image();
    put(&mut bytes, 60, &65536_u32.to_be_bytes());
    put(&mut bytes, 64, &(16_u64 << 20).to_be_bytes());
    let (memory, image) = open(&bytes, Image::options());
    let error = image
        .create_snapshot(&SnapshotOptions::new("more"))
        .unwrap_err();
    let ImageError::Snapshots(SnapshotError::TooMany { found: 65537, .. }) = error else {
        panic!("{error:?}");
    };
    drop(image);
    assert!(memory.to_vec().unwrap() == bytes);
}

#[test]
fn what_nobody_counts_can_t_be_in_a_snapshot_and_harms_nothing() {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, &CreateOptions::new(64 << 20)).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    image.write_at(&[7; 512], 0).unwrap();
    image.flush().unwrap();
    image.close().unwrap();
    let mut bytes = memory.to_vec().unwrap();
    let number =
        |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let index = |number: u64| usize::try_from(number & 0x00ff_ffff_ffff_fe00).unwrap();
    let l2 = index(number(&bytes, index(number(&bytes, 40))));
    for (place, countable) in [(0xff_ffff_0000, true), (0xff_ffff_ffff_0000, false)] {
        put(&mut bytes, l2, &((1_u64 << 63) | place).to_be_bytes());
        let (memory, image) = open(&bytes, Image::options());
        let error = image
            .create_snapshot(&SnapshotOptions::new("one"))
            .unwrap_err();
        let ImageError::Uncounted {
            offset,
            can_be_counted,
        } = error
        else {
            panic!("{error:?}");
        };
        assert_eq!((offset.get(), can_be_counted), (place, countable));
        image.write_at(&[8; 512], CLUSTER).unwrap();
        image.close().unwrap();
        let report = check(&*memory, &Options::default());
        assert_eq!(report.total(Code::FeatureCorrupt), 0);
        assert_eq!(report.total(Code::FeatureDirty), 0);
        assert_eq!(report.total(Code::RefcountLow), 0);
    }
}

#[test]
fn a_snapshot_whose_tables_can_t_be_found_is_refused_or_passed_over() {
    let (sound, table) = image();
    let damages: [(usize, &[u8], _, _); 2] = [
        (
            0,
            &0x40_0200_u64.to_be_bytes(),
            SnapshotL1Problem::Place,
            StorageErrorKind::Invalid,
        ),
        (
            8,
            &0x1000_0000_u32.to_be_bytes(),
            SnapshotL1Problem::TooLarge,
            StorageErrorKind::OutOfRange,
        ),
    ];
    for (at, new, expected, kind) in damages {
        let mut bytes = sound.clone();
        put(&mut bytes, table + at, new);
        let is_it = |error: ImageError| {
            let ImageError::SnapshotL1 { problem, .. } = error else {
                panic!("{error:?}");
            };
            assert_eq!(problem, expected);
        };

        // As a rule nothing is written.
        let (memory, image) = open(&bytes, Image::options());
        let mut read = [0; 512];
        image.read_at(&mut read, 0).unwrap();
        assert_eq!(read, [7; 512]);
        let error = image.write_at(&[9; 512], 0).unwrap_err();
        assert_eq!(error.kind(), kind);
        drop(image);
        assert!(memory.to_vec().unwrap() == bytes);

        let options = || Image::options().pass_over_snapshots(true);
        let (memory, image) = open(&bytes, options());
        is_it(image.delete_snapshot(&SnapshotKey::any("one")).unwrap_err());
        image.write_at(&[9; 512], 0).unwrap();
        image.create_snapshot(&SnapshotOptions::new("two")).unwrap();
        image.delete_snapshot(&SnapshotKey::any("two")).unwrap();
        image.close().unwrap();
        // With its tables named again the snapshot is what it was.
        let mut after = memory.to_vec().unwrap();
        let number = |at: usize| u64::from_be_bytes(after[at..at + 8].try_into().unwrap());
        let moved = usize::try_from(number(64)).unwrap();
        let old = sound[table + at..table + at + new.len()].to_vec();
        put(&mut after, moved + at, &old);
        let report = check(&Memory::from(after.clone()), &Options::default());
        assert_eq!(report.counts.corruptions, 0, "{:?}", report.findings);
        assert_eq!(report.counts.leaks, 0, "{:?}", report.findings);
        let view = Image::options()
            .read_only(true)
            .snapshot(SnapshotKey::any("one"));
        let (_, view) = open(&after, view);
        view.read_at(&mut read, 0).unwrap();
        assert_eq!(read, [7; 512]);
        let view = Image::options()
            .read_only(true)
            .snapshot(SnapshotKey::any("one"));
        is_it(view.open(Arc::new(Memory::from(bytes))).unwrap_err());
    }
}

/// The entry at `table` with `unknown` behind the extra data it has.
fn lengthen(bytes: &mut [u8], table: usize, unknown: &[u8]) {
    let part = |at: usize, len: usize| bytes.get(at..at + len).unwrap_or_default();
    let word = |at: usize| part(at, 4).try_into().map_or(0, u32::from_be_bytes);
    let extra = word(table + 36) as usize;
    let names = (word(table + 12) >> 16) as usize + (word(table + 12) & 0xffff) as usize;
    let known = table + 40 + extra;
    let names = part(known, names).to_vec();
    put(bytes, known, unknown);
    put(bytes, known + unknown.len(), &names);
    let extra = u32::try_from(extra + unknown.len()).unwrap();
    put(bytes, table + 36, &extra.to_be_bytes());
}

fn has(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn extra_data_that_nobody_knows_stays_with_its_snapshot() {
    let (mut bytes, table) = image();
    let unknown = *b"of a later version, and of no meaning to this one";
    lengthen(&mut bytes, table, &unknown);
    assert_eq!(
        check(&Memory::from(bytes.clone()), &Options::default())
            .counts
            .corruptions,
        0
    );
    let (memory, mut image) = open(&bytes, Image::options());
    image.write_at(&[8; 512], 0).unwrap();
    image.create_snapshot(&SnapshotOptions::new("two")).unwrap();

    let kept = || {
        let now = memory.to_vec().unwrap();
        let header = |at: usize| u64::from_be_bytes(now[at..at + 8].try_into().unwrap());
        let table = usize::try_from(header(64)).unwrap();
        has(&now[table..(table + 512).min(now.len())], &unknown)
    };
    assert!(kept(), "after a snapshot was taken");
    image.apply_snapshot(&SnapshotKey::any("one")).unwrap();
    let mut read = [0; 512];
    image.read_at(&mut read, 0).unwrap();
    assert_eq!(read, [7; 512]);
    image.delete_snapshot(&SnapshotKey::any("two")).unwrap();
    assert!(kept(), "after another was deleted");
    image
        .amend(&AmendOptions::new().version(Version::V2))
        .unwrap();
    assert!(kept(), "in the older version");
    image
        .amend(&AmendOptions::new().version(Version::V3).refcount_bits(64))
        .unwrap();
    assert!(kept(), "in the newer version again");
    image.delete_snapshot(&SnapshotKey::any("one")).unwrap();
    image.close().unwrap();
    let report = check(&*memory, &Options::default());
    assert_eq!(report.counts.corruptions, 0, "{:?}", report.findings);
    assert_eq!(report.counts.leaks, 0, "{:?}", report.findings);
}
