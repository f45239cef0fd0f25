use std::path::Path;
use std::process::Command;

use qcow2_image::map::{MapEntry, map};
use qcow2_image::testing::{
    DataFile, Encryption, Layer, Program, RealEngine, Scale, Shape, run_beside_qemu, run_by_qemu,
};
use qcow2_image::{Image, References};
use qcow2_io::Storage;

use crate::rig::{Folder, is_available};

/// A row, as `qemu-img map` prints it.
fn row(entry: &MapEntry<'_>) -> String {
    let offset = entry
        .offset
        .map_or(String::new(), |at| format!(", \"offset\": {at}"));
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \
         \"compressed\": {}{offset}}}",
        entry.start,
        entry.len,
        entry.depth,
        entry.present,
        entry.zero,
        entry.data,
        entry.compressed
    )
}

fn rows(image: &Image) -> String {
    let len = image.len().unwrap();
    let rows: Vec<String> = map(image.chain(), 0..len)
        .unwrap()
        .map(|entry| row(&entry.unwrap()))
        .collect();
    format!("[{}]\n", rows.join(",\n"))
}

/// What QEMU says of an image of a folder.
fn by_qemu(folder: &Path, is_encrypted: bool) -> String {
    let mut command = Command::new("qemu-img");
    command.args(["map", "--output=json"]).current_dir(folder);
    if is_encrypted {
        let image = "driver=qcow2,file.filename=image.qcow2,encrypt.key-secret=s";
        command.args([
            "--object",
            "secret,id=s,data=open-sesame",
            "--image-opts",
            image,
        ]);
    } else {
        command.args(["-f", "qcow2", "image.qcow2"]);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "qemu-img map: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn ours(folder: &Path, is_encrypted: bool) -> String {
    let options = Image::options().read_only(true).references(References::All);
    #[cfg(feature = "encryption")]
    let options = if is_encrypted {
        options.secret(qcow2_io::cipher::Secret::new(b"open-sesame".to_vec()))
    } else {
        options
    };
    _ = is_encrypted;
    let image = options.open_path(folder.join("image.qcow2")).unwrap();
    rows(&image)
}

/// QEMU counts files in sectors.
fn has_whole_sectors(shape: &Shape) -> bool {
    shape.backing.iter().all(|layer| match layer {
        Layer::Raw { size, .. } => size % 512 == 0,
        Layer::Qcow2 { .. } => true,
    })
}

#[test]
fn rows_are_those_of_qemu_whatever_the_chain() {
    if !is_available("maps beside qemu-img map") {
        return;
    }
    let (mut chains, mut data_files, mut compressed, mut holes) = (0, 0, 0, 0);
    for seed in 7000..7040 {
        let folder = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        let program = Program::random(seed, Scale::Full, true);
        let shape = &program.shape;
        if !has_whole_sectors(shape) || shape.encryption == Encryption::Luks {
            continue;
        }
        let engine = RealEngine::default();
        let played = match seed % 3 {
            0 => run_by_qemu(&engine, &program, folder.path()),
            _ => run_beside_qemu(&engine, &program, folder.path()),
        };
        played
            .map_err(|failure| failure.during(format_args!("seed {seed}")))
            .unwrap();
        let is_encrypted = shape.encryption != Encryption::None;
        let expected = by_qemu(folder.path(), is_encrypted);
        let found = ours(folder.path(), is_encrypted);
        assert_eq!(found, expected, "seed {seed}: {shape:?}");
        chains += u32::from(expected.contains("\"depth\": 1"));
        data_files += u32::from(shape.data_file != DataFile::None);
        compressed += u32::from(expected.contains("\"compressed\": true"));
        holes += u32::from(expected.contains("\"zero\": true, \"data\": true"));
    }
    let seen = [chains, data_files, compressed, holes];
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
}

#[test]
fn holes_under_preallocated_clusters_are_zeros_that_are_not_read() {
    if !is_available("maps of preallocated images") {
        return;
    }
    for options in [
        "preallocation=metadata",
        "preallocation=metadata,extended_l2=on",
        "preallocation=metadata,cluster_size=4k",
    ] {
        let folder = Folder::new();
        folder.img(&format!("create -q -f qcow2 -o {options} image.qcow2 1G"));
        let before = by_qemu(&folder.path(""), false);
        assert_eq!(ours(&folder.path(""), false), before, "{options}");
        folder.io(
            &["write -q -P 5 77M 3M", "write -q -P 5 777M 65000"],
            "image.qcow2",
        );
        let after = by_qemu(&folder.path(""), false);
        assert_eq!(ours(&folder.path(""), false), after, "{options}");
        assert!(after.contains("\"zero\": true") && after.contains("\"zero\": false"));
        let image = Image::options()
            .read_only(true)
            .open_path(folder.path("image.qcow2"))
            .unwrap();
        let extents = image.extents(0..1 << 30, 100).unwrap();
        let data: u64 = extents
            .iter()
            .filter(|one| !one.kind.reads_as_zeros())
            .map(|one| one.len)
            .sum();
        assert!(data <= 4 << 20, "{options}: {data}");
    }
}

#[test]
fn a_part_of_the_map_is_the_part_of_the_whole() {
    let (_, chain) = crate::rig::sources(&crate::rig::content(3 << 20, 41)).swap_remove(2);
    // A storage that is no image is one row of data, or of what it tells.
    let layer = qcow2_image::chain::Chain::raw(&*chain);
    let whole: Vec<_> = map(layer.clone(), 0..3 << 20)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert!(whole.len() > 3);
    for window in [0..1, 5000..6000, 1 << 20..2 << 20, (3 << 20) - 7..4 << 20] {
        let part: Vec<_> = map(layer.clone(), window.clone())
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(part[0].start, window.start);
        assert_eq!(part.last().unwrap().end(), window.end.min(3 << 20));
        for entry in &part {
            let of = whole
                .iter()
                .find(|one| (one.start..one.end()).contains(&entry.start))
                .unwrap();
            assert_eq!((entry.data, entry.zero), (of.data, of.zero));
            assert_eq!(entry.offset, Some(entry.start));
        }
    }
}
