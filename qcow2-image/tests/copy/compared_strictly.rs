use std::process::Command;
use std::sync::Arc;

use qcow2_image::chain::{BackingFile, Chain};
use qcow2_image::compare::{CompareOptions, Difference, compare_chains};
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, References};
use qcow2_io::{File, Memory, Storage};

use crate::rig::{Folder, create, is_available, memory, options};

/// Bytes of the disks; all but the last cluster is in one state.
const LEN: u64 = 1 << 20;
const STATE: u64 = LEN - (64 << 10);

/// A disk that QEMU made, opened here.
enum Disk {
    Image(Box<Image>),
    Raw(File),
}

impl Disk {
    fn open(folder: &Folder, name: &str) -> Self {
        let path = folder.path(name);
        if name.starts_with("raw-") {
            return Self::Raw(File::open(path).unwrap());
        }
        let options = options().references(References::SameDirectory);
        #[cfg(feature = "encryption")]
        let options = if name == "encrypted" || name == "encrypted-zeros" {
            options.secret(crate::rig::secret())
        } else {
            options
        };
        Self::Image(Box::new(options.read_only(true).open_path(path).unwrap()))
    }

    fn chain(&self) -> Chain<'_> {
        match self {
            Self::Image(image) => image.chain(),
            Self::Raw(file) => Chain::file(file),
        }
    }
}

/// What `qemu-img compare -s` finds: where it begins to differ, and whether it is in content.
fn theirs(folder: &Folder, one: &str, two: &str) -> Option<Difference> {
    let named = |name: &str| match name {
        name if name.starts_with("raw-") => format!("driver=raw,file.filename={name}"),
        "encrypted" | "encrypted-zeros" => {
            format!("driver=qcow2,encrypt.key-secret=s,file.filename={name}")
        }
        name => format!("driver=qcow2,file.filename={name}"),
    };
    let output = Command::new("qemu-img")
        .args(["compare", "-s", "--object", "secret,id=s,file=secret"])
        .args(["--image-opts", &named(one), &named(two)])
        .current_dir(folder.path("."))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.code() == Some(0) {
        return None;
    }
    assert_eq!(output.status.code(), Some(1), "{one}, {two}: {output:?}");
    let mut numbers = said
        .split(|char: char| !char.is_ascii_digit())
        .filter_map(|word| word.parse().ok());
    let offset = numbers.next().unwrap();
    Some(if said.contains("block status") {
        Difference::Allocation { offset }
    } else {
        Difference::Content { offset }
    })
}

/// Makes disks whose first part is in all states that there are, and reads as zeros.
fn make(folder: &Folder) -> Vec<&'static str> {
    let mut names = vec!["raw-hole", "raw-data"];
    for name in ["raw-hole", "raw-data"] {
        let file = crate::rig::new_file(folder, name);
        file.set_len(LEN).unwrap();
        if name == "raw-data" {
            file.write_at(&vec![0; usize::try_from(STATE).unwrap()], 0)
                .unwrap();
        }
        file.write_at(&vec![5; 64 << 10], STATE).unwrap();
    }
    let state = format!("{STATE}");
    let write_zeros = format!("write -q -P 0 0 {state}");
    let note_zeros = format!("write -q -z 0 {state}");
    let note_no_place = format!("write -q -z -u 0 {state}");
    let mut image = |name: &'static str, how: &str, commands: &[&str]| {
        folder.img(&format!("create -q -f qcow2 {how} {name} {LEN}"));
        if !name.starts_with("encrypted") {
            let tail = format!("write -q -P 5 {STATE} 64k");
            // The tail first, so that it does not go on where the state ends.
            let mut all = vec![tail.as_str()];
            all.extend_from_slice(commands);
            folder.io(&all, name);
        }
        names.push(name);
    };
    image("none", "", &[]);
    image("zeros", "", &[&note_no_place]);
    image("kept-zeros", "", &[&write_zeros, &note_zeros]);
    image("data", "", &[&write_zeros]);
    image("small", "-o cluster_size=2k", &["write -q -P 0 0 2k"]);
    image("part", "-o extended_l2=on", &["write -q -P 0 0 2k"]);
    image("part-zeros", "-o extended_l2=on", &["write -q -z -u 0 2k"]);
    image("reserved", "-o preallocation=metadata", &[]);
    let packed: Vec<String> = (0..15)
        .map(|number| format!("write -q -c -P 0 {}k 64k", number * 64))
        .collect();
    let packed: Vec<&str> = packed.iter().map(String::as_str).collect();
    image("packed", "", &packed);
    image("over-none", "-F qcow2 -b none", &[]);
    image("over-zeros", "-F qcow2 -b zeros", &[]);
    image("over-kept-zeros", "-F qcow2 -b kept-zeros", &[]);
    image("over-data", "-F qcow2 -b data", &[]);
    image("over-packed", "-F qcow2 -b packed", &[]);
    image("over-reserved", "-F qcow2 -b reserved", &[]);
    image("over-hole", "-F raw -b raw-hole", &[]);
    folder.img("create -q -f raw raw-short 64k");
    image(
        "over-short",
        "-F raw -b raw-short",
        &["write -q -z -u 0 64k"],
    );
    #[cfg(feature = "encryption")]
    {
        let how = "-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
        image("encrypted", how, &[]);
        image("encrypted-zeros", how, &[]);
        for name in ["encrypted", "encrypted-zeros"] {
            let image = options().secret(crate::rig::secret());
            let image = image.open_path(folder.path(name)).unwrap();
            image.write_at(&vec![5; 64 << 10], STATE).unwrap();
            image
                .write_at(&vec![0; usize::try_from(STATE).unwrap()], 0)
                .unwrap();
            if name == "encrypted-zeros" {
                image
                    .write_zeroes(0..STATE, qcow2_io::ZeroFlags::NONE)
                    .unwrap();
            }
            image.close().unwrap();
        }
    }
    names
}

