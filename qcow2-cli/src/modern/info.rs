//! `qcow2 info`: what is known of an image.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use qcow2_format::header::{CompressionType, CryptMethod, Version};
use qcow2_image::Image;
use qcow2_image::luks::{self, LuksArea};
use qcow2_io::{FileOptions, Storage};
use serde::Serialize;

use super::answer::{Answer, lossy, name};
use super::args::{OutputArgs, ReadArgs};
use super::bitmap::{self, BitmapRow};
use super::failure::Failure;
use super::open::{Disk, Want};
use super::snapshot::{self, SnapshotRow};
use crate::audit::{clean, shown};
use crate::words::size;

/// Tell what is known of an image
///
/// Nothing that the image names is opened, unless --chain asks for it, and no passphrase is needed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  qcow2 info disk.qcow2
  qcow2 info --chain --references all overlay.qcow2
  qcow2 info --json disk.qcow2 | jq '.\"virtual-size\"'")]
pub(crate) struct Command {
    /// The image
    image: PathBuf,

    /// Tell it of all layers of the chain, the top one first
    #[arg(long)]
    chain: bool,

    #[command(flatten)]
    read: ReadArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    depth: Option<usize>,
    format: &'static str,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    file_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allocated_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    qcow2: Option<Qcow2>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2 {
    version: u32,
    cluster_size: u64,
    refcount_bits: u32,
    compression_type: &'static str,
    extended_l2: bool,
    lazy_refcounts: bool,
    dirty: bool,
    corrupt: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    encryption: Option<Encryption>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<String>,
    data_file_raw: bool,
    snapshots: Vec<SnapshotRow>,
    bitmaps: Vec<BitmapRow>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Encryption {
    method: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cipher: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    key_slots: Vec<u8>,
}

impl Command {
    pub(super) fn run(&self, answer: &Answer<'_>) -> Result<u8, Failure> {
        let want = Want {
            no_backing: !self.chain,
            facts_only: !self.chain,
            ..Want::read(&self.read)
        };
        let disk = Disk::open(&self.image, &self.read.open, &want)?;
        let chain = disk.chain();
        for (depth, layer) in chain.layers().iter().enumerate() {
            let path = match depth {
                0 => Some(self.image.as_path()),
                _ => layer.path(),
            };
            let depth = self.chain.then_some(depth);
            let info = Info::of(layer.image(), layer.storage(), path, depth)
                .map_err(|failure| failure.about(path.unwrap_or(&self.image)))?;
            answer.tell(&info, || {
                let gap = if depth.unwrap_or(0) > 0 { "\n" } else { "" };
                format!("{gap}{}", info.text(path, answer))
            })?;
        }
        Ok(0)
    }
}

impl Info {
    fn of(
        image: Option<&Image>,
        storage: &dyn Storage,
        path: Option<&Path>,
        depth: Option<usize>,
    ) -> Result<Self, Failure> {
        // The file may be locked by what has it open here.
        let file = path.and_then(|path| FileOptions::new().force_share(true).open(path).ok());
        let file = file.as_ref();
        Ok(Self {
            filename: path.map(name).unwrap_or_default(),
            depth,
            format: if image.is_some() { "qcow2" } else { "raw" },
            virtual_size: match image {
                Some(image) => image.virtual_size(),
                None => storage.len()?,
            },
            file_size: file.and_then(|file| file.len().ok()),
            allocated_size: file.and_then(|file| file.allocated().ok().flatten()),
            qcow2: match image {
                Some(image) => Some(Qcow2::of(image, file.map(|file| file as &dyn Storage))?),
                None => None,
            },
        })
    }

