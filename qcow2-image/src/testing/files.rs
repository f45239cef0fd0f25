//! The files of an image: itself, its data file, the chain below; and what they hold before a program runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_check::synth::{self, Builder, Zero};
use qcow2_format::GuestCluster;
use qcow2_format::header::{Extension, Version};
use qcow2_io::{File, FileOptions, Memory, Storage};

use super::content::Content;
use super::failure::{Failure, OrFail};
use super::shape::{DataFile, Format, Layer, Origin, Shape, Step};

/// Name of the image.
pub(super) const IMAGE_NAME: &str = "image.qcow2";
/// Name of its data file.
pub(super) const DATA_NAME: &str = "data.raw";

/// Name of a file below the image; 0 is the nearest.
pub(super) fn layer_name(index: usize) -> String {
    format!("layer{index}.img")
}

/// The format of a layer, as images record it.
pub(super) fn layer_format(layer: &Layer) -> &'static str {
    match layer {
        Layer::Raw { .. } => "raw",
        Layer::Qcow2 { .. } => "qcow2",
    }
}

/// The files of one image.
#[derive(Clone, Debug)]
pub struct Files {
    /// The image.
    pub image: Arc<dyn Storage>,
    /// Its data file.
    pub data: Option<Arc<dyn Storage>>,
    /// The chain below, the nearest first.
    pub backing: Vec<Arc<dyn Storage>>,
    /// The folder they lie in, if any.
    pub folder: Option<PathBuf>,
}

impl Files {
    /// Files in memory, with the chain written and the image and data file empty.
    ///
    /// # Errors
    ///
    /// When the chain can't be written.
    pub fn in_memory(shape: &Shape) -> Result<Self, Failure> {
        Self::make(shape, None, |_| Ok(Arc::new(Memory::new())))
    }

    /// New files in a folder, with the chain written and the image and data file empty.
    ///
    /// # Errors
    ///
    /// When a file can't be made.
    pub fn in_folder(shape: &Shape, folder: &Path) -> Result<Self, Failure> {
        let options = FileOptions::new().write(true).create(true).truncate(true);
        Self::make(shape, Some(folder), |name| open(&options, folder, name))
    }

    /// The files that lie in a folder.
    ///
    /// # Errors
    ///
    /// When a file can't be opened.
    pub fn reopen(shape: &Shape, folder: &Path) -> Result<Self, Failure> {
        let (write, read) = (FileOptions::new().write(true), FileOptions::new());
        let data = (shape.data_file != DataFile::None)
            .then(|| open(&write, folder, DATA_NAME))
            .transpose()?;
        let backing = (0..shape.backing.len())
            .map(|index| open(&read, folder, &layer_name(index)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            image: open(&write, folder, IMAGE_NAME)?,
            data,
            backing,
            folder: Some(folder.to_owned()),
        })
    }

    fn make(
        shape: &Shape,
        folder: Option<&Path>,
        file: impl Fn(&str) -> Result<Arc<dyn Storage>, Failure>,
    ) -> Result<Self, Failure> {
        let mut backing = Vec::new();
        for (index, layer) in shape.backing.iter().enumerate() {
            let storage = file(&layer_name(index))?;
            write_layer(layer, shape.backing.get(index + 1), index + 1, &*storage)?;
            backing.push(storage);
        }
        Ok(Self {
            image: file(IMAGE_NAME)?,
            data: (shape.data_file != DataFile::None)
                .then(|| file(DATA_NAME))
                .transpose()?,
            backing,
            folder: folder.map(Path::to_owned),
        })
    }
}

fn open(options: &FileOptions, folder: &Path, name: &str) -> Result<Arc<dyn Storage>, Failure> {
    let file: File = options.open(folder.join(name)).or_fail(name)?;
    Ok(Arc::new(file))
}

fn write_layer(
    layer: &Layer,
    below: Option<&Layer>,
    below_index: usize,
    storage: &dyn Storage,
) -> Result<(), Failure> {
    match layer {
        Layer::Raw { .. } => {
            let bytes = layer_content(layer, &[]);
            storage.set_len(layer.size()).or_fail("a raw layer")?;
            for (offset, len) in stretches(layer.size()) {
                let part = &bytes[offset as usize..(offset + len) as usize];
                storage.write_at(part, offset).or_fail("a raw layer")?;
            }
            Ok(())
        }
        Layer::Qcow2 { format, steps } => {
            let below = below.map(|layer| (layer_name(below_index), layer_format(layer)));
            write_image(format, steps, below, storage)
        }
    }
}

/// Where a raw layer has data.
fn stretches(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let step = (size / 7).max(700);
    (0..size)
        .step_by(2 * step as usize)
        .map(move |start| (start, step.min(size - start)))
}

/// Writes the image of a shape whose origin is [`Origin::Written`].
///
/// # Errors
///
/// When it can't be made so.
pub(super) fn write_origin(shape: &Shape, steps: &[Step], files: &Files) -> Result<(), Failure> {
    let below = shape
        .backing
        .first()
        .map(|layer| (layer_name(0), layer_format(layer)));
    write_image(&shape.format, steps, below, &*files.image)
}

