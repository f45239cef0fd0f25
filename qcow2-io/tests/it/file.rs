use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use qcow2_io::{ExtentKind, File, FileOptions, LockMode, Storage, StorageErrorKind, ZeroFlags};

fn kind(options: &FileOptions, path: &Path) -> StorageErrorKind {
    let error = options.open(path).unwrap_err();
    assert_eq!(
        error.path(),
        Some(path),
        "the error names the file: {error}"
    );
    error.kind()
}

#[test]
fn what_is_no_disk_is_refused_without_hanging() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();

    let read = FileOptions::new();
    let write = FileOptions::new().write(true);
    assert_eq!(kind(&read, dir.path()), StorageErrorKind::Invalid);
    assert_eq!(kind(&write, dir.path()), StorageErrorKind::Invalid);
    assert_eq!(kind(&read, &pipe), StorageErrorKind::Invalid);
    assert_eq!(kind(&write, &pipe), StorageErrorKind::Invalid);
    assert_eq!(
        kind(&read, Path::new("/dev/zero")),
        StorageErrorKind::Invalid
    );
    assert_eq!(
        kind(&write, Path::new("/dev/null")),
        StorageErrorKind::Invalid
    );
    FileOptions::new().open(&socket).unwrap_err();
    let text = FileOptions::new().open(&pipe).unwrap_err().to_string();
    assert!(text.ends_with("it is a pipe"), "{text}");
}

#[test]
fn missing_and_existing_files_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    assert_eq!(kind(&FileOptions::new(), &path), StorageErrorKind::NotFound);
    assert_eq!(
        kind(&FileOptions::new().write(true), &path),
        StorageErrorKind::NotFound
    );
    let file = FileOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.write_at(b"kept", 0).unwrap();
    file.flush().unwrap();
    drop(file);
    let new = FileOptions::new().write(true).create_new(true);
    assert_eq!(kind(&new, &path), StorageErrorKind::AlreadyExists);
    let file = FileOptions::new()
        .write(true)
        .create(true)
        .open(&path)
        .unwrap();
    assert_eq!(file.len().unwrap(), 4);
    drop(file);
    let file = FileOptions::new()
        .write(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    assert!(file.is_empty().unwrap());
}

#[test]
fn contradictory_options_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for options in [
        FileOptions::new().create(true),
        FileOptions::new().create_new(true),
        FileOptions::new().truncate(true),
        FileOptions::new()
            .write(true)
            .create(true)
            .force_share(true),
    ] {
        assert_eq!(kind(&options, &path), StorageErrorKind::Invalid);
    }
    assert!(!path.exists());
}

#[test]
fn a_read_only_file_refuses_every_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [7; 100]).unwrap();
    let file = File::open(&path).unwrap();
    let refused = [
        file.write_at(&[1], 0),
        file.write_zeroes(0..10, ZeroFlags::NONE),
        file.discard(0..10),
        file.set_len(5),
    ];
    for result in refused {
        assert_eq!(result.unwrap_err().kind(), StorageErrorKind::ReadOnly);
    }
    file.flush().unwrap();
    assert!(!file.is_writable());
    assert_eq!(fs::read(&path).unwrap(), [7; 100]);
}

#[test]
fn two_names_of_a_file_have_one_identity() {
    let dir = tempfile::tempdir().unwrap();
    let [a, link, hard, other] = ["a", "link", "hard", "other"].map(|name| dir.path().join(name));
    fs::write(&a, b"").unwrap();
    fs::write(&other, b"").unwrap();
    symlink(&a, &link).unwrap();
    fs::hard_link(&a, &hard).unwrap();
    let identity = |path| File::open(path).unwrap().identity();
    assert_eq!(identity(&a), identity(&link));
    assert_eq!(identity(&a), identity(&hard));
    assert_ne!(identity(&a), identity(&other));
    assert_eq!(File::open(&link).unwrap().path(), Some(link.as_path()));
}

#[test]
fn a_link_to_nothing_is_created_through() {
    let dir = tempfile::tempdir().unwrap();
    let [target, link] = ["target", "link"].map(|name| dir.path().join(name));
    symlink(&target, &link).unwrap();
    FileOptions::new()
        .write(true)
        .create(true)
        .open(&link)
        .unwrap();
    assert!(target.exists());
}

