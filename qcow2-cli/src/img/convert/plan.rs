//! What a command line of `convert` asks for.

use qcow2_image::{BitmapState, Image, SnapshotKey};
use qcow2_io::codec::Level;

use crate::img::args::{self, CacheMode, Common, Failure};
use crate::img::choices::{self, Format};
use crate::img::creation::{Creation, refused};
use crate::img::measure::snapshot_key;
use crate::node::Node;
use crate::words::getopt::{Long, Spec};
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hf:O:B:CcF:o:l:S:pt:T:qnm:WUr:",
    long: &[
        Long::flag("help", 'h'),
        Long::value("source-format", 'f'),
        Long::value("source-cache", 'T'),
        Long::value("snapshot", 'l'),
        Long::value("sparse-size", 'S'),
        Long::value("target-format", 'O'),
        Long::value("target-cache", 't'),
        Long::value("backing", 'B'),
        Long::value("backing-format", 'F'),
        Long::value("options", 'o'),
        Long::flag("image-opts", '\u{1}'),
        Long::flag("target-image-opts", '\u{2}'),
        Long::value("object", '\u{3}'),
        Long::flag("target-is-zero", '\u{4}'),
        Long::flag("salvage", '\u{5}'),
        Long::flag("bitmaps", '\u{6}'),
        Long::flag("skip-broken-bitmaps", '\u{7}'),
        Long::flag("force-share", 'U'),
        Long::value("rate-limit", 'r'),
        Long::value("parallel", 'm'),
        Long::flag("oob-writes", 'W'),
        Long::flag("copy-range-offloading", 'C'),
        Long::flag("progress", 'p'),
        Long::flag("no-create", 'n'),
        Long::flag("compress", 'c'),
        Long::flag("quiet", 'q'),
    ],
};

const USAGE: &str = "qemu-img convert [-f SRC_FMT | --image-opts] [-T SRC_CACHE] [-l SNAPSHOT] [-S SPARSE_SIZE]
        [-O TGT_FMT | --target-image-opts] [-t TGT_CACHE] [-B BACKING_FILE [-F BACKING_FMT]] [-o TGT_OPTS]
        [-n] [-c] [-C] [-W] [-m PARALLEL] [-r RATE] [--target-is-zero] [--salvage]
        [--bitmaps [--skip-broken-bitmaps]] [-U] [-p] [-q] [--object OBJDEF] FILE... TARGET

Copy a disk, or several one behind the other, into a new image.
  -f, --source-format FMT        format of FILE (default: what it looks like)
  -O, --target-format FMT        format of TARGET (default: raw)
  -o, --options TGT_OPTS         options of the format; `-o help` lists them
  -B, --backing FILE             TARGET gets this backing file, and only what FILE has itself
  -F, --backing-format FMT       its format
  -l, --snapshot SNAPSHOT        copy this snapshot
  -c, --compress                 compress
  -S, --sparse-size BYTES        leave out zeros that fill so many bytes; 0: write everything
  -n, --no-create                TARGET is there already
  --target-is-zero               and reads as zeros
  --salvage                      zeros for what can't be read
  --bitmaps                      carry dirty bitmaps along
  --skip-broken-bitmaps          but not those that can't be used
  -r, --rate-limit RATE          read no more than so many bytes a second
  -m, -W, -C                     taken; the copy is parallel anyway
  -U, --force-share              read beside a program that writes
  -p, --progress                 show how far it is
  --object OBJDEF                define an object, such as a secret
  -q, --quiet                    say nothing unless something is wrong";

/// Zeros of this many bytes are left out unless something else is asked for.
const SPARSE: u64 = 4096;
const MAX_SPARSE: u64 = 16 << 20;

/// What a command line of `convert` asks for.
pub(super) struct Plan {
    pub(super) common: Common,
    pub(super) sources: Vec<String>,
    pub(super) source_format: Option<String>,
    pub(super) snapshot: Option<SnapshotKey>,
    pub(super) target: String,
    /// `None` if the target is described otherwise, or must tell itself.
    pub(super) target_format: Option<String>,
    pub(super) target_image_opts: bool,
    lists: Vec<String>,
    backing: Option<String>,
    backing_format: Option<String>,
    pub(super) compress: Option<Level>,
    pub(super) sparse: u64,
    /// The target is there, and is not made anew.
    pub(super) keeps_target: bool,
    pub(super) target_is_zero: bool,
    pub(super) salvage: bool,
    /// Pieces are written as they are ready.
    pub(super) any_order: bool,
    pub(super) bitmaps: bool,
    pub(super) skip_broken: bool,
    pub(super) rate: u64,
    pub(super) force_share: bool,
    pub(super) progress: bool,
    pub(super) quiet: bool,
    pub(super) cache: CacheMode,
    pub(super) source_cache: CacheMode,
    offload: bool,
    sparse_given: bool,
}

