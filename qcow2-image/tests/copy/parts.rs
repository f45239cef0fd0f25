use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_image::Monitor;
use qcow2_image::copy::{CopyError, CopyOptions, Target, copy};
use qcow2_image::create::CreateOptions;
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{ExtentKind, Memory, Storage};

use crate::rig::{
    Folder, assert_reads, assert_sound, content, create, fill, is_available, memory, new_file,
    open, options, sources,
};

const LEN: usize = (2 << 20) + 1536;

#[test]
fn a_window_of_the_source_goes_to_any_place() {
    let bytes = content(LEN, 51);
    let size = LEN as u64;
    for (number, (name, source)) in (0_usize..).zip(sources(&bytes)) {
        for (start, end, at) in [
            (0, size, 700_001),
            (70_000, 1_500_000, 0),
            (512, 513, 99),
            (size - 100, size + 500, 1 << 20),
            (size + 7, u64::MAX, 5),
        ] {
            let window = start.min(size) as usize..end.min(size) as usize;
            let options = CopyOptions::new().window(start..end).at(at);
            let options = options.threads([1, 4][number % 2]).chunk(100_000);
            // A target with content keeps the rest of it.
            for before in [vec![9; 3 << 20], Vec::new()] {
                let target = Memory::from(before.clone());
                let report = copy(&*source, Target::Storage(&target), &options).unwrap();
                assert_eq!(report.len_bytes, window.len() as u64);
                let mut expected = before;
                let end = at as usize + window.len();
                expected.resize(expected.len().max(end), 0);
                expected[at as usize..end].copy_from_slice(&bytes[window.clone()]);
                assert_reads(&target, &expected, name);
            }
            let image = open(&create(&CreateOptions::new(8 << 20)));
            fill(&image, &vec![7; 3 << 20]);
            copy(&*source, &image, &options).unwrap();
            let mut expected = vec![7; 3 << 20];
            let end = at as usize + window.len();
            expected.resize(expected.len().max(end), 0);
            expected[at as usize..end].copy_from_slice(&bytes[window]);
            assert_reads(&image, &expected, name);
        }
    }
}

#[test]
fn blocks_are_those_of_dd() {
    if !is_available("blocks beside qemu-img dd") {
        return;
    }
    let folder = Folder::new();
    let bytes = content(LEN, 52);
    folder.save("disk", &memory(&bytes));
    let source = qcow2_io::File::open(folder.path("disk")).unwrap();
    for (size, count, skip) in [
        (512, None, 3),
        (4096, Some(100), 0),
        (65536, Some(1), 0),
        (1 << 20, Some(9), 1),
    ] {
        let count_said = count.map_or(String::new(), |count| format!("count={count}"));
        folder.img(&format!(
            "dd -f raw -O raw bs={size} {count_said} skip={skip} if=disk of=theirs"
        ));
        let target = Memory::new();
        let options = CopyOptions::new().blocks(size, count, skip, 2);
        copy(&source, Target::Storage(&target), &options).unwrap();
        let found = target.to_vec().unwrap();
        let theirs = std::fs::read(folder.path("theirs")).unwrap();
        assert!(found[..2 * size as usize].iter().all(|byte| *byte == 0));
        assert!(
            found[2 * size as usize..] == theirs,
            "{size} {count:?} {skip}"
        );
    }
}

#[test]
fn compressed_windows_go_to_whole_clusters() {
    if !Codec::Zlib.is_available() {
        return;
    }
    let bytes = content(LEN, 53);
    let source = memory(&bytes);
    let file = create(&CreateOptions::new(8 << 20));
    let image = open(&file);
    let options = CopyOptions::new()
        .compress(Level::default())
        .window(100..1_000_000);
    let error = copy(&source, &image, &options.at(512)).unwrap_err();
    assert!(
        matches!(error, CopyError::Target { offset: 512, .. }),
        "{error}"
    );
    copy(&source, &image, &options.at(1 << 20)).unwrap();
    let mut expected = vec![0; 1 << 20];
    expected.extend_from_slice(&bytes[100..1_000_000]);
    assert_reads(&image, &expected, "image");
    image.close().unwrap();
    assert_sound(&file, "image");
}

