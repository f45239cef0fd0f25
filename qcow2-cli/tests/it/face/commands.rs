use std::fs;

use super::Bench;

#[test]
fn a_new_image_is_what_was_asked_for() {
    let bench = Bench::new();
    let told = bench.ok(&[
        "create",
        "--cluster-size",
        "128k",
        "--compression-type",
        "zstd",
        "--lazy-refcounts",
        "a.qcow2",
        "1.5G",
    ]);
    assert_eq!(told, "a.qcow2: a 1.5 GiB disk in qcow2\n");
    let info = bench.object(&["info", "a.qcow2"]);
    assert_eq!(info["virtual-size"], 3_u64 << 29);
    assert_eq!(info["qcow2"]["cluster-size"], 131_072);
    assert_eq!(info["qcow2"]["compression-type"], "zstd");
    assert_eq!(info["qcow2"]["lazy-refcounts"], true);
    let text = bench.ok(&["info", "a.qcow2"]);
    assert!(
        text.starts_with("a.qcow2: a qcow2 image of 1.5 GiB"),
        "{text}"
    );
    assert!(!text.contains('\x1b'), "there is no terminal: {text}");

    bench.ok(&[
        "create",
        "-f",
        "raw",
        "--preallocation",
        "full",
        "a.raw",
        "1M",
        "-q",
    ]);
    assert_eq!(bench.len("a.raw"), 1 << 20);
}

#[test]
fn an_overlay_has_the_size_of_its_backing_file_and_shows_its_disk() {
    let bench = Bench::with_disk();
    bench.ok(&["create", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2"]);
    bench.same("disk.qcow2", "top.qcow2");
    let layers = bench.objects(&["info", "--chain", "top.qcow2"]);
    assert_eq!(layers.len(), 2);
    assert_eq!(layers[1]["depth"], 1);
    bench.io("top.qcow2", "write -P 3 4M 1M");
    let parts = bench.objects(&["map", "top.qcow2"]);
    let depths: Vec<_> = parts
        .iter()
        .filter(|part| part["data"] == true)
        .map(|part| part["depth"].as_u64().unwrap())
        .collect();
    assert_eq!(depths, [1, 0, 1]);

    let told = bench.ok(&["commit", "top.qcow2"]);
    assert!(told.contains("1 MiB of data went into layer 1"), "{told}");
    let base = bench.objects(&["map", "--start", "4M", "--length", "1M", "disk.qcow2"]);
    assert_eq!(base[0]["data"], true);
}

#[test]
fn copies_show_the_same_whatever_they_are() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "-O", "raw", "disk.qcow2", "flat.raw"]);
    bench.ok(&[
        "convert",
        "-c",
        "--compress-level",
        "9",
        "flat.raw",
        "small.qcow2",
    ]);
    bench.same("disk.qcow2", "flat.raw");
    bench.same("small.qcow2", "flat.raw");
    assert!(bench.len("small.qcow2") < bench.len("disk.qcow2"));
    // Into what is there already, with data where the source has none.
    bench.ok(&["create", "there.qcow2", "16M"]);
    bench.io("there.qcow2", "write -P 9 0 16M");
    bench.ok(&["convert", "-n", "-y", "disk.qcow2", "there.qcow2"]);
    bench.same("disk.qcow2", "there.qcow2");
    // Over a backing file only what differs is stored.
    let told = bench.object(&[
        "convert",
        "-b",
        "disk.qcow2",
        "-F",
        "qcow2",
        "flat.raw",
        "thin.qcow2",
    ]);
    assert_eq!(told["stored-bytes"], 0, "{told}");
    bench.same("thin.qcow2", "flat.raw");
    // So it is where it is compressed.
    bench.io("there.qcow2", "write -P 7 4M 64k");
    let told = bench.object(&[
        "convert",
        "--compress",
        "--backing",
        "disk.qcow2",
        "-F",
        "qcow2",
        "there.qcow2",
        "thin-packed.qcow2",
    ]);
    assert_eq!(told["stored-bytes"], 65536, "{told}");
    assert_eq!(told["compressed-clusters"], 1, "{told}");
    bench.same("thin-packed.qcow2", "there.qcow2");
}

#[test]
fn what_is_measured_is_how_long_the_copy_gets() {
    let bench = Bench::with_disk();
    let told = bench.object(&["measure", "disk.qcow2"]);
    bench.ok(&["convert", "disk.qcow2", "copy.qcow2"]);
    assert_eq!(told["required"], bench.len("copy.qcow2"));
    let empty = bench.ok(&["measure", "--size", "1T"]);
    assert!(empty.starts_with("with this data"), "{empty}");
    bench.ok(&["measure", "--size", "1G", "--encrypt", "luks"]);
}

