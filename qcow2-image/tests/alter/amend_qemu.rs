//! The same options amended by qemu-img and here, each to the other's image.

use qcow2_image::Image;
use qcow2_image::amend::AmendOptions;

use crate::oracle::{Folder, is_available};

struct Sample {
    create: &'static str,
    /// What is done to the image before, by `qemu-io`.
    io: &'static [&'static str],
    snapshots: bool,
    amend: &'static str,
}

const DATA: &[&str] = &[
    "write -P 1 0 300k",
    "write -z 100k 50k",
    "write -P 2 700k 20k",
    "write -z 900k 64k",
    "discard 64k 64k",
];

const fn sample(create: &'static str, snapshots: bool, amend: &'static str) -> Sample {
    Sample {
        create,
        io: DATA,
        snapshots,
        amend,
    }
}

/// What both can do.
const SAMPLES: &[Sample] = &[
    sample("compat=0.10", true, "compat=1.1"),
    sample("compat=0.10,cluster_size=512", true, "compat=v3"),
    sample("cluster_size=4096", true, "compat=0.10"),
    sample("lazy_refcounts=on", true, "compat=v2"),
    sample("cluster_size=512", false, "compat=0.10"),
    sample(
        "compat=0.10",
        false,
        "compat=1.1,lazy_refcounts=on,refcount_bits=64",
    ),
    sample("cluster_size=512", true, "refcount_bits=2"),
    sample("cluster_size=512", true, "refcount_bits=64"),
    sample(
        "refcount_bits=1,cluster_size=1024",
        false,
        "refcount_bits=8",
    ),
    sample(
        "refcount_bits=64,cluster_size=512",
        false,
        "refcount_bits=1",
    ),
    sample(
        "refcount_bits=32",
        true,
        "refcount_bits=4,lazy_refcounts=on",
    ),
    sample("lazy_refcounts=on", true, "lazy_refcounts=off"),
    sample("cluster_size=4096", true, "size=3M"),
    sample("cluster_size=4096", false, "size=512k"),
    sample("extended_l2=on", true, "refcount_bits=32,size=2M"),
    sample("data_file=data.raw", false, "data_file=other"),
    sample("data_file=data.raw", false, "data_file="),
    sample(
        "data_file=data.raw,data_file_raw=on",
        false,
        "data_file_raw=off",
    ),
];

fn prepare(folder: &Folder, sample: &Sample) {
    for line in [
        "rm -f data.raw other",
        &format!("qemu-img create -q -f qcow2 -o {} a 1M", sample.create),
    ] {
        let mut parts = line.split(' ');
        let tool = parts.next().unwrap();
        let args: Vec<&str> = parts.collect();
        folder.run(tool, &args).unwrap();
    }
    if sample.create.contains("data_file") {
        folder.io("a", &DATA[..3]);
    } else {
        folder.io("a", sample.io);
    }
    if sample.snapshots {
        folder.img("snapshot -c one a");
        folder.io("a", &["write -P 3 200k 200k", "write -z 0 30k"]);
        folder.img("snapshot -c two a");
        folder.io("a", &["write -P 4 0 10k", "write -z 710k 64k"]);
    }
}

fn options(text: &str) -> AmendOptions<'static> {
    let mut options = AmendOptions::new();
    for part in text.split(',') {
        let (key, value) = part.split_once('=').unwrap();
        options.set(key, value).unwrap();
    }
    options
}

/// What `qemu-img info` says of the format.
fn info(folder: &Folder, name: &str) -> String {
    let info = folder.img(&format!("info -f qcow2 --output=json {name}"));
    // What is said of the file below stands further in.
    let of_image = |name: &str| format!("\n    \"{name}\":");
    let from = info.find(&of_image("format-specific")).unwrap();
    let size = info.find(&of_image("virtual-size")).unwrap();
    let size = info[size + 1..].lines().next().unwrap();
    let rest = info[from + 1..]
        .lines()
        .take_while(|line| !line.starts_with("    }"));
    format!("{size}\n{}", rest.collect::<Vec<_>>().join("\n"))
}

#[test]
fn what_qemu_amends_is_amended_here_alike() {
    if !is_available(SAMPLES.len(), "comparisons of amended images") {
        return;
    }
    for sample in SAMPLES {
        let what = format!("{} -> {}", sample.create, sample.amend);
        let folder = Folder::new();
        prepare(&folder, sample);
        folder.copy("a", "b");
        folder.copy("a", "c");
        let external = sample.create.contains("data_file");
        let mut image = folder.open("a");
        let done = image.amend(&options(sample.amend));
        done.unwrap_or_else(|error| panic!("{what}: {error}"));
        image.close().unwrap();
        folder.img(&format!("amend -f qcow2 -o {} b", sample.amend));
        let (ours, theirs) = (info(&folder, "a"), info(&folder, "b"));
        assert_eq!(ours, theirs, "{what}");
        if external {
            // The data file may have lost its name.
            continue;
        }
        folder.assert_sound("a");
        let names: &[&str] = if sample.snapshots {
            &["one", "two"]
        } else {
            &[]
        };
        folder.assert_same("a", "b", &[]);
        if !sample.amend.contains("size") {
            // Snapshots keep the size they had, which no tool tells apart.
            folder.assert_same("a", "c", names);
        }
        if sample.snapshots && sample.amend.contains("compat") && !sample.create.contains("compat")
        {
            // QEMU zeroes clusters that snapshots share, and leaves flags behind that are wrong.
            folder.io("a", &["write -P 9 30k 400k"]);
            folder.assert_sound("a");
            continue;
        }
        // Each writes to what the other has amended.
        folder.io("a", &["write -P 9 30k 400k"]);
        let image = folder.open("b");
        qcow2_io::Storage::write_at(&image, &vec![9; 400 << 10], 30 << 10).unwrap();
        image.close().unwrap();
        folder.assert_same("a", "b", &[]);
        folder.assert_sound("a");
    }
}

