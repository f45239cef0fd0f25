//! The programs in `examples/`, called as a user calls them.

use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::Path;

use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::Memory;

use crate::oracle::{Folder, noise, words};

#[expect(dead_code, reason = "`main` is for the program")]
#[path = "../../examples/create_and_write.rs"]
mod create_and_write;
#[expect(dead_code, reason = "`main` is for the program")]
#[path = "../../examples/custom_storage.rs"]
mod custom_storage;
#[cfg(feature = "queue")]
#[expect(dead_code, reason = "`main` is for the program")]
#[path = "../../examples/multi_queue.rs"]
mod multi_queue;
#[expect(dead_code, reason = "`main` is for the program")]
#[path = "../../examples/open_and_read.rs"]
mod open_and_read;

type Run = fn(&[OsString], &mut dyn Write) -> Result<(), Box<dyn Error>>;

/// What a program prints, or its complaint with all causes.
fn call(run: Run, args: &[&Path]) -> Result<String, String> {
    let args: Vec<OsString> = args.iter().map(|arg| arg.as_os_str().to_owned()).collect();
    let mut out = Vec::new();
    match run(&args, &mut out) {
        Ok(()) => Ok(String::from_utf8(out).unwrap()),
        Err(error) => Err(words(&*error)),
    }
}

#[test]
fn a_raw_file_goes_into_an_image_and_comes_out_again() {
    let folder = Folder::new();
    let mut raw = noise(300_000, 1);
    raw.resize(3 << 20, 0);
    raw.extend(b"the end");
    folder.write("disk.raw", &raw);
    let (image, source) = (folder.path("disk.qcow2"), folder.path("disk.raw"));
    let size = Path::new("10M");
    let said = call(create_and_write::run, &[&image, size, &source]).unwrap();
    assert!(said.ends_with("bytes of data written\n"), "{said}");
    let said = call(open_and_read::run, &[&image]).unwrap();
    assert!(said.starts_with("10485760 bytes, "), "{said}");

    let (start, len) = (Path::new("3145728"), Path::new("0x9"));
    let said = call(open_and_read::run, &[&image, start, len]).unwrap();
    assert_eq!(said, "000000300000  74 68 65 20 65 6e 64 00 00\n");

    let target = folder.path("copy.raw");
    let len = raw.len().to_string();
    let args: [&Path; 4] = [&image, Path::new("0"), len.as_ref(), &target];
    call(open_and_read::run, &args).unwrap();
    assert_eq!(folder.read("copy.raw"), raw);
    let again = call(open_and_read::run, &args).unwrap_err();
    assert!(again.contains("can't be created"), "{again}");

    let again = call(create_and_write::run, &[&image, size, &source]).unwrap_err();
    assert!(again.contains("disk.qcow2"), "{again}");
    let other = folder.path("other.qcow2");
    let small = call(create_and_write::run, &[&other, Path::new("1M"), &source]).unwrap_err();
    assert!(small.contains("the disk only 1048576"), "{small}");
    assert!(!fs::exists(&other).unwrap());
    let beyond = [&image, Path::new("10485760"), Path::new("1")];
    let beyond = call(open_and_read::run, &beyond).unwrap_err();
    assert!(beyond.contains("reach beyond"), "{beyond}");
    folder.assert_sound_here("disk.qcow2");
}

#[test]
fn the_reader_follows_names_in_the_same_directory_only() {
    let folder = Folder::new();
    folder.write("base.raw", &[7; 4096]);
    fs::create_dir(folder.path("below")).unwrap();
    let over = |name: &str| CreateOptions::new(4096).backing_file(name, "raw");
    folder.create("image", &over("base.raw"));
    folder.create("below/image", &over("../base.raw"));
    let (start, len) = (Path::new("4094"), Path::new("2"));
    let said = call(open_and_read::run, &[&folder.path("image"), start, len]).unwrap();
    assert_eq!(said, "000000000ffe  07 07\n");
    let refused = call(open_and_read::run, &[&folder.path("below/image")]).unwrap_err();
    assert!(refused.contains("\"../base.raw\""), "{refused}");
    assert!(refused.contains("outside"), "{refused}");
}

#[cfg(feature = "queue")]
#[test]
fn four_guests_on_queues_find_what_they_wrote() {
    let folder = Folder::new();
    let image = folder.path("image");
    let said = call(multi_queue::run, &[&image, Path::new("500")]).unwrap();
    assert_eq!(said, "2000 requests on 4 queues, all data as written\n");
    folder.assert_sound_here("image");
    let again = call(multi_queue::run, &[&image]).unwrap_err();
    assert!(again.contains("image"), "{again}");
}

#[test]
fn an_image_lies_on_a_storage_that_its_user_wrote() {
    let folder = Folder::new();
    let (first, second) = (folder.path("0"), folder.path("1"));
    let said = call(custom_storage::run, &[&first, &second]).unwrap();
    assert!(said.contains(" writes, "), "{said}");
    // Neither part is an image on its own.
    assert!(Image::options().open_path(&second).is_err());
    call(custom_storage::run, &[&first, &second]).unwrap_err();
}

#[test]
fn that_storage_keeps_what_storages_promise() {
    let new = || Box::new(custom_storage::Striped::new([Memory::new(), Memory::new()]));
    qcow2_io::conformance::run(|| new());
}

#[test]
fn the_programs_tell_how_they_are_called() {
    let programs: [(Run, &str); 3] = [
        (open_and_read::run, "usage: open_and_read IMAGE"),
        (
            create_and_write::run,
            "usage: create_and_write IMAGE SIZE FILE",
        ),
        (custom_storage::run, "usage: custom_storage PART PART"),
    ];
    for (run, usage) in programs {
        let said = call(run, &[]).unwrap_err();
        assert!(said.starts_with(usage), "{said}");
    }
}
