use std::error::Error as _;
use std::fs;
use std::os::unix::fs::symlink;

use qcow2_format::Geometry;
use qcow2_format::header::{Extension, Version};
use tempfile::TempDir;

use super::*;
use crate::synth::Builder;

/// A folder of its own, with an empty one beside it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("images")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("images").join(name)
    }

    /// Makes an image that names a backing file.
    fn image(&self, name: &str, backing: Option<&[u8]>, format: Option<&str>) {
        let geometry = Geometry::new(12, 4, false).unwrap();
        let mut image = Builder::new(Version::V3, geometry, 1 << 20);
        image.header.backing_name = backing.map(<[u8]>::to_vec);
        if let Some(format) = format {
            let format = Extension::BackingFormat(format.into());
            image.header.extensions.push(format);
        }
        let options = FileOptions::new().write(true).create(true);
        image
            .finish(&options.open(self.path(name)).unwrap())
            .unwrap();
    }

    fn qcow2(&self, name: &str, backing: &str) {
        self.image(name, Some(backing.as_bytes()), Some("qcow2"));
    }

    fn walk(&self, name: &str, references: References) -> Vec<Layer> {
        let path = self.path(name);
        let file = File::open(&path).unwrap();
        Chain::new(path, file, references, FileOptions::new()).collect()
    }

    /// The only layer's link.
    fn link(&self, name: &str, references: References) -> Link {
        let mut layers = self.walk(name, references);
        assert_eq!(layers.len(), 1);
        layers.remove(0).backing
    }

    fn canonical(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.path(name)).unwrap()
    }
}

#[test]
fn a_chain_is_followed_down_to_the_image_without_backing_file() {
    let folder = Folder::new();
    folder.qcow2("top", "./middle");
    folder.qcow2("middle", "base");
    folder.image("base", None, None);
    let layers = folder.walk("top", References::SameDirectory);
    assert_eq!(layers.len(), 3);
    assert!(matches!(
        layers[0].backing,
        Link::Followed { recorded: true, .. }
    ));
    assert_eq!(layers[2].backing, Link::None);
    assert_eq!(layers[2].depth, 2);
    assert!(layers.iter().all(|layer| layer.finding().is_none()));
}

#[test]
fn the_default_policy_opens_nothing() {
    let folder = Folder::new();
    folder.qcow2("top", "base");
    folder.image("base", None, None);
    assert_eq!(
        folder.link("top", References::default()),
        Link::Refused(Refusal::Denied)
    );
}

#[test]
fn names_that_leave_the_directory_are_refused_however_they_are_written() {
    let folder = Folder::new();
    fs::write(folder.path("../outside/secret"), "secret").unwrap();
    symlink("../outside/secret", folder.path("link")).unwrap();
    symlink("../outside", folder.path("links")).unwrap();
    let absolute = folder.path("../outside/secret");
    for name in [
        "../outside/secret",
        "link",
        "links/secret",
        absolute.to_str().unwrap(),
        "../outside/missing",
        "links/missing",
        "/missing/for/sure",
    ] {
        folder.qcow2("top", name);
        assert_eq!(
            folder.link("top", References::SameDirectory),
            Link::Refused(Refusal::Outside),
            "{name}"
        );
    }
}

#[test]
fn a_link_inside_the_directory_is_followed_and_told_by_its_target() {
    let folder = Folder::new();
    folder.image("base", None, None);
    symlink("base", folder.path("link")).unwrap();
    folder.qcow2("top", "link");
    let layers = folder.walk("top", References::SameDirectory);
    assert_eq!(layers.len(), 2);
    assert_eq!(
        layers[0].backing,
        Link::Followed {
            path: folder.canonical("base"),
            recorded: true
        }
    );
}

#[test]
fn a_list_allows_files_and_what_is_below_directories() {
    let folder = Folder::new();
    folder.qcow2("top", "../outside/base");
    folder.image("../outside/base", None, None);
    let allow = |name: &str| References::AllowList(vec![folder.path(name)]);
    assert_eq!(folder.walk("top", allow("../outside")).len(), 2);
    assert_eq!(folder.walk("top", allow("../outside/base")).len(), 2);
    assert_eq!(folder.walk("top", References::All).len(), 2);
    assert_eq!(
        folder.link("top", allow("../out")),
        Link::Refused(Refusal::Outside)
    );
}

