//! The driver `qcow2`: an image, its data file and its backing chain.

use std::sync::Arc;
use std::time::Duration;

use qcow2_check::chain::{Resolved, Resolver, Unresolved};
use qcow2_format::header::{CryptMethod, HeaderTable};
use qcow2_format::{Header, HeaderError, SnapshotError};
use qcow2_image::{
    CacheOptions, Image, ImageError, ImageOptions, OverlapChecks, PassDiscard, Template,
};
use qcow2_io::cipher::Secret;

use super::open::Opener;
use super::{Access, Content, Node, NodeOptions, OpenError, corruption, name};
use crate::mend;
use crate::words::{outside, size};

pub(super) fn open(
    opener: Opener<'_>,
    mut options: NodeOptions,
    described: NodeOptions,
    file: Node,
    access: &Access,
    layer: usize,
) -> Result<Node, OpenError> {
    let (header, defects) = read_header(&file)?;
    let (backing, no_backing) = options.take_child("backing");
    let (data, _) = options.take_child("data-file");
    // Else the reference programs don't look for them.
    let wants_snapshot_tables = options.text("overlap-check") == Some("all")
        || options.text("overlap-check.template") == Some("all")
        || options.text("overlap-check.inactive-l2") == Some("on");
    let too_big = too_big_a_cache(&options, &header);
    let mut image = run_time_options(&mut options)?
        .read_only(!access.write)
        .discard(access.unmap)
        .locked(access.locked)
        .watcher(corruption::watcher(access.write))
        .pass_over_snapshots(!wants_snapshot_tables);
    if let Some(secret) = secret(opener, &mut options, &header, access, layer)? {
        image = image.secret(secret);
    }
    if let Some(key) = options.first_key() {
        return Err(OpenError::new(format!(
            "Block format 'qcow2' does not support the option '{key}'"
        )));
    }

    if let Some(what) = too_big {
        return Err(OpenError::new(format!("{what} cache size too big")));
    }
    if let Some(key) = &access.snapshot {
        image = image.snapshot(key.clone());
    }
    let mut children = Vec::new();
    if header.incompatible.external_data() {
        let data = open_data_file(opener, data, &header, &file, access, layer)?;
        image = image.data_file(data.storage());
        children.push(("data-file", data));
    }
    let below = if no_backing || access.no_backing {
        if let Some(key) = backing.first_key() {
            return Err(OpenError::new(format!(
                "Block format 'qcow2' does not support the option 'backing.{key}'"
            )));
        }
        None
    } else {
        open_backing(opener, backing, &header, &file, access, layer)?
    };
    image = match &below {
        None => image.no_backing(),
        Some(node) => match &node.content {
            Content::Image(base) => image.backing_image(Arc::clone(base)),
            Content::Filtered(_, base) | Content::Plain(base) => image.backing(Arc::clone(base)),
        },
    };
    if access.write && header.incompatible.dirty() && !header.incompatible.corrupt() {
        mend::unclosed(&*file.storage())
            .map_err(|text| OpenError::new(format!("Could not repair dirty image: {text}")))?;
    }
    let content = if access.for_check && only_of_snapshots(&defects).is_some() {
        Content::Plain(file.storage())
    } else {
        if let Some(debug) = &file.debug {
            image = image.probe(debug.probe());
        }
        let image: Image = image
            .open(file.storage())
            .map_err(|error| refusal(&error, &header))?;
        if !access.for_check {
            refuse_snapshot_table(&image)?;
        }
        let image = Arc::new(image);
        if let Some(debug) = &file.debug {
            debug.holds(&image);
        }
        Content::Image(image)
    };
    let filename = if described.says_more_than_a_name() {
        let mut full = described.clone();
        full.set_default("driver", "qcow2");
        full.to_name()
    } else {
        file.filename.clone()
    };
    children.insert(0, ("file", file));
    children.extend(below.map(|node| ("backing", node)));
    Ok(Node {
        driver: "qcow2",
        filename,
        options: described,
        content,
        children,
        writable: access.write,
        debug: None,
    })
}

