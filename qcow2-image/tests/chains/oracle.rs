//! The same work by qemu-img: it reads what comes of ours, we read what comes of its, and both are the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use qcow2_image::chain::{BackingFile, SegmentKind};
use qcow2_image::commit::CommitOptions;
use qcow2_image::create::CreateOptions;
use qcow2_image::difference::{Changes, ExportOptions, export};
use qcow2_image::rebase::RebaseOptions;
use qcow2_image::testing::{Random, qemu};
use qcow2_image::{Image, ImageOptions, References};
use qcow2_io::codec::Level;
use qcow2_io::{FileOptions, Memory};

use crate::rig::{Pile, Spec, difference, read};

/// Whether the tools are there. If not, says so; where they are required, fails.
fn is_available(what: &str) -> bool {
    if qemu::is_available() {
        return true;
    }
    let required = ["QCOW2_REQUIRE_QEMU", "CI"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    assert!(!required, "qemu-img and qemu-io not found, but required");
    eprintln!("skipped {what}: qemu-img and qemu-io not found");
    false
}

/// A folder with the layers of a pile as files.
struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    fn new(piles: &[&Pile]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for layer in piles.iter().flat_map(|pile| &pile.layers) {
            fs::write(folder.path().join(&layer.name), read(&layer.file)).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What qemu-img prints.
    fn img(&self, args: &[&str]) -> String {
        let output = Command::new("qemu-img")
            .args(args)
            .current_dir(self.folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "qemu-img {}: {said}",
            args.join(" ")
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// The disk of a layer, as QEMU reads it.
    fn disk(&self, name: &str, format: &str) -> Vec<u8> {
        if format == "raw" {
            return fs::read(self.path(name)).unwrap();
        }
        self.img(&["check", "-q", "-f", format, name]);
        self.img(&["convert", "-f", format, "-O", "raw", name, "converted"]);
        fs::read(self.path("converted")).unwrap()
    }

    fn options(&self) -> ImageOptions {
        Image::options()
            .references(References::SameDirectory)
            .path(self.path("top"))
    }

    fn open(&self, options: ImageOptions) -> Image {
        options.open_path(self.path("top")).unwrap()
    }
}

fn pile(random: &mut Random) -> Pile {
    let count = usize::try_from(random.within(1..4)).unwrap();
    let mut pile = Pile::random(random, count, "old");
    let spec = Spec::random(random, false);
    pile.add("top".to_owned(), spec);
    pile.fill(random);
    pile
}

#[test]
fn qemu_rebases_to_the_same_disk() {
    if !is_available("12 rebases") {
        return;
    }
    for seed in 0..12 {
        let random = &mut Random::new(seed + 100);
        let pile = pile(random);
        let new = Pile::random(random, 2, "new");
        let target = match seed % 4 {
            0 => None,
            1 => Some(&pile.layers[0]),
            _ => Some(new.top()),
        };
        let (ours, theirs) = (Folder::new(&[&pile, &new]), Folder::new(&[&pile, &new]));
        let (name, format) =
            target.map_or(("", "raw"), |layer| (&*layer.name, layer.spec.format()));
        let compress = seed % 3 == 0;
        let mut args = vec!["rebase", "-q", "-f", "qcow2"];
        if target.is_some() {
            args.extend(["-F", format]);
        }
        if compress {
            args.push("-c");
        }
        args.extend(["-b", name, "top"]);
        theirs.img(&args);

        let mut image = ours.open(ours.options());
        let to = target.map(|_| BackingFile::open(name, format, &ours.options()).unwrap());
        let mut options = RebaseOptions::new();
        if compress {
            options = options.compress(Level::default());
        }
        image.rebase(to.as_ref(), &options).unwrap();
        image.close().unwrap();
        let view = &pile.top().view;
        assert_eq!(
            difference(&ours.disk("top", "qcow2"), view),
            None,
            "seed {seed}"
        );
        assert_eq!(
            difference(&theirs.disk("top", "qcow2"), view),
            None,
            "seed {seed}"
        );
        let image = theirs.open(theirs.options().read_only(true));
        assert_eq!(difference(&read(&image), view), None, "seed {seed}");
        // It goes on from ours, and we from its.
        ours.img(&["rebase", "-q", "-f", "qcow2", "-b", "", "top"]);
        assert_eq!(
            difference(&ours.disk("top", "qcow2"), view),
            None,
            "seed {seed}"
        );
        drop(image);
        let mut image = theirs.open(theirs.options());
        image.rebase(None, &options).unwrap();
        image.close().unwrap();
        assert_eq!(
            difference(&theirs.disk("top", "qcow2"), view),
            None,
            "seed {seed}"
        );
    }
}

#[test]
fn qemu_commits_the_same() {
    if !is_available("12 commits") {
        return;
    }
    for seed in 0..12 {
        let random = &mut Random::new(seed + 200);
        let pile = pile(random);
        let count = pile.layers.len();
        let depth = usize::try_from(random.within(1..count as u64)).unwrap();
        let base = &pile.layers[count - 1 - depth];
        let (ours, theirs) = (Folder::new(&[&pile]), Folder::new(&[&pile]));
        let keep = seed % 3 == 0;
        let mut args = vec!["commit", "-q", "-f", "qcow2"];
        if keep {
            args.push("-d");
        }
        if depth > 1 {
            args.extend(["-b", &base.name]);
        }
        args.push("top");
        theirs.img(&args);
        let mut image = ours.open(ours.options().writable_layer(depth));
        image
            .commit(&CommitOptions::new().base(depth).keep(keep))
            .unwrap();
        image.close().unwrap();
        let format = base.spec.format();
        let wanted = theirs.disk(&base.name, format);
        let found = ours.disk(&base.name, format);
        let name = format!("seed {seed}, {depth} of {count}, {:?}", base.spec);
        assert_eq!(difference(&found, &wanted), None, "{name}");
        for folder in [&ours, &theirs] {
            let view = &pile.top().view;
            assert_eq!(
                difference(&folder.disk("top", "qcow2"), view),
                None,
                "{name}"
            );
            let image = folder.open(folder.options().read_only(true));
            assert_eq!(difference(&read(&image), view), None, "{name}");
        }
    }
}

/// What is said of each sector of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    depth: usize,
    data: bool,
    zero: bool,
    present: bool,
    compressed: bool,
    offset: Option<u64>,
}

fn by_sector(entries: impl Iterator<Item = (u64, u64, Told)>) -> Vec<Told> {
    let mut sectors = Vec::new();
    for (start, len, told) in entries {
        for sector in start / 512..(start + len) / 512 {
            let offset = told.offset.map(|offset| offset + sector * 512 - start);
            assert_eq!(sectors.len() as u64, sector);
            sectors.push(Told {
                offset,
                ..told.clone()
            });
        }
    }
    sectors
}

/// What `qemu-img map --output=json` prints.
fn told_by_qemu(json: &str) -> Vec<Told> {
    let entries = json
        .lines()
        .filter(|line| line.contains("start"))
        .map(|line| {
            let value = |key: &str| -> Option<&str> {
                let (_, rest) = line.split_once(&format!("\"{key}\": "))?;
                rest.split([',', '}']).next()
            };
            let number = |key| value(key).map(|text| text.parse::<u64>().unwrap());
            let flag = |key| value(key) == Some("true");
            let told = Told {
                depth: usize::try_from(number("depth").unwrap()).unwrap(),
                data: flag("data"),
                zero: flag("zero"),
                present: flag("present"),
                compressed: flag("compressed"),
                offset: number("offset"),
            };
            (number("start").unwrap(), number("length").unwrap(), told)
        });
    by_sector(entries)
}

#[test]
fn qemu_maps_the_same() {
    if !is_available("16 maps") {
        return;
    }
    for seed in 0..16 {
        let random = &mut Random::new(seed + 300);
        let pile = pile(random);
        let folder = Folder::new(&[&pile]);
        let theirs = told_by_qemu(&folder.img(&["map", "--output=json", "-f", "qcow2", "top"]));
        let image = folder.open(folder.options().read_only(true));
        let chain = image.chain();
        let names: Vec<_> = chain
            .layers()
            .iter()
            .map(|layer| layer.path().and_then(Path::file_name))
            .collect();
        let wanted: Vec<_> = pile
            .layers
            .iter()
            .rev()
            .map(|layer| Some(layer.name.as_ref()))
            .collect();
        assert_eq!(names, wanted);
        let segments = chain.segments(0..u64::MAX).unwrap().map(Result::unwrap);
        let ours = by_sector(segments.map(|one| {
            let told = Told {
                depth: one.depth,
                data: !one.kind.reads_as_zeros(),
                zero: one.kind.reads_as_zeros(),
                present: one.kind != SegmentKind::Unallocated,
                compressed: one.kind == SegmentKind::Compressed,
                offset: one.host,
            };
            (one.offset, one.len, told)
        }));
        assert_eq!(ours.len(), theirs.len(), "seed {seed}");
        for (sector, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert_eq!(ours, theirs, "seed {seed}, sector {sector}");
        }
    }
}

#[test]
fn what_qemu_has_noted_as_changed_is_exported() {
    if !is_available("an incremental backup by a bitmap of QEMU") {
        return;
    }
    let folder = Folder::new(&[]);
    folder.img(&["create", "-q", "-f", "qcow2", "top", "4M"]);
    let write = |commands: &[&str]| {
        let mut args = vec!["-f", "qcow2"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        let output = Command::new("qemu-io")
            .args(args)
            .arg(folder.path("top"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    write(&["write -P 1 0 3M", "write -P 2 3M 100k"]);
    folder.img(&["convert", "-O", "raw", "top", "old"]);
    folder.img(&["bitmap", "-f", "qcow2", "--add", "top", "since"]);
    write(&[
        "write -P 3 1M 64k",
        "write -z 2M 200k",
        "write -P 4 4000k 1k",
    ]);
    let image = folder.open(folder.options().read_only(true));
    let backup = CreateOptions::new(4 << 20).backing_file("old", "raw");
    let file = FileOptions::new().write(true).create(true);
    let file = file.open(folder.path("backup")).unwrap();
    Image::create(&file, &backup).unwrap();
    let target = Image::options().backing(Arc::new(Memory::new()));
    let target = target.open_file(file).unwrap();
    let mut ranges = image.dirty_ranges(b"since", 0..u64::MAX);
    let changes = Changes::Ranges(&mut ranges);
    let report = export(&image.chain(), changes, &target, &ExportOptions::new()).unwrap();
    assert!(report.stored_bytes <= 3 * 65536, "{report:?}");
    assert!(report.zeroed_bytes >= 196_608, "{report:?}");
    target.close().unwrap();
    let wanted = read(&image);
    drop(image);
    assert_eq!(difference(&folder.disk("backup", "qcow2"), &wanted), None);
    folder.img(&["compare", "-f", "qcow2", "-F", "qcow2", "top", "backup"]);
}