#[test]
fn a_loop_is_seen_through_links_and_other_names() {
    let folder = Folder::new();
    folder.qcow2("top", "middle");
    folder.qcow2("middle", "link");
    symlink("./top", folder.path("link")).unwrap();
    let layers = folder.walk("top", References::SameDirectory);
    assert_eq!(layers.len(), 2);
    assert!(matches!(layers[1].backing, Link::Loop { layer: 0, .. }));
    assert_eq!(layers[1].finding().unwrap().code, Code::BackingLoop);
}

#[test]
fn a_missing_file_is_a_finding() {
    let folder = Folder::new();
    folder.qcow2("top", "base");
    symlink("nowhere", folder.path("dangling")).unwrap();
    folder.qcow2("other", "dangling");
    for name in ["top", "other"] {
        let layers = folder.walk(name, References::SameDirectory);
        assert_eq!(layers[0].finding().unwrap().code, Code::BackingMissing);
    }
}

#[test]
fn a_chain_that_is_too_deep_ends() {
    let folder = Folder::new();
    for number in 0..MAX_LAYERS {
        folder.qcow2(&number.to_string(), &(number + 1).to_string());
    }
    folder.image(&MAX_LAYERS.to_string(), None, None);
    let layers = folder.walk("0", References::SameDirectory);
    assert_eq!(layers.len(), MAX_LAYERS);
    let last = layers.last().unwrap();
    assert_eq!(last.finding().unwrap().code, Code::BackingDeep);
    // One layer less is no offence.
    assert_eq!(
        folder.walk("1", References::SameDirectory).len(),
        MAX_LAYERS
    );
}

#[test]
fn names_that_are_no_paths_are_never_followed() {
    let folder = Folder::new();
    for (name, refusal) in [
        (&b"json:{\"file.filename\":\"base\"}"[..], Refusal::Protocol),
        (b"nbd://localhost/disk", Refusal::Protocol),
        (b"FILE:base", Refusal::Protocol),
        (b"file:ba\0se", Refusal::Nul),
        (b"file:", Refusal::NoDisk),
        (b"ba\0se", Refusal::Nul),
        (b".", Refusal::NoDisk),
    ] {
        folder.image("top", Some(name), Some("qcow2"));
        assert_eq!(
            folder.link("top", References::All),
            Link::Refused(refusal),
            "{}",
            name.escape_ascii()
        );
    }
}

#[test]
fn without_a_recorded_format_only_the_magic_is_looked_at() {
    let folder = Folder::new();
    folder.image("base", None, None);
    fs::write(folder.path("raw"), [0; 4096]).unwrap();
    folder.image("top", Some(b"base"), None);
    let layers = folder.walk("top", References::SameDirectory);
    assert_eq!(layers.len(), 2);
    assert!(matches!(
        layers[0].backing,
        Link::Followed {
            recorded: false,
            ..
        }
    ));
    drop(layers);
    folder.image("top", Some(b"raw"), None);
    assert_eq!(
        folder.link("top", References::SameDirectory),
        Link::Present {
            path: folder.canonical("raw"),
            format: None
        }
    );
}

#[test]
fn a_raw_backing_file_is_named_even_if_it_looks_like_qcow2() {
    let folder = Folder::new();
    folder.image("base", None, None);
    folder.image("top", Some(b"base"), Some("raw"));
    assert_eq!(
        folder.link("top", References::SameDirectory),
        Link::Present {
            path: folder.canonical("base"),
            format: Some(b"raw".to_vec())
        }
    );
}

