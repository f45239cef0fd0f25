//! One image, two users: nobody may write beside another one. Two opens in one process exclude each other, too.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use qcow2_image::create::CreateOptions;
use qcow2_image::{Image, References};
use qcow2_io::{FileOptions, StorageErrorKind};

use crate::oracle::{Folder, is_available, refusal};

const SIZE: u64 = 1 << 20;

#[test]
fn a_second_writer_is_refused_until_the_first_is_through() {
    let folder = Folder::new();
    folder.create("image", &CreateOptions::new(SIZE));
    let path = folder.path("image");
    let image = Image::options().open_path(&path).unwrap();
    let error = Image::options().open_path(&path).unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Locked);
    let words = refusal(Err(error));
    assert!(
        words.contains("image") && words.contains("another process"),
        "{words}"
    );
    image.close().unwrap();
    Image::options().open_path(&path).unwrap().close().unwrap();
}

#[test]
fn readers_share_with_each_other_but_not_with_a_writer() {
    let folder = Folder::new();
    folder.create("image", &CreateOptions::new(SIZE));
    let path = folder.path("image");
    let reader = || Image::options().read_only(true).open_path(&path);
    let (first, second) = (reader().unwrap(), reader().unwrap());
    let words = refusal(Image::options().open_path(&path));
    assert!(words.contains("\"write\""), "{words}");
    drop(first);
    refusal(Image::options().open_path(&path));
    drop(second);
    let writer = Image::options().open_path(&path).unwrap();
    let words = refusal(reader());
    assert!(words.contains("\"write\""), "{words}");
    let shared = FileOptions::new().force_share(true).open(&path).unwrap();
    Image::options().read_only(true).open_file(shared).unwrap();
    drop(writer);
    reader().unwrap();
}

#[test]
fn a_backing_file_in_use_can_not_be_written() {
    let folder = Folder::new();
    folder.create("base", &CreateOptions::new(SIZE));
    folder.create(
        "top",
        &CreateOptions::new(SIZE).backing_file("base", "qcow2"),
    );
    let top = || {
        let options = Image::options().references(References::SameDirectory);
        options.open_path(folder.path("top"))
    };
    let image = top().unwrap();
    refusal(Image::options().open_path(folder.path("base")));
    drop(image);
    let base = Image::options().open_path(folder.path("base")).unwrap();
    let words = refusal(top());
    assert!(
        words.contains("base") && words.contains("another process"),
        "{words}"
    );
    drop(base);
    top().unwrap();
}

#[test]
fn qemu_does_not_open_what_is_open_here() {
    if !is_available("locks against QEMU") {
        return;
    }
    let folder = Folder::new();
    folder.create("image", &CreateOptions::new(SIZE));
    let path = folder.path("image");
    let qemu = |flags: &[&str], command: &str| {
        let args = [flags, &["-f", "qcow2", "-c", command, "image"]].concat();
        let output = folder.run("qemu-io", &args);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), words)
    };
    let image = Image::options().open_path(&path).unwrap();
    let (works, words) = qemu(&[], "write 0 512");
    assert!(!works && words.contains("lock"), "{words}");
    let (works, words) = qemu(&["-r"], "read 0 512");
    assert!(!works && words.contains("lock"), "{words}");
    assert!(qemu(&["-r", "-U"], "read 0 512").0);
    image.close().unwrap();
    assert!(qemu(&[], "write 0 512").0);
    let image = Image::options().read_only(true).open_path(&path).unwrap();
    let (works, words) = qemu(&[], "write 0 512");
    assert!(!works && words.contains("lock"), "{words}");
    assert!(qemu(&["-r"], "read 0 512").0);
    drop(image);
    folder.assert_sound("image");
}

/// A `qemu-io` that has an image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(folder: &Folder, flags: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(flags)
            .args(["-f", "qcow2"])
            .arg(folder.path("image"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.as_mut().unwrap();
        stdin.write_all(b"length\n").unwrap();
        stdin.flush().unwrap();
        // It answers when it has the image.
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.contains("1 MiB"), "{line}");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn what_qemu_has_open_is_not_opened_here() {
    if !is_available("locks against a running QEMU") {
        return;
    }
    let folder = Folder::new();
    folder.create("image", &CreateOptions::new(SIZE));
    let path = folder.path("image");
    let reader = || Image::options().read_only(true).open_path(&path);
    let writer = || Image::options().open_path(&path);
    let before = folder.read("image");
    {
        let _writing = Holder::new(&folder, &[]);
        assert_eq!(writer().unwrap_err().kind(), StorageErrorKind::Locked);
        assert_eq!(reader().unwrap_err().kind(), StorageErrorKind::Locked);
    }
    {
        let _reading = Holder::new(&folder, &["-r"]);
        assert_eq!(writer().unwrap_err().kind(), StorageErrorKind::Locked);
        reader().unwrap();
    }
    assert_eq!(folder.read("image"), before);
    writer().unwrap();
}
