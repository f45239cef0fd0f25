//! Compaction, cut short: the content is always the same, and the image sound.

use qcow2_format::header::Version;
use qcow2_image::compact::{CompactMode, CompactOptions};
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::Random;
use qcow2_image::{Image, SnapshotKey};

use crate::rig::{Case, Deed, LEN};

fn deeds() -> Vec<Deed> {
    let new = || CreateOptions::new(LEN as u64);
    let mut deeds = Vec::new();
    for (name, recipe) in [
        ("small clusters", new().cluster_size(512)),
        ("wide refcounts", new().cluster_size(1024).refcount_bits(64)),
        ("extended", new().cluster_size(16384).extended_l2(true)),
        ("lazy", new().cluster_size(2048).lazy_refcounts(true)),
        ("old", new().cluster_size(4096).version(Version::V2)),
    ] {
        for mode in [CompactMode::Truncate, CompactMode::Sequential] {
            let act = move |image: &mut Image| {
                let options = CompactOptions::new().mode(mode).slice(40_000);
                image.compact(&options).map(drop)
            };
            deeds.push(Deed::new(format!("{name} {mode:?}"), recipe.clone(), act));
        }
    }
    deeds
}

/// Compacted after a snapshot is gone, so that there is something to do.
fn with_holes(deed: Deed) -> Case {
    Case::after_work(deed, |image| {
        image.delete_snapshot(&SnapshotKey::any("one")).unwrap();
    })
}

#[test]
fn a_crash_changes_no_content() {
    let mut random = Random::new(31);
    for deed in deeds() {
        let case = with_holes(deed);
        assert_eq!(case.before(), case.after(), "{}", case.deed.name);
        case.crash_everywhere(&mut random, 3);
    }
}

#[test]
fn a_fault_changes_no_content() {
    let mut met = 0;
    for deed in deeds() {
        met += with_holes(deed).fail_everywhere(3);
    }
    assert!(met > 300, "{met}");
}
