//! Compressed entries that claim more of the file than their data has: the clusters behind belong to other data, too.

use std::collections::BTreeMap;

use qcow2_check::repair::{Level as Repair, RepairOptions, plan};
use qcow2_check::{Code, Options, Report, Severity, Verdict, check, recount};
use qcow2_image::CompactOptions;
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, ImageError};
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{Memory, Storage};

use crate::oracle::{Folder, assert_sound, copy_of, guest_bytes, in_memory, is_available, noise};

const UNIT: u64 = 1 << 16;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn word(storage: &dyn Storage, at: u64) -> u64 {
    let mut bytes = [0; 8];
    storage.read_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// Where the entry of a guest cluster stands.
fn entry_at(storage: &dyn Storage, cluster: u64) -> u64 {
    (word(storage, word(storage, 40)) & OFFSET) + cluster * 8
}

/// Two compressed clusters that claim as much as an entry can, on four clusters of other data.
fn overlong(refcount_bits: u64) -> std::sync::Arc<Memory> {
    let options = CreateOptions::new(1 << 20).refcount_bits(refcount_bits);
    let memory = in_memory(&options);
    let image = Image::options().open(memory.clone()).unwrap();
    let packed = vec![0x11; 2 << 16];
    image
        .write_compressed(&packed, 0, Level::default())
        .unwrap();
    image.write_at(&noise(4 << 16, 3), 4 * UNIT).unwrap();
    image.close().unwrap();
    for cluster in 0..2 {
        let at = entry_at(&*memory, cluster);
        // The number of sectors beyond the first fills the bits 54 to 61.
        let longest = word(&*memory, at) | 0xff << 54;
        memory.write_at(&longest.to_be_bytes(), at).unwrap();
    }
    memory
}

fn repaired(memory: &Memory, level: Repair) -> (Report, Vec<String>) {
    let options = RepairOptions {
        level,
        ..RepairOptions::default()
    };
    let plan = plan(memory, &options).unwrap();
    let kinds = plan
        .actions()
        .iter()
        .map(|action| action.kind.id().to_owned());
    let kinds = kinds.collect();
    plan.apply(None).unwrap();
    (check(memory, &Options::default()), kinds)
}

#[test]
fn refcounts_are_the_repair_and_nothing_is_written_in_place_then() {
    if !Codec::Zlib.is_available() {
        return;
    }
    let memory = overlong(16);
    let before = guest_bytes(
        &Image::options()
            .read_only(true)
            .open(memory.clone())
            .unwrap(),
    );
    let found = check(&*memory, &Options::default());
    assert_eq!(found.verdict(), Verdict::Corrupt);
    assert!(found.total(Code::RefcountLow) > 0);
    assert!(found.total(Code::CompressedOnData) > 0);
    assert_eq!(found.total(Code::DataShared), 0);

    let (after, kinds) = repaired(&memory, Repair::All);
    assert_eq!(after.verdict(), Verdict::Sound, "{:#?}", after.findings);
    assert!(after.complete && after.total(Code::CompressedOnData) > 0);
    assert!(!kinds.iter().any(|kind| kind.contains("COPY")), "{kinds:?}");
    assert!(
        recount(&*memory, &Options::default())
            .unwrap()
            .is_complete()
    );

    // The guest overwrites all that is claimed twice; the old bytes stay where they are.
    let shared: BTreeMap<u64, Vec<u8>> = after
        .findings
        .iter()
        .filter(|finding| finding.code == Code::CompressedOnData)
        .map(|finding| {
            let host = finding.place.host.unwrap();
            let mut bytes = vec![0; 1 << 16];
            memory.read_at(&mut bytes, host.start).unwrap();
            (host.start, bytes)
        })
        .collect();
    let image = Image::options().open(memory.clone()).unwrap();
    assert_eq!(guest_bytes(&image), before);
    for part in [(0, 512), (1 << 16, 3 << 16), (70_000, 10)] {
        let bytes = noise(part.1, 9);
        image.write_at(&bytes, 4 * UNIT + part.0).unwrap();
    }
    image.flush().unwrap();
    for (at, old) in shared {
        let mut bytes = vec![0; 1 << 16];
        memory.read_at(&mut bytes, at).unwrap();
        assert!(bytes == old, "{at:#x}");
    }
    let now = guest_bytes(&image);
    assert!(now[..4 << 16] == before[..4 << 16]);
    image.close().unwrap();
    assert_sound(&*memory);
}

#[test]
fn what_refcounts_cannot_count_is_copied_and_salvage_copies_all() {
    if !Codec::Zlib.is_available() {
        return;
    }
    for (bits, level) in [(1, Repair::All), (16, Repair::Salvage)] {
        let memory = overlong(bits);
        let before = guest_bytes(
            &Image::options()
                .read_only(true)
                .open(memory.clone())
                .unwrap(),
        );
        let (after, kinds) = repaired(&memory, level);
        assert_eq!(after.verdict(), Verdict::Sound, "{:#?}", after.findings);
        assert_eq!(after.total(Code::CompressedOnData), 0, "{bits} bits");
        assert!(kinds.iter().any(|kind| kind == "COPY-CLUSTER"), "{kinds:?}");
        let image = Image::options().open(memory.clone()).unwrap();
        assert_eq!(guest_bytes(&image), before);
    }
    // Also where `all` was there before.
    let memory = overlong(16);
    repaired(&memory, Repair::All);
    let (after, _) = repaired(&memory, Repair::Salvage);
    assert_eq!(after.total(Code::CompressedOnData), 0);
    assert_eq!(after.total_of(Severity::Leak), 0);
}

#[test]
fn such_an_image_is_not_compacted_before_it_is_parted() {
    if !Codec::Zlib.is_available() {
        return;
    }
    let memory = overlong(16);
    repaired(&memory, Repair::All);
    let copy = copy_of(&memory);
    let image = Image::options().open(copy.clone()).unwrap();
    let before = guest_bytes(&image);
    let refused = image.compact(&CompactOptions::default());
    assert!(
        matches!(refused, Err(ImageError::Unrecoverable { .. })),
        "{refused:?}"
    );
    assert_eq!(guest_bytes(&image), before);
    image.close().unwrap();
    assert_sound(&*copy);

    repaired(&memory, Repair::Salvage);
    let image = Image::options().open(memory.clone()).unwrap();
    image.compact(&CompactOptions::default()).unwrap();
    assert_eq!(guest_bytes(&image), before);
    image.close().unwrap();
    assert_sound(&*memory);
}

#[test]
fn qemu_calls_the_result_clean_and_reads_the_same() {
    if !Codec::Zlib.is_available() || !is_available("overlong compressed entries") {
        return;
    }
    let memory = overlong(16);
    let before = guest_bytes(
        &Image::options()
            .read_only(true)
            .open(memory.clone())
            .unwrap(),
    );
    repaired(&memory, Repair::All);
    let folder = Folder::new();
    std::fs::write(folder.path("image"), memory.to_vec().unwrap()).unwrap();
    folder.assert_sound("image");
    assert_eq!(folder.guest_bytes_by_qemu("image"), before);
    folder.io("image", &["write -P 9 256k 256k", "read -P 17 0 128k"]);
    folder.assert_sound("image");
}
