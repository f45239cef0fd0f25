//! The small sound images that are damaged.

use crate::oracle::{Access, Workshop, secret_args, target, words};

/// Name of the image in its workshop.
pub(crate) const IMAGE: &str = "image.qcow2";

/// An image before it is damaged.
#[derive(Debug)]
pub(crate) struct Base {
    pub(crate) name: &'static str,
    pub(crate) access: Access,
    pub(crate) bytes: Vec<u8>,
    /// Files that the image names, with their content.
    pub(crate) others: Vec<(&'static str, Vec<u8>)>,
}

struct Plan {
    name: &'static str,
    options: &'static str,
    size: &'static str,
    /// As `qemu-io` commands, separated by semicolons, or `qemu-img` arguments behind `img`.
    steps: &'static [&'static str],
}

/// Guest data of every kind that a standard image of 64 KiB clusters has.
const KINDS_64K: &str = "write -P 1 0 256k; write -z 64k 64k; write -z -u 192k 64k; write -c -P 2 320k 64k; write -c -P 3 384k 64k";

const PLANS: &[Plan] = &[
    Plan {
        name: "64k",
        options: "",
        size: "4M",
        steps: &[KINDS_64K, "write -P 4 3M 64k"],
    },
    Plan {
        name: "4k",
        options: "cluster_size=4k",
        size: "6M",
        steps: &[
            "write -P 1 0 16k; write -z 4k 4k; write -z -u 12k 4k; write -c -P 2 20k 4k; write -P 3 5M 8k",
        ],
    },
    Plan {
        name: "512",
        options: "cluster_size=512",
        size: "200k",
        steps: &[
            "write -P 1 0 2k; write -z 512 512; write -z -u 1k 512; write -c -P 2 40k 512; write -P 3 100k 4k",
        ],
    },
    Plan {
        name: "v2",
        options: "compat=v2",
        size: "4M",
        steps: &["write -P 1 0 192k; write -c -P 2 320k 64k"],
    },
    Plan {
        name: "extended",
        options: "cluster_size=16k,extended_l2=on",
        size: "12M",
        steps: &[
            "write -P 1 0 17k; write -z 512 1k; write -z 32k 16k; write -c -P 2 64k 16k; write -P 3 9M 512; write -z 9M 16k",
        ],
    },
    Plan {
        name: "compressed",
        options: "cluster_size=4k,compression_type=zstd",
        size: "1M",
        steps: &[
            "write -c -s noise 0 4k; write -c -s noise 4k 4k; write -c -s noise 8k 4k; write -c -P 1 12k 4k",
        ],
    },
    Plan {
        name: "snapshots",
        options: "cluster_size=4k",
        size: "4M",
        steps: &[
            "write -P 1 0 16k; write -P 1 3M 4k",
            "img snapshot -c one @",
            "write -P 2 4k 4k; write -b -P 9 0 4k",
            "img snapshot -c two @",
            "write -P 3 8k 4k; write -z 0 4k",
        ],
    },
    Plan {
        name: "bitmaps",
        options: "",
        size: "4M",
        steps: &[
            "img bitmap --add @ b0",
            "img bitmap --add -g 512 @ second",
            "write -P 1 0 128k",
            "img bitmap --disable @ b0",
        ],
    },
    Plan {
        name: "bitmaps-512",
        options: "cluster_size=512",
        size: "4M",
        steps: &[
            "img bitmap --add -g 512 @ b0",
            "write -P 1 0 1k; write -P 1 3M 1k",
        ],
    },
    Plan {
        name: "luks",
        options: "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10",
        size: "1M",
        steps: &["write -P 1 0 64k"],
    },
    Plan {
        name: "aes",
        options: "cluster_size=4k,encrypt.format=aes,encrypt.key-secret=s0",
        size: "1M",
        steps: &["write -P 1 0 8k"],
    },
    Plan {
        name: "data-file",
        options: "data_file=data.raw",
        size: "4M",
        steps: &["write -P 1 0 128k; write -z 64k 64k; write -P 2 192k 64k"],
    },
    Plan {
        name: "data-file-extended",
        options: "cluster_size=16k,extended_l2=on,data_file=data.raw",
        size: "2M",
        steps: &["write -P 1 0 32k; write -z 16k 1k; write -P 2 64k 512"],
    },
    Plan {
        name: "backing",
        options: "cluster_size=4k,backing_file=base.raw,backing_fmt=raw",
        size: "4M",
        steps: &["write -P 1 0 4k; write -z 4k 4k"],
    },
    Plan {
        name: "refcount-1",
        options: "cluster_size=4k,refcount_bits=1",
        size: "1M",
        steps: &["write -P 1 0 16k; write -c -P 2 20k 4k; write -z 4k 4k"],
    },
    Plan {
        name: "refcount-4",
        options: "cluster_size=4k,refcount_bits=4",
        size: "1M",
        steps: &[
            "write -P 1 0 16k; write -c -P 2 20k 4k; write -c -P 2 24k 4k",
            "img snapshot -c one @",
        ],
    },
    Plan {
        name: "refcount-64",
        options: "cluster_size=512,refcount_bits=64",
        size: "200k",
        steps: &["write -P 1 0 32k; write -P 2 100k 1k"],
    },
    Plan {
        name: "dirty",
        options: "lazy_refcounts=on",
        size: "1M",
        steps: &["crash write -P 1 0 128k; flush"],
    },
];

/// Makes all images.
pub(crate) fn all() -> Vec<Base> {
    PLANS.iter().map(make).collect()
}

/// Makes the image of this name.
pub(crate) fn named(name: &str) -> Base {
    make(PLANS.iter().find(|plan| plan.name == name).unwrap())
}

fn make(plan: &Plan) -> Base {
    let shop = Workshop::new();
    let access = if plan.options.contains("encrypt") {
        Access::WithSecret
    } else {
        Access::Plain
    };
    shop.write("noise", &noise());
    shop.write("base.raw", &vec![7; 1 << 20]);
    shop.create(IMAGE, plan.size, plan.options, &[]).unwrap();
    for step in plan.steps {
        run(&shop, access, step);
    }
    let others = ["data.raw", "base.raw"]
        .into_iter()
        .filter(|name| plan.options.contains(name));
    Base {
        name: plan.name,
        access,
        bytes: shop.read(IMAGE),
        others: others.map(|name| (name, shop.read(name))).collect(),
    }
}

fn run(shop: &Workshop, access: Access, step: &str) {
    let image = target(IMAGE, access);
    if let Some(rest) = step.strip_prefix("img ") {
        let args: Vec<_> = words(rest)
            .into_iter()
            .map(|w| w.replace('@', &image))
            .collect();
        return shop.run("qemu-img", &args).unwrap();
    }
    let (commands, crash) = step
        .strip_prefix("crash ")
        .map_or((step, false), |s| (s, true));
    let mut args = match access {
        Access::Plain => words("-f qcow2"),
        Access::WithSecret => secret_args().to_vec(),
    };
    for command in commands.split(';').chain(crash.then_some("abort")) {
        args.extend(["-c".to_owned(), command.trim().to_owned()]);
    }
    args.push(image);
    let result = shop.run("qemu-io", &args);
    assert!(crash || result.is_ok(), "{}", result.unwrap_err());
}

/// A cluster that compresses, but not to little.
fn noise() -> Vec<u8> {
    let mut state = 1_u32;
    let random = (0..4096).map(|_| {
        state = state.wrapping_mul(1_103_515_245).wrapping_add(12345);
        (state >> 24) as u8
    });
    random
        .enumerate()
        .map(|(at, byte)| if at % 8 < 3 { 0 } else { byte })
        .collect()
}
