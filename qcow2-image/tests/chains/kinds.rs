//! Layers of special kinds: encrypted ones, external data files, files that others have open.

use std::fs;
use std::sync::Arc;

use qcow2_image::chain::{BackingFile, ChainError};
use qcow2_image::commit::CommitOptions;
use qcow2_image::create::CreateOptions;
use qcow2_image::luks::{KeyCost, LuksOptions};
use qcow2_image::rebase::RebaseOptions;
use qcow2_image::testing::Random;
use qcow2_image::{
    BitmapOptions, BitmapState, Image, ImageError, ImageOptions, References, SnapshotKey,
    SnapshotOptions,
};
use qcow2_io::cipher::Secret;
use qcow2_io::codec::Level;
use qcow2_io::{FileOptions, Memory, Storage, ZeroFlags};

use crate::rig::{content, difference, flaws, read};

const SIZE: u64 = 1 << 20;

fn secret(word: &str) -> Secret {
    Secret::new(word.as_bytes().to_vec())
}

/// Writes here and there; tells what the disk holds then.
fn fill(disk: &dyn Storage, seed: u64) -> Vec<u8> {
    let random = &mut Random::new(seed);
    for _ in 0..5 {
        let at = random.below(SIZE - 150_000);
        disk.write_at(&content(random, 100_000), at).unwrap();
    }
    let at = random.below(SIZE - 200_000);
    disk.write_zeroes(at..at + 150_000, ZeroFlags::MAY_UNMAP)
        .unwrap();
    read(disk)
}

#[test]
fn encrypted_layers_keep_their_keys() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let create = |name: &str, options: CreateOptions| {
        let file = FileOptions::new().write(true).create(true);
        Image::create(&file.open(path(name)).unwrap(), &options).unwrap();
    };
    let cost = KeyCost::Iterations(1000);
    let luks = LuksOptions::new().cost(cost);
    let new = || CreateOptions::new(SIZE).cluster_size(4096);
    create("base", new().luks(luks, secret("one")));
    create("middle", new().backing_file("base", "qcow2"));
    create(
        "top",
        new()
            .backing_file("middle", "qcow2")
            .legacy_aes(secret("two")),
    );
    create("new", new().cluster_size(65536).luks(luks, secret("three")));
    let options = || Image::options().references(References::SameDirectory);
    let base = options()
        .secret(secret("one"))
        .open_path(path("base"))
        .unwrap();
    fill(&base, 1);
    drop(base);
    let middle = options().layer_secret(1, secret("one"));
    fill(&middle.open_path(path("middle")).unwrap(), 2);
    let top = || {
        options()
            .secret(secret("two"))
            .layer_secret(2, secret("one"))
            .writable_layer(2)
    };
    let mut image = top().open_path(path("top")).unwrap();
    let mut view = fill(&image, 3);
    image.commit(&CommitOptions::new().base(2)).unwrap();
    assert_eq!(difference(&read(&image), &view), None);
    image.close().unwrap();
    let base = options().secret(secret("one")).read_only(true);
    let base = base.open_path(path("base")).unwrap();
    assert_eq!(difference(&read(&base), &view), None);
    assert!(base.is_encrypted());
    drop(base);

    let mut image = top().open_path(path("top")).unwrap();
    let new = options().path(path("top")).layer_secret(1, secret("three"));
    let new = BackingFile::open("new", "qcow2", &new).unwrap();
    let compressed = RebaseOptions::new().compress(Level::default());
    let refused = image.rebase(Some(&new), &compressed).unwrap_err();
    assert!(matches!(
        refused,
        ChainError::Image(ImageError::Unsupported { .. })
    ));
    image.rebase(Some(&new), &RebaseOptions::new()).unwrap();
    image.write_at(&[9; 700], 1000).unwrap();
    view[1000..1700].fill(9);
    assert_eq!(difference(&read(&image), &view), None);
    image.close().unwrap();
    drop(new);
    let image = options()
        .secret(secret("two"))
        .layer_secret(1, secret("three"));
    let mut image = image.writable_layer(1).open_path(path("top")).unwrap();
    assert_eq!(difference(&read(&image), &view), None);
    image.commit(&CommitOptions::new()).unwrap();
    image.close().unwrap();
    let new = options()
        .secret(secret("three"))
        .open_path(path("new"))
        .unwrap();
    assert_eq!(difference(&read(&new), &view), None);
    for name in ["base", "top", "new"] {
        assert_eq!(flaws(&Memory::from(fs::read(path(name)).unwrap())), []);
    }
    // Nothing of it lies there in clear text.
    let sector = &view[1024..1536];
    for name in ["top", "new"] {
        let bytes = fs::read(path(name)).unwrap();
        assert!(!bytes.chunks(512).any(|chunk| chunk == sector), "{name}");
    }
}

