//! Making the image of a shape, whoever made it.

use std::path::Path;
use std::sync::Arc;

use qcow2_io::{Memory, Storage};

use super::engine::Engine;
use super::failure::{Failure, OrFail};
use super::files::{Files, write_origin};
use super::qemu::Qemu;
use super::shape::{Origin, Shape};

/// Makes the files of a shape in an empty folder.
///
/// # Errors
///
/// When one can't be made.
pub fn in_folder(engine: &dyn Engine, shape: &Shape, folder: &Path) -> Result<Files, Failure> {
    let files = Files::in_folder(shape, folder)?;
    if let Origin::Qemu(steps) = &shape.origin {
        // QEMU locks what it opens.
        drop(files);
        Qemu::new(folder, shape.encryption).create(shape, steps)?;
    } else {
        make(engine, shape, &files)?;
        drop(files);
    }
    // Nobody writes to the chain any more.
    Files::reopen(shape, folder)
}

/// Makes the files of a shape in memory. What QEMU makes comes into being in `scratch`, an empty folder.
///
/// # Errors
///
/// When one can't be made; also an image of QEMU's without a folder for it.
pub fn in_memory(
    engine: &dyn Engine,
    shape: &Shape,
    scratch: Option<&Path>,
) -> Result<Files, Failure> {
    if !matches!(shape.origin, Origin::Qemu(_)) {
        let files = Files::in_memory(shape)?;
        make(engine, shape, &files)?;
        return Ok(files);
    }
    let scratch = scratch.ok_or_else(|| Failure::new("QEMU needs a folder"))?;
    let files = in_folder(engine, shape, scratch)?;
    Ok(Files {
        image: copy(&files.image)?,
        data: files.data.as_ref().map(copy).transpose()?,
        backing: files.backing.iter().map(copy).collect::<Result<_, _>>()?,
        folder: None,
    })
}

fn make(engine: &dyn Engine, shape: &Shape, files: &Files) -> Result<(), Failure> {
    match &shape.origin {
        Origin::Written(steps) => write_origin(shape, steps, files),
        Origin::Engine | Origin::Qemu(_) => engine
            .create(shape, files)
            .map_err(|refusal| Failure::from(refusal).during("creating the image")),
    }
}

/// A copy in memory.
fn copy(storage: &Arc<dyn Storage>) -> Result<Arc<dyn Storage>, Failure> {
    let len = storage.len().or_fail("asking for the length")?;
    let mut bytes = vec![0; len as usize];
    storage.read_at(&mut bytes, 0).or_fail("reading")?;
    Ok(Arc::new(Memory::from(bytes)))
}
