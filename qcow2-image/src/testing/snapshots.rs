//! Internal snapshots, read without the engine knowing of them: as an image whose active L1 table is theirs.

use std::sync::Arc;

use qcow2_io::Storage;

use super::crash::Overlay;
use super::engine::Engine;
use super::failure::{Failure, OrFail};
use super::files::Files;
use super::shape::Shape;

/// Compares what each snapshot of the image holds with `expected`.
///
/// # Errors
///
/// The first difference.
pub fn compare_snapshots(
    engine: &dyn Engine,
    shape: &Shape,
    files: &Files,
    expected: &[Vec<u8>],
) -> Result<(), Failure> {
    if expected.is_empty() {
        return Ok(());
    }
    let len = files.image.len().or_fail("asking for the length")?;
    let mut bytes = vec![0; len as usize];
    files.image.read_at(&mut bytes, 0).or_fail("reading")?;
    let tables = l1_tables(&bytes).ok_or_else(|| Failure::new("no snapshot table"))?;
    if tables.len() != expected.len() {
        let text = format!("{} snapshots, not {}", tables.len(), expected.len());
        return Err(Failure::new(text));
    }
    let base = Arc::new(bytes);
    for (number, ((offset, entries), expected)) in tables.iter().zip(expected).enumerate() {
        let view = Overlay::new(Arc::clone(&base));
        let put = |bytes: &[u8], at: u64| view.write_at(bytes, at).or_fail("writing");
        put(&(expected.len() as u64).to_be_bytes(), 24)?;
        put(&entries.to_be_bytes(), 36)?;
        put(&offset.to_be_bytes(), 40)?;
        // No snapshots: the L1 tables of others would be in the way of nothing, but let it be simple.
        put(&[0; 4], 60)?;
        let files = Files {
            image: Arc::new(view),
            ..files.clone()
        };
        let subject = engine.open(shape, &files, true)?;
        let mut found = vec![0xa5; expected.len()];
        subject
            .disk()
            .read_at(&mut found, 0)
            .or_fail("reading a snapshot")?;
        let differs = found.iter().zip(expected).position(|(a, b)| a != b);
        if let Some(at) = differs {
            return Err(Failure::new(format!(
                "byte {at:#x} of snapshot {number} is {:#04x}, not {:#04x}",
                found[at], expected[at]
            )));
        }
    }
    Ok(())
}

/// Offset and entries of the L1 table of each snapshot.
fn l1_tables(image: &[u8]) -> Option<Vec<(u64, u32)>> {
    let count = u32::from_be_bytes(image.get(60..64)?.try_into().ok()?);
    let mut position = u64::from_be_bytes(image.get(64..72)?.try_into().ok()?) as usize;
    let mut tables = Vec::new();
    for _ in 0..count {
        let entry = image.get(position..position + 40)?;
        let offset = u64::from_be_bytes(entry[..8].try_into().ok()?);
        let entries = u32::from_be_bytes(entry[8..12].try_into().ok()?);
        let id_len = u16::from_be_bytes(entry[12..14].try_into().ok()?);
        let name_len = u16::from_be_bytes(entry[14..16].try_into().ok()?);
        let extra_len = u32::from_be_bytes(entry[36..40].try_into().ok()?);
        position += 40 + extra_len as usize + usize::from(id_len) + usize::from(name_len);
        position = position.next_multiple_of(8);
        tables.push((offset, entries));
    }
    Some(tables)
}
