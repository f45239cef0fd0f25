//! Chains that are opened by name.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use qcow2_check::chain::MAX_LAYERS;
use qcow2_format::header::Extension;
use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, References};
use qcow2_io::{Memory, Storage};

use crate::oracle::{Folder, guest_bytes, in_memory, refusal};

const SIZE: u64 = 1 << 20;

fn over(name: &str, format: &str) -> CreateOptions {
    CreateOptions::new(SIZE).backing_file(name, format)
}

/// A raw disk below an image below an image.
fn three_layers() -> Folder {
    let folder = Folder::new();
    folder.write("base.raw", &vec![1; 300_000]);
    folder.create("middle", &over("base.raw", "raw"));
    folder.create("top", &over("middle", "qcow2"));
    folder
}

/// Opens for reading and for writing; both must be refused, for the same reason, without any trace in the folder.
fn refused(folder: &Folder, name: &str, references: &References) -> String {
    let [reading, writing] = both_refused(folder, name, references);
    assert_eq!(reading, writing);
    reading
}

/// The same where the reasons may differ.
fn both_refused(folder: &Folder, name: &str, references: &References) -> [String; 2] {
    let before = folder.content();
    let open = |read_only| {
        let options = Image::options()
            .read_only(read_only)
            .references(references.clone());
        refusal(options.open_path(folder.path(name)))
    };
    let words = [open(true), open(false)];
    assert_eq!(folder.content(), before, "{words:?}");
    words
}

#[test]
fn no_name_is_followed_unless_that_is_allowed() {
    let folder = three_layers();
    let words = refused(&folder, "top", &References::Deny);
    assert_eq!(
        words,
        "the backing file can't be opened: \"middle\" is not opened: no reference may be followed"
    );
    for references in [
        References::SameDirectory,
        References::All,
        References::AllowList(vec![folder.path("middle"), folder.path("base.raw")]),
    ] {
        let options = Image::options().references(references);
        let image = options.open_path(folder.path("top")).unwrap();
        let mut expected = vec![1; 300_000];
        expected.resize(1 << 20, 0);
        assert!(guest_bytes(&image) == expected);
        image.write_at(&vec![2; 70_000], 250_000).unwrap();
        expected[250_000..320_000].fill(2);
        assert!(guest_bytes(&image) == expected);
        image.discard(0..SIZE).unwrap();
        assert!(guest_bytes(&image).iter().all(|byte| *byte == 0));
        image.close().unwrap();
        folder.create("top", &over("middle", "qcow2"));
    }
    assert_eq!(folder.read("base.raw"), vec![1; 300_000]);
    let half = References::AllowList(vec![folder.path("middle")]);
    let words = refused(&folder, "top", &half);
    assert!(words.contains("\"base.raw\" is not opened"), "{words}");
    assert!(words.contains("middle"), "{words}");
}

#[test]
fn who_gives_the_backing_file_needs_no_name() {
    let folder = three_layers();
    let given: Arc<dyn Storage> = Arc::new(Memory::from(vec![5; 1000]));
    let image = Image::options().backing(given);
    let image = image.open_path(folder.path("top")).unwrap();
    assert_eq!(guest_bytes(&image)[998..1002], [5, 5, 0, 0]);
    drop(image);
    let image = Image::options().no_backing();
    let image = image.open_path(folder.path("top")).unwrap();
    assert!(guest_bytes(&image).iter().all(|byte| *byte == 0));
}

#[test]
fn without_a_path_there_is_no_directory_to_look_in() {
    let memory = in_memory(&over("base.raw", "raw"));
    let options = Image::options().references(References::SameDirectory);
    let words = refusal(options.open(memory.clone()));
    assert!(words.contains("\"base.raw\" is not opened"), "{words}");
    let folder = three_layers();
    let options = Image::options().references(References::SameDirectory);
    let image = options.path(folder.path("anything")).open(memory).unwrap();
    assert_eq!(guest_bytes(&image)[299_999..300_001], [1, 0]);
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    let folder = three_layers();
    fs::create_dir(folder.path("below")).unwrap();
    folder.write("below/base.raw", &[2; 512]);
    folder.create("down", &over("below/base.raw", "raw"));
    let image = Image::options().references(References::SameDirectory);
    image.open_path(folder.path("down")).unwrap();
    folder.create("below/up", &over("../base.raw", "raw"));
    let absolute = folder.path("base.raw").to_str().unwrap().to_owned();
    folder.create("below/absolute", &over(&absolute, "raw"));
    std::os::unix::fs::symlink("../base.raw", folder.path("below/link")).unwrap();
    folder.create("below/linked", &over("link", "raw"));
    folder.create("below/sneaky", &over("../below/../base.raw", "raw"));
    for name in ["up", "absolute", "linked", "sneaky"] {
        let words = refused(
            &folder,
            &format!("below/{name}"),
            &References::SameDirectory,
        );
        assert!(words.contains("outside of what may be followed"), "{words}");
    }
    for (name, reason) in [
        ("nbd://localhost:1/x", "never followed"),
        ("json:{\"driver\":\"raw\"}", "never followed"),
        ("fat:rw:/tmp", "never followed"),
        ("/dev/zero", "neither a regular file nor a block device"),
        (".", "neither a regular file nor a block device"),
    ] {
        folder.create("strange", &over(name, "raw"));
        let words = refused(&folder, "strange", &References::All);
        assert!(words.contains(reason), "{name}: {words}");
    }
}