#[test]
fn an_external_data_file_is_only_looked_for() {
    let folder = Folder::new();
    let geometry = Geometry::new(12, 4, false).unwrap();
    let mut image = Builder::new(Version::V3, geometry, 1 << 20);
    image.header.incompatible.set_external_data(true);
    let name = Extension::DataFileName(b"data".to_vec());
    image.header.extensions.push(name);
    let options = FileOptions::new().write(true).create(true);
    image
        .finish(&options.open(folder.path("top")).unwrap())
        .unwrap();
    let walk = || folder.walk("top", References::SameDirectory).remove(0);
    assert!(matches!(walk().data_file, Link::Missing { .. }));
    fs::write(folder.path("data"), "").unwrap();
    assert!(matches!(walk().data_file, Link::Present { .. }));
}

#[test]
fn the_file_prefix_of_a_backing_name_makes_a_plain_name_of_what_follows() {
    let folder = Folder::new();
    for base in ["base", "nbd:base"] {
        folder.image(base, None, None);
        folder.qcow2("top", &format!("file:{base}"));
        let layers = folder.walk("top", References::SameDirectory);
        assert_eq!(layers.len(), 2, "{base}");
        assert_eq!(
            layers[0].backing,
            Link::Followed {
                path: folder.canonical(base),
                recorded: true
            }
        );
    }
    let absolute = folder.canonical("base");
    folder.qcow2("top", &format!("file:{}", absolute.display()));
    assert_eq!(folder.walk("top", References::SameDirectory).len(), 2);
    fs::write(folder.path("../outside/secret"), "secret").unwrap();
    folder.qcow2("top", "file:../outside/secret");
    assert_eq!(
        folder.link("top", References::SameDirectory),
        Link::Refused(Refusal::Outside)
    );
}

#[test]
fn a_name_is_resolved_from_the_image_it_stands_in_and_judged_by_the_first_one() {
    let folder = Folder::new();
    fs::create_dir(folder.path("below")).unwrap();
    fs::write(folder.path("below/base"), "").unwrap();
    fs::write(folder.path("../outside/base"), "").unwrap();
    symlink("base", folder.path("below/link")).unwrap();
    let resolver = Resolver::new(References::SameDirectory, &folder.path("top"));
    let found = resolver
        .backing_file(&folder.path("below/middle"), b"link")
        .unwrap();
    assert_eq!(found.path, folder.path("below/link"));
    assert_eq!(found.canonical, folder.canonical("below/base"));
    let outside = resolver.backing_file(&folder.path("../outside/middle"), b"base");
    assert!(matches!(
        outside,
        Err(Unresolved::Refused {
            refusal: Refusal::Outside,
            ..
        })
    ));
}

#[test]
fn prefixes_mean_nothing_in_the_name_of_a_data_file() {
    let folder = Folder::new();
    let resolver = Resolver::new(References::SameDirectory, &folder.path("top"));
    for name in ["file:data", "nbd:data", "json:{}"] {
        fs::write(folder.path(name), "").unwrap();
        let found = resolver
            .data_file(&folder.path("top"), name.as_bytes())
            .unwrap();
        assert_eq!(found.canonical, folder.canonical(name));
    }
    // Behind the prefix would be a file.
    fs::write(folder.path("disk"), "").unwrap();
    let missing = resolver.data_file(&folder.path("top"), b"file:disk");
    assert!(matches!(missing, Err(Unresolved::Missing { .. })));
}

#[test]
fn what_leads_nowhere_says_why() {
    let folder = Folder::new();
    let top = folder.path("top");
    let words = |references, name: &[u8]| {
        let resolver = Resolver::new(references, &top);
        resolver.backing_file(&top, name).unwrap_err()
    };
    for (references, text) in [
        (References::Deny, "no reference may be followed"),
        (
            References::AllowList(Vec::new()),
            "no reference may be followed",
        ),
        (
            References::All,
            "it is no plain file name, and such are never followed",
        ),
    ] {
        assert_eq!(
            words(references, b"nbd:\xff").to_string(),
            format!("\"nbd:\u{fffd}\" is not opened: {text}")
        );
    }
    let missing = words(References::All, b"base");
    let path = folder.path("base");
    assert_eq!(
        missing.to_string(),
        format!("\"base\" can't be found as {path:?}")
    );
    assert!(missing.source().is_some());
}
