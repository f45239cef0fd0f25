//! Disks that commands work on, opened by the library with what it needs to know.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_check::chain::Resolver;
use qcow2_image::chain::Chain;
use qcow2_image::{Image, ImageError, ImageOptions, SnapshotKey};
use qcow2_io::{File, FileOptions, Null, Storage, StorageError, StorageErrorKind};

use super::args::{Format, OpenArgs, ReadArgs};
use super::failure::Failure;
use crate::Objects;
use crate::audit::facts;
use crate::node::{self, Access, Node, NodeOptions, OpenError, Opener};

/// What is wanted of a disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Want {
    /// It is written to.
    pub(crate) write: bool,
    /// Read beside a program that writes.
    pub(crate) force_share: bool,
    /// Not the guest's data, but what is known of it: nothing that the image names is opened, and no passphrase is needed.
    pub(crate) facts_only: bool,
    /// Nothing below the image is of interest, nor may it be written through.
    pub(crate) no_backing: bool,
    /// A snapshot instead of the present state.
    pub(crate) snapshot: Option<SnapshotKey>,
    /// A layer below that is written to.
    pub(crate) writable_layer: Option<usize>,
    /// The name is a list of options of nodes.
    pub(crate) image_opts: bool,
}

impl Want {
    /// To read it.
    pub(crate) fn read(args: &ReadArgs) -> Self {
        Self {
            force_share: args.force_share,
            image_opts: args.image_opts,
            ..Self::default()
        }
    }

    /// To write to it.
    pub(crate) fn write() -> Self {
        Self {
            write: true,
            ..Self::default()
        }
    }

    /// What is known of it.
    pub(crate) fn facts(args: &ReadArgs) -> Self {
        Self {
            facts_only: true,
            ..Self::read(args)
        }
    }
}

/// An open disk.
#[derive(Debug)]
pub(crate) struct Disk {
    /// Its name, as it was typed.
    pub(crate) path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Image(Arc<Image>),
    Raw(Arc<File>),
    /// What a description stands for.
    Node(Node),
}

impl Disk {
    /// Opens a disk of either format, or one that is described by its nodes.
    pub(crate) fn open(path: &Path, args: &OpenArgs, want: &Want) -> Result<Self, Failure> {
        match described(path, want) {
            Some(text) => open_nodes(path, text, args, want),
            None => open(path, args, want),
        }
        .map_err(|failure| failure.about(path))
    }

    /// The image, if it is one.
    pub(crate) fn image(&self) -> Option<&Arc<Image>> {
        match &self.content {
            Content::Image(image) => Some(image),
            Content::Raw(_) => None,
            Content::Node(node) => node.image(),
        }
    }

    /// What a guest sees.
    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        match &self.content {
            Content::Image(image) => Arc::clone(image) as Arc<dyn Storage>,
            Content::Raw(file) => Arc::clone(file) as Arc<dyn Storage>,
            Content::Node(node) => node.storage(),
        }
    }

    /// The image itself, or the file of a raw disk.
    pub(crate) fn into_image(self) -> Result<Image, Arc<dyn Storage>> {
        match self.content {
            Content::Image(image) => {
                Arc::try_unwrap(image).map_err(|image| image as Arc<dyn Storage>)
            }
            Content::Raw(file) => Err(file),
            Content::Node(node) => Err(node.storage()),
        }
    }

    /// The layers.
    pub(crate) fn chain(&self) -> Chain<'_> {
        match &self.content {
            Content::Image(image) => image.chain(),
            Content::Raw(file) => Chain::file(file),
            Content::Node(node) => match &node.content {
                node::Content::Image(image) => image.chain(),
                node::Content::Filtered(_, storage) | node::Content::Plain(storage) => {
                    Chain::raw(&**storage)
                }
            },
        }
    }

    /// Bytes of the disk.
    pub(crate) fn len(&self) -> Result<u64, Failure> {
        Ok(self.storage().len()?)
    }

    /// Makes what was written durable, and closes it.
    pub(crate) fn close(self) -> Result<(), Failure> {
        let done = match self.content {
            Content::Raw(file) => file.flush().map_err(ImageError::from),
            // It was only read.
            Content::Node(_) => Ok(()),
            Content::Image(image) => match Arc::try_unwrap(image) {
                Ok(image) => image.close(),
                Err(image) => image.flush().map_err(ImageError::from),
            },
        };
        done.map_err(|error| Failure::from(error).about(&self.path))
    }
}

/// Opens an image; another format is refused.
pub(crate) fn image(path: &Path, args: &OpenArgs, want: &Want) -> Result<Image, Failure> {
    let disk = Disk::open(path, args, want)?;
    match disk.content {
        Content::Image(image) => {
            Arc::try_unwrap(image).map_err(|_| Failure::new("the image is in use"))
        }
        Content::Node(node) => match node.into_image() {
            Some((image, _)) => Ok(image),
            None => Err(raw(path)),
        },
        Content::Raw(_) => Err(raw(path)),
    }
}

fn raw(path: &Path) -> Failure {
    Failure::new("the file is a raw disk, and only qcow2 images have what this command is about")
        .hint("`qcow2 convert IMAGE NEW.qcow2` makes an image of it")
        .about(path)
}

/// What a name says that is no plain file name: options of nodes, or a `json:` description.
pub(crate) fn described<'a>(path: &'a Path, want: &Want) -> Option<&'a str> {
    let text = path.to_str()?;
    (want.image_opts || text.starts_with("json:")).then_some(text)
}

