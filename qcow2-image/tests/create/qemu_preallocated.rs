use std::fs;
use std::path::Path;

use crate::oracle::{DATA, IMAGE, Pair, Recipe, is_available, on_all_cores, qemu_img};

/// A part of the disk, as `qemu-img map --output=json` tells; except whether it reads as zero, for that depends on where the
/// file happens to have holes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    start: u64,
    len: u64,
    depth: u64,
    present: bool,
    data: bool,
    offset: Option<u64>,
}

fn map(dir: &Path) -> Vec<Part> {
    let args = ["map", "--output=json", "-f", "qcow2", IMAGE].map(str::to_owned);
    let text = qemu_img(dir, &args).unwrap();
    text.lines().filter_map(part).collect()
}

fn part(line: &str) -> Option<Part> {
    let field = |name: &str| {
        let (_, rest) = line.split_once(&format!("\"{name}\": "))?;
        Some(rest[..rest.find([',', '}']).unwrap()].trim())
    };
    let flag = |name| field(name) == Some("true");
    Some(Part {
        start: field("start")?.parse().unwrap(),
        len: field("length")?.parse().unwrap(),
        depth: field("depth")?.parse().unwrap(),
        present: flag("present"),
        data: flag("data"),
        offset: field("offset").map(|n| n.parse().unwrap()),
    })
}

/// Joins neighbours that differ in their place in the file only: QEMU lays data out in another order.
fn merged(parts: Vec<Part>) -> Vec<Part> {
    let mut merged: Vec<Part> = Vec::new();
    for mut part in parts {
        part.offset = part.offset.map(|_| 0);
        let same = |last: &Part| {
            Part {
                start: part.start,
                len: part.len,
                ..last.clone()
            } == part
        };
        match merged.last_mut() {
            Some(last) if same(last) => last.len += part.len,
            _ => merged.push(part),
        }
    }
    merged
}

const OPTIONS: [&str; 8] = [
    "",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4096,compat=0.10",
    "cluster_size=2M,refcount_bits=1",
    "cluster_size=16k,extended_l2=on",
    "extended_l2=on,backing_file=b.raw,backing_fmt=raw",
    "data_file=d.raw",
    "data_file=d.raw,data_file_raw=on,cluster_size=4096",
];

fn recipes(preallocation: &str) -> Vec<Recipe> {
    let mut recipes = Vec::new();
    for options in OPTIONS {
        for size in [0, 512, 1_000_000, (5 << 20) + 512] {
            recipes.push(Recipe::new(size, options).with("preallocation", preallocation));
        }
    }
    recipes
}

fn for_each_pair(what: &str, preallocation: &str, work: impl Fn(&Pair, &Recipe) + Sync) {
    let recipes = recipes(preallocation);
    if !is_available(recipes.len(), what) {
        return;
    }
    on_all_cores(&recipes, |recipe| {
        let pair = Pair::new();
        for dir in [pair.ours(), pair.theirs()] {
            fs::write(dir.join("b.raw"), vec![b'b'; 1 << 20]).unwrap();
        }
        assert!(pair.make_both(recipe), "{recipe:?}");
        pair.assert_sound(recipe);
        pair.assert_same_info(recipe);
        work(&pair, recipe);
    });
}

fn blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn clusters_are_mapped_as_qemu_maps_them() {
    for preallocation in ["metadata", "falloc", "full"] {
        for_each_pair("maps", preallocation, |pair, recipe| {
            let ours = map(&pair.ours());
            if recipe.value("data_file").is_some() && recipe.size != "0" {
                let same = ours.iter().all(|part| part.offset == Some(part.start));
                assert!(same, "{ours:?}");
            }
            let theirs = merged(map(&pair.theirs()));
            assert_eq!(merged(ours), theirs, "{recipe:?}");
        });
    }
}

#[test]
fn falloc_and_full_have_their_space() {
    for preallocation in ["falloc", "full"] {
        for_each_pair("filled images", preallocation, |pair, recipe| {
            let size: u64 = recipe.size.parse().unwrap();
            let name = recipe.value("data_file").map_or(IMAGE, |_| DATA);
            let taken = blocks(&pair.ours().join(name));
            assert!(taken >= size, "{recipe:?}: {taken} of {size}");
        });
    }
}

#[test]
fn the_guest_sees_what_it_sees_of_an_image_by_qemu() {
    for preallocation in ["metadata", "falloc", "full"] {
        for_each_pair("contents", preallocation, |pair, recipe| {
            let read = |dir: &Path| {
                let args = ["convert", "-f", "qcow2", "-O", "raw", IMAGE, "out.raw"];
                qemu_img(dir, &args.map(str::to_owned)).unwrap();
                fs::read(dir.join("out.raw")).unwrap()
            };
            let ours = read(&pair.ours());
            assert_eq!(ours, read(&pair.theirs()), "{recipe:?}");
            let overlay = recipe.value("backing_file").is_some();
            assert_eq!(ours.contains(&b'b'), overlay && !ours.is_empty());
        });
    }
}