impl Plan {
    /// Reads a command line; `None` if it only wanted help, which was given.
    pub(super) fn from_words(words: &[String], console: &Console) -> Result<Option<Self>, Failure> {
        let parsed = args::parse("convert", &SPEC, words)?;
        let mut plan = Self::empty();
        let mut format = None;
        for (code, value) in parsed.options {
            match code {
                'h' => {
                    say!(console, "{USAGE}");
                    return Ok(None);
                }
                'O' => format = Some(value),
                other => plan.take(other, value)?,
            }
        }
        if plan.lists.iter().any(|list| choices::asks_for_help(list)) {
            let format =
                Format::from_name(format.as_deref().unwrap_or("raw")).map_err(Failure::new)?;
            choices::help(format, parsed.operands.len() > 1, console);
            return Ok(None);
        }
        let mut operands = parsed.operands;
        plan.target = operands.pop().unwrap_or_default();
        plan.sources = operands;
        if plan.sources.is_empty() {
            return Err(Failure::new("Must specify image file name"));
        }
        plan.target_format = match (format, plan.target_image_opts, plan.keeps_target) {
            (Some(_), true, _) => {
                return Err(Failure::new(
                    "--image-opts and --format are mutually exclusive",
                ));
            }
            (Some(format), false, _) => Some(format),
            (None, true, _) => None,
            (None, false, _) => Some("raw".to_owned()),
        };
        plan.check()?;
        Ok(Some(plan))
    }

    fn empty() -> Self {
        Self {
            common: Common::default(),
            sources: Vec::new(),
            source_format: None,
            snapshot: None,
            target: String::new(),
            target_format: None,
            target_image_opts: false,
            lists: Vec::new(),
            backing: None,
            backing_format: None,
            compress: None,
            sparse: SPARSE,
            keeps_target: false,
            target_is_zero: false,
            salvage: false,
            any_order: false,
            bitmaps: false,
            skip_broken: false,
            rate: 0,
            force_share: false,
            progress: false,
            quiet: false,
            cache: CacheMode::default(),
            source_cache: CacheMode::default(),
            offload: false,
            sparse_given: false,
        }
    }

    fn take(&mut self, code: char, value: String) -> Result<(), Failure> {
        match code {
            'f' => self.source_format = Some(value),
            'l' => self.snapshot = Some(snapshot_key(&value)?),
            'S' => {
                self.sparse_given = true;
                let bytes = args::number("buffer size for sparse output", &value, 0..=u64::MAX)?;
                if !bytes.is_multiple_of(512) || bytes > MAX_SPARSE {
                    return Err(Failure::new(
                        "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. \
                         Select 0 to disable sparse detection (fully allocates output).",
                    ));
                }
                // Zeros are looked for in pieces that are powers of two.
                self.sparse = bytes.checked_ilog2().map_or(0, |bits| 1 << bits);
            }
            'C' => self.offload = true,
            'B' => self.backing = Some(value),
            'F' => self.backing_format = Some(value),
            'o' => self.lists.push(args::option_list(value)?),
            'c' => self.compress = Some(Level::default()),
            'n' => self.keeps_target = true,
            'p' => self.progress = true,
            'q' => self.quiet = true,
            'U' => self.force_share = true,
            't' => self.cache = CacheMode::of_target(&value)?,
            'T' => self.source_cache = CacheMode::of_source(&value)?,
            'm' => {
                args::number("number of coroutines", &value, 1..=16)?;
            }
            'r' => {
                self.rate = args::number("rate limit", &value, args::ANY_BYTES)?;
            }
            '\u{1}' => self.common.image_opts = true,
            '\u{2}' => self.target_image_opts = true,
            '\u{3}' => self.common.objects.add(&value).map_err(Failure::new)?,
            '\u{4}' => self.target_is_zero = true,
            '\u{5}' => self.salvage = true,
            'W' => self.any_order = true,
            '\u{6}' => self.bitmaps = true,
            '\u{7}' => self.skip_broken = true,
            // Copies are parallel, and find their own way.
            _ => {}
        }
        Ok(())
    }