#[test]
fn a_comparison_tells_where_disks_differ() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "disk.qcow2", "other.qcow2"]);
    bench.io("other.qcow2", "write -P 7 0x800200 512");
    let answer = bench.run(&["compare", "disk.qcow2", "other.qcow2"]);
    assert_eq!(answer.code, 1);
    assert!(answer.out.contains("at 0x800200\n"), "{}", answer.out);
    assert_eq!(bench.run(&["compare", "disk.qcow2", "gone"]).code, 2);
    bench.ok(&["convert", "disk.qcow2", "longer.qcow2"]);
    bench.ok(&["resize", "longer.qcow2", "+1M"]);
    bench.same("disk.qcow2", "longer.qcow2");
    let strict = bench.run(&["compare", "--strict", "disk.qcow2", "longer.qcow2"]);
    assert_eq!(strict.code, 1);
}

#[test]
fn snapshots_are_taken_compared_applied_and_deleted() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "disk.qcow2", "before.qcow2"]);
    bench.ok(&["snapshot", "create", "disk.qcow2", "one"]);
    bench.io("disk.qcow2", "write -P 3 0 64k");
    bench.io("disk.qcow2", "write -z 8M 64k");
    let stretches = bench.objects(&["snapshot", "diff", "disk.qcow2", "one"]);
    assert_eq!(stretches.len(), 2, "{stretches:?}");
    assert_eq!(
        (
            stretches[0]["start"].as_u64(),
            stretches[0]["length"].as_u64()
        ),
        (Some(0), Some(65536))
    );
    assert_eq!(stretches[1]["zero"], true);
    bench.ok(&[
        "snapshot",
        "export",
        "disk.qcow2",
        "one",
        "since.qcow2",
        "-b",
        "before.qcow2",
        "-F",
        "qcow2",
    ]);
    bench.same("since.qcow2", "disk.qcow2");
    let list = bench.ok(&["snapshot", "list", "disk.qcow2"]);
    assert!(list.starts_with("ID  NAME  TAKEN"), "{list}");
    assert!(list.contains("\n1   one   20"), "{list}");

    bench.ok(&["snapshot", "apply", "--yes", "disk.qcow2", "one"]);
    bench.same("disk.qcow2", "before.qcow2");
    bench.ok(&["snapshot", "delete", "--yes", "disk.qcow2", "1"]);
    let list = bench.ok(&["snapshot", "list", "disk.qcow2"]);
    assert_eq!(list, "disk.qcow2 has no snapshots\n");
    assert_eq!(bench.run(&["check", "disk.qcow2"]).code, 0);
}

#[test]
fn bitmaps_record_are_merged_and_exported() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "disk.qcow2", "monday.qcow2"]);
    bench.ok(&["bitmap", "add", "disk.qcow2", "a", "-g", "4k"]);
    bench.ok(&["bitmap", "add", "disk.qcow2", "b", "--disabled"]);
    bench.io("disk.qcow2", "write -P 5 1M 4k");
    let ranges = bench.objects(&["bitmap", "ranges", "disk.qcow2", "a"]);
    assert_eq!(ranges.len(), 1);
    assert_eq!(ranges[0]["start"], 1 << 20);
    assert_eq!(ranges[0]["length"], 4096);
    bench.ok(&["bitmap", "merge", "disk.qcow2", "b", "a"]);
    let list = bench.object(&["bitmap", "list", "disk.qcow2"]);
    assert_eq!(list["bitmaps"][1]["dirty-bytes"], 65536);
    bench.ok(&[
        "bitmap",
        "export",
        "disk.qcow2",
        "a",
        "tuesday.qcow2",
        "-b",
        "monday.qcow2",
        "-F",
        "qcow2",
    ]);
    bench.same("tuesday.qcow2", "disk.qcow2");
    bench.ok(&["convert", "--bitmaps", "disk.qcow2", "copy.qcow2"]);
    assert_eq!(
        bench.object(&["bitmap", "list", "copy.qcow2"])["bitmaps"],
        list["bitmaps"]
    );
    bench.ok(&["bitmap", "clear", "disk.qcow2", "a"]);
    bench.ok(&["bitmap", "disable", "disk.qcow2", "a"]);
    bench.io("disk.qcow2", "write -P 5 1M 4k");
    let none = bench.ok(&["bitmap", "ranges", "disk.qcow2", "a"]);
    assert_eq!(none, "0 ranges, 0 B, changed\n");
    bench.ok(&["bitmap", "enable", "disk.qcow2", "a"]);
    bench.ok(&["bitmap", "remove", "-y", "disk.qcow2", "a"]);
    bench.fails(1, &["bitmap", "ranges", "disk.qcow2", "a"]);
}

