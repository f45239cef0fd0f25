use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use qcow2_check::Code;
use qcow2_image::Image;
use qcow2_image::create::CreateOptions;
use qcow2_io::FileOptions;
use qcow2_io::codec::Level;

use crate::workbench::{CLUSTER, Workbench};

#[test]
fn exit_codes_are_those_of_qemu_img_and_the_worst_wins() {
    let bench = Workbench::new();
    bench.sound("sound");
    bench.leaky("leaky");
    bench.corrupt("corrupt");
    fs::write(bench.path("text"), "no image at all").unwrap();
    for (images, code) in [
        (&["sound"][..], 0),
        (&["leaky"], 3),
        (&["corrupt"], 2),
        (&["text"], 1),
        (&["missing"], 1),
        (&["sound", "leaky"], 3),
        (&["leaky", "corrupt", "sound"], 2),
        (&["corrupt", "missing", "leaky"], 1),
    ] {
        let answer = bench.check(images);
        assert_eq!(answer.code, code, "{images:?}: {}", answer.stdout);
    }
}

#[test]
fn a_sound_image_needs_few_words() {
    let bench = Workbench::new();
    bench.sound("disk");
    let answer = bench.check(["disk"]);
    assert!(
        answer
            .stdout
            .starts_with("disk: sound\n  Nothing is wrong with it.\n")
    );
    assert!(answer.stdout.contains("2/256 = 0.78% allocated"));
    assert!(answer.stdout.lines().count() <= 6, "{}", answer.stdout);
    assert!(answer.stderr.is_empty());
    let quiet = bench.check(["-q", "disk"]);
    assert!(quiet.stdout.is_empty() && quiet.stderr.is_empty());
}

#[test]
fn a_report_fits_a_screen_unless_more_is_asked_for() {
    let bench = Workbench::new();
    bench.sound("disk");
    // Every L2 entry of the only table refers to a place of its own that is wrong.
    let bytes = fs::read(bench.path("disk")).unwrap();
    let at = |offset: usize| u64::from_be_bytes(bytes[offset..offset + 8].try_into().unwrap());
    let l1 = usize::try_from(at(40)).unwrap();
    let table = usize::try_from(at(l1) & 0x00ff_ffff_ffff_fe00).unwrap();
    let mut damaged = bytes.clone();
    for (number, entry) in damaged[table..table + 4096].chunks_mut(8).enumerate() {
        let number = number as u64;
        let value = (number << 9) | (1 << 63) | (number % 64);
        entry.copy_from_slice(&value.to_be_bytes());
    }
    fs::write(bench.path("disk"), damaged).unwrap();

    let screen = bench.check(["disk"]);
    assert_eq!(screen.code, 2);
    assert!(screen.stdout.lines().count() <= 24, "{}", screen.stdout);
    let last = screen.stdout.lines().last().unwrap();
    assert!(
        last.contains("not shown") && last.contains("--all"),
        "{last}"
    );

    let all = bench.check(["--all", "disk"]);
    assert!(all.stdout.lines().count() > 400);
    assert!(!all.stdout.contains("not shown"));

    let few = bench.check(["--max-findings", "5", "disk"]);
    let places = few.stdout.lines().filter(|line| line.starts_with("    - "));
    assert!(places.count() > 5);
    assert!(few.stdout.lines().last().unwrap().contains("not shown"));
}

#[test]
fn the_worst_findings_come_first() {
    let bench = Workbench::new();
    bench.overlay("disk", "/etc/passwd");
    let answer = bench.check(["disk"]);
    let position = |text: &str| answer.stdout.find(text).unwrap();
    assert!(position("hazard BACKING-ABSOLUTE") < position("note BACKING-REFERENCE"));
    assert!(
        answer
            .stdout
            .contains("    repair: Rebase to a name beside the image")
    );
}

#[test]
fn hazards_cost_nothing_unless_they_are_denied() {
    let bench = Workbench::new();
    bench.overlay("disk", "/etc/passwd");
    let answer = bench.check(["disk"]);
    assert_eq!(answer.code, 0);
    assert!(answer.stdout.starts_with("disk: sound, with hazards\n"));
    assert_eq!(bench.check(["--deny-hazards", "disk"]).code, 2);
    bench.sound("other");
    assert_eq!(bench.check(["--deny-hazards", "other"]).code, 0);
}