fn write_image(
    format: &Format,
    steps: &[Step],
    below: Option<(String, &'static str)>,
    storage: &dyn Storage,
) -> Result<(), Failure> {
    let version = if format.version == 2 {
        Version::V2
    } else {
        Version::V3
    };
    let mut image = Builder::new(version, format.geometry(), format.size);
    if format.lazy_refcounts {
        image.header.compatible.set_lazy_refcounts(true);
    }
    if let Some((name, kind)) = below {
        image.header.backing_name = Some(name.into());
        let extension = Extension::BackingFormat(kind.as_bytes().to_vec());
        image.header.extensions.push(extension);
    }
    let cluster_size = format.cluster_size();
    let mut snapshots = 0;
    for step in steps {
        match *step {
            Step::Data { cluster, content } => {
                let offset = cluster * cluster_size;
                let len = cluster_size.min(format.size - offset);
                let bytes = content.bytes(offset, len as usize);
                image.data(GuestCluster::new(cluster), &bytes).map(|_| ())
            }
            Step::Zero { cluster, allocated } => {
                let zero = if allocated {
                    Zero::Allocated
                } else {
                    Zero::Plain
                };
                image.zero(GuestCluster::new(cluster), zero)
            }
            Step::Compressed { cluster, byte } => {
                let payload = synth::deflate(&vec![byte; cluster_size as usize]);
                let guest = GuestCluster::new(cluster);
                image.compressed(guest, &payload).map(|_| ())
            }
            Step::Subclusters {
                cluster,
                bitmap,
                content,
            } => {
                let offset = cluster * cluster_size;
                let len = cluster_size.min(format.size - offset);
                let bytes = content.bytes(offset, len as usize);
                let guest = GuestCluster::new(cluster);
                image.subclusters(guest, bitmap, &bytes).map(|_| ())
            }
            Step::Snapshot => {
                snapshots += 1;
                image.snapshot(&format!("s{snapshots}"), &[])
            }
        }
        .or_fail("writing an image")?;
    }
    image.finish(storage).or_fail("writing an image")
}

/// What a guest sees before the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct First {
    /// The disk.
    pub disk: Vec<u8>,
    /// The disk as each snapshot has it.
    pub snapshots: Vec<Vec<u8>>,
}

impl First {
    /// What the guest sees of this shape.
    pub fn of(shape: &Shape) -> Self {
        let below = chain_content(&shape.backing);
        let steps: &[Step] = match &shape.origin {
            Origin::Engine => &[],
            Origin::Written(steps) | Origin::Qemu(steps) => steps,
        };
        apply_steps(&shape.format, steps, &below)
    }
}

/// What a chain shows; as long as its first file.
fn chain_content(chain: &[Layer]) -> Vec<u8> {
    let Some((first, rest)) = chain.split_first() else {
        return Vec::new();
    };
    layer_content(first, &chain_content(rest))
}

fn layer_content(layer: &Layer, below: &[u8]) -> Vec<u8> {
    match layer {
        Layer::Raw { size, content } => {
            let mut bytes = vec![0; *size as usize];
            for (offset, len) in stretches(*size) {
                content.fill(offset, &mut bytes[offset as usize..(offset + len) as usize]);
            }
            bytes
        }
        Layer::Qcow2 { format, steps } => apply_steps(format, steps, below).disk,
    }
}

fn apply_steps(format: &Format, steps: &[Step], below: &[u8]) -> First {
    let mut below = below.to_vec();
    below.resize(format.size as usize, 0);
    let mut disk = below.clone();
    let mut snapshots = Vec::new();
    let cluster_size = format.cluster_size();
    let bytes_of = |cluster: u64| {
        let start = cluster * cluster_size;
        start as usize..(start + cluster_size).min(format.size) as usize
    };
    for step in steps {
        match *step {
            Step::Data { cluster, content } => {
                let bytes = bytes_of(cluster);
                content.fill(bytes.start as u64, &mut disk[bytes]);
            }
            Step::Zero { cluster, .. } => disk[bytes_of(cluster)].fill(0),
            Step::Compressed { cluster, byte } => disk[bytes_of(cluster)].fill(byte),
            Step::Subclusters {
                cluster,
                bitmap,
                content,
            } => {
                let bytes = bytes_of(cluster);
                let part = cluster_size as usize / 32;
                for index in 0..32 {
                    let start = (bytes.start + index * part).min(bytes.end);
                    let place = start..(start + part).min(bytes.end);
                    if bitmap >> index & 1 == 1 {
                        content.fill(place.start as u64, &mut disk[place]);
                    } else if bitmap >> (index + 32) & 1 == 1 {
                        Content::Zeros.fill(0, &mut disk[place]);
                    } else {
                        disk[place.clone()].copy_from_slice(&below[place]);
                    }
                }
            }
            Step::Snapshot => snapshots.push(disk.clone()),
        }
    }
    First { disk, snapshots }
}