#[test]
fn the_backing_file_shows_where_the_image_has_nothing_after_a_downgrade() {
    if !is_available(1, "downgrades over a backing file") {
        return;
    }
    let folder = Folder::new();
    folder.img("create -q -f qcow2 base 1M");
    folder.io("base", &["write -P 7 0 1M"]);
    folder.img("create -q -f qcow2 -b base -F qcow2 -o cluster_size=4096 a");
    folder.io("a", DATA);
    folder.img("snapshot -c one a");
    folder.io("a", &["write -z 400k 100k", "write -P 5 410k 1k"]);
    folder.copy("a", "b");
    folder.copy("a", "c");
    let mut image = folder.open("a");
    image.amend(&options("compat=0.10")).unwrap();
    image.close().unwrap();
    folder.img("amend -f qcow2 -o compat=0.10 b");
    folder.assert_sound("a");
    folder.assert_same("a", "c", &["one"]);
    folder.assert_same("a", "b", &[]);
    assert_eq!(info(&folder, "a"), info(&folder, "b"));
    // QEMU takes it up again, and we take it back once more.
    folder.img("amend -f qcow2 -o compat=1.1,lazy_refcounts=on a");
    folder.io("a", &["write -z 300k 200k"]);
    let mut image = folder.open("a");
    image.amend(&options("compat=0.10")).unwrap();
    image.close().unwrap();
    folder.assert_sound("a");
    folder.io("c", &["write -z 300k 200k"]);
    folder.assert_same("a", "c", &["one"]);
}

#[test]
fn a_name_is_only_a_name() {
    if !is_available(1, "changes of backing files") {
        return;
    }
    let folder = Folder::new();
    for (name, value) in [("one", 1), ("two", 2)] {
        folder.img(&format!("create -q -f qcow2 {name} 1M"));
        folder.io(name, &[&format!("write -P {value} 0 1M")]);
    }
    folder.img("create -q -f qcow2 -b one -F qcow2 a");
    folder.copy("a", "b");
    let mut image = folder.open("a");
    image
        .amend(&options("backing_file=two,backing_fmt=qcow2"))
        .unwrap();
    image.close().unwrap();
    folder.img("rebase -u -f qcow2 -b two -F qcow2 b");
    folder.assert_same("a", "b", &[]);
    folder.assert_same("a", "two", &[]);
    let mut image = folder.open("a");
    image.amend(&options("backing_file=")).unwrap();
    image.close().unwrap();
    let args = ["rebase", "-u", "-f", "qcow2", "-b", "", "b"];
    folder.run("qemu-img", &args).unwrap();
    assert_eq!(info(&folder, "a"), info(&folder, "b"));
    let header = folder.open("a").header();
    assert_eq!(
        (header.backing_name.as_deref(), header.backing_format()),
        (None, None)
    );
}

#[test]
#[cfg(feature = "encryption")]
fn key_slots_are_amended_for_qemu_and_by_it() {
    use qcow2_image::luks::KeyCost;
    use qcow2_io::cipher::Secret;

    if !is_available(1, "changes of key slots") {
        return;
    }
    let secret = |text: &str| Secret::new(text.as_bytes().to_vec());
    let folder = Folder::new();
    let object = |id: &str, text: &str| format!("secret,id={id},data={text}");
    let one = object("k", "one");
    let create = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=1";
    let args = [
        "create", "-q", "-f", "qcow2", "--object", &one, "-o", create, "a", "1M",
    ];
    folder.run("qemu-img", &args).unwrap();
    let opens = |text: &str| {
        let object = object("k", text);
        let image = "driver=qcow2,file.filename=a,encrypt.key-secret=k";
        let args = [
            "--object",
            &object,
            "--image-opts",
            image,
            "-c",
            "read 0 4k",
        ];
        folder
            .run("qemu-io", &args)
            .is_ok_and(|words| words.contains("ops"))
    };
    let open = |text: &str| folder.open_with("a", Image::options().secret(secret(text)));
    let new = || {
        AmendOptions::new()
            .secret(secret("one"))
            .key_cost(KeyCost::Iterations(1000))
    };
    let mut image = open("one");
    let mut add = new().new_secret(secret("two"));
    add.set("encrypt.state", "active").unwrap();
    // Half of it is refused, so none of it happens.
    let bad = image.amend(&add.clone().size(5));
    assert!(bad.is_err());
    image.close().unwrap();
    assert!(!opens("two"));
    let mut image = open("one");
    image.amend(&add).unwrap();
    image.close().unwrap();
    assert!(opens("one") && opens("two"));

    let mut erase = AmendOptions::new().old_secret(secret("one"));
    erase.set("encrypt.state", "inactive").unwrap();
    let mut image = open("two");
    image.amend(&erase).unwrap();
    image.close().unwrap();
    assert!(!opens("one") && opens("two"));
    // The last one only by force.
    let mut last = AmendOptions::new().old_secret(secret("two"));
    last.set("encrypt.state", "inactive").unwrap();
    let mut image = open("two");
    assert!(image.amend(&last).is_err());
    for (key, value) in [("encrypt.keyslot", "9"), ("encrypt.iter-time", "10")] {
        let mut wrong = last.clone();
        wrong.set(key, value).unwrap();
        assert!(image.amend(&wrong).is_err(), "{key}");
    }
    assert!(
        image
            .amend(&AmendOptions::new().old_secret(secret("two")))
            .is_err()
    );
    image.amend(&last.force(true)).unwrap();
    image.close().unwrap();
    assert!(!opens("two"));
}