    fn text(&self, path: Option<&Path>, answer: &Answer<'_>) -> String {
        let look = answer.look;
        let mut text = format!(
            "{}: {} of {} ({} bytes)\n",
            look.bold(&path.map(shown).unwrap_or_default()),
            match self.format {
                "raw" => "a raw disk",
                _ => "a qcow2 image",
            },
            size::human(self.virtual_size),
            self.virtual_size
        );
        let mut line = |what: &str, value: String| {
            _ = writeln!(text, "  {what:<16}{value}");
        };
        if let Some(len) = self.file_size {
            let taken = match self.allocated_size {
                Some(bytes) => format!(", of which {} are on disk", size::human(bytes)),
                None => String::new(),
            };
            line("file", format!("{}{taken}", size::human(len)));
        }
        let Some(qcow2) = &self.qcow2 else {
            return text;
        };
        for (what, value) in qcow2.lines() {
            line(what, value);
        }
        if !qcow2.snapshots.is_empty() {
            text.push_str("\nSnapshots:\n");
            text.push_str(&snapshot::table_of(&qcow2.snapshots, look));
        }
        if !qcow2.bitmaps.is_empty() {
            text.push_str("\nBitmaps:\n");
            text.push_str(&bitmap::table_of(&qcow2.bitmaps, look));
        }
        text
    }
}

impl Qcow2 {
    fn of(image: &Image, file: Option<&dyn Storage>) -> Result<Self, Failure> {
        let header = image.header();
        let encryption = match header.crypt_method {
            CryptMethod::None => None,
            CryptMethod::Luks => Some(Encryption::luks(
                header.crypto().copied().map(LuksArea::from),
                file,
            )),
            _ => Some(Encryption::bare("aes")),
        };
        Ok(Self {
            version: if header.version == Version::V2 { 2 } else { 3 },
            cluster_size: header.geometry.cluster_size(),
            refcount_bits: header.geometry.refcount_bits(),
            compression_type: match header.compression_type {
                CompressionType::Zstd => "zstd",
                CompressionType::Zlib => "zlib",
            },
            extended_l2: header.geometry.extended_l2(),
            lazy_refcounts: header.compatible.lazy_refcounts(),
            dirty: header.incompatible.dirty(),
            corrupt: header.incompatible.corrupt(),
            encryption,
            backing_file: header.backing_name.as_deref().map(lossy),
            backing_format: header.backing_format().map(lossy),
            data_file: header.data_file_name().map(lossy),
            data_file_raw: header.autoclear.raw_external_data(),
            snapshots: image.snapshots()?.iter().map(SnapshotRow::of).collect(),
            bitmaps: image.bitmaps()?.iter().map(BitmapRow::of).collect(),
        })
    }

    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("version", self.version.to_string()),
            ("clusters", size::human(self.cluster_size)),
            ("refcounts", format!("{} bits", self.refcount_bits)),
            ("compression", self.compression_type.to_owned()),
        ];
        let marks: Vec<&str> = [
            (self.extended_l2, "extended L2"),
            (self.lazy_refcounts, "lazy refcounts"),
            (self.data_file_raw, "raw data file"),
        ]
        .into_iter()
        .filter_map(|(on, what)| on.then_some(what))
        .collect();
        if !marks.is_empty() {
            lines.push(("features", marks.join(", ")));
        }
        if let Some(encryption) = &self.encryption {
            lines.push(("encryption", encryption.text()));
        }
        if let Some(file) = &self.backing_file {
            let format = self.backing_format.as_deref().unwrap_or("not recorded");
            let text = format!("{} (format {})", clean(file), clean(format));
            lines.push(("backing file", text));
        }
        if let Some(file) = &self.data_file {
            lines.push(("data file", clean(file)));
        }
        if self.dirty {
            let text = "dirty: it was not closed, or is in use; the next writer recovers it";
            lines.push(("state", text.to_owned()));
        }
        if self.corrupt {
            let text = "marked as corrupt; `qcow2 repair` mends it";
            lines.push(("state", text.to_owned()));
        }
        lines
    }
}

impl Encryption {
    fn bare(method: &'static str) -> Self {
        Self {
            method,
            cipher: None,
            hash: None,
            uuid: None,
            key_slots: Vec::new(),
        }
    }

    fn luks(area: Option<LuksArea>, file: Option<&dyn Storage>) -> Self {
        let info = area
            .zip(file)
            .and_then(|(area, file)| luks::info(file, area).ok());
        let Some(info) = info else {
            return Self::bare("luks");
        };
        let slots = (0..).zip(&info.slots);
        Self {
            cipher: Some(format!("{}-{}", info.algorithm, info.mode)),
            hash: Some(info.hash.to_string()),
            uuid: Some(info.uuid.clone()),
            key_slots: slots
                .filter_map(|(number, slot)| slot.active.then_some(number))
                .collect(),
            ..Self::bare("luks")
        }
    }

    fn text(&self) -> String {
        let mut text = self.method.to_owned();
        if let Some(cipher) = &self.cipher {
            _ = write!(text, ", {cipher}");
        }
        if !self.key_slots.is_empty() {
            let slots: Vec<String> = self.key_slots.iter().map(u8::to_string).collect();
            _ = write!(text, ", key slots in use: {}", slots.join(", "));
        }
        text
    }
}
