//! A temporary overlay: what is written is gone afterwards.

use std::sync::Arc;

use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::{Memory, Storage};

use super::{Access, Content, Node, OpenError};
use crate::words::system;

/// Puts an overlay in memory on top of a node.
pub(super) fn on_top_of(node: Node, access: &Access) -> Result<Node, OpenError> {
    let failed =
        |text: String| OpenError::new(format!("Could not create temporary overlay: {text}"));
    let size = node
        .storage()
        .len()
        .map_err(|error| failed(system::describe(&error)))?;
    let memory = Memory::new();
    Image::create(&memory, &CreateOptions::new(size)).map_err(|error| failed(error.to_string()))?;
    let options = Image::options().discard(access.unmap);
    let options = match &node.content {
        Content::Image(image) => options.backing_image(Arc::clone(image)),
        Content::Filtered(_, storage) | Content::Plain(storage) => {
            options.backing(Arc::clone(storage))
        }
    };
    let image = options
        .open(Arc::new(memory))
        .map_err(|error| OpenError::of_image(&error))?;
    Ok(Node {
        driver: "qcow2",
        filename: node.filename.clone(),
        options: node.options.clone(),
        content: Content::Image(Arc::new(image)),
        children: vec![("backing", node)],
        writable: true,
        debug: None,
    })
}
