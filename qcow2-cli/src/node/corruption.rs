//! What is said when an image is found corrupt.

use qcow2_image::{Kinds, MetadataError, PointerKind, Purpose, Watcher};

use crate::Console;

/// Says it as the reference programs do, the first time.
pub(super) fn watcher(is_writable: bool) -> Watcher {
    Watcher::new(move |error| {
        let text = text(error);
        let (event, kind) = if is_writable {
            ("Marking image as corrupt", "corruption")
        } else {
            ("Image is corrupt", "non-fatal corruption")
        };
        Console::warn(format_args!(
            "qcow2: {event}: {text}; further {kind} events will be suppressed\n"
        ));
    })
}

fn text(error: &MetadataError) -> String {
    match error {
        MetadataError::BadPointer {
            what: PointerKind::RefcountTable,
            index,
            found,
            ..
        } => format!(
            "Refblock offset {} unaligned (reftable index: {})",
            hex(found.get()),
            hex(*index)
        ),
        MetadataError::BadPointer {
            what: PointerKind::L1,
            index,
            found,
            ..
        } => format!(
            "L2 table offset {} unaligned (L1 index: {})",
            hex(found.get()),
            hex(*index)
        ),
        MetadataError::InUse {
            cluster,
            wanted: wanted @ (Purpose::L2Table | Purpose::RefcountBlock | Purpose::Compressed),
            ..
        } if cluster.get() == 0 => {
            let what = match wanted {
                Purpose::L2Table => "L2 table",
                Purpose::RefcountBlock => "refcount block",
                _ => "compressed cluster",
            };
            format!("Preventing invalid allocation of {what} at offset 0")
        }
        MetadataError::Overlap { kinds, .. } | MetadataError::InUse { kinds, .. } => format!(
            "Preventing invalid write on metadata (overlaps with {})",
            name(*kinds)
        ),
        other => other.to_string(),
    }
}

/// A number as they write it, without a prefix before a mere 0.
fn hex(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        _ => format!("{number:#x}"),
    }
}

/// What the reference programs call the first of these kinds.
fn name(kinds: Kinds) -> String {
    let names = [
        (Kinds::MAIN_HEADER, "qcow2_header"),
        (Kinds::ACTIVE_L1, "active L1 table"),
        (Kinds::ACTIVE_L2, "active L2 table"),
        (Kinds::REFCOUNT_BLOCK, "refcount block"),
        (Kinds::REFCOUNT_TABLE, "refcount table"),
        (Kinds::SNAPSHOT_TABLE, "snapshot table"),
        (Kinds::INACTIVE_L1, "inactive L1 table"),
        (Kinds::INACTIVE_L2, "inactive L2 table"),
        (Kinds::BITMAP_DIRECTORY, "bitmap directory"),
    ];
    names
        .iter()
        .find(|(kind, _)| kinds.intersects(*kind))
        .map_or_else(|| kinds.to_string(), |(_, name)| (*name).to_owned())
}
