//! From a description to a tree of nodes.

use std::sync::Arc;

use qcow2_check::chain::MAX_LAYERS;

use super::compress::Compress;
use super::cor::CopyOnRead;
use super::{
    Access, Content, Node, NodeOptions, OpenError, blkdebug, file, name, null, overlay, qcow2,
    quorum, raw,
};
use crate::Objects;

/// What the first bytes of a qcow2 image are.
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Why a node can't be written to.
const READ_ONLY: &str = "Block node is read-only";

/// Opens trees of nodes; keeps what descriptions refer to.
#[derive(Clone, Copy, Debug)]
pub struct Opener<'a> {
    /// Secrets and other objects.
    pub objects: &'a Objects,
}

/// Opens what a file name stands for, in a format (`None`: whatever it looks like).
///
/// # Errors
///
/// Why not, in words that don't name the file.
pub fn open(
    filename: &str,
    format: Option<&str>,
    access: &Access,
    objects: &Objects,
) -> Result<Node, OpenError> {
    Opener { objects }.name(filename, format, access)
}

impl Opener<'_> {
    /// Opens what a file name stands for, in a format (`None`: whatever it looks like).
    ///
    /// # Errors
    ///
    /// Why not, in words that don't name the file.
    pub fn name(
        self,
        filename: &str,
        format: Option<&str>,
        access: &Access,
    ) -> Result<Node, OpenError> {
        let options = self.describe(filename, format)?;
        self.options(options, access)
    }

    /// What a file name stands for, in a format (`None`: whatever it looks like).
    ///
    /// # Errors
    ///
    /// When it can't be read as a description, or names an unknown protocol.
    pub fn describe(self, filename: &str, format: Option<&str>) -> Result<NodeOptions, OpenError> {
        let mut options = name::parse(filename)?;
        if let Some(format) = format {
            options.set("driver", format);
        }
        Ok(options)
    }

    /// Opens what options describe.
    ///
    /// # Errors
    ///
    /// Why not, in words that don't name the options.
    pub fn options(self, options: NodeOptions, access: &Access) -> Result<Node, OpenError> {
        if access.temporary_overlay {
            let below = Access {
                write: false,
                temporary_overlay: false,
                ..access.clone()
            };
            return overlay::on_top_of(self.node(options, &below, 1)?, access);
        }
        let mut node = self.node(options, access, 1)?;
        if access.copy_on_read {
            if !node.writable {
                return Err(OpenError::new("Can't use copy-on-read on read-only device"));
            }
            copy_on_read(&mut node);
        }
        Ok(node)
    }

    /// One node and what is below it; `layer` counts the images of the chain from 1.
    pub(super) fn node(
        self,
        mut options: NodeOptions,
        access: &Access,
        layer: usize,
    ) -> Result<Node, OpenError> {
        if layer > MAX_LAYERS {
            return Err(OpenError::new(format!(
                "The chain has more than {MAX_LAYERS} layers"
            )));
        }
        let described = options.clone();
        // What names the node for others, which this program has none of.
        options.take("node-name");
        let mut access = access.clone();
        if options.take_switch("read-only")? == Some(true) {
            access.write = false;
        }
        options.take_switch("auto-read-only")?;
        // Whoever writes looks for zeros; the description tells.
        if let Some(mode) = options.take("detect-zeroes")
            && !matches!(mode.as_str(), "off" | "on" | "unmap")
        {
            return Err(OpenError::new(format!(
                "Parameter 'detect-zeroes' does not accept value '{mode}'"
            )));
        }
        if let Some(discard) = options.take("discard") {
            access.unmap = matches!(discard.as_str(), "unmap" | "on");
        }
        if let Some(direct) = options.take_switch("cache.direct")? {
            access.direct = direct;
        }
        // Durability is not given up, whoever would allow it.
        options.take_switch("cache.no-flush")?;
        if let Some(share) = options.take_switch("force-share")? {
            access.force_share = share;
        }
        let driver = options.take("driver");
        // A format's file may be named without saying so.
        let names_itself = options.contains("filename") && !options.contains("file.filename");
        if names_itself
            && matches!(
                driver.as_deref(),
                None | Some("qcow2" | "raw" | "copy-on-read" | "compress")
            )
        {
            let name = options.take("filename").unwrap_or_default();
            options.set("file.filename", name);
        }
        match driver.as_deref() {
            Some("file") => return file::open("file", options, described, &access),
            Some("host_device") => return file::open("host_device", options, described, &access),
            Some("host_cdrom") => return file::open("host_cdrom", options, described, &access),
            Some("null-co") => return null::open("null-co", options, described, &access),
            Some("null-aio") => return null::open("null-aio", options, described, &access),
            Some("copy-on-read") => {
                let (below, _) = options.take_child("file");
                let mut node = self.node(below, &access, layer)?;
                if !node.writable {
                    return Err(OpenError::new(READ_ONLY));
                }
                copy_on_read(&mut node);
                return Ok(node);
            }
            Some("quorum") => return quorum::open(self, options, described, &access, layer),
            Some("compress") => {
                let (below, _) = options.take_child("file");
                let mut node = self.node(below, &access, layer)?;
                let Content::Image(image) = &node.content else {
                    return Err(OpenError::new("Compression is not supported for this node"));
                };
                let filter = Compress::new(Arc::clone(image));
                node.content = Content::Filtered(Arc::clone(image), Arc::new(filter));
                return Ok(node);
            }
            Some("blkdebug") => {
                let (mut below, _) = options.take_child("image");
                let name = options.take("filename");
                if let Some(name) = name.filter(|_| !below.contains("filename")) {
                    below.set("filename", name);
                }
                if below.is_empty() {
                    below = match options.take("x-image") {
                        Some(name) => name::parse(&name)?,
                        None => {
                            return Err(OpenError::new(
                                "A block device must be specified for \"image\"",
                            ));
                        }
                    };
                }
                if below.text("driver").is_none() {
                    below.set_default("driver", "file");
                }
                let below = self.node(below, &access, layer)?;
                check_writable(&below, &access)?;
                return blkdebug::open(options, described, below);
            }
            Some("raw" | "qcow2") | None => {}
            Some(other) => return Err(OpenError::new(format!("Unknown driver '{other}'"))),
        }
        let (mut below, _) = options.take_child("file");
        below.set_default("driver", "file");
        let below = self.node(below, &access, layer)?;
        check_writable(&below, &access)?;
        let driver = match driver.as_deref() {
            Some(driver) => driver.to_owned(),
            None => probe(&below).to_owned(),
        };
        if driver == "raw" {
            return raw::open(options, described, below);
        }
        qcow2::open(self, options, described, below, &access, layer)
    }
}

/// Refuses to write to what is on top of a node that nothing can be written to.
fn check_writable(below: &Node, access: &Access) -> Result<(), OpenError> {
    if access.write && !below.writable {
        return Err(OpenError::new(READ_ONLY));
    }
    Ok(())
}

/// Lets a node keep what it reads from its backing chain.
fn copy_on_read(node: &mut Node) {
    if let Content::Image(image) = &node.content {
        let copies = CopyOnRead::new(Arc::clone(image));
        node.content = Content::Filtered(Arc::clone(image), Arc::new(copies));
    }
}

/// Which format this looks like.
fn probe(node: &Node) -> &'static str {
    let mut start = [0; 4];
    match node.storage().read_at(&mut start, 0) {
        Ok(()) if start == MAGIC => "qcow2",
        _ => "raw",
    }
}
