//! The layouts: every dimension with every value, and the corners where two of them meet.

use super::recipe::{Backing, Format, Fresh};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

pub(super) fn v3(name: &'static str, cluster: u64, size: u64, options: &'static str) -> Format {
    Format {
        name,
        options,
        version: 3,
        cluster,
        size,
        backing: Backing::None,
        fresh: Fresh::default(),
    }
}

fn v2(name: &'static str, cluster: u64, size: u64, options: &'static str) -> Format {
    Format {
        version: 2,
        ..v3(name, cluster, size, options)
    }
}

fn over(backing: Backing, format: Format) -> Format {
    Format { backing, ..format }
}

/// All layouts. The sizes make several L2 tables where that is cheap, and often end inside a cluster.
pub(super) fn all() -> Vec<Format> {
    vec![
        v3("64k", 64 * KIB, GIB + 1536, ""),
        v2("v2-64k", 64 * KIB, GIB, ""),
        v2("v2-512", 512, 4 * MIB, ""),
        v2("v2-2m", 2 * MIB, TIB, ""),
        v2("v2-4k", 4 * KIB, 8 * MIB, ""),
        // Cluster sizes by refcount widths.
        v3("512", 512, 4 * MIB, ""),
        v3("512-rb64", 512, 4 * MIB, "refcount_bits=64"),
        v3("512-rb1", 512, 4 * MIB, "refcount_bits=1"),
        v3("1k-rb1", KIB, 4 * MIB + 512, "refcount_bits=1"),
        v3("2k-rb2", 2 * KIB, 8 * MIB, "refcount_bits=2"),
        v3("4k-rb4", 4 * KIB, 8 * MIB, "refcount_bits=4"),
        v3("4k-rb8", 4 * KIB, 8 * MIB + 3584, "refcount_bits=8"),
        v3("8k-rb32", 8 * KIB, 32 * MIB, "refcount_bits=32"),
        v3("16k-rb2", 16 * KIB, 64 * MIB, "refcount_bits=2"),
        v3(
            "32k-rb64-zstd",
            32 * KIB,
            256 * MIB,
            "refcount_bits=64,compression_type=zstd",
        ),
        v3("128k-rb4", 128 * KIB, 3 * GIB, "refcount_bits=4"),
        v3("256k-rb1", 256 * KIB, 16 * GIB, "refcount_bits=1"),
        v3("512k-zstd", 512 * KIB, 64 * GIB, "compression_type=zstd"),
        v3("1m-rb8", MIB, 256 * GIB, "refcount_bits=8"),
        v3("2m", 2 * MIB, TIB, ""),
        v3("4k-zstd", 4 * KIB, 8 * MIB, "compression_type=zstd"),
        // Extended L2 entries.
        v3("16k-ext", 16 * KIB, 48 * MIB, "extended_l2=on"),
        v3(
            "16k-ext-rb1",
            16 * KIB,
            48 * MIB,
            "extended_l2=on,refcount_bits=1",
        ),
        v3(
            "64k-ext-zstd",
            64 * KIB,
            GIB,
            "extended_l2=on,compression_type=zstd",
        ),
        v3(
            "512k-ext-rb32",
            512 * KIB,
            40 * GIB,
            "extended_l2=on,refcount_bits=32",
        ),
        v3(
            "2m-ext-rb64",
            2 * MIB,
            TIB,
            "extended_l2=on,refcount_bits=64,compression_type=zstd",
        ),
        // Postponed refcounts.
        v3("64k-lazy", 64 * KIB, GIB, "lazy_refcounts=on"),
        v3(
            "4k-lazy-rb64",
            4 * KIB,
            8 * MIB,
            "lazy_refcounts=on,refcount_bits=64",
        ),
        v3(
            "64k-ext-lazy",
            64 * KIB,
            GIB,
            "lazy_refcounts=on,extended_l2=on",
        ),
        // Encryption.
        v3(
            "64k-luks",
            64 * KIB,
            GIB,
            "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10",
        ),
        v3(
            "4k-luks-rb64",
            4 * KIB,
            8 * MIB,
            "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,refcount_bits=64",
        ),
        v3(
            "16k-luks-ext",
            16 * KIB,
            48 * MIB,
            "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,extended_l2=on",
        ),
        v2(
            "v2-luks",
            64 * KIB,
            GIB,
            "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10",
        ),
        v3(
            "64k-aes",
            64 * KIB,
            GIB,
            "encrypt.format=aes,encrypt.key-secret=s0",
        ),
        v2(
            "v2-512-aes",
            512,
            4 * MIB,
            "encrypt.format=aes,encrypt.key-secret=s0",
        ),
        // Guest data in another file.
        v3("64k-data-file", 64 * KIB, 64 * MIB, "data_file=data.raw"),
        v3(
            "4k-data-file-raw",
            4 * KIB,
            8 * MIB,
            "data_file=data.raw,data_file_raw=on",
        ),
        v3(
            "16k-data-file-ext",
            16 * KIB,
            48 * MIB,
            "data_file=data.raw,extended_l2=on",
        ),
        v3(
            "64k-data-file-luks",
            64 * KIB,
            64 * MIB,
            "data_file=data.raw,encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10",
        ),
        // Backing files.
        over(Backing::Short, v3("64k-over-short", 64 * KIB, 64 * MIB, "")),
        over(
            Backing::LongRaw,
            v3("64k-over-raw", 64 * KIB, 64 * MIB + 512, ""),
        ),
        over(Backing::Short, v2("v2-4k-over-short", 4 * KIB, 8 * MIB, "")),
        over(
            Backing::LongRaw,
            v3("64k-ext-over-raw", 64 * KIB, 64 * MIB, "extended_l2=on"),
        ),
        over(Backing::Short, v3("512-over-short", 512, 4 * MIB, "")),
        over(
            Backing::Short,
            v3(
                "64k-data-file-over",
                64 * KIB,
                64 * MIB,
                "data_file=data.raw",
            ),
        ),
        // Preallocation.
        v3(
            "64k-pre-metadata",
            64 * KIB,
            600 * MIB,
            "preallocation=metadata",
        ),
        v3(
            "4k-pre-metadata-rb64",
            4 * KIB,
            8 * MIB,
            "preallocation=metadata,refcount_bits=64",
        ),
        v3("64k-pre-falloc", 64 * KIB, 8 * MIB, "preallocation=falloc"),
        v3("4k-pre-full", 4 * KIB, 4 * MIB, "preallocation=full"),
        v2("v2-512-pre-full", 512, MIB, "preallocation=full"),
        v3(
            "16k-ext-pre-metadata",
            16 * KIB,
            48 * MIB,
            "preallocation=metadata,extended_l2=on",
        ),
        v3(
            "2m-pre-metadata",
            2 * MIB,
            512 * MIB,
            "preallocation=metadata",
        ),
        v3(
            "512-rb1-pre-metadata",
            512,
            MIB,
            "preallocation=metadata,refcount_bits=1",
        ),
        v3(
            "64k-luks-pre-metadata",
            64 * KIB,
            8 * MIB,
            "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,preallocation=metadata",
        ),
        over(
            Backing::Short,
            v3(
                "16k-ext-over-pre",
                16 * KIB,
                16 * MIB,
                "preallocation=metadata,extended_l2=on",
            ),
        ),
    ]
}