#[test]
fn qemu_tells_the_same_states_apart() {
    if !is_available("states that qemu-img compare -s tells apart") {
        return;
    }
    let folder = Folder::new();
    let names = make(&folder);
    let strict = CompareOptions::new().strict(true);
    let (mut same, mut different) = (0, 0);
    for (number, one) in names.iter().enumerate() {
        for two in names.iter().skip(number) {
            let disks = [one, two].map(|name| Disk::open(&folder, name));
            let ours = compare_chains(&disks[0].chain(), &disks[1].chain(), &strict).unwrap();
            let theirs = theirs(&folder, one, two);
            let ours = ours.difference;
            if *one == "raw-data" {
                // To QEMU a stretch up to the end of the disk is another thing than one that ends before, and all of this disk is one
                // such.
                assert!(theirs.is_some() || ours.is_none(), "{one} and {two}");
                continue;
            }
            assert_eq!(ours, theirs, "{one} and {two}");
            if theirs.is_none() {
                same += u32::from(one != two);
            } else {
                different += 1;
            }
            // The guest sees no difference.
            let loose = compare_chains(
                &disks[0].chain(),
                &disks[1].chain(),
                &CompareOptions::new().threads(2),
            );
            assert_eq!(loose.unwrap().difference, None, "{one} and {two}");
        }
    }
    assert!(same >= 8 && different > 80, "{same} {different}");
}

#[test]
fn what_both_share_is_not_read() {
    let bytes = vec![3; 4 << 20];
    let len = bytes.len() as u64;
    let raw = BackingFile::raw("base", Arc::new(Memory::from(bytes.clone())));
    let image = create(&CreateOptions::new(len));
    let image = options().open(image).unwrap();
    image.write_at(&bytes, 0).unwrap();
    let image = BackingFile::image("base", Arc::new(image));
    for base in [raw, image] {
        let overlay = |at: u64, byte: u8| {
            let options = CreateOptions::new(len).backing_file("base", "raw");
            let file = create(&options);
            let image = Image::options().backing_file(&base).open(file).unwrap();
            image.write_at(&vec![byte; 65536], at).unwrap();
            image
        };
        let (one, two) = (overlay(0, 3), overlay(3 << 20, 3));
        for strict in [false, true] {
            let options = CompareOptions::new().strict(strict);
            let found = compare_chains(&one.chain(), &two.chain(), &options).unwrap();
            // Where one of them has something of its own, both are read.
            assert_eq!((found.difference, found.read_bytes), (None, 4 * 65536));
        }
        let other = overlay(2 << 20, 4);
        let found = compare_chains(&one.chain(), &other.chain(), &CompareOptions::new()).unwrap();
        let offset = 2 << 20;
        assert_eq!(found.difference, Some(Difference::Content { offset }));
        // Nothing of a disk differs from itself.
        let found = compare_chains(&one.chain(), &one.chain(), &CompareOptions::new()).unwrap();
        assert_eq!((found.difference, found.read_bytes), (None, 0));
    }
}

#[test]
fn the_first_difference_counts_whoever_finds_one() {
    let bytes = vec![1; 8 << 20];
    let first = memory(&bytes);
    for offset in [0, 12_345, (4 << 20) + 1, (8 << 20) - 1] {
        let second = Memory::from(bytes.clone());
        for at in (offset..bytes.len() as u64).step_by(100_003) {
            second.write_at(&[2], at).unwrap();
        }
        let options = CompareOptions::new().threads(4).chunk(4096);
        let found = compare_chains(&Chain::raw(&first), &Chain::raw(&second), &options).unwrap();
        assert_eq!(found.difference, Some(Difference::Content { offset }));
    }
}