#[test]
fn files_from_outside_are_examined() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let open = |options: &mut fs::OpenOptions| {
        File::from_std(options.create(true).open(&path).unwrap()).map(|file| file.is_writable())
    };
    let both = open(
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .truncate(false),
    );
    assert!(both.unwrap());
    assert!(
        !File::from_std(fs::File::open(&path).unwrap())
            .unwrap()
            .is_writable()
    );
    let append = open(fs::OpenOptions::new().read(true).append(true));
    assert_eq!(append.unwrap_err().kind(), StorageErrorKind::Invalid);
    let write_only = open(fs::OpenOptions::new().write(true).truncate(false));
    assert_eq!(write_only.unwrap_err().kind(), StorageErrorKind::Invalid);
    let directory = File::from_std(fs::File::open(dir.path()).unwrap());
    assert_eq!(directory.unwrap_err().kind(), StorageErrorKind::Invalid);
}

#[test]
fn holes_are_found_where_nothing_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let options = FileOptions::new()
        .write(true)
        .create(true)
        .lock(LockMode::None);
    let file = options.open(dir.path().join("disk")).unwrap();
    file.write_at(&vec![1; 65536], 1 << 20).unwrap();
    file.set_len(4 << 20).unwrap();
    let extents = file.extents(0..4 << 20, 10).unwrap();
    if extents.len() == 1 {
        eprintln!("SKIPPED: the file system of temporary files doesn't tell holes");
        return;
    }
    let found: Vec<(u64, u64, ExtentKind)> = extents
        .iter()
        .map(|extent| (extent.offset, extent.end(), extent.kind))
        .collect();
    assert_eq!(
        found,
        [
            (0, 1 << 20, ExtentKind::Hole),
            (1 << 20, (1 << 20) + 65536, ExtentKind::Data),
            ((1 << 20) + 65536, 4 << 20, ExtentKind::Hole),
        ]
    );
    file.discard(1 << 20..(1 << 20) + 65536).unwrap();
    let extents = file.extents(0..8 << 20, 10).unwrap();
    assert_eq!(extents.len(), 1, "{extents:?}");
    assert_eq!(
        (extents[0].len, extents[0].kind),
        (8 << 20, ExtentKind::Hole)
    );
}

#[test]
fn a_direct_file_and_a_buffered_one_see_the_same_bytes() {
    if !crate::direct_io_works() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let data: Vec<u8> = (0..=250).cycle().take(3_000_017).collect();
    fs::write(&path, &data).unwrap();
    let direct = FileOptions::new()
        .write(true)
        .direct(true)
        .open(&path)
        .unwrap();
    assert!(direct.limits().alignment >= 512);
    let mut found = vec![1; data.len() + 1000];
    direct.read_at(&mut found, 0).unwrap();
    assert_eq!(found[..data.len()], data);
    assert!(found[data.len()..].iter().all(|byte| *byte == 0));
    direct.write_at(&vec![9; 1_500_001], 777).unwrap();
    direct.write_at(&[8; 10], 3_000_017).unwrap();
    direct.flush().unwrap();
    let plain = fs::read(&path).unwrap();
    assert_eq!(plain.len(), 3_000_027);
    assert_eq!(plain[..777], data[..777]);
    assert_eq!(plain[777..1_500_778], vec![9; 1_500_001]);
    assert_eq!(plain[1_500_778..3_000_017], data[1_500_778..]);
    assert_eq!(plain[3_000_017..], [8; 10]);
}

#[test]
fn a_file_system_without_direct_io_is_told_and_leaves_no_file() {
    // Of the usual file systems only those of the kernel's own refuse; what is there decides what can be tested.
    let options = FileOptions::new().direct(true).lock(LockMode::None);
    match options.open("/proc/self/status") {
        Ok(_) => panic!("the process file system has no direct I/O"),
        Err(error) => assert_eq!(error.kind(), StorageErrorKind::Unsupported, "{error}"),
    }
}

#[test]
fn what_the_file_system_can_not_address_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for direct in [false, true] {
        if direct && !crate::direct_io_works() {
            return;
        }
        let options = FileOptions::new().write(true).create(true).direct(direct);
        let file = options.open(dir.path().join("disk")).unwrap();
        // Far beyond what any common file system holds, except those that hold all of 63 bits; these must then keep it.
        for (offset, len) in [
            (1 << 62, 512),
            ((1 << 62) + 77, 10),
            (qcow2_io::MAX_LEN - 10, 10),
        ] {
            match file.write_at(&vec![1; len], offset) {
                Ok(()) => assert_eq!(file.len().unwrap(), offset + len as u64),
                Err(error) => {
                    assert_eq!(error.kind(), StorageErrorKind::OutOfRange, "{error}");
                    assert!(file.is_empty().unwrap());
                }
            }
            let mut found = vec![7; len];
            file.read_at(&mut found, offset).unwrap();
            file.set_len(0).unwrap();
        }
        match file.set_len(qcow2_io::MAX_LEN) {
            Ok(()) => file.set_len(0).unwrap(),
            Err(error) => assert_eq!(error.kind(), StorageErrorKind::OutOfRange, "{error}"),
        }
    }
}
