//! The fuzz targets as values: what each one runs, and the inputs it starts from.
//!
//! `fuzz_targets/` has one program a target, each a single call, for libFuzzer. The same calls stand here in [`TARGETS`], so
//! that `cargo xtask fuzz` can seed them and a plain `cargo test` can replay every input that ever broke one.

mod seeds;

/// One fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Name of the program in `fuzz_targets/`, of its corpus and of its folder in `regressions/`.
    pub name: &'static str,
    /// What it feeds the input to, in one sentence.
    pub about: &'static str,
    /// The longest input worth trying; bytes.
    pub max_len_bytes: usize,
    /// Takes any bytes; returns unless there is a defect.
    pub run: fn(&[u8]),
    /// Sound inputs to start from, each with a name that is unique in its target.
    pub seeds: fn() -> Vec<Seed>,
}

/// An input to start from.
#[derive(Clone, Debug)]
pub struct Seed {
    /// Becomes part of the file's name: lower-case letters, digits and hyphens.
    pub name: String,
    /// The input itself.
    pub bytes: Vec<u8>,
}

impl Seed {
    fn new(name: impl Into<String>, bytes: Vec<u8>) -> Self {
        Self {
            name: name.into(),
            bytes,
        }
    }
}

/// Every target, in the order in which they run.
pub const TARGETS: [Target; 9] = [
    Target {
        name: "header",
        about: "Decodes a header with its extensions and backing name, and encodes it again.",
        max_len_bytes: 8 << 10,
        run: qcow2_format::fuzzing::header,
        seeds: seeds::header,
    },
    Target {
        name: "refcount_block",
        about: "Reads and writes refcounts of every width in one block, against each other.",
        max_len_bytes: 4 << 10,
        run: qcow2_format::fuzzing::refcount_block,
        seeds: seeds::refcount_block,
    },
    Target {
        name: "tables",
        about: "Decodes snapshot tables and bitmap directories, and encodes them again.",
        max_len_bytes: 16 << 10,
        run: qcow2_format::fuzzing::tables,
        seeds: seeds::tables,
    },
    Target {
        name: "luks",
        about: "Decodes a LUKS1 header and judges its areas and parameters.",
        max_len_bytes: 4 << 10,
        run: qcow2_format::fuzzing::luks,
        seeds: seeds::luks,
    },
    Target {
        name: "check_image",
        about: "Checks and audits the input as a whole image in memory.",
        max_len_bytes: 256 << 10,
        run: qcow2_check::fuzzing::image,
        seeds: seeds::check_image,
    },
    Target {
        name: "repair",
        about: "Plans a repair of the input as a whole image, carries it out, repeats it and undoes it.",
        max_len_bytes: 256 << 10,
        run: qcow2_check::fuzzing::repair,
        seeds: seeds::repair,
    },
    Target {
        name: "image",
        about: "Opens the input as an image, and reads, writes, cuts and discards.",
        max_len_bytes: 256 << 10,
        run: qcow2_image::fuzzing::image,
        seeds: seeds::image,
    },
    Target {
        name: "decompress",
        about: "Decodes a compressed cluster of either codec, or compresses the input and decodes that.",
        max_len_bytes: 128 << 10,
        run: qcow2_io::codec::fuzzing::decompress,
        seeds: seeds::decompress,
    },
    Target {
        name: "luks_open",
        about: "Opens the input as a LUKS area, and adds and erases a passphrase.",
        max_len_bytes: 72 << 10,
        run: qcow2_image::fuzzing::luks_open,
        seeds: seeds::luks_open,
    },
];