#[test]
fn data_files_go_along() {
    let make = |backing: Option<&BackingFile>| {
        let data: Arc<dyn Storage> = Arc::new(Memory::new());
        let file: Arc<dyn Storage> = Arc::new(Memory::new());
        let mut options = CreateOptions::new(SIZE)
            .data_file("data")
            .data_file_storage(Arc::clone(&data));
        if let Some(backing) = backing {
            options = options.backing_file(backing.name(), backing.format());
        }
        Image::create(&file, &options).unwrap();
        let open = Image::options().data_file(Arc::clone(&data));
        let open = match backing {
            Some(backing) => open.backing_file(backing),
            None => open,
        };
        (open.open(Arc::clone(&file)).unwrap(), file, data)
    };
    let (base, base_file, _) = make(None);
    fill(&base, 11);
    let base = BackingFile::image("base", Arc::new(base));
    let (mut image, file, data) = make(Some(&base));
    let view = fill(&image, 12);
    let stored = |data: &dyn Storage| read(data).iter().any(|byte| *byte != 0);
    assert!(stored(&data));
    image.commit(&CommitOptions::new()).unwrap();
    assert_eq!(difference(&read(&image), &view), None);
    assert_eq!(difference(&read(base.storage()), &view), None);
    assert!(!stored(&data));
    let segments = image.chain().map(0..SIZE, 100).unwrap();
    assert!(segments.iter().all(|segment| segment.depth == 1));
    image.rebase(None, &RebaseOptions::new()).unwrap();
    assert_eq!(difference(&read(&image), &view), None);
    image.close().unwrap();
    drop(base);
    assert_eq!(flaws(&file), []);
    assert_eq!(flaws(&base_file), []);
}

#[test]
fn snapshots_survive_a_commit() {
    let base = Arc::new(Memory::from(vec![0x11; 1 << 20]));
    let file = Arc::new(Memory::new());
    let options = CreateOptions::new(SIZE).backing_file("base", "raw");
    Image::create(&file, &options.cluster_size(4096)).unwrap();
    let open = |options: ImageOptions| options.backing(base.clone()).open(file.clone()).unwrap();
    let mut image = open(Image::options());
    image.write_at(&vec![1; 300_000], 0).unwrap();
    image.create_snapshot(&SnapshotOptions::new("one")).unwrap();
    image.write_at(&vec![2; 300_000], 200_000).unwrap();
    image.create_snapshot(&SnapshotOptions::new("two")).unwrap();
    image.write_at(&vec![3; 8192], 100_000).unwrap();
    let view = read(&image);
    let full = file.len().unwrap();
    image.commit(&CommitOptions::new()).unwrap();
    assert_eq!(difference(&read(&image), &view), None);
    assert_eq!(difference(&read(&base), &view), None);
    assert!(file.len().unwrap() <= full);
    for (name, stop, next) in [("one", 300_000, 2), ("two", 200_000, 2)] {
        let key = SnapshotKey::any(name);
        let found = read(&open(Image::options().snapshot(key)));
        assert!(found[..stop].iter().all(|byte| *byte == 1), "{name}");
        // What it does not have comes from the base as that is now.
        assert_eq!(found[stop.next_multiple_of(4096)], next, "{name}");
    }
    image.apply_snapshot(&SnapshotKey::any("two")).unwrap();
    image.write_at(&[4; 100], 0).unwrap();
    image.delete_snapshot(&SnapshotKey::any("one")).unwrap();
    image.delete_snapshot(&SnapshotKey::any("two")).unwrap();
    assert_eq!(read(&image)[99..101], [4, 1]);
    image.close().unwrap();
    assert_eq!(flaws(&file), []);
}