/// What keeps from finding the snapshot table, if nothing else is wrong with the header that an opener would refuse.
fn only_of_snapshots(defects: &[HeaderError]) -> Option<&HeaderError> {
    let mut refused = defects.iter().filter(|defect| defect.is_refused());
    let (first, others) = (refused.next()?, refused.next());
    let is_of_snapshots = matches!(
        first,
        HeaderError::TableTooLarge {
            table: HeaderTable::Snapshots,
            ..
        } | HeaderError::TableUnaligned {
            table: HeaderTable::Snapshots,
            ..
        } | HeaderError::TableEnd {
            table: HeaderTable::Snapshots,
            ..
        }
    );
    (is_of_snapshots && others.is_none()).then_some(first)
}

/// Why the snapshots of an image that is open for a check can't be read.
pub(crate) enum SnapshotRefusal {
    /// The header leads to no table of them.
    Header(HeaderError),
    /// The table goes beyond the limits.
    Table(OpenError),
}

/// Why the snapshots of an image that is open for a check can't be read, if so.
pub(crate) fn snapshot_refusal(node: &Node) -> Option<SnapshotRefusal> {
    match (&node.content, node.child("file")) {
        (Content::Image(image), _) => {
            let refused = refuse_snapshot_table(image);
            refused.err().map(SnapshotRefusal::Table)
        }
        (Content::Plain(_), Some(file)) => {
            let (_, defects) = read_header(file).ok()?;
            let defect = only_of_snapshots(&defects)?;
            Some(SnapshotRefusal::Header(defect.clone()))
        }
        _ => None,
    }
}

/// Refuses an image whose snapshots go beyond the limits, as the reference programs do: they read the whole table at once. A table
/// that the file ends in is left to whoever asks for a snapshot.
fn refuse_snapshot_table(image: &Image) -> Result<(), OpenError> {
    if image.header().snapshot_count == 0 {
        return Ok(());
    }
    match image.snapshots() {
        Err(
            error @ ImageError::SnapshotEntry {
                source: SnapshotError::ExtraDataTooLong { .. } | SnapshotError::TableTooLarge { .. },
                ..
            },
        ) => Err(OpenError::of_image(&error)),
        _ => Ok(()),
    }
}

/// Reads the header, and what is wrong with it, for what is to be opened besides. Defects show when the image is opened.
fn read_header(file: &Node) -> Result<(Header, Vec<HeaderError>), OpenError> {
    let storage = file.storage();
    let read = |buf: &mut [u8]| {
        storage
            .read_at(buf, 0)
            .map_err(|error| OpenError::of_file(&file.filename, &error))
    };
    let mut prefix = [0; 104];
    read(&mut prefix)?;
    if !prefix.starts_with(b"QFI\xfb") {
        return Err(OpenError::new("Image is not in qcow2 format"));
    }
    let probe = Header::probe(&prefix).map_err(|error| OpenError::of_image(&error.into()))?;
    let mut cluster = vec![0; probe];
    read(&mut cluster)?;
    Header::decode_for_check(&cluster).map_err(|error| OpenError::of_image(&error.into()))
}