#[test]
fn an_image_gets_another_backing_file_and_keeps_its_disk() {
    let bench = Bench::with_disk();
    bench.ok(&["create", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2"]);
    bench.ok(&["create", "empty.qcow2", "16M"]);
    bench.ok(&["rebase", "-b", "empty.qcow2", "-F", "qcow2", "top.qcow2"]);
    bench.same("disk.qcow2", "top.qcow2");
    // What there is to carry over comes at once.
    let words = ["rebase", "--no-backing", "-r", "1G", "top.qcow2"];
    bench.ok(&words);
    fs::remove_file(bench.path("empty.qcow2")).unwrap();
    bench.same("disk.qcow2", "top.qcow2");
    bench.ok(&[
        "rebase",
        "--unsafe",
        "-b",
        "gone.raw",
        "-F",
        "raw",
        "top.qcow2",
    ]);
    let info = bench.object(&["info", "top.qcow2"]);
    assert_eq!(info["qcow2"]["backing-file"], "gone.raw");
}

#[test]
fn sizes_and_options_change() {
    let bench = Bench::with_disk();
    let told = bench.ok(&["resize", "disk.qcow2", "+16M"]);
    assert_eq!(
        told,
        "disk.qcow2: the disk has 32 MiB (33554432 bytes) now, and had 16 MiB\n"
    );
    bench.ok(&["resize", "disk.qcow2", "-16M", "--shrink"]);
    assert_eq!(
        bench.object(&["info", "disk.qcow2"])["virtual-size"],
        16 << 20
    );
    bench.ok(&[
        "amend",
        "--refcount-bits",
        "32",
        "--lazy-refcounts",
        "on",
        "disk.qcow2",
    ]);
    let info = bench.object(&["info", "disk.qcow2"]);
    assert_eq!(info["qcow2"]["refcount-bits"], 32);
    assert_eq!(info["qcow2"]["lazy-refcounts"], true);
}

#[test]
fn a_compacted_image_is_smaller_and_the_same_with_its_snapshots() {
    let bench = Bench::with_disk();
    bench.ok(&["snapshot", "create", "disk.qcow2", "keep"]);
    bench.io("disk.qcow2", "write -P 4 0 8M");
    bench.io("disk.qcow2", "write -P 5 9M 1M");
    bench.io("disk.qcow2", "discard 0 8M");
    bench.ok(&["convert", "disk.qcow2", "now.qcow2"]);
    let before = bench.len("disk.qcow2");
    bench.ok(&["compact", "--into", "small.qcow2", "disk.qcow2"]);
    assert_eq!(bench.len("disk.qcow2"), before);
    assert!(bench.len("small.qcow2") < before);
    bench.ok(&["compact", "--sequential", "disk.qcow2"]);
    assert!(bench.len("disk.qcow2") < before);
    for image in ["disk.qcow2", "small.qcow2"] {
        bench.same(image, "now.qcow2");
        bench.ok(&["check", image]);
        let list = bench.object(&["snapshot", "list", image]);
        assert_eq!(list["snapshots"][0]["name"], "keep");
    }
}

#[test]
fn encrypted_images_open_by_their_passphrases_only() {
    let bench = Bench::with_disk();
    fs::write(bench.path("one"), "hunter2").unwrap();
    fs::write(bench.path("two"), "swordfish").unwrap();
    let fast = "encrypt.iter-time=10";
    bench.ok(&[
        "convert",
        "--encrypt",
        "luks",
        "-o",
        fast,
        "--new-passphrase-file",
        "one",
        "disk.qcow2",
        "safe.qcow2",
    ]);
    let info = bench.object(&["info", "safe.qcow2"]);
    assert_eq!(info["qcow2"]["encryption"]["method"], "luks");
    bench.ok(&[
        "compare",
        "--passphrase-file",
        "one",
        "safe.qcow2",
        "disk.qcow2",
    ]);
    let err = bench.fails(1, &["map", "safe.qcow2"]);
    assert!(err.contains("--passphrase-file FILE"), "{err}");
    let err = bench.fails(1, &["map", "--passphrase-file", "two", "safe.qcow2"]);
    assert!(err.contains("opens no key slot"), "{err}");

    let words = ["--passphrase-file", "one", "safe.qcow2"];
    let add = [
        "amend",
        "--add-key",
        "--new-passphrase-file",
        "two",
        "-o",
        fast,
    ];
    bench.ok(&[&add[..], &words].concat());
    let erase = ["amend", "--erase-key", "--old-passphrase-file", "one", "-y"];
    bench.ok(&[&erase[..], &words].concat());
    bench.fails(1, &["map", "--passphrase-file", "one", "safe.qcow2"]);
    bench.ok(&["map", "--passphrase-file", "two", "safe.qcow2"]);

    // Below another image its passphrase has a number.
    bench.ok(&[
        "create",
        "-b",
        "safe.qcow2",
        "-F",
        "qcow2",
        "--passphrase-file",
        "1=two",
        "top.qcow2",
    ]);
    bench.ok(&["map", "--passphrase-file", "1=two", "top.qcow2"]);
    bench.fails(1, &["map", "--passphrase-file", "two", "top.qcow2"]);
}
