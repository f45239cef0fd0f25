//! What lies in the folder when `qemu-img` is done, where the other tool is not needed to tell.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use tempfile::tempdir;

use super::beside::{Ours, run};

fn img(folder: &Path, line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let output = run(&Ours::new().program("qemu-img"), &words, folder);
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_first_block_of_a_raw_copy_is_there_and_the_rest_is_not() {
    let folder = tempdir().unwrap();
    img(folder.path(), "create -q -f qcow2 a.qcow2 1M");
    img(folder.path(), "convert -O raw a.qcow2 r.raw");
    let found = fs::metadata(folder.path().join("r.raw")).unwrap();
    assert_eq!(found.len(), 1 << 20);
    assert!((1..=32).contains(&found.blocks()), "{}", found.blocks());
    img(folder.path(), "convert -O raw -S 0 a.qcow2 full.raw");
    let found = fs::metadata(folder.path().join("full.raw")).unwrap();
    assert!(found.blocks() >= 2048, "{}", found.blocks());
}

#[test]
fn a_data_file_is_named_in_the_image_without_its_protocol() {
    let folder = tempdir().unwrap();
    let create = "create -q -f qcow2 -o data_file=file:d:ext file:a:qcow2 1M";
    img(folder.path(), create);
    assert!(folder.path().join("d:ext").exists());
    let info = img(folder.path(), "info file:a:qcow2");
    assert!(info.contains("    data file: ./d:ext\n"), "{info}");
}
