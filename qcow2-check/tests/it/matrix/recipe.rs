//! How one image comes about: a format, and what is done to it.

use std::sync::{Arc, OnceLock};

use crate::oracle::{Access, Workshop, secret_args, target, words};

/// Name of the image in its workshop.
pub(super) const IMAGE: &str = "image.qcow2";
/// Name of the external data file of those formats that have one.
const DATA_FILE: &str = "data.raw";
/// Guest data that compresses to about six tenths, so that extents straddle host clusters.
const NOISE: &str = "noise";
/// Bytes of [`NOISE`]: the largest cluster, twice.
const NOISE_BYTES: usize = 4 << 20;

/// A way to lay out an image.
#[derive(Clone, Debug)]
pub(super) struct Format {
    /// Name, short.
    pub(super) name: &'static str,
    /// Options for `qemu-img create -o`, without the cluster size and compatibility level.
    pub(super) options: &'static str,
    /// Format version.
    pub(super) version: u32,
    /// Bytes in a cluster.
    pub(super) cluster: u64,
    /// Virtual size in bytes.
    pub(super) size: u64,
    /// What lies behind the image.
    pub(super) backing: Backing,
    /// The image before any work, where it is worth keeping: QEMU takes seconds to derive a key.
    pub(super) fresh: Fresh,
}

/// Files of a fresh image with their names, shared by all recipes with the format.
pub(super) type Fresh = Arc<OnceLock<Result<Vec<(&'static str, Vec<u8>)>, String>>>;

/// A backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// None.
    None,
    /// A qcow2 image of half the size.
    Short,
    /// A raw file of twice the size, at most 64 MiB.
    LongRaw,
}

impl Format {
    pub(super) fn has(&self, option: &str) -> bool {
        self.options.contains(option)
    }

    pub(super) fn access(&self) -> Access {
        if self.has("encrypt") {
            Access::WithSecret
        } else {
            Access::Plain
        }
    }

    /// A word of a step, with units resolved: `3c` are clusters, `1h` halves of one, `1s` thirty-seconds, at least a
    /// sector; `far` is a place near the end of the disk; `@` is the image.
    fn resolve(&self, word: &str) -> String {
        let number = |unit: char| word.strip_suffix(unit)?.parse::<u64>().ok();
        if let Some(n) = number('c') {
            (n * self.cluster).to_string()
        } else if let Some(n) = number('h') {
            (n * self.cluster / 2).max(512).to_string()
        } else if let Some(n) = number('s') {
            (n * (self.cluster / 32).max(512)).to_string()
        } else if word == "far" {
            ((self.size / self.cluster).saturating_sub(3) * self.cluster).to_string()
        } else if word == "@" {
            target(IMAGE, self.access())
        } else {
            word.to_owned()
        }
    }

    /// Makes the fresh image.
    fn make(&self, shop: &Workshop) -> Result<(), String> {
        if !self.has("luks") {
            return self.create(shop);
        }
        let fresh = self.fresh.get_or_init(|| {
            let shop = Workshop::new();
            self.create(&shop)?;
            let names = [IMAGE, DATA_FILE]
                .into_iter()
                .filter(|name| shop.path(name).exists());
            Ok(names.map(|name| (name, shop.read(name))).collect())
        });
        for (name, bytes) in fresh.as_ref().map_err(Clone::clone)? {
            shop.write(name, bytes);
        }
        Ok(())
    }

    fn create(&self, shop: &Workshop) -> Result<(), String> {
        let compat = if self.version == 2 { "v2" } else { "v3" };
        let mut options = format!("cluster_size={},compat={compat}", self.cluster);
        if !self.options.is_empty() {
            options = format!("{options},{}", self.options);
        }
        let mut more = Vec::new();
        match self.backing {
            Backing::None => {}
            Backing::Short => {
                shop.create("base.qcow2", &(self.size / 2).to_string(), "", &[])?;
                shop.run(
                    "qemu-io",
                    &["-c", "write -P 7 0 1M", "base.qcow2"].map(str::to_owned),
                )?;
                more = vec!["-b", "base.qcow2", "-F", "qcow2"];
            }
            Backing::LongRaw => {
                let size = (self.size * 2).min(64 << 20).to_string();
                shop.run(
                    "qemu-img",
                    &words(&format!("create -q -f raw base.raw {size}")),
                )?;
                let write = ["-f", "raw", "-c", "write -P 7 0 1M", "base.raw"];
                shop.run("qemu-io", &write.map(str::to_owned))?;
                more = vec!["-b", "base.raw", "-F", "raw"];
            }
        }
        shop.create(IMAGE, &self.size.to_string(), &options, &more)
    }
}

/// What is done to an image, one tool's run a step.
///
/// A step is `io` and commands of `qemu-io`, separated by semicolons; `crash` and the same, with an abort at the end; or `img`
/// and arguments of `qemu-img`. With a question mark in front, it may fail.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) name: &'static str,
    pub(super) steps: &'static [&'static str],
}

/// An image to be made.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    pub(super) format: Format,
    pub(super) work: Work,
}

impl Recipe {
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.format.name, self.work.name)
    }

    /// Makes the image, as [`IMAGE`].
    pub(super) fn make(&self, shop: &Workshop) -> Result<(), String> {
        self.format.make(shop)?;
        if self.work.steps.iter().any(|step| step.contains(NOISE)) {
            shop.write(NOISE, &noise());
        }
        self.work
            .steps
            .iter()
            .try_for_each(|step| self.step(shop, step))
    }

    fn step(&self, shop: &Workshop, step: &str) -> Result<(), String> {
        let (step, may_fail) = step
            .strip_prefix('?')
            .map_or((step, false), |step| (step, true));
        let (verb, rest) = step.split_once(' ').unwrap();
        let resolve = |line: &str| {
            line.split_whitespace()
                .map(|w| self.format.resolve(w))
                .collect::<Vec<_>>()
        };
        let access = self.format.access();
        let mut args = Vec::new();
        let tool = match verb {
            "img" => {
                args = resolve(rest);
                if access == Access::WithSecret {
                    args.splice(1..1, secret_args());
                }
                "qemu-img"
            }
            "io" | "crash" => {
                match access {
                    Access::Plain => args.extend(words("-f qcow2")),
                    Access::WithSecret => args.extend(secret_args()),
                }
                for command in rest.split(';') {
                    args.extend(["-c".to_owned(), resolve(command).join(" ")]);
                }
                if verb == "crash" {
                    args.extend(words("-c abort"));
                }
                args.push(target(IMAGE, access));
                "qemu-io"
            }
            _ => panic!("no such verb: {verb}"),
        };
        let result = shop.run(tool, &args);
        if may_fail || verb == "crash" {
            Ok(())
        } else {
            result
        }
    }
}

/// Bytes of which four in ten are zero, the others without pattern.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(NOISE_BYTES);
    for position in 0..NOISE_BYTES / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = if position % 10 < 4 { 0 } else { state };
        bytes.extend(word.to_be_bytes());
    }
    bytes
}