#[test]
fn loops_are_noticed() {
    let folder = Folder::new();
    folder.create("self", &over("self", "qcow2"));
    folder.create("a", &over("b", "qcow2"));
    folder.create("b", &over("./a", "qcow2"));
    std::os::unix::fs::symlink("a", folder.path("other")).unwrap();
    folder.create("c", &over("d", "qcow2"));
    folder.create("d", &over("c", "raw"));
    for name in ["self", "a", "b", "other", "c"] {
        let words = refused(&folder, name, &References::All);
        assert!(
            words.contains("part of the chain already"),
            "{name}: {words}"
        );
    }
}

#[test]
fn chains_have_an_end() {
    let folder = Folder::new();
    for number in 0..=MAX_LAYERS {
        let below = format!("{}", number + 1);
        let options = over(&below, "qcow2").cluster_size(512);
        folder.create(&number.to_string(), &options);
    }
    folder.create(&(MAX_LAYERS + 1).to_string(), &CreateOptions::new(SIZE));
    let words = refused(&folder, "0", &References::All);
    assert!(
        words.ends_with("the chain has more than 200 layers"),
        "{words}"
    );
    // As many as are allowed work.
    let options = Image::options().references(References::All);
    let image = options.open_path(folder.path("2")).unwrap();
    assert!(guest_bytes(&image).iter().all(|byte| *byte == 0));
}

#[test]
fn what_is_missing_or_no_image_is_named() {
    let folder = Folder::new();
    folder.create("missing", &over("nowhere", "qcow2"));
    let words = refused(&folder, "missing", &References::SameDirectory);
    assert!(words.contains("\"nowhere\" can't be found as"), "{words}");
    folder.write("text", b"this is no image");
    folder.create("wrong", &over("text", "qcow2"));
    let words = refused(&folder, "wrong", &References::SameDirectory);
    assert!(
        words.contains("text") && words.contains("header"),
        "{words}"
    );
    folder.create("vmdk", &over("text", "vmdk"));
    let words = refused(&folder, "vmdk", &References::SameDirectory);
    assert_eq!(words, "the backing file has the unknown format \"vmdk\"");
    folder.write("short", b"QFI\xfb\0\0\0\x03");
    folder.create("cut", &over("short", "qcow2"));
    refused(&folder, "cut", &References::SameDirectory);
}

#[test]
fn a_missing_data_file_is_named_and_not_made() {
    let folder = Folder::new();
    let data: Arc<dyn Storage> = Arc::new(Memory::new());
    let options = CreateOptions::new(SIZE).data_file("data.raw");
    folder.create("image", &options.data_file_storage(data));
    let words = refused(&folder, "image", &References::SameDirectory);
    assert!(words.contains("data file"), "{words}");
    assert!(words.contains("\"data.raw\" can't be found"), "{words}");
    let words = refused(&folder, "image", &References::Deny);
    assert!(words.contains("no reference may be followed"), "{words}");
}

#[test]
fn an_image_can_not_be_its_own_data_file() {
    let folder = Folder::new();
    let data: Arc<dyn Storage> = Arc::new(Memory::new());
    let options = CreateOptions::new(SIZE).data_file("image");
    folder.create("image", &options.data_file_storage(data));
    let words = both_refused(&folder, "image", &References::All);
    assert!(
        words.iter().all(|words| words.contains("data file")),
        "{words:?}"
    );
}

#[test]
fn a_raw_disk_that_looks_like_an_image_opens_nothing_more() {
    let folder = Folder::new();
    folder.write("secret", &[0x5e; 4096]);
    folder.create("guest-made", &over("secret", "raw"));
    folder.create("top", &over("guest-made", "qcow2"));
    // A named format is trusted.
    let all = || Image::options().references(References::All);
    let image = all().open_path(folder.path("top")).unwrap();
    assert_eq!(guest_bytes(&image)[0], 0x5e);
    drop(image);
    // A guessed one is not.
    folder.edit_header("top", |header| {
        let is_format = |extension: &Extension| matches!(extension, Extension::BackingFormat(_));
        header.extensions.retain(|extension| !is_format(extension));
    });
    let words = refused(&folder, "top", &References::All);
    assert!(words.contains("guest-made"), "{words}");
    assert!(words.contains("\"secret\" is not opened"), "{words}");
    // A disk that looks like one and names nothing is one.
    folder.create("guest-made", &CreateOptions::new(SIZE));
    let image = all().open_path(folder.path("top")).unwrap();
    assert_eq!(guest_bytes(&image)[0], 0);
    drop(image);
    folder.write("guest-made", &[3; 512]);
    let image = all().open_path(folder.path("top")).unwrap();
    assert_eq!(guest_bytes(&image)[511..513], [3, 0]);
}

#[test]
fn layers_are_opened_for_reading_only() {
    let folder = three_layers();
    let before: Vec<Vec<u8>> = ["base.raw", "middle"].map(|name| folder.read(name)).into();
    // A writer would clear them.
    folder.edit_header("middle", |header| {
        header.autoclear = qcow2_format::header::AutoclearFeatures::from_bits(1 << 40);
        header.incompatible.set_corrupt(true);
    });
    let middle = folder.read("middle");
    let path: PathBuf = folder.path("top");
    let image = Image::options().references(References::SameDirectory);
    let image = image.open_path(&path).unwrap();
    image.write_at(&vec![9; 100_000], 100_000).unwrap();
    image.close().unwrap();
    assert_eq!(folder.read("base.raw"), before[0]);
    assert_eq!(folder.read("middle"), middle);
    assert_ne!(folder.read("middle"), before[1]);
}