/// Copies the upper layers of a chain over an image of the rest.
fn over_the_rest(compress: bool, target_cluster: u64) {
    let bytes = content(LEN, 54);
    let below = memory(&content(LEN, 55));
    let middle = create(
        &CreateOptions::new(LEN as u64)
            .backing_file("below", "raw")
            .cluster_size(4096),
    );
    let middle = options().backing(Arc::new(below)).open(middle).unwrap();
    for (number, piece) in (0..).zip(bytes.chunks(50_000)).step_by(4) {
        middle.write_at(piece, number * 50_000).unwrap();
    }
    let middle: Arc<dyn Storage> = Arc::new(middle);
    let upper = create(
        &CreateOptions::new(LEN as u64)
            .backing_file("middle", "qcow2")
            .cluster_size(4096),
    );
    let upper = options().backing(middle.clone()).open(upper).unwrap();
    for (number, piece) in (0..).zip(bytes.chunks(30_000)).step_by(5) {
        let start = number * 30_000;
        upper
            .write_zeroes(
                start..start + 4096.min(piece.len() as u64),
                qcow2_io::ZeroFlags::NONE,
            )
            .unwrap();
        upper
            .write_at(
                piece.split_at(piece.len() / 2).1,
                start + piece.len() as u64 / 2,
            )
            .unwrap();
    }
    let mut expected = vec![0; LEN];
    upper.read_at(&mut expected, 0).unwrap();

    let overlay = CreateOptions::new(LEN as u64).backing_file("middle", "qcow2");
    let file = create(&overlay.cluster_size(target_cluster));
    let target = options().backing(middle).open(file.clone()).unwrap();
    let mut copying = CopyOptions::new().layers(1).threads(3).chunk(60_000);
    if compress {
        copying = copying.compress(Level::default());
    }
    let report = copy(&upper, &target, &copying).unwrap();
    assert_reads(&target, &expected, "overlay");
    // Less than a third is in the upper layer, and units are rounded.
    let most = if target_cluster > 4096 {
        LEN as u64
    } else {
        LEN as u64 / 3
    };
    assert!(
        report.read_bytes > 0 && report.read_bytes < most,
        "{report:?}"
    );
    let own = target.extents(0..LEN as u64, 10_000).unwrap();
    assert!(own.iter().any(|extent| extent.depth > 0));
    assert!(
        own.iter()
            .any(|extent| extent.depth == 0 && extent.kind == ExtentKind::Zero)
    );
    target.close().unwrap();
    assert_sound(&file, "overlay");
}

#[test]
fn upper_layers_are_copied_over_an_image_of_the_rest() {
    for target_cluster in [512, 4096, 65536] {
        over_the_rest(false, target_cluster);
        if Codec::Zlib.is_available() {
            over_the_rest(true, target_cluster);
        }
    }
}

