//! What is done to an image of each layout, and to a few by themselves.

use super::recipe::{Format, Recipe, Work};

type Fits = fn(&Format) -> bool;

/// Work for every layout that it fits.
const WORKS: &[(Fits, Work)] = &[
    (
        |_| true,
        Work {
            name: "empty",
            steps: &[],
        },
    ),
    (
        |_| true,
        Work {
            name: "data",
            steps: &[
                "io write -P 1 0 2c",
                "io write -P 2 5c 1h; write -P 3 far 2c; write -P 4 7c 3c",
                "io write -P 5 20c 1c; write -P 6 19c 1c; write -P 7 18c 1c; write -P 8 22c 1s",
            ],
        },
    ),
    (
        |_| true,
        Work {
            name: "zeros",
            steps: &[
                "io write -P 1 0 8c; write -z 0 2c; write -z -u 3c 1c; discard 5c 1c; write -z 6c 1h",
                "io write -z 12c 4c; write -z -u far 2c; write -P 2 1c 1s; discard 13c 1c",
            ],
        },
    ),
    (
        |f| !f.has("data_file") && !f.has("preallocation"),
        Work {
            name: "compressed",
            steps: &[
                "io write -c -P 1 0 1c; write -c -P 2 1c 1c; write -c -s noise 2c 1c; write -c -s noise 3c 1c",
                "io write -c -s noise 5c 1c; write -P 9 1c 1s; write -c -P 3 far 1c; write -P 4 8c 2c",
                "io discard 0 1c; write -c -s noise 20c 1c; write -z 3c 1c; write -c -P 5 21c 1c",
            ],
        },
    ),
    (
        |f| !f.has("data_file") && !f.has("refcount_bits=1"),
        Work {
            name: "snapshots",
            steps: &[
                "io write -P 1 0 4c; write -P 1 far 1c",
                "?io write -c -P 8 10c 1c",
                "img snapshot -c a @",
                "io write -P 2 1c 2c; write -z 3c 1c",
                "?io write -c -s noise 11c 1c",
                "img snapshot -c b @",
                "io write -P 3 2c 1c; discard 0 1c; write -P 3 30c 1s; write -P 4 10c 1s",
                "img snapshot -d a @",
                "img snapshot -c c @",
                // With two bits, a refcount may not do for another reference.
                "?img snapshot -a b @",
                "io write -P 4 0 1c; discard far 1c",
            ],
        },
    ),
    (
        |f| f.has("refcount_bits=1"),
        Work {
            name: "failed-snapshot",
            steps: &[
                "io write -P 1 0 4c",
                "?img snapshot -c a @",
                "io write -P 2 2c 4c",
            ],
        },
    ),
    (
        |f| !f.has("data_file") && !f.has("refcount_bits=1"),
        Work {
            name: "vm-state",
            steps: &[
                "io write -P 1 0 1c; write -b -P 5 0 3c",
                "img snapshot -c a @",
                "io write -b -P 6 1c 3c; write -P 2 0 2c",
            ],
        },
    ),
    (
        |f| !f.has("data_file_raw"),
        Work {
            name: "resize",
            steps: &[
                "io write -P 1 0 40c; write -P 2 far 1c",
                "img resize -q --shrink @ 33c",
                // Version 2 has no zero clusters to hide a longer backing file with.
                "?img resize -q @ 90c",
                "?io write -P 3 60c 20c",
            ],
        },
    ),
    (
        |f| f.version == 3,
        Work {
            name: "bitmaps",
            steps: &[
                "img bitmap --add @ b0",
                "img bitmap --add -g 2M @ b1",
                "io write -P 1 0 4c; write -P 1 far 1c",
                "img bitmap --disable @ b1",
                "img bitmap --add --disable @ a-longer-name-for-a-bitmap",
                "img bitmap --merge b0 @ a-longer-name-for-a-bitmap",
                "io write -P 2 9c 1h",
                "img bitmap --remove @ b1",
            ],
        },
    ),
    (
        |_| true,
        Work {
            name: "crash",
            steps: &[
                "io write -P 1 0 2c",
                "crash write -P 2 4c 4c; flush; write -P 3 far 1c; discard 0 1c; write -P 4 30c 1s",
            ],
        },
    ),
    (
        |f| f.version == 3,
        Work {
            name: "crash-with-bitmap",
            steps: &[
                "img bitmap --add @ b0",
                "io write -P 1 0 2c",
                "crash write -P 2 4c 4c; flush; write -z far 1c",
            ],
        },
    ),
    (
        |f| f.has("extended_l2"),
        Work {
            name: "subclusters",
            steps: &[
                "io write -P 1 3s 2s; write -z 8s 4s; write -z -u 34s 3s; write -P 2 70s 1s; discard 5s 20s",
                "io write -z 1c 1c; write -P 3 40s 1s; write -z 100s 64s; write -P 4 130s 32s; discard 4c 1c",
            ],
        },
    ),
];

