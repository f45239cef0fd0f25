//! What a plan calls ambiguous: data that may be somebody else's, with the guest ranges of all that it may belong to.

use qcow2_check::ByteRange;
use qcow2_check::repair::{Action, ActionKind, Effect, Plan, RepairOptions, plan};
use qcow2_io::Memory;

use super::classes::Bytes;
use crate::mutants::bases;
use crate::oracle;

const COPIED: u64 = 1 << 63;

fn ambiguous<'a>(plan: &'a Plan<'_>) -> Vec<&'a Action> {
    let actions = plan.actions().iter();
    actions
        .filter(|action| action.effect == Effect::Ambiguous)
        .collect()
}

#[test]
fn both_guest_ranges_of_a_shared_cluster_are_ambiguous() {
    if !oracle::is_available(1, "shared clusters") {
        return;
    }
    let mut bytes = Bytes(bases::named("64k").bytes);
    bytes.put(bytes.l2() + 16, bytes.get(bytes.l2()));
    let image = Memory::from(bytes.0);
    let made = plan(&image, &RepairOptions::default()).unwrap();
    let found = ambiguous(&made);
    assert_eq!(found.len(), 1, "{made}");
    assert_eq!(found[0].kind, ActionKind::CopyCluster);
    assert_eq!(
        found[0].place.guest,
        Some(ByteRange::new(0x2_0000, 0x1_0000))
    );
    assert_eq!(found[0].also, [ByteRange::new(0, 0x1_0000)]);
}

#[test]
fn what_was_writable_although_a_snapshot_has_it_is_ambiguous_in_the_snapshot() {
    if !oracle::is_available(1, "refcounts that are too low") {
        return;
    }
    // The fourth cluster is that of both snapshots still: by refcount and flag it is the disk's alone, and is written in place.
    let mut bytes = Bytes(bases::named("snapshots").bytes);
    let entry = bytes.get(bytes.l2() + 24);
    assert_eq!(entry & COPIED, 0);
    bytes.put(bytes.l2() + 24, entry | COPIED);
    let block = bytes.get(bytes.refcounts());
    let at = usize::try_from(block + (entry >> 12) * 2 + 1).unwrap();
    assert!(bytes.0[at] > 1);
    bytes.0[at] = 1;
    let image = Memory::from(bytes.0);
    let made = plan(&image, &RepairOptions::default()).unwrap();
    let found = ambiguous(&made);
    assert_eq!(found.len(), 1, "{made}");
    assert_eq!(found[0].kind, ActionKind::SetCopied);
    assert_eq!(found[0].place.guest, Some(ByteRange::new(0x3000, 0x1000)));
    assert_eq!(found[0].place.snapshot, Some(0));
}

#[test]
fn contradictory_subclusters_are_ambiguous_one_by_one() {
    if !oracle::is_available(3, "subclusters") {
        return;
    }
    let sound = bases::named("extended").bytes;
    let planned = |change: fn(&mut Bytes)| {
        let mut bytes = Bytes(sound.clone());
        change(&mut bytes);
        let image: &'static Memory = Box::leak(Box::new(Memory::from(bytes.0)));
        plan(image, &RepairOptions::default()).unwrap()
    };
    // The second and third have data and are zeros: which of it is right nobody knows.
    let made = planned(|b| b.put(b.l2() + 8, b.get(b.l2() + 8) | 0b110));
    let found = ambiguous(&made);
    assert_eq!(found.len(), 1, "{made}");
    assert_eq!(found[0].place.guest, Some(ByteRange::new(512, 1024)));

    // Zeros are zeros.
    let made = planned(|b| b.put(b.l2() + 24, b.get(b.l2() + 24) | 1 << 37 | 1 << 5));
    assert_eq!(ambiguous(&made), Vec::<&Action>::new(), "{made}");
    let mended: Vec<_> = made
        .actions()
        .iter()
        .filter(|action| action.kind == ActionKind::MendL2Entry)
        .collect();
    assert_eq!(mended.len(), 1, "{made}");
    assert_eq!(mended[0].effect, Effect::None);
    assert_eq!(
        mended[0].place.guest,
        Some(ByteRange::new(16384 + 5 * 512, 512))
    );

    // Without a cluster, just those are lost that are said to have data.
    let made = planned(|b| b.put(b.l2() + 16, 0));
    let lost: Vec<_> = made
        .actions()
        .iter()
        .filter(|action| action.effect == Effect::Lost)
        .collect();
    assert_eq!(lost.len(), 1, "{made}");
    assert_eq!(lost[0].place.guest, Some(ByteRange::new(16384, 1024)));

    // Compressed data that does not decode, with a bitmap that makes no sense either.
    let made = planned(|b| {
        let entry = b.get(b.l2() + 4 * 16);
        let start = usize::try_from(entry & 0x00ff_ffff_ffff).unwrap();
        b.0[start..start + 16].fill(0xff);
        b.put(b.l2() + 4 * 16 + 8, 1 << 32 | 1);
    });
    let found = ambiguous(&made);
    assert_eq!(found.len(), 1, "{made}");
    assert_eq!(found[0].place.guest, Some(ByteRange::new(65536, 16384)));
}
