use std::fs;

use super::Bench;

#[test]
fn several_sources_are_copied_one_behind_the_other() {
    let bench = Bench::with_disk();
    fs::write(bench.path("one.raw"), vec![1; 1 << 20]).unwrap();
    fs::write(bench.path("two.raw"), vec![2; 512]).unwrap();
    let told = bench.object(&["convert", "one.raw", "disk.qcow2", "two.raw", "all.raw"]);
    assert_eq!(told["virtual-size"], (17 << 20) + 512);
    assert_eq!(told["source"], "one.raw");
    assert_eq!(
        told["more-sources"],
        serde_json::json!(["disk.qcow2", "two.raw"])
    );
    let all = fs::read(bench.path("all.raw")).unwrap();
    assert_eq!(all.len(), (17 << 20) + 512);
    assert!(all[..2 << 20].iter().all(|byte| *byte == 1));
    assert!(all[2 << 20..9 << 20].iter().all(|byte| *byte == 0));
    assert!(all[17 << 20..].iter().all(|byte| *byte == 2));
    bench.ok(&[
        "convert",
        "-c",
        "one.raw",
        "disk.qcow2",
        "two.raw",
        "all.qcow2",
    ]);
    bench.same("all.raw", "all.qcow2");
    for more in [
        &["--bitmaps"][..],
        &["-l", "one"],
        &["-b", "disk.qcow2", "-F", "qcow2"],
    ] {
        let words = [&["convert", "one.raw", "two.raw", "x.qcow2"][..], more].concat();
        let err = bench.fails(1, &words);
        assert!(err.contains("needs a single source"), "{err}");
    }
    let err = bench.fails(1, &["convert", "one.raw", "all.qcow2", "./all.qcow2"]);
    assert!(err.contains("the same file"), "{err}");
    assert!(!bench.path("x.qcow2").exists());
}

#[test]
fn the_name_of_a_new_file_tells_its_format() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "disk.qcow2", "copy.RAW"]);
    assert_eq!(bench.len("copy.RAW"), 16 << 20);
    assert_eq!(bench.object(&["create", "new.raw", "1M"])["format"], "raw");
    bench.ok(&["convert", "-O", "qcow2", "copy.RAW", "image.raw"]);
    assert_eq!(bench.object(&["info", "image.raw"])["format"], "qcow2");
    assert_eq!(
        bench.object(&["create", "new.img", "1M"])["format"],
        "qcow2"
    );
}

#[test]
fn sources_can_be_described() {
    let bench = Bench::with_disk();
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2"}}"#;
    let list = "driver=qcow2,file.filename=disk.qcow2";
    assert_eq!(bench.object(&["info", json])["virtual-size"], 16 << 20);
    assert_eq!(
        bench.object(&["info", "--image-opts", list])["format"],
        "qcow2"
    );
    assert_eq!(bench.object(&["check", json])["verdict"], "sound");
    assert_eq!(
        bench.object(&["check", "--image-opts", list])["verdict"],
        "sound"
    );
    let map = |words: &[&str]| {
        let mut rows = bench.objects(words);
        for row in &mut rows {
            row.as_object_mut().unwrap().remove("path");
        }
        rows
    };
    assert_eq!(map(&["map", json]), map(&["map", "disk.qcow2"]));
    assert_eq!(
        bench.object(&["measure", json])["required"],
        bench.object(&["measure", "disk.qcow2"])["required"]
    );
    bench.same(json, "disk.qcow2");
    bench.ok(&["convert", json, "copy.qcow2"]);
    bench.same("copy.qcow2", "disk.qcow2");
    // A part of a disk.
    let part = r#"json:{"driver":"raw","offset":8388608,"size":1048576,"file":{"driver":"qcow2","file":{"filename":"disk.qcow2"}}}"#;
    bench.ok(&["convert", part, "part.raw"]);
    assert!(fs::read(bench.path("part.raw")).unwrap() == vec![2; 1 << 20]);
    let err = bench.fails(1, &["info", "json:{\"driver\":\"foo\"}"]);
    assert!(err.contains("Unknown driver 'foo'"), "{err}");
    let err = bench.fails(1, &["resize", json, "1G"]);
    assert!(err.contains("only read here"), "{err}");
}

#[test]
fn described_images_follow_names_only_where_that_is_allowed() {
    let bench = Bench::with_disk();
    fs::create_dir(bench.path("sub")).unwrap();
    let words = [
        "create",
        "-b",
        "../disk.qcow2",
        "-F",
        "qcow2",
        "sub/top.qcow2",
    ];
    bench.ok(&words);
    let json = r#"json:{"driver":"qcow2","file":{"filename":"sub/top.qcow2"}}"#;
    let err = bench.fails(1, &["map", json]);
    assert!(
        err.contains("outside") && err.contains("--references"),
        "{err}"
    );
    assert_eq!(
        bench.objects(&["map", "--references", "all", json])[0]["depth"],
        1
    );
    bench.ok(&["info", json]);
    // What is described is typed, and so the user's own.
    let with_base = r#"json:{"driver":"qcow2","file":{"filename":"sub/top.qcow2"},"backing":{"driver":"qcow2","file":{"filename":"disk.qcow2"}}}"#;
    bench.same(with_base, "disk.qcow2");
}

#[test]
fn described_images_are_opened_by_the_passphrases_of_their_layers() {
    let bench = Bench::new();
    fs::write(bench.path("key"), "secret").unwrap();
    bench.ok(&[
        "create",
        "--encrypt",
        "luks",
        "-o",
        "encrypt.iter-time=10",
        "--new-passphrase-file",
        "key",
        "a.qcow2",
        "1M",
    ]);
    let json = r#"json:{"driver":"qcow2","file":{"filename":"a.qcow2"}}"#;
    bench.fails(1, &["map", json]);
    bench.ok(&["map", "--passphrase-file", "key", json]);
    bench.ok(&["info", json]);
    bench.ok(&["convert", "--passphrase-file", "key", json, "plain.qcow2"]);
}

#[test]
fn a_source_that_was_cut_short_is_not_copied_as_if_it_were_whole() {
    let bench = Bench::with_disk();
    let len = bench.len("disk.qcow2");
    let file = fs::File::options()
        .write(true)
        .open(bench.path("disk.qcow2"))
        .unwrap();
    file.set_len(len - (512 << 10)).unwrap();
    let err = bench.fails(1, &["convert", "disk.qcow2", "copy.qcow2"]);
    assert!(
        err.contains("disk.qcow2: the file was cut short: 8 references"),
        "{err}"
    );
    assert!(err.contains("--salvage"), "{err}");
    assert!(!bench.path("copy.qcow2").exists());
    bench.run(&["convert", "--salvage", "disk.qcow2", "copy.qcow2"]);
    assert!(bench.path("copy.qcow2").exists());
}
