//! Layers of all kinds, beside what their content says.

use std::sync::Arc;

use qcow2_io::codec::Level;
use qcow2_io::{Memory, Storage, ZeroFlags};

use super::SegmentKind::{Compressed, Data, Unallocated, Zero};
use super::*;
use crate::create::CreateOptions;

const KIB: u64 = 1 << 10;

fn create(options: &CreateOptions) -> Arc<Memory> {
    let memory = Arc::new(Memory::new());
    Image::create(&memory, options).unwrap();
    memory
}

fn shown(image: &Image) -> Vec<(u64, u64, usize, SegmentKind, bool)> {
    let size = image.virtual_size();
    let segments = image.chain().map(0..size, usize::MAX).unwrap();
    let mut at = 0;
    for segment in &segments {
        assert_eq!(segment.offset, at);
        at = segment.end();
    }
    assert_eq!(at, size);
    segments
        .iter()
        .map(|one| {
            (
                one.offset / KIB,
                one.len / KIB,
                one.depth,
                one.kind,
                one.host.is_some(),
            )
        })
        .collect()
}

#[test]
fn each_stretch_is_told_with_its_layer_and_place() {
    let raw = Arc::new(Memory::new());
    raw.write_at(&vec![3; 100 << 10], 0).unwrap();
    raw.set_len(200 << 10).unwrap();
    let options = || CreateOptions::new(512 << 10).cluster_size(4096);
    let middle = create(&options().size(400 << 10).backing_file("raw", "raw"));
    let middle = Image::options().backing(raw).open(middle).unwrap();
    middle.write_at(&[1; 8192], 40 << 10).unwrap();
    middle
        .write_compressed(&[2; 8192], 60 << 10, Level::default())
        .unwrap();
    middle.write_at(&[1; 4096], 300 << 10).unwrap();
    middle
        .write_zeroes(300 << 10..308 << 10, ZeroFlags::NONE)
        .unwrap();
    let top = create(&options().backing_file("middle", "qcow2"));
    let top = Image::options()
        .backing_image(Arc::new(middle))
        .open(top)
        .unwrap();
    top.write_at(&[5; 4096], 0).unwrap();
    top.write_at(&[5; 4096], 508 << 10).unwrap();
    assert_eq!(
        shown(&top),
        [
            (0, 4, 0, Data, true),
            (4, 36, 2, Data, true),
            (40, 8, 1, Data, true),
            (48, 12, 2, Data, true),
            (60, 8, 1, Compressed, false),
            (68, 32, 2, Data, true),
            (100, 100, 2, Zero, true),
            (200, 100, 1, Unallocated, false),
            (300, 4, 1, Zero, true),
            (304, 4, 1, Zero, false),
            (308, 92, 1, Unallocated, false),
            (400, 108, 0, Unallocated, false),
            (508, 4, 0, Data, true),
        ]
    );
    let chain = top.chain();
    assert_eq!(chain.layers().len(), 3);
    // What the segments say is where the bytes are.
    let mut disk = vec![0; 512 << 10];
    top.read_at(&mut disk, 0).unwrap();
    for segment in chain.segments(0..u64::MAX).unwrap() {
        let segment = segment.unwrap();
        let start = usize::try_from(segment.offset).unwrap();
        let bytes = &disk[start..start + usize::try_from(segment.len).unwrap()];
        match segment.kind {
            Data => {
                let mut there = vec![0; bytes.len()];
                let data = chain.layers()[segment.depth].data();
                data.read_at(&mut there, segment.host.unwrap()).unwrap();
                assert!(there == bytes, "{segment:?}");
            }
            Compressed => assert!(bytes.iter().all(|byte| *byte == 2)),
            Zero | Unallocated => assert!(bytes.iter().all(|byte| *byte == 0)),
        }
    }
    // In pieces it is the same, and only what is above can be asked for.
    let mut at = 0;
    let mut pieces = 0;
    while at < 512 << 10 {
        let some = chain.map(at..512 << 10, 2).unwrap();
        at = some.last().unwrap().end();
        pieces += some.len();
    }
    assert_eq!(pieces, 13);
    let above = chain.clone().above(1).map(0..512 << 10, 10).unwrap();
    assert_eq!(above.len(), 3);
    assert_eq!((above[1].depth, above[1].kind), (0, Unallocated));
    let below = chain.below(1);
    assert_eq!(below.virtual_size().unwrap(), 400 << 10);
    assert_eq!(
        below.map(0..u64::MAX, 100).unwrap().last().unwrap().offset,
        308 << 10
    );
}

#[test]
fn subclusters_are_told_apart() {
    let options = CreateOptions::new(128 << 10)
        .cluster_size(32 << 10)
        .extended_l2(true);
    let image = Image::options().open(create(&options)).unwrap();
    image.write_at(&[1; 2048], 4096).unwrap();
    image.write_zeroes(8192..10_240, ZeroFlags::NONE).unwrap();
    assert_eq!(
        shown(&image),
        [
            (0, 4, 0, Unallocated, true),
            (4, 2, 0, Data, true),
            (6, 2, 0, Unallocated, true),
            (8, 2, 0, Zero, true),
            (10, 22, 0, Unallocated, true),
            (32, 96, 0, Unallocated, false),
        ]
    );
}

#[test]
fn layers_behind_one_another_know_whether_they_are_the_same() {
    let base = create(&CreateOptions::new(64 << 10));
    let open = || Image::options().read_only(true).open(base.clone()).unwrap();
    let (one, two) = (Arc::new(open()), Arc::new(open()));
    let over = |base: &Arc<Image>| {
        let file = create(&CreateOptions::new(64 << 10).backing_file("base", "qcow2"));
        Image::options()
            .backing_image(Arc::clone(base))
            .open(file)
            .unwrap()
    };
    let (a, b) = (over(&one), over(&one));
    let walk = |image: &Image| -> Vec<Origin> {
        image
            .chain()
            .layers
            .iter()
            .map(|layer| layer.origin)
            .collect()
    };
    assert_eq!(walk(&a)[1], walk(&b)[1]);
    assert_ne!(walk(&a)[0], walk(&b)[0]);
    // Opened twice it is still one file.
    assert_eq!(walk(&a)[1], walk(&over(&two))[1]);
    // The same bytes read as an image and as they are.
    let raw = Chain::raw(&*base);
    assert_ne!(raw.layers[0].origin, walk(&a)[1]);
}
