use qcow2_image::copy::{CopyOptions, copy, copy_bitmaps};
use qcow2_image::create::CreateOptions;
use qcow2_image::{BitmapOptions, BitmapState, ImageError};
use qcow2_io::Storage;

use crate::rig::{
    Folder, assert_sound, content, create, fill, is_available, new_file, open, options,
};

const LEN: u64 = 8 << 20;

#[test]
fn bitmaps_go_along_with_the_disk() {
    let source = open(&create(&CreateOptions::new(LEN)));
    fill(&source, &content(1 << 20, 81));
    for (name, granularity, enabled) in [("first", 4096, true), ("second", 65536, false)] {
        let options = BitmapOptions::new().granularity(granularity).enabled(true);
        source.create_bitmap(name.as_bytes(), &options).unwrap();
        source
            .write_at(&[1; 5000], 2 * granularity + (1 << 20))
            .unwrap();
        if !enabled {
            source.disable_bitmap(name.as_bytes()).unwrap();
        }
    }
    let file = create(&CreateOptions::new(LEN).cluster_size(4096));
    let target = open(&file);
    copy(&source, &target, &CopyOptions::new()).unwrap();
    let done = copy_bitmaps(&source, &target, false).unwrap();
    assert_eq!(done.copied, [b"first".to_vec(), b"second".to_vec()]);
    let [ours, theirs] = [&target, &source].map(|image| image.bitmaps().unwrap());
    assert_eq!(ours, theirs);
    for name in ["first", "second"] {
        let [ours, theirs] = [&target, &source].map(|image| {
            let ranges = image.dirty_ranges(name.as_bytes(), 0..LEN);
            ranges.map(Result::unwrap).collect::<Vec<_>>()
        });
        assert_eq!(ours, theirs);
        assert!(!ours.is_empty());
    }
    // They are there already.
    copy_bitmaps(&source, &target, false).unwrap_err();
    target.close().unwrap();
    assert_sound(&file, "the copy");
}

#[test]
fn bitmaps_of_qemu_go_along_and_broken_ones_if_told_do_not() {
    if !is_available("bitmaps of QEMU that are carried along") {
        return;
    }
    let folder = Folder::new();
    folder.img("create -q -f qcow2 image 8M");
    folder.img("bitmap --add -g 32768 image good");
    folder.io(&["write -q -P 5 1M 100k"], "image");
    folder.img("bitmap --add image bad");
    // What was not closed leaves its bitmaps in use.
    folder.io_killed(&["write -q -P 6 3M 1M", "flush"], "image");
    let source = options()
        .read_only(true)
        .open_path(folder.path("image"))
        .unwrap();
    let states: Vec<_> = source
        .bitmaps()
        .unwrap()
        .into_iter()
        .map(|one| one.state)
        .collect();
    assert_eq!(
        states,
        [BitmapState::Inconsistent, BitmapState::Inconsistent]
    );
    let target = new_file(&folder, "target");
    qcow2_image::Image::create(&target, &CreateOptions::new(8 << 20)).unwrap();
    let target = options().open_file(target).unwrap();
    let error = copy_bitmaps(&source, &target, false).unwrap_err();
    assert!(
        matches!(error, ImageError::BitmapUnusable { .. }),
        "{error}"
    );
    let done = copy_bitmaps(&source, &target, true).unwrap();
    assert_eq!((done.copied.len(), done.skipped.len()), (0, 2));
    drop(source);
    folder.img("bitmap --remove image bad");
    folder.img("bitmap --remove image good");
    folder.img("bitmap --add -g 32768 image good");
    folder.io(&["write -q -P 5 1M 100k"], "image");
    let source = options()
        .read_only(true)
        .open_path(folder.path("image"))
        .unwrap();
    copy(&source, &target, &CopyOptions::new()).unwrap();
    let done = copy_bitmaps(&source, &target, false).unwrap();
    assert_eq!(done.copied, [b"good".to_vec()]);
    let dirty = source.bitmaps().unwrap()[0].dirty_bytes;
    assert!(dirty.is_some_and(|bytes| bytes >= 100 << 10));
    drop(source);
    target.close().unwrap();
    folder.img("check -q target");
    let said = folder.img("info --output=json target");
    assert!(
        said.contains("\"good\"") && said.contains("\"granularity\": 32768"),
        "{said}"
    );
}