fn open_nodes(path: &Path, text: &str, args: &OpenArgs, want: &Want) -> Result<Disk, Failure> {
    if want.write {
        return Err(
            Failure::new("what is described like this is only read here")
                .hint("`qcow2 img` and `qcow2 io` write to nodes, as qemu-img and qemu-io do"),
        );
    }
    let access = Access {
        force_share: want.force_share,
        no_backing: want.no_backing || want.facts_only,
        locked: want.facts_only,
        snapshot: want.snapshot.clone(),
        references: Some(args.policy()?),
        secrets: args.passphrases.read()?,
        ..Access::read()
    };
    let objects = Objects::default();
    let opener = Opener { objects: &objects };
    let failed = |error: OpenError| {
        let failure = Failure::new(error.text);
        error.hints.into_iter().fold(failure, Failure::hint)
    };
    let node = if want.image_opts {
        if args.format.is_some() {
            return Err(
                Failure::new("the options of nodes name the format themselves")
                    .hint("driver=qcow2 or driver=raw instead of --format"),
            );
        }
        opener.options(NodeOptions::from_list(text), &access)
    } else {
        opener.name(text, args.format.map(Format::name), &access)
    }
    .map_err(failed)?;
    if node.image().is_none() && want.snapshot.is_some() {
        return Err(Failure::new("a raw disk has no snapshots"));
    }
    Ok(Disk {
        path: path.to_owned(),
        content: Content::Node(node),
    })
}

/// The file that a description's image lies in, and not the image.
pub(crate) fn described_file(text: &str, want: &Want) -> Result<Arc<dyn Storage>, Failure> {
    let objects = Objects::default();
    let opener = Opener { objects: &objects };
    let access = Access {
        force_share: want.force_share,
        ..Access::read()
    };
    let file = || {
        let mut options = if want.image_opts {
            NodeOptions::from_list(text)
        } else {
            opener.describe(text, None)?
        };
        if let Some(name) = options.take("filename") {
            options.set_default("file.filename", &name);
        }
        let (mut file, _) = options.take_child("file");
        file.set_default("driver", "file");
        opener.options(file, &access)
    };
    match file() {
        Ok(node) => Ok(node.storage()),
        Err(error) => Err(error
            .hints
            .into_iter()
            .fold(Failure::new(error.text), Failure::hint)),
    }
}

fn open(path: &Path, args: &OpenArgs, want: &Want) -> Result<Disk, Failure> {
    let file = FileOptions::new()
        .write(want.write)
        .force_share(want.force_share && !want.write)
        .open(path)
        .map_err(|error| locked(&error, want))?;
    let format = match args.format {
        Some(format) => format,
        None if facts::has_magic(&file) => Format::Qcow2,
        // Whose guest writes the start of an image to its disk would have it opened as that the next time.
        None if want.write => {
            return Err(Failure::new(
                "the file does not look like qcow2, and its format is not given",
            )
            .hint("-f raw says that it is a raw disk"));
        }
        None => Format::Raw,
    };
    let content = match format {
        Format::Raw if want.snapshot.is_some() => {
            return Err(Failure::new("a raw disk has no snapshots"));
        }
        Format::Raw => Content::Raw(Arc::new(file)),
        Format::Qcow2 => Content::Image(Arc::new(open_image(path, file, args, want)?)),
    };
    Ok(Disk {
        path: path.to_owned(),
        content,
    })
}

fn open_image(path: &Path, file: File, args: &OpenArgs, want: &Want) -> Result<Image, Failure> {
    let policy = args.policy()?;
    let mut options = Image::options()
        .read_only(!want.write)
        .references(policy.clone())
        .path(path)
        .locked(want.facts_only);
    for (layer, secret) in args.passphrases.read()? {
        options = options.layer_secret(layer, secret);
    }
    if let Some(key) = &want.snapshot {
        options = options.snapshot(key.clone());
    }
    if let Some(layer) = want.writable_layer {
        options = options.writable_layer(layer);
    }
    if want.facts_only || want.no_backing {
        options = options.no_backing();
    }
    let header = facts::header(&file);
    if header.is_some_and(|header| header.incompatible.external_data()) {
        if want.facts_only {
            options = options.data_file(Arc::new(Null::new()));
        } else if want.force_share {
            options = with_shared_data(options, path, &file, &Resolver::new(policy, path))?;
        }
    }
    options.open_file(file).map_err(|error| match error {
        ImageError::Storage(error) => locked(&error, want),
        error => Failure::from(error),
    })
}

/// Opens the data file beside a program that writes to it, as the image itself.
fn with_shared_data(
    options: ImageOptions,
    path: &Path,
    file: &File,
    resolver: &Resolver,
) -> Result<ImageOptions, Failure> {
    let name = facts::header(file).and_then(|header| header.data_file_name().map(<[u8]>::to_vec));
    let Some(name) = name else {
        return Ok(options);
    };
    let found = resolver
        .data_file(path, &name)
        .map_err(|source| ImageError::Reference {
            what: "data file",
            source,
        })?;
    let data = FileOptions::new()
        .force_share(true)
        .open(&found.canonical)?;
    Ok(options.data_file(Arc::new(data)))
}

/// What can be done about an image that somebody else uses.
fn locked(error: &StorageError, want: &Want) -> Failure {
    let in_use = error.kind() == StorageErrorKind::Locked;
    let failure = Failure::opening(error);
    if in_use && !want.write && !want.force_share {
        failure.hint("--force-share (-U) reads it beside that program")
    } else {
        failure
    }
}