/// The options that say how an image is worked with.
fn run_time_options(options: &mut NodeOptions) -> Result<ImageOptions, OpenError> {
    let mut image = Image::options().qemu_places(true);
    let mut cache = CacheOptions::new();
    if let Some(bytes) = options.take_size("cache-size")? {
        cache = cache.total_bytes(bytes);
    }
    if let Some(bytes) = options.take_size("l2-cache-size")? {
        cache = cache.l2_bytes(bytes);
    }
    if let Some(bytes) = options.take_size("l2-cache-entry-size")? {
        cache = cache.l2_slice_bytes(bytes);
    }
    if let Some(bytes) = options.take_size("refcount-cache-size")? {
        cache = cache.refcount_bytes(bytes);
    }
    if options.text("cache-clean-interval").is_some_and(|text| {
        let seconds = text.parse::<i128>();
        seconds.is_ok_and(|seconds| u32::try_from(seconds).is_err())
    }) {
        return Err(OpenError::new("Cache clean interval too big"));
    }
    if let Some(seconds) = options.take_size("cache-clean-interval")? {
        cache = cache.clean_interval(Duration::from_secs(seconds));
    }
    image = image.cache(cache);
    if let Some(on) = options.take_switch("lazy-refcounts")? {
        image = image.lazy_refcounts(on);
    }
    let mut pass = PassDiscard::default();
    for (key, field) in [
        ("pass-discard-request", &mut pass.request),
        ("pass-discard-snapshot", &mut pass.snapshot),
        ("pass-discard-other", &mut pass.other),
    ] {
        if let Some(on) = options.take_switch(key)? {
            *field = on;
        }
    }
    image = image.pass_discard(pass);
    if let Some(on) = options.take_switch("discard-no-unref")? {
        image = image.discard_no_unref(on);
    }
    Ok(image.overlap_checks(overlap_checks(options)?))
}

/// Which cache would have more slices than the reference programs can count: they refuse that, the engine keeps fewer. What
/// contradicts itself is refused for that.
fn too_big_a_cache(options: &NodeOptions, header: &Header) -> Option<&'static str> {
    let asked = |key| options.text(key).and_then(|text| size::parse(text).ok());
    let cluster = header.geometry.cluster_size();
    let slice = asked("l2-cache-entry-size").unwrap_or(cluster.min(4096));
    if asked("cache-size").is_some() || !(512..=cluster).contains(&slice) {
        return None;
    }
    let is_too_big =
        |key, slice| asked(key).is_some_and(|bytes| i32::try_from(bytes / slice).is_err());
    if is_too_big("l2-cache-size", slice) {
        Some("L2")
    } else if is_too_big("refcount-cache-size", cluster) {
        Some("Refcount")
    } else {
        None
    }
}

