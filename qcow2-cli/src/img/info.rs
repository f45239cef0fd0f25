//! `info`: what is known of an image without reading its data.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::process::ExitCode;

use qcow2_format::header::{CompressionType, CryptMethod, Version};
use qcow2_image::luks::{self, LuksArea, LuksInfo};
use qcow2_image::{BitmapInfo, Image, SnapshotInfo};
use qcow2_io::cipher::IvGenerator;

use super::args::{self, Common, Failure, Output};
use super::snapshot;
use crate::node::{self, Access, Node};
use crate::words::dict::Value;
use crate::words::getopt::{Long, Spec};
use crate::words::outside;
use crate::words::size;
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hf:U",
    long: &[
        Long::flag("help", 'h'),
        Long::value("format", 'f'),
        Long::value("output", '\u{1}'),
        Long::flag("backing-chain", '\u{2}'),
        Long::value("object", '\u{3}'),
        Long::flag("image-opts", '\u{4}'),
        Long::flag("force-share", 'U'),
        Long::flag("limits", '\u{5}'),
        Long::value("cache", 't'),
    ],
};

const USAGE: &str = "qemu-img info [-f FMT | --image-opts] [--backing-chain] [-U]
        [--output human|json] [--object OBJDEF] FILE

Tell what is known of an image.
  -f, --format FMT      format of the image (default: what it looks like)
  --image-opts          FILE is a list of options
  --backing-chain       tell it of all layers of the chain
  -U, --force-share     read beside a program that writes
  --output human|json   for people (the default) or for programs
  --object OBJDEF       define an object, such as a secret";

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("info", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut output) = (None, Output::Human);
    let (mut chain, mut force_share) = (false, false);
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => format = Some(value),
            'U' => force_share = true,
            '\u{1}' => output = Output::from_name("info", &value)?,
            '\u{2}' => chain = true,
            '\u{3}' => common.objects.add(&value).map_err(Failure::new)?,
            '\u{4}' => common.image_opts = true,
            _ => {}
        }
    }
    let [name] = parsed.operands.as_slice() else {
        return Err(Failure::usage("info", "Expecting one image file name"));
    };
    let access = Access {
        locked: true,
        force_share,
        no_backing: true,
        ..Access::read()
    };
    let mut layers = vec![common.open(name, format.as_deref(), &access)?];
    if chain {
        layers_below(&mut layers, common, name, &access)?;
    }
    let facts: Vec<_> = layers.iter().map(Facts::of).collect();
    match output {
        Output::Json => {
            let mut answers: Vec<_> = facts.iter().map(Facts::to_value).collect();
            let answer = if chain {
                Value::List(answers)
            } else {
                answers.pop().unwrap_or_else(|| Value::object([]))
            };
            say!(console, "{}", answer.to_json());
        }
        Output::Human => {
            let texts: Vec<_> = facts.iter().map(Facts::to_text).collect();
            console.out(format_args!("{}", texts.join("\n")));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens what lies below the first layer, each by the name that the one above has for it, so that each can be told of by itself.
fn layers_below(
    layers: &mut Vec<Node>,
    mut common: Common,
    first: &str,
    access: &Access,
) -> Result<(), Failure> {
    common.image_opts = false;
    let mut seen = HashSet::from([first.to_owned()]);
    while let Some(node) = layers.last()
        && let Some(image) = node.image()
        && let Some((name, format)) = backing_of(image, node)
    {
        if !seen.insert(name.clone()) {
            return Err(Failure::new(format_args!(
                "Backing file '{name}' creates an infinite loop."
            )));
        }
        layers.push(common.open(&name, format.as_deref(), access)?);
    }
    Ok(())
}

/// Where the name of the backing file leads, and the format that it is said to have.
fn backing_of(image: &Image, node: &Node) -> Option<(String, Option<String>)> {
    let header = image.header();
    let name = header.backing_name.as_deref()?;
    let name = full_name(&String::from_utf8_lossy(name), node)?;
    let format = header.backing_format();
    Some((
        name,
        format.map(|format| String::from_utf8_lossy(format).into_owned()),
    ))
}

/// The full name of a file that the image in `node` names; `None` if nothing tells from which directory it is meant.
fn full_name(name: &str, node: &Node) -> Option<String> {
    (name.starts_with('/') || !node.path().starts_with("json:"))
        .then(|| node::resolve(node.path(), name))
}

/// What is known of a node.
pub(crate) struct Facts<'a> {
    node: &'a Node,
    size: u64,
    on_disk: Option<u64>,
    image: Option<ImageFacts>,
    children: Vec<(&'static str, Facts<'a>)>,
}

/// What is known of a qcow2 image besides.
struct ImageFacts {
    cluster_size: u64,
    encrypted: bool,
    dirty: bool,
    /// The name as the image has it.
    backing: Option<String>,
    /// Where that leads.
    full_backing: Option<String>,
    backing_format: Option<String>,
    snapshots: Vec<SnapshotInfo>,
    specific: Value,
}

impl<'a> Facts<'a> {
    /// Asks a node.
    pub(crate) fn of(node: &'a Node) -> Self {
        let storage = node.storage();
        let children = node.children.iter();
        let children = children
            .filter(|(role, _)| *role != "backing")
            .map(|(role, child)| (*role, Self::of(child)));
        let children: Vec<_> = children.collect();
        let on_disk = match node.child("file") {
            Some(_) => children
                .iter()
                .filter(|(role, _)| *role == "file")
                .find_map(|(_, child)| child.on_disk),
            None => storage.allocated().unwrap_or_default(),
        };
        Self {
            node,
            size: storage.len().unwrap_or_default().next_multiple_of(512),
            on_disk,
            image: node.image().map(|image| ImageFacts::of(image, node)),
            children,
        }
    }

    /// As a structured answer.
    pub(crate) fn to_value(&self) -> Value {
        let mut members = vec![
            ("virtual-size", self.size.into()),
            ("filename", self.node.filename.as_str().into()),
            ("format", self.node.driver.into()),
            (
                "dirty-flag",
                self.image.as_ref().is_some_and(|image| image.dirty).into(),
            ),
        ];
        let children = self.children.iter().filter(|(role, _)| *role == "file");
        let children: Vec<_> = children
            .map(|(role, child)| {
                Value::object([("name", (*role).into()), ("info", child.to_value())])
            })
            .collect();
        if let Some(bytes) = self.on_disk {
            members.push(("actual-size", bytes.into()));
        }
        if self.node.driver == "file" {
            let specific = Value::object([("type", "file".into()), ("data", Value::object([]))]);
            members.push(("format-specific", specific));
        }
        if let Some(image) = &self.image {
            image.add_to(&mut members);
        }
        // It shares a bucket with another member, and is the newer one.
        members.push(("children", children.into()));
        Value::Object(members)
    }

    /// As text for people.
    pub(crate) fn to_text(&self) -> String {
        let mut text = format!(
            "image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\n",
            self.node.filename,
            self.node.driver,
            size::human(self.size),
            self.size
        );
        let on_disk = self.on_disk.map_or("unavailable".to_owned(), size::human);
        _ = writeln!(text, "disk size: {on_disk}");
        if let Some(image) = &self.image {
            text.push_str(&image.to_text());
        }
        for (role, child) in &self.children {
            if *role == "file" {
                text.push_str(&child.to_text_of_child(role));
            }
        }
        text
    }

    /// What only its format has, as lines for people.
    pub(crate) fn specific_text(&self) -> String {
        let image = self.image.as_ref();
        image.map_or(String::new(), |image| image.specific.to_lines(1))
    }

    fn to_text_of_child(&self, path: &str) -> String {
        let mut text = format!(
            "Child node '/{path}':\n    filename: {}\n    protocol type: {}\n    file length: {} ({} bytes)\n",
            self.node.filename,
            self.node.driver,
            size::human(self.size),
            self.size
        );
        let on_disk = self.on_disk.map_or("unavailable".to_owned(), size::human);
        _ = writeln!(text, "    disk size: {on_disk}");
        for (role, child) in &self.children {
            text.push_str(&child.to_text_of_child(&format!("{path}/{role}")));
        }
        text
    }
}

impl ImageFacts {
    fn of(image: &Image, node: &Node) -> Self {
        let header = image.header();
        let lossy = outside::text;
        let backing = header.backing_name.as_deref().map(lossy);
        let full_backing = backing.as_deref().and_then(|name| full_name(name, node));
        Self {
            cluster_size: header.geometry.cluster_size(),
            encrypted: header.crypt_method != CryptMethod::None,
            dirty: header.incompatible.dirty(),
            backing_format: header.backing_format().map(lossy),
            snapshots: image.snapshots().unwrap_or_default(),
            specific: specific(image, node),
            backing,
            full_backing,
        }
    }

    fn add_to(&self, members: &mut Vec<(&'static str, Value)>) {
        members.push(("cluster-size", self.cluster_size.into()));
        if self.encrypted {
            members.push(("encrypted", true.into()));
        }
        let specific = Value::object([("type", "qcow2".into()), ("data", self.specific.clone())]);
        members.push(("format-specific", specific));
        if let Some(name) = &self.backing {
            members.push(("backing-filename", name.as_str().into()));
        }
        if let Some(name) = &self.full_backing {
            members.push(("full-backing-filename", name.as_str().into()));
        }
        if let Some(format) = &self.backing_format {
            members.push(("backing-filename-format", format.as_str().into()));
        }
        if !self.snapshots.is_empty() {
            let snapshots: Vec<_> = self.snapshots.iter().map(snapshot_value).collect();
            members.push(("snapshots", snapshots.into()));
        }
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        if self.encrypted {
            text.push_str("encrypted: yes\n");
        }
        _ = writeln!(text, "cluster_size: {}", self.cluster_size);
        if self.dirty {
            text.push_str("cleanly shut down: no\n");
        }
        if let Some(name) = &self.backing {
            _ = write!(text, "backing file: {name}");
            match &self.full_backing {
                Some(full) if full != name => _ = writeln!(text, " (actual path: {full})"),
                None => text.push_str(" (cannot determine actual path)\n"),
                _ => text.push('\n'),
            }
        }
        if let Some(format) = &self.backing_format {
            _ = writeln!(text, "backing file format: {format}");
        }
        if !self.snapshots.is_empty() {
            text.push_str("Snapshot list:\n");
            text.push_str(&snapshot::table(&self.snapshots));
        }
        text.push_str("Format specific information:\n");
        text.push_str(&self.specific.to_lines(1));
        text
    }
}

fn snapshot_value(one: &SnapshotInfo) -> Value {
    let mut members = vec![
        ("id", snapshot::id(one).into()),
        ("name", snapshot::name(one).into()),
        ("vm-state-size", one.vm_state_size.into()),
        ("date-sec", one.date.as_secs().into()),
        ("date-nsec", one.date.subsec_nanos().into()),
        ("vm-clock-sec", one.vm_clock.as_secs().into()),
        ("vm-clock-nsec", one.vm_clock.subsec_nanos().into()),
    ];
    if let Some(count) = one.icount {
        members.push(("icount", count.into()));
    }
    Value::Object(members)
}

/// What only qcow2 images have.
fn specific(image: &Image, node: &Node) -> Value {
    let header = image.header();
    let mut members: Vec<(&'static str, Value)> = Vec::new();
    let version2 = header.version == Version::V2;
    members.push(("compat", if version2 { "0.10" } else { "1.1" }.into()));
    let compression = match header.compression_type {
        CompressionType::Zstd => "zstd",
        CompressionType::Zlib => "zlib",
    };
    members.push(("compression-type", compression.into()));
    members.push(("refcount-bits", header.geometry.refcount_bits().into()));
    if !version2 {
        members.push(("lazy-refcounts", header.compatible.lazy_refcounts().into()));
        members.push(("corrupt", header.incompatible.corrupt().into()));
        members.push(("extended-l2", header.geometry.extended_l2().into()));
        let bitmaps = image.bitmaps().unwrap_or_default();
        if !bitmaps.is_empty() {
            let bitmaps: Vec<_> = bitmaps.iter().map(bitmap_value).collect();
            members.push(("bitmaps", bitmaps.into()));
        }
    }
    if header.incompatible.external_data() {
        if let Some(name) = header.data_file_name() {
            let name = outside::text(name);
            members.push(("data-file", name.into()));
        }
        members.push(("data-file-raw", header.autoclear.raw_external_data().into()));
    }
    match header.crypt_method {
        CryptMethod::Aes => {
            members.push(("encrypt", Value::object([("format", "aes".into())])));
        }
        CryptMethod::Luks => {
            let file = node.child("file").map(Node::storage);
            if let (Some(area), Some(file)) = (header.crypto(), file)
                && let Ok(info) = luks::info(&*file, LuksArea::from(*area))
            {
                members.push(("encrypt", luks_value(&info)));
            }
        }
        _ => {}
    }
    Value::Object(members)
}

fn bitmap_value(bitmap: &BitmapInfo) -> Value {
    let mut flags = Vec::new();
    if bitmap.in_use {
        flags.push("in-use".into());
    }
    if bitmap.auto {
        flags.push("auto".into());
    }
    Value::object([
        (
            "name",
            String::from_utf8_lossy(&bitmap.name).into_owned().into(),
        ),
        ("granularity", bitmap.granularity.into()),
        ("flags", Value::List(flags)),
    ])
}

fn luks_value(info: &LuksInfo) -> Value {
    let (ivgen, ivgen_hash) = match info.iv_generator {
        IvGenerator::Plain64 => ("plain64", None),
        IvGenerator::Essiv(hash) => ("essiv", Some(hash.to_string())),
        _ => ("plain", None),
    };
    let slots = info.slots.iter().map(|slot| {
        let mut members = vec![
            ("active", slot.active.into()),
            ("key-offset", slot.key_offset.into()),
        ];
        if slot.active {
            members.push(("iters", slot.iterations.into()));
            members.push(("stripes", slot.stripes.into()));
        }
        Value::Object(members)
    });
    let mut members = vec![
        ("format", "luks".into()),
        ("cipher-alg", info.algorithm.to_string().into()),
        ("cipher-mode", info.mode.to_string().into()),
        ("ivgen-alg", ivgen.into()),
        ("hash-alg", info.hash.to_string().into()),
        ("detached-header", false.into()),
        ("payload-offset", info.payload_offset.into()),
        ("master-key-iters", info.master_key_iterations.into()),
        ("uuid", info.uuid.as_str().into()),
        ("slots", Value::List(slots.collect())),
    ];
    if let Some(hash) = ivgen_hash {
        members.push(("ivgen-hash-alg", hash.into()));
    }
    Value::Object(members)
}