#[test]
fn names_in_images_can_not_steer_the_terminal() {
    let bench = Workbench::new();
    let hostile = b"../\x1b]0;owned\x07\x1b[2J\xc2\x9b1m\xe2\x80\xae\xff\r";
    bench.overlay("disk", hostile);
    for args in [
        &["disk"][..],
        &["--all", "disk"],
        &["--chain", "disk"],
        &["--format", "json", "disk"],
        &["--format", "json", "--chain", "--references", "all", "disk"],
    ] {
        let answer = bench.check(args);
        assert!(answer.stdout.contains("owned"), "{args:?}");
        for c in (answer.stdout + &answer.stderr).chars() {
            let harmless = c == '\n' || (!c.is_control() && c != '\u{202e}');
            assert!(harmless, "{args:?}: {c:?}");
        }
    }
}

#[test]
fn json_is_printed_for_every_image_even_an_unreadable_one() {
    let bench = Workbench::new();
    bench.sound("sound");
    bench.leaky("leaky");
    fs::write(bench.path("text"), "no image at all").unwrap();
    let objects = bench.json(["sound", "missing", "text", "leaky"]);
    let told: Vec<_> = objects
        .iter()
        .map(|object| {
            let text = |key: &str| object[key].as_str().unwrap();
            (text("filename"), text("format"), text("verdict"))
        })
        .collect();
    assert_eq!(
        told,
        [
            ("sound", "qcow2", "sound"),
            ("missing", "unknown", "incomplete"),
            ("text", "unknown", "incomplete"),
            ("leaky", "qcow2", "leaks"),
        ]
    );
    let codes: Vec<_> = objects.iter().map(|o| o["exit-code"].as_u64()).collect();
    assert_eq!(codes, [Some(0), Some(1), Some(1), Some(3)]);
    assert!(objects[1]["error"].is_string());
    assert_eq!(objects[3]["totals"]["LEAK"], 1);
    assert_eq!(objects[3]["findings"][0]["code"], "LEAK");
}

#[test]
fn findings_that_are_not_kept_are_counted() {
    let bench = Workbench::new();
    bench.leaky("leaky");
    let objects = bench.json(["--max-findings", "0", "leaky"]);
    assert_eq!(objects[0]["findings"].as_array().unwrap().len(), 0);
    assert_eq!(objects[0]["totals"]["LEAK"], 1);
    assert_eq!(objects[0]["leaks"], 1);
    assert!(objects[0]["findings-omitted"].as_u64().unwrap() >= 1);
}

