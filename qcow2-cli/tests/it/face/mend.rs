use std::fs;
use std::os::unix::fs::FileExt as _;

use super::Bench;

/// Clears the refcounts of the first four clusters: they are in use, and may be handed out again.
fn damage(bench: &Bench, name: &str) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(bench.path(name))
        .unwrap();
    let read = |offset| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = read(read(48));
    file.write_all_at(&[0; 8], block).unwrap();
}

#[test]
fn damage_is_told_mended_and_can_come_back() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "disk.qcow2", "good.qcow2"]);
    damage(&bench, "disk.qcow2");
    let damaged = fs::read(bench.path("disk.qcow2")).unwrap();
    let check = bench.run(&["check", "disk.qcow2"]);
    assert_eq!(check.code, 2);
    assert!(check.out.starts_with("disk.qcow2: corrupt\n"), "{check:?}");
    assert!(check.out.contains("`qcow2 repair` mends it"), "{check:?}");
    let audit = bench.run(&["audit", "disk.qcow2"]);
    assert_eq!(audit.code, 2);
    assert!(audit.out.contains("REFCOUNT-MISSING"), "{audit:?}");

    let plan = bench.run(&["repair", "--plan", "disk.qcow2"]);
    assert_eq!(plan.code, 2);
    assert!(plan.out.contains("RAISE-REFCOUNTS"), "{plan:?}");
    let err = bench.fails(1, &["repair", "disk.qcow2"]);
    assert!(err.contains("--yes applies the plan"), "{err}");
    assert!(fs::read(bench.path("disk.qcow2")).unwrap() == damaged);

    let done = bench.ok(&["repair", "--yes", "disk.qcow2"]);
    assert!(
        done.ends_with("Done. To go back: qcow2 repair --undo disk.qcow2.undo disk.qcow2\n"),
        "{done}"
    );
    bench.ok(&["check", "disk.qcow2"]);
    bench.same("disk.qcow2", "good.qcow2");
    bench.ok(&["repair", "--undo", "disk.qcow2.undo", "disk.qcow2"]);
    assert!(fs::read(bench.path("disk.qcow2")).unwrap() == damaged);

    bench.ok(&["repair", "--salvage-to", "saved.qcow2", "disk.qcow2"]);
    bench.same("saved.qcow2", "good.qcow2");
    assert!(fs::read(bench.path("disk.qcow2")).unwrap() == damaged);
}

#[test]
fn hints_name_this_program() {
    let bench = Bench::new();
    fs::write(bench.path("junk"), vec![1; 65536]).unwrap();
    let err = bench.fails(1, &["repair", "--plan", "junk"]);
    assert!(err.contains("--level salvage searches the file"), "{err}");
    let err = bench.fails(1, &["explain", "nothing-of-the-kind-at-all"]);
    assert!(err.contains("`qcow2 explain list`"), "{err}");
}

#[test]
fn a_folder_is_audited_and_the_worst_image_counts() {
    let bench = Bench::with_disk();
    bench.ok(&["convert", "disk.qcow2", "worse.qcow2"]);
    damage(&bench, "worse.qcow2");
    let answer = bench.run(&["audit", "."]);
    assert_eq!(answer.code, 2, "{answer:?}");
    assert!(
        answer.out.contains("2 images: 1 sound; 1 corrupt"),
        "{answer:?}"
    );
    let reports = bench.objects(&["audit", "."]);
    assert_eq!(reports.len(), 2);
    let owner = bench.object(&["audit", "--owner", "0", "disk.qcow2"]);
    assert_eq!(owner["owners"][0]["structure"], "header");
}

#[test]
fn the_page_of_findings_is_what_the_program_prints() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/findings.md");
    let page = Bench::new().ok(&["explain", "--markdown"]);
    assert!(
        fs::read_to_string(path).unwrap() == page,
        "docs/findings.md is out of date: qcow2 explain --markdown > docs/findings.md"
    );
}

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The entry of the first L2 table for a cluster: where it is, and what it says.
fn entry(bytes: &[u8], cluster: usize) -> (usize, u64) {
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let place = |at| usize::try_from(number(at) & OFFSET_MASK).unwrap();
    let at = place(place(40)) + 8 * cluster;
    (at, number(at))
}

/// Lets the second cluster of an image be the first one, too.
fn share(bench: &Bench, name: &str) {
    let mut bytes = fs::read(bench.path(name)).unwrap();
    let (_, first) = entry(&bytes, 0);
    let (at, _) = entry(&bytes, 1);
    bytes[at..at + 8].copy_from_slice(&first.to_be_bytes());
    fs::write(bench.path(name), bytes).unwrap();
}

/// An image `safe.qcow2` that the passphrase in the file `key` opens; its first cluster has ones, the second twos.
fn encrypted() -> Bench {
    let bench = Bench::new();
    fs::write(bench.path("key"), "hunter2").unwrap();
    fs::write(bench.path("other"), "swordfish").unwrap();
    bench.ok(&["create", "plain.qcow2", "1M"]);
    bench.io("plain.qcow2", "write -P 1 0 64k");
    bench.io("plain.qcow2", "write -P 2 64k 64k");
    let how = ["--encrypt", "luks", "-o", "encrypt.iter-time=10"];
    let key = ["--new-passphrase-file", "key", "plain.qcow2", "safe.qcow2"];
    bench.ok(&[&["convert"], &how[..], &key[..]].concat());
    bench
}

