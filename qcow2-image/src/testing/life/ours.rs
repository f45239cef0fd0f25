//! Deeds done by the engine.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use qcow2_check::chain::References;
use qcow2_io::{Storage as _, ZeroFlags};

use super::super::failure::{Failure, OrFail};
use super::deed::Deed;
use super::model::Model;
use super::{BASES, IMAGE};
use crate::chain::BackingFile;
use crate::commit::CommitOptions;
use crate::compact::{CompactMode, CompactOptions};
use crate::create::CreateOptions;
use crate::rebase::RebaseOptions;
use crate::{AmendOptions, BitmapOptions, Image, ResizeOptions, SnapshotKey, SnapshotOptions};

/// Makes the image and what it may lie over.
pub(super) fn bear(model: &Model, folder: &Path) -> Result<(), Failure> {
    for (name, bytes) in BASES.iter().zip(&model.bases) {
        fs::write(folder.join(name), bytes).or_fail("writing a base")?;
    }
    let mut options = CreateOptions::new(model.size())
        .cluster_size(1 << model.cluster_bits)
        .extended_l2(model.extended_l2)
        .refcount_bits(model.refcount_bits)
        .lazy_refcounts(model.lazy_refcounts);
    if let Some(number) = model.backing {
        options = options.backing_file(BASES[number], "raw");
    }
    let file = qcow2_io::FileOptions::new().write(true).create(true);
    let file = file.open(folder.join(IMAGE)).or_fail("creating the file")?;
    Image::create(&file, &options).or_fail("creating the image")
}

pub(super) fn open(folder: &Path, write: bool, below: bool) -> Result<Image, Failure> {
    let mut options = Image::options()
        .read_only(!write)
        .references(References::SameDirectory);
    if below {
        options = options.writable_layer(1);
    }
    options
        .open_path(folder.join(IMAGE))
        .or_fail("opening the image")
}

/// Opens the image, does a deed and closes it.
pub(super) fn work(deed: &Deed, folder: &Path) -> Result<(), Failure> {
    let mut image = open(folder, true, matches!(deed, Deed::Commit))?;
    let key = |name: &str| SnapshotKey::Name(name.as_bytes().to_vec());
    let amend =
        |image: &mut Image, options: AmendOptions<'_>| image.amend(&options).or_fail("amending");
    match deed {
        Deed::Write { offset, len, byte } => image
            .write_at(&vec![*byte; *len as usize], *offset)
            .or_fail("writing")?,
        Deed::Zero { offset, len, unmap } => {
            let flags = if *unmap {
                ZeroFlags::MAY_UNMAP
            } else {
                ZeroFlags::NONE
            };
            image
                .write_zeroes(*offset..offset + len, flags)
                .or_fail("zeroing")?;
        }
        Deed::Resize { size } => {
            let options = ResizeOptions {
                shrink: true,
                ..ResizeOptions::default()
            };
            image.resize(*size, options).or_fail("resizing")?;
        }
        Deed::TakeSnapshot { name } => image
            .create_snapshot(&SnapshotOptions::new(name.as_str()))
            .map(drop)
            .or_fail("taking a snapshot")?,
        Deed::ApplySnapshot { name } => image
            .apply_snapshot(&key(name))
            .or_fail("applying a snapshot")?,
        Deed::DeleteSnapshot { name } => image
            .delete_snapshot(&key(name))
            .or_fail("deleting a snapshot")?,
        Deed::AddBitmap {
            name,
            granularity,
            enabled,
        } => {
            let options = BitmapOptions::new()
                .granularity(*granularity)
                .enabled(*enabled);
            image
                .create_bitmap(name.as_bytes(), &options)
                .or_fail("adding a bitmap")?;
        }
        Deed::RemoveBitmap { name } => image
            .remove_bitmap(name.as_bytes())
            .or_fail("removing a bitmap")?,
        Deed::ClearBitmap { name } => image
            .clear_bitmap(name.as_bytes())
            .or_fail("clearing a bitmap")?,
        Deed::EnableBitmap { name } => image
            .enable_bitmap(name.as_bytes())
            .or_fail("enabling a bitmap")?,
        Deed::DisableBitmap { name } => image
            .disable_bitmap(name.as_bytes())
            .or_fail("disabling a bitmap")?,
        Deed::MergeBitmap { into, from } => image
            .merge_bitmap(into.as_bytes(), &image, from.as_bytes())
            .or_fail("merging bitmaps")?,
        Deed::Rebase { to } => {
            let base = match to {
                None => None,
                Some(number) => {
                    let file = qcow2_io::File::open(folder.join(BASES[*number]));
                    let file = Arc::new(file.or_fail("opening a base")?);
                    Some(BackingFile::raw(BASES[*number], file))
                }
            };
            image
                .rebase(base.as_ref(), &RebaseOptions::new())
                .map(drop)
                .or_fail("rebasing")?;
        }
        Deed::Commit => image
            .commit(&CommitOptions::new())
            .map(drop)
            .or_fail("committing")?,
        Deed::AmendVersion { version } => {
            // Lazy refcounts have to go before.
            let options = AmendOptions::new().version(*version).lazy_refcounts(false);
            amend(&mut image, options)?;
        }
        Deed::AmendRefcountBits { bits } => {
            amend(&mut image, AmendOptions::new().refcount_bits(*bits))?;
        }
        Deed::AmendLazyRefcounts { on } => {
            amend(&mut image, AmendOptions::new().lazy_refcounts(*on))?;
        }
        Deed::Compact { sequential } => {
            let mode = if *sequential {
                CompactMode::Sequential
            } else {
                CompactMode::Truncate
            };
            image
                .compact(&CompactOptions::new().mode(mode))
                .map(drop)
                .or_fail("compacting")?;
        }
    }
    image.close().or_fail("closing the image")
}
