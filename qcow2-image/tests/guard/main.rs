//! Writes that would hit metadata: each kind is found, the write does not happen, and the image is marked, once.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic fails the test"
)]

use std::sync::Arc;

use qcow2_check::synth;
use qcow2_format::bitmap::{BitmapCluster, BitmapDirectory};
use qcow2_format::{BitmapTableEntry, Header, HostOffset, L1Entry, L2Entry, Snapshot};
use qcow2_image::{Image, ImageError, ImageOptions, Kinds, OverlapChecks, Template};
use qcow2_io::{Memory, Storage, StorageErrorKind, ZeroFlags};

fn word(storage: &dyn Storage, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    storage.read_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

fn header(storage: &dyn Storage) -> Header {
    let mut bytes = vec![0; 65536];
    storage.read_at(&mut bytes, 0).unwrap();
    Header::decode(&bytes).unwrap()
}

/// An image with everything, bitmaps and snapshots among it.
fn demo() -> Arc<Memory> {
    let memory = Arc::new(Memory::new());
    synth::demo(&*memory).unwrap();
    memory
}

fn options() -> ImageOptions {
    Image::options().no_backing()
}

fn first_table(storage: &dyn Storage, l1: HostOffset, entries: u32) -> HostOffset {
    (0..u64::from(entries))
        .map(|index| L1Entry::from_bits(word(storage, l1.get() + index * 8)).l2_table())
        .find(|table| table.get() != 0)
        .unwrap()
}

fn snapshots(storage: &dyn Storage, header: &Header) -> Vec<Snapshot> {
    let mut bytes = vec![0; 65536];
    let place = header.snapshot_table_offset.get();
    storage.read_at(&mut bytes, place).unwrap();
    let mut at = 0;
    (0..header.snapshot_count)
        .map(|_| {
            let (snapshot, len) = Snapshot::decode(&bytes[at..]).unwrap();
            at += len.next_multiple_of(8);
            snapshot
        })
        .collect()
}

/// A cluster that holds metadata of this kind, and of no other.
fn place(storage: &dyn Storage, kind: Kinds) -> HostOffset {
    let header = header(storage);
    let active = first_table(storage, header.l1_table_offset, header.l1_entries);
    let bitmaps = || header.bitmaps().unwrap();
    let bitmap_table = || {
        let mut bytes = vec![0; usize::try_from(bitmaps().directory_len_bytes).unwrap()];
        let place = bitmaps().directory_offset.get();
        storage.read_at(&mut bytes, place).unwrap();
        let entries = BitmapDirectory::new(&bytes, bitmaps().count);
        let entries: Vec<_> = entries.map(Result::unwrap).collect();
        entries
            .into_iter()
            .find_map(|entry| {
                let data = (0..u64::from(entry.table_entries)).find_map(|index| {
                    let bits = word(storage, entry.table_offset.get() + index * 8);
                    match BitmapTableEntry::from_bits(bits).kind() {
                        BitmapCluster::Cluster(data) => Some(data),
                        _ => None,
                    }
                })?;
                Some((entry.table_offset, data))
            })
            .unwrap()
    };
    match kind {
        Kinds::ACTIVE_L1 => header.l1_table_offset,
        Kinds::ACTIVE_L2 => active,
        Kinds::REFCOUNT_TABLE => header.refcount_table_offset,
        Kinds::REFCOUNT_BLOCK => HostOffset::new(word(storage, header.refcount_table_offset.get())),
        Kinds::SNAPSHOT_TABLE => header.snapshot_table_offset,
        Kinds::INACTIVE_L1 => snapshots(storage, &header)[0].l1_table_offset,
        Kinds::INACTIVE_L2 => snapshots(storage, &header)
            .iter()
            .map(|snapshot| first_table(storage, snapshot.l1_table_offset, snapshot.l1_entries))
            .find(|table| *table != active)
            .unwrap(),
        Kinds::BITMAP_DIRECTORY => bitmaps().directory_offset,
        Kinds::BITMAP_TABLE => bitmap_table().0,
        Kinds::BITMAP_DATA => bitmap_table().1,
        other => panic!("no place for {other:?}"),
    }
}

const KINDS: [Kinds; 10] = [
    Kinds::ACTIVE_L1,
    Kinds::ACTIVE_L2,
    Kinds::REFCOUNT_TABLE,
    Kinds::REFCOUNT_BLOCK,
    Kinds::SNAPSHOT_TABLE,
    Kinds::INACTIVE_L1,
    Kinds::INACTIVE_L2,
    Kinds::BITMAP_DIRECTORY,
    Kinds::BITMAP_TABLE,
    Kinds::BITMAP_DATA,
];

/// Makes guest cluster 0 lie on `target`, and its table the image's own.
fn lead_to(storage: &dyn Storage, target: HostOffset) {
    let header = header(storage);
    let l1 = header.l1_table_offset.get();
    let table = L1Entry::from_bits(word(storage, l1)).l2_table();
    assert_ne!(table.get(), 0, "the first table is there");
    let own = L1Entry::new(table, true);
    storage.write_at(&own.to_be_bytes(), l1).unwrap();
    let entry = L2Entry::normal(target, true, 0);
    storage
        .write_at(&entry.word().to_be_bytes(), table.get())
        .unwrap();
}

#[test]
fn a_guest_write_onto_metadata_of_any_kind_is_stopped_and_the_image_marked() {
    for kind in KINDS {
        let memory = demo();
        let target = place(&*memory, kind);
        lead_to(&*memory, target);
        let size = header(&*memory).geometry.cluster_len();
        let mut before = vec![0; size];
        memory.read_at(&mut before, target.get()).unwrap();

        let image = options().open(Arc::<Memory>::clone(&memory)).unwrap();
        let error = image.write_at(&[0xee; 512], 0).unwrap_err();
        assert!(error.to_string().contains("would overwrite"), "{error}");
        assert!(error.to_string().contains(&kind.to_string()), "{error}");
        assert!(image.is_poisoned());
        assert!(header(&*memory).incompatible.corrupt(), "{kind:?}");
        let mut after = vec![0; size];
        memory.read_at(&mut after, target.get()).unwrap();
        if kind == Kinds::BITMAP_DIRECTORY {
            // The bitmap that records is marked as in use before the first write.
            before[15] |= 1;
        }
        if kind != Kinds::ACTIVE_L1 {
            assert_eq!(before, after, "{kind:?} is as it was");
        }

        // Nothing more is written, reads go on.
        for error in [
            image.write_at(&[1; 512], 1 << 16).unwrap_err(),
            image.write_zeroes(0..65536, ZeroFlags::NONE).unwrap_err(),
            image.discard(0..65536).unwrap_err(),
            image.flush().unwrap_err(),
        ] {
            assert!(
                error.to_string().contains("takes no more writes"),
                "{error}"
            );
        }
        image.read_at(&mut [0; 512], 0).unwrap();
        image.close().unwrap_err();
        let storage = Arc::<Memory>::clone(&memory);
        let refused = options().open(storage).unwrap_err();
        assert!(matches!(refused, ImageError::MarkedCorrupt), "{refused}");
        let storage = Arc::<Memory>::clone(&memory);
        let image = options().read_only(true).open(storage).unwrap();
        let error = image.write_at(&[1], 0).unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::ReadOnly);
    }
}