#[test]
fn folders_give_their_images_in_order_and_links_are_not_followed() {
    let bench = Workbench::new();
    fs::create_dir_all(bench.path("images/deeper")).unwrap();
    for name in ["images/b", "images/a", "images/deeper/c", "outside"] {
        bench.sound(name);
    }
    fs::write(bench.path("images/readme"), "text").unwrap();
    fs::write(bench.path("images/empty"), "").unwrap();
    symlink("../outside", bench.path("images/link")).unwrap();
    symlink("..", bench.path("images/loop")).unwrap();
    let names: Vec<_> = bench
        .json(["images"])
        .iter()
        .map(|object| object["filename"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["images/a", "images/b", "images/deeper/c"]);
    let answer = bench.check(["images"]);
    assert_eq!(answer.code, 0);
    let last = answer.stdout.lines().last().unwrap();
    assert_eq!(last, "3 images: 3 sound; 4 files skipped, not qcow2");
    // An argument that is a link is meant.
    assert_eq!(bench.check(["images/link"]).code, 0);
}

#[test]
fn a_folder_that_can_not_be_read_does_not_hide_the_others() {
    let bench = Workbench::new();
    fs::create_dir_all(bench.path("images/closed")).unwrap();
    bench.sound("images/disk");
    let closed = bench.path("images/closed");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
    // To root no door is closed.
    let refused = fs::read_dir(&closed).is_err();
    let answer = bench.check(["images"]);
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    assert!(answer.stdout.contains("images/disk: sound\n"));
    let told = answer.stderr.contains("images/closed can't be read");
    assert_eq!(told, refused);
    assert_eq!(answer.code, i32::from(refused));
}

#[test]
fn wrong_use_is_never_mistaken_for_corruption() {
    let bench = Workbench::new();
    bench.sound("disk");
    fs::create_dir(bench.path("empty")).unwrap();
    for args in [
        &["empty"][..],
        &["--threads", "many", "disk"],
        &["--threads", "1000000", "disk"],
        &["--max-findings", "-1", "disk"],
        &["--no-such-option"],
        &["--owner", "12q", "disk"],
        &["--owner", "0"],
        &["--owner", "0", "disk", "disk"],
        &["--owner", "1T", "disk"],
        &["--owner", "0", "missing"],
        &["--references", "all", "disk"],
        &["--chain", "--references", "everything", "disk"],
        &[
            "--chain",
            "--references",
            "all",
            "--references",
            "allow:.",
            "disk",
        ],
        &["--format", "markdown", "disk"],
        &["--explain", "NO-SUCH-CODE"],
    ] {
        let answer = bench.check(args);
        assert_eq!(answer.code, 1, "{args:?}");
        assert!(answer.stdout.is_empty(), "{args:?}");
        assert!(
            answer.stderr.starts_with("error: "),
            "{args:?}: {}",
            answer.stderr
        );
    }
    assert_eq!(bench.check(["--help"]).code, 0);
}

#[test]
fn nothing_is_followed_unless_that_is_asked_for() {
    let bench = Workbench::new();
    bench.overlay("disk", "base");
    // Missing, and still nobody notices.
    let answer = bench.json(["disk"]);
    assert_eq!(answer.len(), 1);
    assert!(answer[0].get("chain").is_none());
    assert!(answer[0]["totals"].get("BACKING-MISSING").is_none());
}

#[test]
fn a_chain_is_reported_layer_by_layer() {
    let bench = Workbench::new();
    bench.overlay("top", "middle");
    bench.overlay("middle", "base");
    bench.leaky("base");
    let layers = bench.json(["--chain", "top"]);
    assert_eq!(layers.len(), 3);
    assert_eq!(layers[0]["chain"]["backing"]["outcome"], "followed");
    assert_eq!(layers[2]["chain"]["depth"], 2);
    assert!(layers[2]["chain"].get("backing").is_none());
    let answer = bench.check(["--chain", "top"]);
    assert_eq!(answer.code, 3);
    assert!(answer.stdout.contains("\nbase: leaks\n"));
    assert!(
        answer.stdout.ends_with("3 images: 2 sound; 1 leaks\n"),
        "{}",
        answer.stdout
    );
}

#[test]
fn what_is_wrong_with_a_chain_is_a_hazard_of_the_layer_above() {
    let bench = Workbench::new();
    bench.overlay("missing", "nowhere");
    bench.overlay("self", "./self");
    for (image, code) in [("missing", "BACKING-MISSING"), ("self", "BACKING-LOOP")] {
        let layers = bench.json(["--chain", image]);
        assert_eq!(layers.len(), 1);
        assert_eq!(layers[0]["totals"][code], 1, "{image}");
        assert_eq!(layers[0]["hazards"], 1, "{image}");
        assert_eq!(bench.check(["--chain", image]).code, 0);
        assert_eq!(bench.check(["--chain", "--deny-hazards", image]).code, 2);
    }
}

#[test]
fn a_chain_stays_within_the_policy_through_links_too() {
    let bench = Workbench::new();
    fs::create_dir(bench.path("images")).unwrap();
    bench.sound("base");
    symlink("../base", bench.path("images/link")).unwrap();
    bench.overlay("images/up", "../base");
    bench.overlay("images/through", "link");
    let run = |image: &str, policy: &str| {
        let layers = bench.json(["--chain", "--references", policy, image]);
        let outcome = layers[0]["chain"]["backing"]["outcome"].as_str().unwrap();
        (layers.len(), outcome.to_owned())
    };
    for image in ["images/up", "images/through"] {
        assert_eq!(run(image, "same-directory"), (1, "refused".to_owned()));
        assert_eq!(run(image, "deny"), (1, "refused".to_owned()));
        assert_eq!(run(image, "allow:images"), (1, "refused".to_owned()));
        assert_eq!(run(image, "allow:base"), (2, "followed".to_owned()));
        assert_eq!(run(image, "all"), (2, "followed".to_owned()));
    }
    let answer = bench.check(["--chain", "images/up"]);
    assert!(
        answer.stdout.contains("not followed: it lies outside"),
        "{}",
        answer.stdout
    );
}

#[test]
fn owners_are_named_with_guest_range_and_snapshots() {
    let bench = Workbench::new();
    let first = bench.image("disk", |image| {
        image.snapshot("before \x1b[1m", &[]).unwrap();
    });
    let answer = bench.check(["--owner", &first.get().to_string(), "disk"]);
    assert_eq!(answer.code, 0);
    let expected = format!("cluster {} at {:#x}", first.get() / CLUSTER, first.get());
    assert!(answer.stdout.contains(&expected), "{}", answer.stdout);
    assert!(answer.stdout.contains("refcount 2, 2 owners"));
    assert!(
        answer
            .stdout
            .contains("  guest data, guest 0x0..0x1000 (active)\n")
    );
    let snapshot = "  guest data, guest 0x0..0x1000 (snapshot 0) \"before \\u{1b}[1m\"\n";
    assert!(answer.stdout.contains(snapshot));

    let inside = (first.get() + 77).to_string();
    let objects = bench.json(["--owner", &inside, "disk"]);
    assert_eq!(objects[0]["host-offset"], first.get());
    assert_eq!(objects[0]["refcount"], 2);
    assert_eq!(objects[0]["owners"].as_array().unwrap().len(), 2);
    assert_eq!(objects[0]["snapshot-names"][0]["name"], "before \x1b[1m");

    let header = bench.check(["--owner", "0x0", "disk"]);
    assert!(header.stdout.contains("  header\n"), "{}", header.stdout);
}

#[test]
fn every_code_can_be_explained() {
    let bench = Workbench::new();
    let list = bench.check(["--explain"]);
    assert_eq!(list.code, 0);
    assert_eq!(list.stdout, bench.check(["--explain", "list"]).stdout);
    let objects = bench.json(["--explain", "list"]);
    assert_eq!(objects.len(), Code::ALL.len());
    for code in Code::ALL {
        assert!(list.stdout.contains(code.id()));
    }
    let one = bench.check(["--explain", "leak"]);
    assert!(one.stdout.starts_with("LEAK (leak)\n"));
    let close = bench.check(["--explain", "L2-UNALIGEND"]);
    assert_eq!(close.code, 1);
    assert!(close.stderr.contains("L2-UNALIGNED"), "{}", close.stderr);
}

#[test]
fn the_page_of_findings_is_complete() {
    let bench = Workbench::new();
    let page = bench.check(["--explain", "list", "--format", "markdown"]);
    assert_eq!(page.code, 0);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/findings.md");
    assert!(
        fs::read_to_string(path).unwrap() == page.stdout,
        "docs/findings.md is out of date: \
         cargo xtask check-image --explain list --format markdown > docs/findings.md"
    );
}

#[test]
fn without_an_image_some_are_made_and_audited() {
    let bench = Workbench::new();
    let answer = bench.check([""; 0]);
    assert_eq!(answer.code, 0, "{}", answer.stdout);
    assert!(bench.path("target/demo-images/demo.qcow2").exists());
    assert!(answer.stdout.contains("2 snapshots, 2 bitmaps"));
    assert!(answer.stdout.ends_with("4 images: 4 sound\n"));
    // And once more, over those that are there.
    assert_eq!(bench.check([""; 0]).code, 0);
}

#[test]
fn two_passes_suffice_where_nobody_writes() {
    let bench = Workbench::new();
    bench.leaky("disk");
    let objects = bench.json(["--online", "disk"]);
    assert_eq!(objects[0]["leaks"], 1);
    assert_eq!(objects[0]["online"]["passes"], 2);
    assert_eq!(objects[0]["online"]["settled"], true);
    assert_eq!(objects[0]["online"]["transient"], 0);
}

#[test]
fn compressed_data_is_decoded_when_that_is_asked_for() {
    let bench = Workbench::new();
    let path = bench.path("packed");
    let file = FileOptions::new()
        .write(true)
        .create(true)
        .open(&path)
        .unwrap();
    Image::create(&file, &CreateOptions::new(1 << 20)).unwrap();
    let image = Image::options().open_file(file).unwrap();
    let text = b"some words that can be packed. ".repeat(5000);
    image
        .write_compressed(&text[..131_072], 65536, Level::default())
        .unwrap();
    image.close().unwrap();
    let answer = bench.check(["--deep", "packed"]);
    assert_eq!(answer.code, 0, "{}", answer.stdout);
    assert!(
        answer
            .stdout
            .contains("2 pieces of compressed data were decoded")
    );

    let mut bytes = fs::read(&path).unwrap();
    let at = |offset: usize| u64::from_be_bytes(bytes[offset..offset + 8].try_into().unwrap());
    let index = |number: u64| usize::try_from(number).unwrap();
    let table = index(at(index(at(40))) & 0x00ff_ffff_ffff_fe00);
    let stream = index(at(table + 16) & ((1 << 54) - 1));
    bytes[stream..stream + 8].fill(0xff);
    fs::write(&path, bytes).unwrap();
    assert_eq!(bench.check(["packed"]).code, 0);
    let answer = bench.check(["--deep", "packed"]);
    assert_eq!(answer.code, 2, "{}", answer.stdout);
    for part in ["COMPRESSED-UNDECODABLE", "guest 0x20000..0x30000"] {
        assert!(answer.stdout.contains(part), "{}", answer.stdout);
    }
}