/// Why an image is not opened.
fn refusal(error: &ImageError, header: &Header) -> OpenError {
    let ImageError::Option { option, .. } = error else {
        return OpenError::of_image(error);
    };
    match *option {
        "cache-size" => OpenError::new(
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        "l2-cache-size" | "refcount-cache-size" => {
            OpenError::new(format!("{option} may not exceed cache-size"))
        }
        "l2-cache-entry-size" => OpenError::new(format!(
            "L2 cache entry size must be a power of two between 512 and the cluster size ({})",
            header.geometry.cluster_size()
        )),
        _ => OpenError::of_image(error),
    }
}

fn overlap_checks(options: &mut NodeOptions) -> Result<OverlapChecks, OpenError> {
    let plain = options.take("overlap-check");
    let (mut switches, _) = options.take_child("overlap-check");
    let template = switches.take("template");
    let name = match (plain, template) {
        (Some(plain), Some(template)) if plain != template => {
            return Err(OpenError::new(format!(
                "Conflicting values for qcow2 options 'overlap-check' ('{plain}') and 'overlap-check.template' ('{template}')"
            )));
        }
        (plain, template) => plain.or(template),
    };
    let mut checks = OverlapChecks::template(match &name {
        None => Template::All,
        Some(name) => Template::from_name(name).ok_or_else(|| {
            OpenError::new(format!(
                "Unsupported value '{name}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all"
            ))
        })?,
    });
    while let Some(key) = switches.first_key().map(str::to_owned) {
        let on = switches.take_switch(&key)?.unwrap_or(false);
        checks = checks.switch(&key, on).ok_or_else(|| {
            OpenError::new(format!(
                "Block format 'qcow2' does not support the option 'overlap-check.{key}'"
            ))
        })?;
    }
    Ok(checks)
}

fn secret(
    opener: Opener<'_>,
    options: &mut NodeOptions,
    header: &Header,
    access: &Access,
    layer: usize,
) -> Result<Option<Arc<Secret>>, OpenError> {
    let format = options.take("encrypt.format");
    let id = options.take("encrypt.key-secret");
    let expected = match header.crypt_method {
        CryptMethod::None => {
            return if format.is_some() {
                Err(OpenError::new(
                    "No encryption in image header, but options specified",
                ))
            } else {
                Ok(None)
            };
        }
        CryptMethod::Aes => "aes",
        CryptMethod::Luks => "luks",
        // Refused when the image is opened.
        CryptMethod::Unknown(_) => return Ok(None),
    };
    if let Some(format) = format.filter(|format| format != expected) {
        return Err(OpenError::new(format!(
            "Header reported '{expected}' encryption format but options specify '{format}'"
        )));
    }
    // Who doesn't read needs no key, though one is named.
    if access.locked {
        return Ok(None);
    }
    if let Some(id) = id {
        return Ok(Some(opener.objects.secret(&id)?));
    }
    let mut known = access.secrets.iter();
    let known = known.find(|(depth, _)| depth + 1 == layer);
    let secret = known.map(|(_, secret)| Arc::clone(secret));
    secret
        .map(Some)
        .ok_or_else(|| OpenError::new("Parameter 'encrypt.key-secret' is required for cipher"))
}

/// Refuses a file that only an image names, where that is not allowed.
fn check_named(
    what: &str,
    access: &Access,
    image: &Node,
    find: impl FnOnce(&Resolver) -> Result<Resolved, Unresolved>,
) -> Result<(), OpenError> {
    let Some(policy) = &access.references else {
        return Ok(());
    };
    let resolver = Resolver::new(policy.clone(), &outside::path(image.path()));
    find(&resolver).map(drop).map_err(|error| {
        let mut refused = OpenError::new(format!("the {what} {error}"));
        refused.hints.push(
            "if you trust the image, --references allow:PATH or --references all lets it be opened"
                .to_owned(),
        );
        refused
    })
}

fn open_data_file(
    opener: Opener<'_>,
    mut data: NodeOptions,
    header: &Header,
    file: &Node,
    access: &Access,
    layer: usize,
) -> Result<Node, OpenError> {
    if data.is_empty() {
        let named = header.data_file_name();
        let named =
            named.ok_or_else(|| OpenError::new("'data-file' is required for this image"))?;
        if access.locked && access.references.is_some() {
            // Only what the image itself says is of interest.
            data.set("driver", "null-co");
            return opener.node(data, access, layer);
        }
        check_named("data file", access, file, |resolver| {
            resolver.data_file(&outside::path(file.path()), named)
        })?;
        let named = outside::text(named);
        // Unlike that of a backing file it is taken from where the program runs, as the reference program does.
        let filename = match access.references {
            None => named,
            Some(_) => name::resolve(&file.filename, &named),
        };
        data.set("filename", filename);
    }
    data.set_default("driver", "file");
    opener.node(data, access, layer)
}

fn open_backing(
    opener: Opener<'_>,
    options: NodeOptions,
    header: &Header,
    file: &Node,
    access: &Access,
    layer: usize,
) -> Result<Option<Node>, OpenError> {
    let mut described = match &header.backing_name {
        Some(named) if !options.contains("file.filename") => {
            check_named("backing file", access, file, |resolver| {
                resolver.backing_file(&outside::path(file.path()), named)
            })?;
            let named = outside::text(named);
            name::parse(&name::resolve(&file.filename, &named))?
        }
        None if options.is_empty() => return Ok(None),
        _ => NodeOptions::default(),
    };
    if let Some(format) = header.backing_format() {
        described.set("driver", String::from_utf8_lossy(format));
    }
    described.extend(options);
    let access = Access {
        write: layer <= access.writable_layers,
        snapshot: None,
        ..access.clone()
    };
    let below = opener.node(described, &access, layer + 1);
    below.map(Some).map_err(|error| OpenError {
        text: format!("Could not open backing file: {}", error.text),
        hints: error.hints,
    })
}