/// Work on one layout each, where more than one program run or an unusual shape matters.
const SINGLE: &[(&str, u64, u64, Work)] = &[
    (
        "no-size",
        65536,
        0,
        Work {
            name: "empty",
            steps: &[],
        },
    ),
    (
        "one-sector",
        65536,
        512,
        Work {
            name: "data",
            steps: &["io write -P 1 0 512"],
        },
    ),
    (
        "largest",
        65536,
        2251799813685248,
        Work {
            name: "data",
            steps: &["io write -P 1 far 1c"],
        },
    ),
    (
        "downgraded",
        65536,
        16777216,
        Work {
            name: "bitmaps-left-behind",
            steps: &[
                "img bitmap --add @ b0",
                "io write -P 1 0 4c",
                "?img amend -o compat=0.10 @",
            ],
        },
    ),
    (
        "grown",
        512,
        67108864,
        Work {
            name: "refcount-table",
            steps: &[
                "img amend -o refcount_bits=64 @",
                "io write -P 1 0 4M",
                "io discard 1M 1M",
            ],
        },
    ),
    (
        "amended",
        4096,
        16777216,
        Work {
            name: "narrow-refcounts",
            steps: &[
                "io write -P 1 0 4M; write -z 5M 1M",
                "img amend -o refcount_bits=1 @",
            ],
        },
    ),
    (
        "upgraded",
        65536,
        16777216,
        Work {
            name: "and-back",
            steps: &[
                "io write -P 1 0 4M; write -z 0 1M",
                "img amend -o compat=v2 @",
                "img amend -o compat=v3,lazy_refcounts=on @",
                "crash write -P 2 8M 1M; flush",
                "?img check -q -r all @",
            ],
        },
    ),
    (
        "packed",
        65536,
        4194304,
        Work {
            name: "convert",
            steps: &["img convert -f raw -c -O qcow2 noise @"],
        },
    ),
    (
        "packed-small",
        4096,
        4194304,
        Work {
            name: "convert",
            steps: &["img convert -f raw -c -O qcow2 -o cluster_size=4k,refcount_bits=32 noise @"],
        },
    ),
    (
        "packed-zstd",
        65536,
        4194304,
        Work {
            name: "convert",
            steps: &["img convert -f raw -c -O qcow2 -o compression_type=zstd noise @"],
        },
    ),
    (
        "sixty-snapshots",
        4096,
        8388608,
        Work {
            name: "shared",
            steps: &[
                "io write -P 1 0 1M",
                "img snapshot -c 1 @",
                "img snapshot -c 2 @",
                "img snapshot -c 3 @",
                "img snapshot -c 4 @",
                "img snapshot -c 5 @",
                "io write -P 2 512k 16k",
                "img snapshot -c 6 @",
                "img resize -q @ 16M",
                "io write -P 3 12M 1M; write -b -P 9 0 1M",
                "img snapshot -c 7 @",
                "img snapshot -d 3 @",
                "img snapshot -a 2 @",
                "img snapshot -d 7 @",
            ],
        },
    ),
];

/// All images of the matrix.
pub(super) fn recipes() -> Vec<Recipe> {
    let mut recipes = Vec::new();
    for format in super::formats::all() {
        for (fits, work) in WORKS {
            if fits(&format) {
                recipes.push(Recipe {
                    format: format.clone(),
                    work: *work,
                });
            }
        }
    }
    for (name, cluster, size, work) in SINGLE {
        let format = super::formats::v3(name, *cluster, *size, "");
        recipes.push(Recipe {
            format,
            work: *work,
        });
    }
    recipes
}
