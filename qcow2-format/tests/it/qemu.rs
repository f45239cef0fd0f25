use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use qcow2_format::Header;

/// A folder for one test's images, removed at its end.
struct Folder(PathBuf);

impl Folder {
    /// The folder, or nothing where there is no qemu-img.
    fn for_test(name: &str) -> Option<Self> {
        if !qemu_img(Path::new("."), &["--version"]) {
            eprintln!("skipped: there is no qemu-img");
            return None;
        }
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        Some(Self(folder))
    }

    fn img(&self, arguments: &[&str]) {
        assert!(qemu_img(&self.0, arguments), "qemu-img {arguments:?}");
    }

    fn first_cluster(&self, image: &str) -> Vec<u8> {
        let mut file = File::open(self.0.join(image)).unwrap();
        let mut prefix = [0; 112];
        file.read_exact(&mut prefix).unwrap();
        let len = Header::probe(&prefix).unwrap();
        let mut cluster = prefix.to_vec();
        file.take(len as u64 - 112)
            .read_to_end(&mut cluster)
            .unwrap();
        cluster.resize(len, 0);
        cluster
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn qemu_img(folder: &Path, arguments: &[&str]) -> bool {
    let status = Command::new("qemu-img")
        .args(arguments)
        .current_dir(folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

#[test]
fn headers_with_any_options_are_written_as_qemu_writes_them() {
    let Some(folder) = Folder::for_test("headers") else {
        return;
    };
    folder.img(&["create", "-f", "raw", "base", "1M"]);
    let secret = ["--object", "secret,id=s,data=x"];
    let luks = "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s";
    let aes = "encrypt.format=aes,encrypt.key-secret=s";
    let mut compared = 0;
    for compat in ["compat=0.10", "compat=1.1"] {
        for cluster_size in ["512", "64k", "2M"] {
            let old = compat == "compat=0.10";
            let newer: &[&str] = &[
                "lazy_refcounts=on",
                "refcount_bits=1",
                "refcount_bits=64",
                "compression_type=zstd",
                "extended_l2=on",
                "data_file=data",
                "data_file=data,data_file_raw=on",
            ];
            for options in ["", luks, aes].iter().chain(newer.iter().filter(|_| !old)) {
                let wrong_size = if options.contains("luks") {
                    // Key derivation is slow.
                    cluster_size != "64k"
                } else {
                    options.contains("extended") && cluster_size == "512"
                };
                if wrong_size {
                    continue;
                }
                for backed in [false, true] {
                    if backed && options.contains("data_file_raw") {
                        continue;
                    }
                    let options = format!("{compat},cluster_size={cluster_size},{options}");
                    let options = options.trim_end_matches(',');
                    let mut create = vec!["create", "-f", "qcow2", "-o", options];
                    create.extend(secret);
                    if backed {
                        create.extend(["-F", "raw", "-b", "base"]);
                    }
                    create.extend(["image", "3M"]);
                    folder.img(&create);
                    let cluster = folder.first_cluster("image");
                    let header = Header::decode(&cluster).unwrap();
                    assert_eq!(header.encode().unwrap(), cluster, "{create:?}");
                    let (_, defects) = Header::decode_for_check(&cluster).unwrap();
                    assert_eq!(defects, []);
                    assert_eq!(header.backing_name.is_some(), backed);
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 50, "{compared}");
}

/// What each of the two says of `image` with some bytes replaced: whether QEMU opens it, and whether this crate does.
fn verdicts(folder: &Folder, image: &str, at: u64, patch: &[u8]) -> (bool, bool) {
    let path = folder.0.join(image);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut kept = vec![0; patch.len()];
    file.seek(SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut kept).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(patch).unwrap();
    let opens = qemu_img(&folder.0, &["info", "-f", "qcow2", image]);
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    (&file).take(2 << 20).read_to_end(&mut bytes).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&kept).unwrap();
    (opens, Header::decode(&bytes).is_ok())
}

#[test]
fn a_header_is_refused_where_qemu_refuses_it() {
    let Some(folder) = Folder::for_test("mutants") else {
        return;
    };
    folder.img(&["create", "-f", "raw", "base", "1M"]);
    folder.img(&[
        "create", "-f", "qcow2", "-F", "raw", "-b", "base", "image", "1G",
    ]);
    folder.img(&["bitmap", "--add", "image", "b"]);
    let words = [0, 1, 2, 3, 9, 22, 104, 112, 1023, 65537, u32::MAX];
    let longs = [
        0,
        1,
        512,
        0x10000,
        0x10001,
        0x30000,
        1 << 62,
        1 << 63,
        u64::MAX,
    ];
    let header = Header::decode(&folder.first_cluster("image")).unwrap();
    // The records are those of backing format, feature names, and bitmaps.
    assert_eq!(header.extensions.len(), 3);
    let bitmaps = 112 + 16 + 392;
    let mut mutants = Vec::new();
    for at in [
        0,
        4,
        16,
        20,
        32,
        36,
        56,
        60,
        72,
        76,
        92,
        96,
        100,
        116,
        132,
        bitmaps + 4,
    ]
    .into_iter()
    .chain([bitmaps + 12])
    {
        mutants.extend(words.map(|word| (at, word.to_be_bytes().to_vec())));
    }
    for at in [8, 24, 40, 48, 64, 72, 80, 88, 104, bitmaps + 16] {
        mutants.extend(longs.map(|long| (at, long.to_be_bytes().to_vec())));
    }
    let mut refused = 0;
    let mut differ = Vec::new();
    for (at, patch) in &mutants {
        let (qemu, here) = verdicts(&folder, "image", *at, patch);
        refused += usize::from(!here);
        if qemu != here && !may_differ(*at, qemu) {
            differ.push((*at, patch.clone(), qemu, here));
        }
    }
    assert!(refused > 80 && mutants.len() - refused > 50, "{refused}");
    assert_eq!(differ, []);
}

/// Where QEMU's answer does not follow from the header alone.
fn may_differ(at: u64, qemu_opens: bool) -> bool {
    match at {
        // It refuses raw external data without external data only when it opens data files, which `info` does not.
        88 | 92 => qemu_opens,
        // It reads the bitmaps too, which must agree with the virtual size and fill the directory.
        24 | 536 => !qemu_opens,
        _ => false,
    }
}
