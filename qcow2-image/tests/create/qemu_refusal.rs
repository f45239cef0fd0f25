use std::sync::atomic::{AtomicUsize, Ordering};

use crate::oracle::{Pair, Recipe, is_available, on_all_cores};

/// Values of single options, as people type them.
const VALUES: [(&str, &[&str]); 7] = [
    (
        "size",
        &[
            "1",
            "511",
            "513",
            "1000b",
            "1.5k",
            "0.3k",
            "0.1",
            "1.1",
            "0x200",
            "0x1k",
            "1e3",
            "1E",
            "1e",
            "8E",
            "16E",
            "0.0000001G",
            "1P",
            "1t",
            "1 k",
            "",
            "1kk",
            "1ki",
            "inf",
            "nan",
            "18446744073709551616",
            "1.k",
            ".5k",
            ".",
            ".k",
            "0.",
            "1e3k",
            "-0",
            "-1",
            "+1k",
            "00010",
            "0.9999999999999999999k",
            "0x",
            "0xb",
            "1.0",
            "1.000b",
            "k",
            "+ 1",
            " 1",
            "1 ",
            "1.5.5k",
            "0X10",
            "1.2_",
            "1,5k",
            "\t7k",
            "1b",
            "b",
            "64kB",
        ],
    ),
    (
        "cluster_size",
        &[
            "0",
            "256",
            "512",
            "513",
            "64k",
            "64K",
            "64kb",
            "0x10000",
            "0.5M",
            "1.5k",
            "2M",
            "4M",
            "2048k",
            "2097152",
            "65536b",
            "",
            "k",
            "-1",
            "1e3",
            "064k",
            ".5M",
            "1.M",
            "+64k",
            " 64k",
            "4294967296",
            "18446744073709551615",
        ],
    ),
    (
        "refcount_bits",
        &[
            "0",
            "1",
            "2",
            "3",
            "4",
            "8",
            "16",
            "32",
            "64",
            "128",
            "0x10",
            "010",
            "020",
            "08",
            "+8",
            " 8",
            "8 ",
            "-8",
            "",
            "1.0",
            "1k",
            "18446744073709551632",
            "0x",
            "65",
            "4294967312",
        ],
    ),
    (
        "lazy_refcounts",
        &[
            "on", "off", "yes", "no", "true", "false", "y", "n", "1", "0", "", "On", "t",
        ],
    ),
    (
        "preallocation",
        &["off", "metadata", "falloc", "full", "OFF", "meta", "", "on"],
    ),
    (
        "compat",
        &["0.10", "1.1", "v2", "v3", "V3", "2", "3", "1.10", "", "0.1"],
    ),
    (
        "compression_type",
        &["zlib", "zstd", "ZLIB", "lz4", "", "deflate"],
    ),
];

/// Makes each image in both ways; says how many were refused.
fn refused(recipes: &[Recipe]) -> usize {
    let refused = AtomicUsize::new(0);
    on_all_cores(recipes, |recipe| {
        let pair = Pair::new();
        if pair.make_both(recipe) {
            pair.assert_sound_here(recipe);
            pair.assert_same_info(recipe);
        } else {
            refused.fetch_add(1, Ordering::Relaxed);
        }
    });
    refused.into_inner()
}

#[test]
fn values_are_read_as_qemu_reads_them() {
    let mut recipes = Vec::new();
    for (key, values) in VALUES {
        for value in values {
            recipes.push(match key {
                "size" => Recipe::new(value, "cluster_size=2M"),
                _ => Recipe::new("1M", "").with(key, value),
            });
        }
    }
    if !is_available(recipes.len(), "values of options") {
        return;
    }
    let refused = refused(&recipes);
    assert!(refused > 40 && refused < recipes.len() - 40, "{refused}");
}

#[test]
fn options_go_together_as_qemu_has_it() {
    let choices: [(&str, &[&str]); 10] = [
        ("compat", &["0.10", "1.1"]),
        ("cluster_size", &["512", "8k", "16k", "64k", "2M"]),
        ("refcount_bits", &["1", "16", "64"]),
        ("lazy_refcounts", &["on", "off"]),
        ("extended_l2", &["on", "off"]),
        ("compression_type", &["zlib", "zstd"]),
        ("preallocation", &["off", "metadata", "falloc", "full"]),
        ("backing_file", &["base"]),
        ("data_file", &["d.raw"]),
        ("data_file_raw", &["on", "off"]),
    ];
    let mut seed = 0x5eed_u64;
    let mut random = move |n: usize| {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        usize::try_from(seed >> 33).unwrap() % n
    };
    let mut recipes = Vec::new();
    for _ in 0..300 {
        let size = ["0", "513", "1M", "3000k"][random(4)];
        let mut recipe = Recipe::new(size, "");
        for (key, values) in choices {
            // Each option stands in a third of them, so that many combinations are possible ones.
            if random(3) > 0 {
                continue;
            }
            recipe = recipe.with(key, values[random(values.len())]);
            if key == "backing_file" && random(8) > 0 {
                recipe = recipe.with("backing_fmt", "raw");
            }
        }
        recipes.push(recipe);
    }
    if !is_available(recipes.len(), "combinations of options") {
        return;
    }
    let refused = refused(&recipes);
    assert!(refused > 60 && refused < 240, "{refused}");
}

#[test]
fn names_may_be_as_long_as_qemu_lets_them() {
    let long = |len| "n".repeat(len);
    let mut recipes = Vec::new();
    for (options, lengths) in [
        ("cluster_size=512,backing_fmt=raw", [0, 375, 376, 377, 384]),
        (
            "cluster_size=512,compat=0.10,backing_fmt=raw",
            [1, 415, 416, 417, 424],
        ),
        (
            "cluster_size=512,data_file=d.raw,backing_fmt=raw",
            [1, 359, 360, 361, 370],
        ),
        ("cluster_size=1k,backing_fmt=raw", [1, 887, 888, 889, 1023]),
        ("backing_fmt=raw", [1, 1022, 1023, 1024, 2000]),
    ] {
        for len in lengths {
            recipes.push(Recipe::new("1M", options).with("backing_file", &*long(len)));
        }
    }
    if !is_available(recipes.len(), "lengths of names") {
        return;
    }
    // Too long are two of each, except where 0 is too short.
    assert_eq!(refused(&recipes), 2 * 5 + 1);
}
