use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::oracle::{DATA, IMAGE, Pair, Recipe, is_available, on_all_cores};

/// Options beside size and cluster size. None shares a value with all others, so that each is seen to matter.
const VARIANTS: [&str; 18] = [
    "",
    "compat=0.10",
    "refcount_bits=1",
    "refcount_bits=2",
    "refcount_bits=4,lazy_refcounts=on",
    "refcount_bits=8,compression_type=zstd",
    "refcount_bits=32",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "compression_type=zstd",
    "extended_l2=on",
    "extended_l2=on,refcount_bits=64,lazy_refcounts=on,compression_type=zstd",
    "backing_file=base.raw,backing_fmt=raw",
    "compat=0.10,backing_file=../x/base,backing_fmt=qcow2",
    "backing_file=b,backing_fmt=vmdk,extended_l2=on,lazy_refcounts=yes",
    "data_file=d.raw",
    "data_file=d.raw,backing_file=json:{},backing_fmt=raw",
    "data_file=d.raw,extended_l2=on,compression_type=zstd",
];

/// Clusters of the file, as far as they are in use; all have a refcount of 1.
fn clusters(pair: &Pair, cluster_size: u64) -> u64 {
    let len = fs::metadata(pair.ours().join(IMAGE)).unwrap().len();
    len.div_ceil(cluster_size)
}

/// Asserts what there is to say of an image made twice. Says whether it was compared byte for byte.
fn compare(pair: &Pair, recipe: &Recipe) -> bool {
    pair.assert_sound_here(recipe);
    let number = |key, default| recipe.value(key).map_or(default, |n| n.parse().unwrap());
    let cluster_size = number("cluster_size", 65536);
    let per_block = cluster_size * 8 / number("refcount_bits", 16);
    if clusters(pair, cluster_size) > per_block {
        pair.assert_same_info(recipe);
        pair.assert_sound(recipe);
        return false;
    }
    for name in [IMAGE, DATA] {
        if recipe.value("data_file").is_none() && name == DATA {
            continue;
        }
        let (ours, theirs) = (pair.ours().join(name), pair.theirs().join(name));
        let (ours, theirs) = (fs::read(ours).unwrap(), fs::read(theirs).unwrap());
        if name == DATA && recipe.value("preallocation").is_some() {
            // QEMU fills up the last cluster; here the file is as long as the disk.
            assert!(ours.len() <= theirs.len() && ours.iter().all(|byte| *byte == 0));
            continue;
        }
        if recipe.value("preallocation").is_some() && recipe.value("extended_l2").is_some() {
            // QEMU ends the file with the last subcluster, here the last cluster is whole.
            assert!(ours.len() >= theirs.len(), "{recipe:?}");
            assert!(ours[theirs.len()..].iter().all(|byte| *byte == 0));
        } else {
            assert_eq!(ours.len(), theirs.len(), "{recipe:?} {name}");
        }
        let (ours, theirs) = (&ours[..theirs.len()], &theirs[..]);
        if ours != theirs {
            let at = ours.iter().zip(theirs).position(|(a, b)| a != b).unwrap();
            panic!("{recipe:?} {name} differs at {at:#x}");
        }
    }
    true
}

fn run(recipes: &[Recipe]) -> (usize, usize) {
    let (equal, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    on_all_cores(recipes, |recipe| {
        let pair = Pair::new();
        if !pair.make_both(recipe) {
            refused.fetch_add(1, Ordering::Relaxed);
        } else if compare(&pair, recipe) {
            equal.fetch_add(1, Ordering::Relaxed);
        }
    });
    (equal.into_inner(), refused.into_inner())
}

#[test]
fn an_image_has_the_bytes_that_qemu_writes() {
    let mut recipes = Vec::new();
    for bits in 9..=21 {
        for options in VARIANTS {
            for size in ["0", "1M", "1T"] {
                // A data file of a terabyte has holes only, but is read as a whole.
                if options.contains("data_file") && size == "1T" {
                    continue;
                }
                recipes.push(Recipe::new(size, options).with("cluster_size", 1_u64 << bits));
            }
        }
    }
    if !is_available(recipes.len(), "new images") {
        return;
    }
    let (equal, refused) = run(&recipes);
    // Extended entries with five cluster sizes (three variants in three sizes, one in two), and a terabyte with two.
    assert_eq!(refused, 5 * (3 * 3 + 2) + 2 * 12);
    // A terabyte takes several refcount blocks with small clusters; all else is compared byte for byte.
    assert!(
        equal > recipes.len() * 3 / 4,
        "{equal} of {}",
        recipes.len()
    );
}

#[test]
fn the_largest_disk_is_the_one_qemu_allows() {
    let mut recipes = Vec::new();
    for bits in [9, 12, 16, 21] {
        for options in ["", "refcount_bits=64", "extended_l2=on"] {
            let extended = options == "extended_l2=on";
            if extended && bits < 14 {
                continue;
            }
            // QEMU is minutes about the many refcount blocks of this one.
            if options == "refcount_bits=64" && bits == 9 {
                continue;
            }
            let largest = 1_u64 << (2 * bits + 19 - u32::from(extended));
            for size in [largest, largest + 1] {
                recipes.push(Recipe::new(size, options).with("cluster_size", 1_u64 << bits));
            }
        }
    }
    if !is_available(recipes.len(), "largest images") {
        return;
    }
    let (_, refused) = run(&recipes);
    assert_eq!(refused, recipes.len() / 2);
}

#[test]
fn preallocated_metadata_has_the_bytes_that_qemu_writes() {
    let mut recipes = Vec::new();
    for (cluster_size, sizes) in [
        (512, ["512", "100k"]),
        (4096, ["1M", "7M"]),
        (16384, ["1000000", "70M"]),
        (65536, ["1M", "600M"]),
        (2 << 20, ["1", "5M"]),
    ] {
        for size in sizes {
            for options in [
                "",
                "compat=0.10",
                "refcount_bits=1",
                "data_file=d.raw",
                "data_file=d.raw,data_file_raw=on",
                "extended_l2=on",
                "extended_l2=on,backing_file=b,backing_fmt=raw",
            ] {
                if options.starts_with("extended") && cluster_size < 16384 {
                    continue;
                }
                // This one is read as a whole: once is enough.
                if size == "600M" && !options.is_empty() {
                    continue;
                }
                let recipe = Recipe::new(size, options).with("cluster_size", cluster_size);
                recipes.push(recipe.with("preallocation", "metadata"));
            }
        }
    }
    if !is_available(recipes.len(), "preallocated images") {
        return;
    }
    let (equal, refused) = run(&recipes);
    assert_eq!((equal, refused), (recipes.len(), 0));
}
