//! Trees that take more than one window of clusters.

use std::sync::Arc;

use qcow2_check::{Options, check};
use qcow2_io::{Memory, Storage as _};

use super::counts::WINDOW;
use crate::create::CreateOptions;
use crate::{Image, ResizeOptions, SnapshotKey, SnapshotOptions};

const LEN: u64 = 1 << 20;

fn assert_sound(memory: &Arc<Memory>) {
    let report = check(&**memory, &Options::default());
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

#[test]
fn what_is_counted_in_several_windows_is_counted_whole() {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, &CreateOptions::new(LEN).cluster_size(512)).unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    let bytes = |value: u8| vec![value; usize::try_from(LEN).unwrap()];
    image.write_at(&bytes(1), 0).unwrap();
    assert!(memory.len().unwrap() > 3 * WINDOW * 512);
    image.create_snapshot(&SnapshotOptions::new("one")).unwrap();
    image.write_at(&bytes(2), 0).unwrap();
    // What was released is free when all is told.
    image.close().unwrap();
    let image = Image::options().open(memory.clone()).unwrap();
    assert_sound(&memory);
    image.apply_snapshot(&SnapshotKey::any("one")).unwrap();
    assert_sound(&memory);
    image.write_at(&bytes(3), 0).unwrap();
    // Nothing else has its tables now.
    image.delete_snapshot(&SnapshotKey::any("one")).unwrap();
    assert_sound(&memory);
    let mut found = bytes(0);
    image.read_at(&mut found, 0).unwrap();
    assert!(found == bytes(3));
    let shrink = ResizeOptions {
        shrink: true,
        ..ResizeOptions::default()
    };
    image.resize(70_144, shrink).unwrap();
    assert_sound(&memory);
    let mut found = vec![0; 70_144];
    image.read_at(&mut found, 0).unwrap();
    assert!(found.iter().all(|byte| *byte == 3));
    image.close().unwrap();
}
