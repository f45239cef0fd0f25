//! The engine of this crate, as the harness sees it.

use std::ops::Range;
use std::sync::Arc;

use qcow2_alloc::PassDiscard;
use qcow2_cache::Rules;
use qcow2_check::chain::References;
use qcow2_format::header::{CompressionType, Version};
use qcow2_io::Storage;
use qcow2_io::cipher::{Algorithm, Hash, IvGenerator, Mode, Secret};
use qcow2_io::codec::Level;

use super::engine::{Engine, Refusal, Subject};
use super::failure::Failure;
use super::files::{DATA_NAME, Files, IMAGE_NAME, layer_format, layer_name};
use super::shape::{CacheSize, DataFile, Encryption, Layer, PASSPHRASE, Shape};
use crate::create::{CreateError, CreateOptions, Preallocation, write_image};
use crate::luks::{KeyCost, LuksOptions};
use crate::{CacheOptions, Image, ImageError, ImageOptions, ResizeOptions};

/// Images as they are; with all rules of crash safety, unless one is switched off to show that its absence is noticed.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealEngine {
    /// The rules that are kept.
    pub rules: Rules,
}

impl Engine for RealEngine {
    fn create(&self, shape: &Shape, files: &Files) -> Result<(), Refusal> {
        let format = &shape.format;
        let mut options = CreateOptions::new(format.size)
            .version(if format.version == 2 {
                Version::V2
            } else {
                Version::V3
            })
            .cluster_size(format.cluster_size())
            .refcount_bits(1 << format.refcount_order)
            .preallocation(shape.preallocation)
            .lazy_refcounts(format.lazy_refcounts)
            .extended_l2(format.extended_l2);
        if format.zstd {
            options = options.compression_type(CompressionType::Zstd);
        }
        if let Some(layer) = shape.backing.first() {
            options = options.backing_file(layer_name(0), layer_format(layer));
        }
        if shape.data_file != DataFile::None {
            options = options
                .data_file(DATA_NAME)
                .data_file_raw(shape.data_file == DataFile::Raw);
        }
        // Short keys, since each state of an image is a copy of it all.
        let luks = LuksOptions::new()
            .algorithm(Algorithm::Aes128)
            .mode(Mode::Cbc)
            .iv_generator(IvGenerator::Essiv(Hash::Sha256))
            .cost(KeyCost::Iterations(1000));
        options = match shape.encryption {
            Encryption::None => options,
            Encryption::Aes => options.legacy_aes(secret()),
            Encryption::Luks => options.luks(luks, secret()),
        };
        write_image(&*files.image, files.data.as_deref(), &options)?;
        Ok(())
    }

    fn open(
        &self,
        shape: &Shape,
        files: &Files,
        read_only: bool,
    ) -> Result<Box<dyn Subject>, Refusal> {
        let mut options = with_rules(Image::options(), self.rules)
            .read_only(read_only)
            .cache(cache(shape))
            .discard_no_unref(shape.tuning.discard_no_unref)
            .pass_discard(PassDiscard {
                request: shape.tuning.pass_discard,
                snapshot: shape.tuning.pass_discard,
                other: !shape.tuning.pass_discard,
            });
        if let Some(lazy) = shape.tuning.lazy_refcounts {
            options = options.lazy_refcounts(lazy);
        }
        if shape.encryption != Encryption::None {
            options = options.secret(secret());
        }
        if let Some(data) = &files.data {
            options = options.data_file(Arc::clone(data));
        }
        options = match (&files.folder, shape.tuning.cache) {
            // The engine finds the chain by itself.
            (Some(folder), CacheSize::Default) => options
                .references(References::SameDirectory)
                .path(folder.join(IMAGE_NAME)),
            _ => match chain(&shape.backing, &files.backing)? {
                Some(backing) => options.backing(backing),
                None => options,
            },
        };
        let image = options.open(Arc::clone(&files.image))?;
        Ok(Box::new(image))
    }
}

fn secret() -> Secret {
    Secret::new(PASSPHRASE.as_bytes().to_vec())
}

/// Opens the layers from the last to the first.
fn chain(
    layers: &[Layer],
    files: &[Arc<dyn Storage>],
) -> Result<Option<Arc<dyn Storage>>, ImageError> {
    let mut below: Option<Arc<dyn Storage>> = None;
    for (layer, file) in layers.iter().zip(files).rev() {
        let file = Arc::clone(file);
        below = Some(match layer {
            Layer::Raw { .. } => file,
            Layer::Qcow2 { .. } => {
                let options = Image::options().read_only(true);
                let options = match below {
                    Some(below) => options.backing(below),
                    None => options,
                };
                Arc::new(options.open(file)?)
            }
        });
    }
    Ok(below)
}

fn with_rules(options: ImageOptions, rules: Rules) -> ImageOptions {
    options.rules(rules)
}

fn cache(shape: &Shape) -> CacheOptions {
    let options = CacheOptions::new();
    match shape.tuning.cache {
        CacheSize::Default => options,
        CacheSize::Tiny => options.l2_bytes(0).refcount_bytes(0).l2_slice_bytes(512),
        CacheSize::Slices => options
            .l2_bytes(4 * shape.format.cluster_size())
            .l2_slice_bytes(512),
    }
}

impl Subject for Image {
    fn disk(&self) -> &dyn Storage {
        self
    }

    fn discard_whole(&self, range: Range<u64>) -> Result<(), Refusal> {
        Ok(Image::discard_whole(self, range)?)
    }

    fn pack(&self, bytes: &[u8], offset: u64) -> Result<(), Refusal> {
        Ok(self.write_compressed(bytes, offset, Level::default())?)
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<(), Refusal> {
        let options = ResizeOptions {
            preallocation,
            shrink: true,
        };
        Ok(Image::resize(self, size, options)?)
    }

    fn close(self: Box<Self>) -> Result<(), Refusal> {
        Ok(Image::close(*self)?)
    }
}

impl From<ImageError> for Refusal {
    fn from(error: ImageError) -> Self {
        Self {
            kind: Some(error.kind()),
            text: Failure::of("refused", &error).to_string(),
        }
    }
}

impl From<CreateError> for Refusal {
    fn from(error: CreateError) -> Self {
        Self::of(&error)
    }
}
