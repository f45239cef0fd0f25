use qcow2_image::{BitmapState, Image, ImageError};

use super::oracle::Tools;
use crate::qemu::is_available;

#[test]
fn what_qemu_has_recorded_is_read_here() {
    if !is_available("bitmaps of QEMU") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let tools = Tools::new(folder.path());
    tools.create("cluster_size=512", "3000001024");
    tools.bitmap(&["--add", "-g", "512"], "fine");
    tools.bitmap(&["--add", "-g", "64k"], "plain");
    tools.bitmap(&["--add", "-g", "16M"], "coarse");
    tools.bitmap(&["--add", "--disable"], "off");
    tools.io(&[
        "write 0 1",
        "write 65535 2",
        "write -z 100M 70M",
        "discard 1G 2M",
        "write 3000000512 512",
        "write 2G 512",
        "write 2148007936 512",
    ]);
    tools.bitmap(&["--disable"], "plain");
    tools.check();
    let image = Image::options()
        .read_only(true)
        .open_path(&tools.image)
        .unwrap();
    let infos = image.bitmaps().unwrap();
    let told: Vec<_> = infos
        .iter()
        .map(|info| (&*info.name, info.granularity, info.auto, info.in_use))
        .collect();
    let expected: [(&[u8], u64, bool, bool); 4] = [
        (b"fine", 512, true, false),
        (b"plain", 65536, false, false),
        (b"coarse", 16 << 20, true, false),
        (b"off", 4096, false, false),
    ];
    assert_eq!(told, expected);
    let size = image.virtual_size();
    for info in &infos {
        assert_eq!(info.state, BitmapState::Consistent);
        let name = std::str::from_utf8(&info.name).unwrap();
        let expected = tools.dirty(name);
        assert_eq!(expected.is_empty(), name == "off");
        let sum: u64 = expected.iter().map(|range| range.end - range.start).sum();
        assert_eq!(info.dirty_bytes, Some(sum), "{name}");
        let found = image
            .bitmap_extents(&info.name, 0..u64::MAX, usize::MAX)
            .unwrap();
        assert_eq!(found, expected, "{name}");
        // In pieces, and a part of it.
        let mut at = 0;
        let mut joined = Vec::new();
        while let [range] = &*image.bitmap_extents(&info.name, at..size, 1).unwrap() {
            joined.push(range.clone());
            at = range.end;
        }
        assert_eq!(joined, expected, "{name}");
        let part = 65000..(1 << 30) + 700;
        let cut: Vec<_> = expected
            .iter()
            .map(|range| range.start.max(part.start)..range.end.min(part.end))
            .filter(|range| range.start < range.end)
            .collect();
        let ranges: Result<Vec<_>, ImageError> = image.dirty_ranges(&info.name, part).collect();
        assert_eq!(ranges.unwrap(), cut, "{name}");
    }
    let missing = image.bitmap_extents(b"none", 0..size, 9).unwrap_err();
    assert!(matches!(missing, ImageError::NoBitmap { .. }), "{missing}");
}
