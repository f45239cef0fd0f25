//! What single requests do to the file.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use qcow2_image::chain::ChainError;
use qcow2_image::commit::CommitOptions;
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, MetadataError, Probe, Step, Watcher};
use qcow2_io::{
    Event, Memory, Operation, Storage, StorageError, StorageErrorKind, Trace, ZeroFlags,
};

#[test]
fn zeros_that_kept_their_place_are_overwritten_with_their_neighbours_in_one_go() {
    let file = Arc::new(Trace::new(Memory::new()));
    Image::create(&file, &CreateOptions::new(3 << 16)).unwrap();
    let image = Image::options().open(file.clone()).unwrap();
    image.write_at(&vec![1; 3 << 16], 0).unwrap();
    image
        .write_zeroes(1 << 16..2 << 16, ZeroFlags::NONE)
        .unwrap();
    image.flush().unwrap();
    file.take_events();
    image.write_at(&vec![2; 3 << 16], 0).unwrap();
    let lens: Vec<usize> = file
        .take_events()
        .iter()
        .filter_map(|event| match event {
            Event::Write { bytes, .. } => Some(bytes.len()),
            _ => None,
        })
        .collect();
    assert_eq!(lens, [3 << 16]);
    let mut read = vec![0; 3 << 16];
    image.read_at(&mut read, 0).unwrap();
    assert!(read.iter().all(|byte| *byte == 2));
    image.close().unwrap();
}

#[test]
fn zeros_that_are_written_show_in_a_later_backing_file() {
    let file = Arc::new(Memory::new());
    Image::create(&file, &CreateOptions::new(1 << 20)).unwrap();
    let image = Image::options().open(file.clone()).unwrap();
    image
        .write_zeroes(0..1 << 16, ZeroFlags::MAY_UNMAP)
        .unwrap();
    image.close().unwrap();
    let below: Arc<dyn Storage> = Arc::new(Memory::from(vec![7; 1 << 20]));
    let image = Image::options()
        .read_only(true)
        .backing(below)
        .open(file)
        .unwrap();
    let mut read = vec![1; 2 << 16];
    image.read_at(&mut read, 0).unwrap();
    assert!(read[..1 << 16].iter().all(|byte| *byte == 0));
    assert!(read[1 << 16..].iter().all(|byte| *byte == 7));
}

#[test]
fn a_watcher_is_told_once_of_a_corrupt_image() {
    let file = Arc::new(Memory::new());
    Image::create(&file, &CreateOptions::new(1 << 20)).unwrap();
    // The first refcount block does not start at a cluster.
    file.write_at(&[0x02, 0x06], 0x1_0005).unwrap();
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    let watcher = Watcher::new(move |error| {
        assert!(matches!(error, MetadataError::BadPointer { index: 0, .. }));
        count.fetch_add(1, Ordering::Relaxed);
    });
    let image = Image::options().watcher(watcher).open(file).unwrap();
    assert!(image.write_at(&[1; 512], 0).is_err());
    assert!(image.write_at(&[1; 512], 0).is_err());
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

#[test]
fn an_overlay_that_is_not_emptied_is_told_apart_and_keeps_its_data() {
    let create = || {
        let file = Arc::new(Memory::new());
        Image::create(&file, &CreateOptions::new(1 << 20)).unwrap();
        file
    };
    let (base_file, file) = (create(), create());
    let base = Arc::new(Image::options().open(base_file).unwrap());
    let overlay = Image::options().open(file.clone()).unwrap();
    overlay.write_at(&vec![7; 1 << 16], 0).unwrap();
    overlay.close().unwrap();
    let probe = Probe::new(|step| match step {
        Step::ChangeL1 => Err(StorageError::new(Operation::Write, StorageErrorKind::Io)),
        _ => Ok(()),
    });
    let options = Image::options()
        .probe(probe)
        .backing_image(Arc::clone(&base));
    let mut overlay = options.open(file.clone()).unwrap();
    // The base gets an L2 table first, from nobody who is asked.
    let error = overlay.commit(&CommitOptions::new()).unwrap_err();
    assert!(matches!(error, ChainError::Emptying(_)), "{error}");
    for disk in [&*base, &overlay] {
        let mut read = vec![0; 1 << 16];
        disk.read_at(&mut read, 0).unwrap();
        assert!(read.iter().all(|byte| *byte == 7));
    }
    overlay.close().unwrap();
    let alone = Image::options().no_backing().open(file).unwrap();
    let mut read = vec![0; 1 << 16];
    alone.read_at(&mut read, 0).unwrap();
    assert!(read.iter().all(|byte| *byte == 7));
}
