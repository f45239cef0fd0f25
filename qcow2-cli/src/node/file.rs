//! The driver `file`: a file or block device of the host.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::sync::Arc;

use qcow2_io::{FileOptions, LockMode, Memory, Storage};

use super::{Access, Content, Node, NodeOptions, OpenError};
use crate::words::outside;

/// Refuses what is not of the kind that the driver is for.
fn check_kind(driver: &str, name: &str, write: bool) -> Result<(), OpenError> {
    // What is not there is refused when it is opened.
    let Ok(kind) = fs::metadata(outside::path(name)).map(|found| found.file_type()) else {
        return Ok(());
    };
    if kind.is_dir() && write {
        return Err(OpenError::new(format!(
            "Could not open '{name}': Is a directory"
        )));
    }
    if kind.is_dir() {
        return Err(OpenError::new(match driver {
            "file" => format!("'file' driver requires '{name}' to be a regular file"),
            _ => format!(
                "'{driver}' driver requires '{name}' to be either a character or block device"
            ),
        }));
    }
    let is_device = kind.is_block_device() || kind.is_char_device();
    match driver {
        "file" if kind.is_char_device() => Err(OpenError::new(format!(
            "'file' driver requires '{name}' to be a regular file"
        ))),
        "file" => Ok(()),
        _ if is_device => Ok(()),
        _ => Err(OpenError::new(format!(
            "'{driver}' driver requires '{name}' to be either a character or block device"
        ))),
    }
}

pub(super) fn open(
    driver: &'static str,
    mut options: NodeOptions,
    described: NodeOptions,
    access: &Access,
) -> Result<Node, OpenError> {
    let name = options
        .take("filename")
        .ok_or_else(|| OpenError::new("A block device must be specified for \"file\""))?;
    check_kind(driver, &name, access.write)?;
    let path = outside::path(&name);
    if fs::metadata(&path).is_ok_and(|found| found.file_type().is_char_device()) {
        return Ok(empty_device(driver, name, described, access));
    }
    let mut file = FileOptions::new().write(access.write).direct(access.direct);
    if options.take("locking").as_deref() == Some("off") {
        file = file.lock(LockMode::None);
    }
    if access.force_share && !access.write {
        file = file.force_share(true);
    }
    let native = match options.take("aio").as_deref() {
        None => access.native,
        Some("native") => true,
        Some("threads" | "io_uring") => false,
        Some(other) => return Err(OpenError::new(format!("invalid parameter value: {other}"))),
    };
    // Which of them is used makes no difference here, but who asks for it is told what it would need.
    if native && !access.direct {
        return Err(OpenError::new(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    if let Some(key) = options.first_key() {
        return Err(OpenError::new(format!(
            "Block protocol 'file' doesn't support the option '{key}'"
        )));
    }
    let storage = file
        .open(&path)
        .map_err(|error| OpenError::of_file(&name, &error))?;
    Ok(Node {
        driver,
        filename: name,
        options: described,
        content: Content::Plain(Arc::new(storage) as Arc<dyn Storage>),
        children: Vec::new(),
        writable: access.write,
        debug: None,
    })
}

/// A character device has no bytes of its own.
fn empty_device(
    driver: &'static str,
    name: String,
    described: NodeOptions,
    access: &Access,
) -> Node {
    Node {
        driver,
        filename: name,
        options: described,
        content: Content::Plain(Arc::new(Memory::new())),
        children: Vec::new(),
        writable: access.write,
        debug: None,
    }
}