#[test]
fn encrypted_clusters_that_share_a_place_are_parted_with_the_passphrase() {
    let bench = encrypted();
    share(&bench, "safe.qcow2");
    let damaged = fs::read(bench.path("safe.qcow2")).unwrap();
    let without = bench.run(&["repair", "--yes", "safe.qcow2"]);
    assert_eq!(without.code, 2, "{without:?}");
    assert!(without.out.contains("--passphrase-file"), "{without:?}");
    fs::write(bench.path("safe.qcow2"), &damaged).unwrap();
    let wrong = ["repair", "--yes", "--passphrase-file", "other"];
    let err = bench.fails(1, &[&wrong[..], &["safe.qcow2"]].concat());
    assert!(err.contains("opens no key slot"), "{err}");
    assert!(fs::read(bench.path("safe.qcow2")).unwrap() == damaged);

    let with = ["--passphrase-file", "key", "safe.qcow2"];
    let undo_file = ["--undo-file", "back"];
    let done = bench.ok(&[&["repair", "--yes"], &undo_file[..], &with[..]].concat());
    assert!(done.contains("COPY-CLUSTER"), "{done}");
    bench.ok(&["check", "safe.qcow2"]);
    // Both have what was in their place.
    bench.io("plain.qcow2", "write -P 1 64k 64k");
    bench.ok(&[&["compare"], &with[..], &["plain.qcow2"]].concat());
    bench.ok(&["repair", "--undo", "back", "safe.qcow2"]);
    assert!(fs::read(bench.path("safe.qcow2")).unwrap() == damaged);
}

#[test]
fn an_encrypted_disk_is_salvaged_with_the_passphrase() {
    let bench = encrypted();
    damage(&bench, "safe.qcow2");
    let words = ["repair", "--salvage-to", "out.qcow2", "safe.qcow2"];
    let err = bench.fails(1, &words);
    assert!(err.contains("--passphrase-file"), "{err}");
    assert!(!bench.path("out.qcow2").exists());
    bench.ok(&[&words[..], &["--passphrase-file", "key"]].concat());
    bench.same("out.qcow2", "plain.qcow2");

    // Two that share a place are in doubt, both of them.
    share(&bench, "safe.qcow2");
    let words = ["repair", "--salvage-to", "two.qcow2", "safe.qcow2"];
    let said = bench.ok(&[&words[..], &["--passphrase-file", "key"]].concat());
    for range in ["0x0..0x10000", "0x10000..0x20000"] {
        assert!(
            said.contains(&format!("guest {range}: guest data ambiguous")),
            "{said}"
        );
    }
    bench.io("plain.qcow2", "write -P 1 64k 64k");
    bench.same("two.qcow2", "plain.qcow2");
}

#[test]
fn a_chain_is_salvaged_as_far_as_it_may_be_opened() {
    let bench = encrypted();
    bench.ok(&[
        "create",
        "-b",
        "safe.qcow2",
        "-F",
        "qcow2",
        "--passphrase-file",
        "1=key",
        "top.qcow2",
    ]);
    let open = ["--passphrase-file", "1=key"];
    let overlay = "driver=qcow2,file.filename=top.qcow2,backing.encrypt.key-secret=s";
    let secret = "secret,id=s,file=key";
    let write = ["-c", "write -P 3 128k 64k"];
    bench.ok(&[
        &["io", "--object", secret],
        &write[..],
        &["--image-opts", overlay],
    ]
    .concat());
    bench.io("plain.qcow2", "write -P 3 128k 64k");
    damage(&bench, "top.qcow2");
    let words = ["repair", "--salvage-to", "out.qcow2", "top.qcow2"];
    bench.fails(1, &words);
    let denied = bench.fails(
        1,
        &[&words[..], &open[..], &["--references", "deny"]].concat(),
    );
    assert!(denied.contains("--references"), "{denied}");
    bench.ok(&[&words[..], &open[..]].concat());
    bench.same("out.qcow2", "plain.qcow2");
    let info = bench.object(&["info", "out.qcow2"]);
    assert!(info["qcow2"].get("backing-file").is_none(), "{info}");
}

#[test]
fn compressed_data_that_cannot_be_decoded_is_told_by_a_salvage() {
    let bench = Bench::new();
    bench.ok(&["create", "disk.qcow2", "1M"]);
    bench.io("disk.qcow2", "write -c -P 1 0 64k");
    bench.io("disk.qcow2", "write -c -P 2 64k 64k");
    let mut bytes = fs::read(bench.path("disk.qcow2")).unwrap();
    let (_, first) = entry(&bytes, 0);
    // 54 bits say where it starts in an image of such clusters.
    let start = usize::try_from(first & ((1 << 54) - 1)).unwrap();
    bytes[start..start + 16].fill(0xff);
    fs::write(bench.path("disk.qcow2"), &bytes).unwrap();
    // Nothing refers to what it should not, so a repair has nothing to do.
    bench.ok(&["check", "disk.qcow2"]);
    bench.ok(&["repair", "--plan", "disk.qcow2"]);
    assert_eq!(bench.run(&["audit", "--deep", "disk.qcow2"]).code, 2);
    let words = ["repair", "--salvage-to", "out.qcow2", "disk.qcow2"];
    let said = bench.run(&words);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(
        said.out.contains("guest 0x0..0x10000: guest data lost"),
        "{said:?}"
    );
    bench.ok(&["io", "-c", "read -P 2 64k 64k", "out.qcow2"]);
}
