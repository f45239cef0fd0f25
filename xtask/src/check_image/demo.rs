//! Images to try the command on, made without QEMU.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use qcow2_check::synth::{
    DEMO_BACKING_NAME, SynthError, demo, demo_base, demo_extended, demo_luks,
};
use qcow2_io::{FileOptions, Storage};

use crate::cargo::workspace_root;

/// Makes images that between them have every kind of structure, in a folder below `target/`. Gives those to be audited.
///
/// # Errors
///
/// The folder or a file in it can't be written.
pub(crate) fn make() -> Result<Vec<PathBuf>> {
    type Writer = fn(&dyn Storage) -> Result<(), SynthError>;
    const IMAGES: [(&str, Writer); 4] = [
        ("demo.qcow2", demo),
        ("demo-extended.qcow2", demo_extended),
        ("demo-luks.qcow2", demo_luks),
        (DEMO_BACKING_NAME, demo_base),
    ];
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace_root().join("target"), PathBuf::from);
    let folder = target.join("demo-images");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut paths = Vec::new();
    for (name, write) in IMAGES {
        let path = folder.join(name);
        FileOptions::new()
            .write(true)
            .create(true)
            .open(&path)
            .map_err(SynthError::from)
            .and_then(|file| write(&file))
            .with_context(|| path.display().to_string())?;
        paths.push(path);
    }
    Ok(paths)
}
