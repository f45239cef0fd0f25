//! Snapshots that version 2 may leave incomplete, and version 3 may not.

use std::sync::Arc;

use qcow2_check::{Options, Verdict, check};
use qcow2_format::header::Version;
use qcow2_image::create::CreateOptions;
use qcow2_image::{AmendOptions, Image, SnapshotKey, SnapshotOptions};
use qcow2_io::{Memory, Storage};

/// Takes the extra data out of the first entry of the snapshot table.
fn strip(file: &Memory) {
    let mut offset = [0; 8];
    file.read_at(&mut offset, 64).unwrap();
    let table = u64::from_be_bytes(offset);
    let mut entry = [0; 128];
    file.read_at(&mut entry, table).unwrap();
    let extra = entry[36..40].try_into().map(u32::from_be_bytes).unwrap() as usize;
    entry.copy_within(40 + extra.., 40);
    entry[36..40].fill(0);
    file.write_at(&entry, table).unwrap();
}

#[test]
fn an_upgrade_completes_the_snapshots() {
    let file = Arc::new(Memory::new());
    let options = CreateOptions::new(1 << 20).version(Version::V2);
    Image::create(&file, &options).unwrap();
    let image = Image::options().open(file.clone()).unwrap();
    image.write_at(&[1; 512], 0).unwrap();
    image
        .create_snapshot(&SnapshotOptions::new("first"))
        .unwrap();
    image.write_at(&[2; 512], 0).unwrap();
    image.close().unwrap();
    strip(&file);
    assert_eq!(check(&*file, &Options::default()).verdict(), Verdict::Sound);

    let mut image = Image::options().open(file.clone()).unwrap();
    let mut upgrade = AmendOptions::new();
    upgrade.set("compat", "1.1").unwrap();
    image.amend(&upgrade).unwrap();
    image.close().unwrap();
    let report = check(&*file, &Options::default());
    assert_eq!(report.verdict(), Verdict::Sound, "{:?}", report.findings);

    let image = Image::options()
        .read_only(true)
        .snapshot(SnapshotKey::any("first"))
        .open(file)
        .unwrap();
    let mut read = [0; 512];
    image.read_at(&mut read, 0).unwrap();
    assert_eq!(read, [1; 512]);
    assert_eq!(image.snapshots().unwrap()[0].disk_size, 1 << 20);
}
