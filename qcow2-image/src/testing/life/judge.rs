//! Whether an image is what the model says.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use qcow2_check::chain::References;
use qcow2_check::{Options, Severity, check};
use qcow2_io::{FileOptions, LockMode, Storage as _};

use super::super::failure::{Failure, OrFail};
use super::deed::Deed;
use super::model::Model;
use super::{BASES, IMAGE, ours, theirs};
use crate::{BitmapState, Image, SnapshotKey};

/// Reads all, here and by QEMU, and has it checked by both. What a bitmap has beyond what it must have is taken over.
pub(super) fn judge(model: &mut Model, deed: &Deed, folder: &Path) -> Result<(), Failure> {
    checked(folder)?;
    let image = ours::open(folder, false, false)?;
    compare("the disk", &all(&image)?, &model.disk, model)?;
    header(&image, model)?;
    bitmaps(&image, model, deed)?;
    drop(image);
    for kept in &model.snapshots {
        let options = Image::options()
            .read_only(true)
            .snapshot(SnapshotKey::Name(kept.name.clone().into_bytes()))
            .references(References::SameDirectory);
        let image = options
            .open_path(folder.join(IMAGE))
            .or_fail("opening a snapshot")?;
        compare(&kept.name, &all(&image)?, &kept.disk, model)?;
    }
    theirs::run("qemu-img", &["check", "-q", "-f", "qcow2", IMAGE], folder)?;
    theirs::run(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", IMAGE, "read.raw"],
        folder,
    )?;
    let read = fs::read(folder.join("read.raw")).or_fail("reading what QEMU read")?;
    compare("the disk, read by QEMU", &read, &model.disk, model)?;
    for (name, bytes) in BASES.iter().zip(&model.bases) {
        let found = fs::read(folder.join(name)).or_fail("reading a base")?;
        compare(name, &found, bytes, model)?;
    }
    Ok(())
}

fn all(image: &Image) -> Result<Vec<u8>, Failure> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read_at(&mut bytes, 0).or_fail("reading the disk")?;
    Ok(bytes)
}

fn compare(what: &str, found: &[u8], expected: &[u8], model: &Model) -> Result<(), Failure> {
    if found.len() != expected.len() {
        return Err(Failure::new(format!(
            "{what} has {} bytes instead of {}",
            found.len(),
            expected.len()
        )));
    }
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(Failure::new(format!(
            "{what} has {:#04x} instead of {:#04x} at {at:#x} (below are {:#x} bytes)",
            found[at],
            expected[at],
            model.below_len()
        ))),
    }
}

fn checked(folder: &Path) -> Result<(), Failure> {
    let file = FileOptions::new().lock(LockMode::None);
    let file = file
        .open(folder.join(IMAGE))
        .or_fail("opening the image to check it")?;
    let report = check(&file, &Options::default());
    let mut found = report.findings.iter();
    match found.find(|finding| finding.code.severity() >= Severity::Leak) {
        None => Ok(()),
        Some(finding) => Err(Failure::new(format!("the checker says: {finding:?}"))),
    }
}

fn header(image: &Image, model: &Model) -> Result<(), Failure> {
    let header = image.header();
    let found = (
        header.version,
        header.geometry.refcount_bits(),
        header.compatible.lazy_refcounts(),
        header.backing_name.is_some(),
    );
    let expected = (
        model.version,
        model.refcount_bits as u32,
        model.lazy_refcounts,
        model.backing.is_some(),
    );
    if found == expected {
        return Ok(());
    }
    Err(Failure::new(format!(
        "the header has {found:?} instead of {expected:?}"
    )))
}

fn bitmaps(image: &Image, model: &mut Model, deed: &Deed) -> Result<(), Failure> {
    let infos = image.bitmaps().or_fail("listing bitmaps")?;
    let names: BTreeSet<String> = infos
        .iter()
        .map(|info| String::from_utf8_lossy(&info.name).into_owned())
        .collect();
    if !names.iter().eq(model.bitmaps.keys()) || names.len() != infos.len() {
        return Err(Failure::new(format!(
            "the bitmaps are {names:?} instead of {:?}",
            model.bitmaps.keys()
        )));
    }
    // What these touch beside the disk's content is theirs to say.
    let exact = !matches!(
        deed,
        Deed::ApplySnapshot { .. } | Deed::Rebase { .. } | Deed::Commit | Deed::Resize { .. }
    );
    let size = model.size();
    for info in &infos {
        let name = String::from_utf8_lossy(&info.name).into_owned();
        let Some(bits) = model.bitmaps.get_mut(&name) else {
            continue;
        };
        let mut dirty = BTreeSet::new();
        for range in image.dirty_ranges(&info.name, 0..size) {
            let range = range.or_fail("reading a bitmap")?;
            dirty.extend(range.start / bits.granularity..range.end.div_ceil(bits.granularity));
        }
        let wrong = if exact {
            bits.dirty != dirty
        } else {
            !bits.dirty.is_subset(&dirty)
        };
        let usable = info.state == BitmapState::Consistent;
        if wrong || !usable || info.granularity != bits.granularity || info.auto != bits.enabled {
            return Err(Failure::new(format!(
                "the bitmap is {info:?} with {dirty:?} instead of {bits:?}"
            )));
        }
        bits.dirty = dirty;
    }
    Ok(())
}