#[test]
fn bitmaps_of_the_base_note_what_comes_down() {
    let base_file = Arc::new(Memory::new());
    Image::create(&base_file, &CreateOptions::new(SIZE)).unwrap();
    let base = Image::options().open(base_file.clone()).unwrap();
    base.create_bitmap(b"since", &BitmapOptions::new()).unwrap();
    let base = Arc::new(base);
    let file = Arc::new(Memory::new());
    let options = CreateOptions::new(SIZE).backing_file("base", "qcow2");
    Image::create(&file, &options).unwrap();
    let open = Image::options().backing_image(Arc::clone(&base));
    let mut image = open.open(file.clone()).unwrap();
    image.create_bitmap(b"own", &BitmapOptions::new()).unwrap();
    image.write_at(&vec![1; 70_000], 131_072).unwrap();
    let noted = |image: &Image, name: &[u8]| -> Vec<std::ops::Range<u64>> {
        let ranges = image.dirty_ranges(name, 0..u64::MAX);
        ranges.map(Result::unwrap).collect()
    };
    let wanted = vec![131_072..262_144; 1];
    assert_eq!(noted(&image, b"own"), wanted);
    assert_eq!(noted(&base, b"since"), []);
    image.commit(&CommitOptions::new()).unwrap();
    // The disk of the overlay has not changed, that of the base has.
    assert_eq!(noted(&image, b"own"), wanted);
    assert_eq!(noted(&base, b"since"), wanted);
    image.close().unwrap();
    drop(base);
    for (file, name) in [(base_file, &b"since"[..]), (file, b"own")] {
        assert_eq!(flaws(&file), []);
        let image = Image::options().read_only(true).no_backing();
        let image = image.open(file).unwrap();
        assert_eq!(image.bitmaps().unwrap()[0].state, BitmapState::Consistent);
        assert_eq!(noted(&image, name), wanted);
    }
}

#[test]
fn an_emptied_overlay_gives_its_space_back() {
    let base = Arc::new(Memory::new());
    Image::create(&base, &CreateOptions::new(8 << 20)).unwrap();
    let base = Arc::new(Image::options().open(base).unwrap());
    let file = Arc::new(Memory::new());
    let options = CreateOptions::new(8 << 20).backing_file("base", "qcow2");
    Image::create(&file, &options).unwrap();
    let empty = file.len().unwrap();
    let open = Image::options().backing_image(Arc::clone(&base));
    let mut image = open.open(file.clone()).unwrap();
    image.write_at(&vec![1; 8 << 20], 0).unwrap();
    image.flush().unwrap();
    assert!(file.len().unwrap() > 8 << 20);
    image.commit(&CommitOptions::new()).unwrap();
    assert!(file.len().unwrap() <= empty.next_multiple_of(65536));
    let again = image.commit(&CommitOptions::new()).unwrap();
    assert_eq!((again.read_bytes, again.stored_bytes), (0, 0));
    assert!(read(&*base).iter().all(|byte| *byte == 1));
}

#[test]
fn nobody_else_may_have_the_base_open() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("base"), vec![7; 1 << 20]).unwrap();
    let file = FileOptions::new().write(true).create(true);
    let options = CreateOptions::new(SIZE).backing_file("base", "raw");
    Image::create(&file.clone().open(path("top")).unwrap(), &options).unwrap();
    Image::create(&file.open(path("other")).unwrap(), &options).unwrap();
    let open = |name: &str, depth| {
        let options = Image::options().references(References::SameDirectory);
        options.writable_layer(depth).open_path(path(name))
    };
    let other = open("other", 9).unwrap();
    // Reading beside a reader is fine, writing is not.
    drop(open("top", 2).unwrap());
    let refused = open("top", 1).unwrap_err();
    assert!(refused.to_string().contains("base"), "{refused}");
    // Who did not ask for it can't write there.
    let mut image = open("top", 2).unwrap();
    image.write_at(&[1; 512], 0).unwrap();
    assert!(image.commit(&CommitOptions::new()).is_err());
    assert_eq!(fs::read(path("base")).unwrap(), vec![7; 1 << 20]);
    assert_eq!(read(&image)[511..513], [1, 7]);
    drop((other, image));
    let mut image = open("top", 1).unwrap();
    image.commit(&CommitOptions::new()).unwrap();
    drop(image);
    assert_eq!(fs::read(path("base")).unwrap()[511..513], [1, 7]);
    // An image can't lie over itself, whatever it is called.
    std::os::unix::fs::symlink(path("top"), path("link")).unwrap();
    for name in ["top", "link"] {
        let options = Image::options().references(References::SameDirectory);
        let same = BackingFile::open(name, "qcow2", &options.path(path("top")));
        assert!(same.unwrap_err().to_string().contains("backing file"));
    }
}