#[test]
fn a_switch_that_is_off_lets_writes_of_that_kind_through_and_no_other() {
    for kind in KINDS {
        for (checks, stopped) in [
            (OverlapChecks::default().with(kind, false), false),
            (OverlapChecks::template(Template::None), false),
            (
                OverlapChecks::template(Template::None).with(kind, true),
                true,
            ),
        ] {
            let memory = demo();
            let target = place(&*memory, kind);
            lead_to(&*memory, target);
            let storage = Arc::<Memory>::clone(&memory);
            let image = options().overlap_checks(checks).open(storage).unwrap();
            let result = image.write_at(&[0xee; 512], 0);
            assert_eq!(result.is_err(), stopped, "{kind:?} with {checks:?}");
        }
    }
}

#[test]
fn a_table_that_lies_on_other_metadata_is_not_written() {
    // The L2 table is the refcount table's cluster: the slice must not get to disk.
    let memory = demo();
    let header = header(&*memory);
    let target = header.refcount_table_offset;
    let l1 = header.l1_table_offset.get();
    let own = L1Entry::new(target, true);
    memory.write_at(&own.to_be_bytes(), l1).unwrap();
    let mut before = vec![0; header.geometry.cluster_len()];
    memory.read_at(&mut before, target.get()).unwrap();
    let image = options().open(Arc::<Memory>::clone(&memory)).unwrap();
    // Whether the write or the flush notices depends on the entry that the guest's cluster happens to have.
    let written = image.write_at(&[1; 512], 20 << 16);
    let flushed = image.flush();
    assert!(written.is_err() || flushed.is_err());
    let mut after = vec![0; before.len()];
    memory.read_at(&mut after, target.get()).unwrap();
    assert_eq!(before, after);
    assert!(image.is_poisoned());
}

#[test]
fn a_cluster_with_refcount_0_that_holds_a_table_is_not_handed_out() {
    let memory = demo();
    let header = header(&*memory);
    let block = word(&*memory, header.refcount_table_offset.get());
    let table = first_table(&*memory, header.l1_table_offset, header.l1_entries);
    let index = table.get() >> header.geometry.cluster_bits();
    // 16-bit refcounts: the lowest free cluster is now the live table.
    memory.write_at(&[0, 0], block + index * 2).unwrap();
    let image = options().open(Arc::<Memory>::clone(&memory)).unwrap();
    let free = (0..header.virtual_size()).step_by(65536);
    let mut stopped = None;
    for offset in free {
        if let Err(error) = image.write_at(&[7; 512], offset) {
            stopped = Some(error);
            break;
        }
    }
    let error = stopped.unwrap();
    assert!(error.to_string().contains("an active L2 table"), "{error}");
    assert!(image.is_poisoned());
}

#[test]
fn metadata_that_a_guest_cluster_points_at_is_not_freed() {
    for kind in KINDS {
        let memory = demo();
        let target = place(&*memory, kind);
        lead_to(&*memory, target);
        let storage = Arc::<Memory>::clone(&memory);
        let image = options().open(storage).unwrap();
        let cluster = header(&*memory).geometry.cluster_size();
        image.discard(0..cluster).unwrap();
        let refused = image.flush().and_then(|()| image.flush());
        let shared = matches!(kind, Kinds::INACTIVE_L2 | Kinds::ACTIVE_L2);
        assert!(refused.is_err() || shared, "{kind:?}");
        let mut bytes = vec![0; 512];
        memory.read_at(&mut bytes, target.get()).unwrap();
        let emptied = bytes.iter().all(|byte| *byte == 0);
        assert!(
            !emptied || kind == Kinds::BITMAP_DATA,
            "{kind:?} was punched"
        );
    }
}