#[test]
fn only_what_differs_is_stored() {
    let bytes = content(LEN, 56);
    let mut other = bytes.clone();
    other[100_000] ^= 1;
    other[1_000_000..1_010_000].fill(0);
    other[1_500_000..1_500_100].fill(0xee);
    let mut ways = vec![];
    for threads in [1, 3] {
        let copying = CopyOptions::new().only_changes(true).threads(threads);
        ways.extend([copying, copying.ordered(true), copying.sparse(0)]);
        if Codec::Zlib.is_available() {
            let copying = copying.compress(Level::default());
            ways.extend([copying, copying.ordered(false), copying.sparse(0)]);
        }
    }
    for copying in ways {
        let how = format!("{copying:?}");
        let below: Arc<dyn Storage> = Arc::new(Memory::from(bytes.clone()));
        let overlay = CreateOptions::new(LEN as u64)
            .backing_file("below", "raw")
            .cluster_size(4096);
        let file = create(&overlay);
        let target = options().backing(below).open(file.clone()).unwrap();
        let report = copy(&memory(&other), &target, &copying).unwrap();
        assert_reads(&target, &other, &how);
        assert!(
            report.stored_bytes > 0 && report.stored_bytes <= 10 * 4096,
            "{how}, {report:?}"
        );
        // Zeros that the backing file has stored as such are not noted once more.
        let own = target.extents(0..LEN as u64, 10_000).unwrap();
        let own = own.iter().filter(|extent| extent.depth == 0);
        let own: u64 = own.map(|extent| extent.len).sum();
        assert!((4096..=10 * 4096).contains(&own), "{how}, {own}");
        let packed = report.compressed_clusters;
        assert_eq!(packed > 0, how.contains("compress: Some"), "{how}");
        let again = copy(&memory(&other), &target, &copying).unwrap();
        assert_eq!(again.stored_bytes, 0, "{how}");
        target.close().unwrap();
        assert_sound(&file, &how);

        if packed > 0 {
            continue;
        }
        let target = Memory::from(bytes.clone());
        let report = copy(&memory(&other), Target::Storage(&target), &copying).unwrap();
        assert_reads(&target, &other, "memory");
        assert!(report.stored_bytes <= 10 * 4096, "{report:?}");
        let again = copy(&memory(&other), Target::Storage(&target), &copying).unwrap();
        assert_eq!(again.stored_bytes, 0);
    }
    let image = open(&create(&CreateOptions::new(LEN as u64)));
    let contradictory = CopyOptions::new().only_changes(true).reserve(true);
    let error = copy(&memory(&other), &image, &contradictory).unwrap_err();
    assert!(matches!(error, CopyError::Options(_)), "{error}");
}

#[test]
fn order_is_a_choice() {
    let bytes = content(LEN, 57);
    let source = memory(&bytes);
    for compress in [false, true] {
        if compress && !Codec::Zlib.is_available() {
            continue;
        }
        for ordered in [false, true] {
            let mut copying = CopyOptions::new()
                .threads(4)
                .chunk(100_000)
                .ordered(ordered);
            if compress {
                copying = copying.compress(Level::default());
            }
            let files = [(); 2].map(|()| {
                let file = create(&CreateOptions::new(LEN as u64).cluster_size(4096));
                let image = open(&file);
                copy(&source, &image, &copying).unwrap();
                assert_reads(&image, &bytes, "image");
                image.close().unwrap();
                assert_sound(&file, "image");
                file.to_vec().unwrap()
            });
            // The order of the disk is the same each time.
            assert!(!ordered || files[0] == files[1], "compressed: {compress}");
        }
    }
}

/// Ends a copy after its first piece.
#[derive(Default)]
struct Once(AtomicU64);

impl Monitor for Once {
    fn progress(&self, _done: u64, _total: u64) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

#[test]
fn a_copy_can_be_held_back() {
    let bytes: Vec<u8> = content(LEN, 58).iter().map(|byte| byte | 1).collect();
    let source = Memory::from(bytes.clone());
    let target = Memory::new();
    let copying = CopyOptions::new().rate(1 << 40);
    copy(&source, Target::Storage(&target), &copying).unwrap();
    assert_reads(&target, &bytes, "memory");
    // The second piece would come in a day, if nobody ended it.
    let monitor = Once::default();
    let copying = CopyOptions::new().rate(10).threads(2).monitor(&monitor);
    let error = copy(&source, Target::Storage(&Memory::new()), &copying).unwrap_err();
    assert!(matches!(error, CopyError::Cancelled), "{error}");
}

#[test]
fn space_is_reserved_before() {
    let folder = Folder::new();
    let bytes = content(LEN, 59);
    for before in [0, 1, LEN + 500_000] {
        let target = new_file(&folder, "target");
        target.write_at(&vec![7; before], 0).unwrap();
        copy(
            &memory(&bytes),
            Target::Storage(&target),
            &CopyOptions::new().reserve(true),
        )
        .unwrap();
        assert_reads(&target, &bytes, "file");
        let taken = target.allocated().unwrap().unwrap();
        assert!(taken >= LEN as u64, "{taken}");
    }
    let sparse = new_file(&folder, "sparse");
    copy(
        &memory(&bytes),
        Target::Storage(&sparse),
        &CopyOptions::new(),
    )
    .unwrap();
    assert!(sparse.allocated().unwrap().unwrap() < LEN as u64);
}