    /// What does not go together.
    fn check(&self) -> Result<(), Failure> {
        let refuse = |text: &str| Err(Failure::new(text));
        if self.offload && self.sparse_given {
            return refuse("Cannot enable copy offloading when -S is used");
        }
        if self.offload && self.compress.is_some() {
            return refuse("Cannot enable copy offloading when -c is used");
        }
        if self.offload && self.salvage {
            return refuse("Cannot use copy offloading in salvaging mode");
        }
        if self.skip_broken && !self.bitmaps {
            return refuse("Use of --skip-broken-bitmaps requires --bitmaps");
        }
        if self.target_is_zero && !self.keeps_target {
            return refuse("--target-is-zero requires use of -n flag");
        }
        if self.target_image_opts && !self.keeps_target {
            return refuse("--target-image-opts requires use of -n flag");
        }
        if self.keeps_target && !self.lists.is_empty() {
            return refuse("-o has no effect when skipping image creation");
        }
        if self.sources.len() > 1 && self.has_backing() {
            return refuse(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            );
        }
        if self.sources.len() > 1 && self.bitmaps {
            return refuse("Copying bitmaps only possible with single source");
        }
        Ok(())
    }

    /// What only the sources can tell.
    pub(super) fn check_sources(&self, sources: &[Node]) -> Result<(), Failure> {
        if self.snapshot.is_some() && sources.len() > 1 {
            return Err(Failure::new(
                "No support for concatenating multiple snapshot",
            ));
        }
        if self.snapshot.is_some()
            && let Some(node) = sources.iter().find(|node| node.image().is_none())
        {
            return Err(Failure::new(format_args!(
                "Failed to load snapshot: Block format '{}' used by device '' does not support temporarily loading internal snapshots",
                node.driver
            )));
        }
        if self.bitmaps && sources.iter().any(|node| node.image().is_none()) {
            return Err(Failure::new("Source lacks bitmap support"));
        }
        if self.bitmaps
            && !self.skip_broken
            && let Some(image) = sources.first().and_then(Node::image)
            && let Some(name) = inconsistent(image).first()
        {
            return Err(
                Failure::new(format_args!("Cannot copy inconsistent bitmap '{name}'")).hint(
                    "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
                ),
            );
        }
        Ok(())
    }

    /// Whether the target leaves to a backing file what the source leaves to its own.
    pub(super) fn has_backing(&self) -> bool {
        self.backing.is_some()
            || self.lists.iter().any(|list| {
                list.split(',')
                    .any(|option| option.starts_with("backing_file="))
            })
    }

    /// What the target is to be like, if it is made.
    pub(super) fn creation(&self, len: u64) -> Result<Creation, Failure> {
        let name = self.target_format.as_deref().unwrap_or("raw");
        let format = match Format::from_name(name) {
            Ok(format) => format,
            Err(_) if self.keeps_target => Format::Raw,
            Err(text) => return Err(Failure::new(text)),
        };
        let mut creation = Creation::new(format);
        for list in &self.lists {
            creation
                .add_list(list)
                .map_err(|refusal| refused("", refusal).without_name())?;
        }
        for (key, value, what) in [
            ("backing_file", &self.backing, "Backing file not supported"),
            (
                "backing_fmt",
                &self.backing_format,
                "Backing file format not supported",
            ),
        ] {
            if let Some(value) = value {
                creation.set(key, value).map_err(|_| {
                    Failure::new(format_args!("{what} for file format '{}'", format.name()))
                })?;
            }
        }
        // Whatever the list says, the target is as large as what is copied.
        creation
            .set("size", &len.to_string())
            .map_err(|refusal| refused("", refusal).without_name())?;
        if self.compress.is_some() && format != Format::Qcow2 && !self.keeps_target {
            return Err(Failure::new(
                "Compression not supported for this file format",
            ));
        }
        if self.compress.is_some()
            && creation
                .get("preallocation")
                .is_some_and(|mode| mode != "off")
        {
            return Err(Failure::new(
                "Compression and preallocation not supported at the same time",
            ));
        }
        if self.compress.is_some()
            && creation
                .get("data_file")
                .is_some_and(|name| !name.is_empty())
        {
            return Err(Failure::new(
                "Compression not supported for this file format",
            ));
        }
        if !self.keeps_target
            && creation.get("backing_file").is_some()
            && creation.get("backing_fmt").is_none()
        {
            return Err(Failure::new(
                "Use of backing file requires explicit backing format",
            ));
        }
        Ok(creation)
    }
}

/// Names of the bitmaps that can't be carried along, in the order in which they are told: the last one first.
pub(super) fn inconsistent(image: &Image) -> Vec<String> {
    let all = image.bitmaps().unwrap_or_default().into_iter().rev();
    all.filter(|bitmap| bitmap.state != BitmapState::Consistent)
        .map(|bitmap| String::from_utf8_lossy(&bitmap.name).into_owned())
        .collect()
}
