//! `bitmap`: the persistent dirty bitmaps of an image.

use std::process::ExitCode;

use qcow2_image::{BitmapOptions, Image, ImageError};

use super::args::{self, Common, Failure};
use crate::node::{self, Access};
use crate::words::getopt::{Long, Spec};
use crate::words::system;
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hf:b:F:g:",
    long: &[
        Long::flag("help", 'h'),
        Long::value("format", 'f'),
        Long::value("object", '\u{1}'),
        Long::flag("image-opts", '\u{2}'),
        Long::flag("add", '\u{3}'),
        Long::flag("remove", '\u{4}'),
        Long::flag("clear", '\u{5}'),
        Long::flag("enable", '\u{6}'),
        Long::flag("disable", '\u{7}'),
        Long::value("merge", '\u{8}'),
        Long::value("source-file", 'b'),
        Long::value("source-format", 'F'),
        Long::value("granularity", 'g'),
    ],
};

const USAGE: &str =
    "qemu-img bitmap (--add [-g GRANULARITY] | --remove | --clear | --enable | --disable |
        --merge SOURCE [-b FILE [-F FMT]])... [-f FMT | --image-opts] [--object OBJDEF] FILE BITMAP

Change a persistent dirty bitmap of an image; several actions are done in their order.
  --add                        make it; it records from now on
  -g, --granularity BYTES      bytes of the disk that a bit stands for
  --remove                     delete it
  --clear                      forget what it has recorded
  --enable, --disable          let it record, or not
  --merge SOURCE               add what the bitmap SOURCE has recorded
  -b, --source-file FILE       the image that has SOURCE
  -F, --source-format FMT      its format
  -f, --format FMT             format of the image
  --image-opts                 FILE is a list of options
  --object OBJDEF              define an object, such as a secret";

enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("bitmap", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut source, mut source_format, mut granularity) = (None, None, None, None);
    let mut actions = Vec::new();
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => format = Some(value),
            'b' => source = Some(value),
            'F' => source_format = Some(value),
            'g' => {
                granularity = Some(args::number("granularity", &value, args::ANY_BYTES)?);
            }
            '\u{1}' => common.objects.add(&value).map_err(Failure::new)?,
            '\u{2}' => common.image_opts = true,
            '\u{3}' => actions.push(Action::Add),
            '\u{4}' => actions.push(Action::Remove),
            '\u{5}' => actions.push(Action::Clear),
            '\u{6}' => actions.push(Action::Enable),
            '\u{7}' => actions.push(Action::Disable),
            '\u{8}' => actions.push(Action::Merge(value)),
            _ => {}
        }
    }
    let [name, bitmap] = parsed.operands.as_slice() else {
        return Err(Failure::new("Expecting filename and bitmap name"));
    };
    let merges = actions
        .iter()
        .any(|action| matches!(action, Action::Merge(_)));
    let adds = actions.iter().any(|action| matches!(action, Action::Add));
    if actions.is_empty() {
        return Err(Failure::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    if granularity.is_some() && !adds {
        return Err(Failure::new("granularity only supported with --add"));
    }
    if source_format.is_some() && source.is_none() {
        return Err(Failure::new("-F only supported with -b"));
    }
    if source.is_some() && !merges {
        return Err(Failure::new(
            "Merge bitmap source file only supported with --merge",
        ));
    }
    // As in the reference program, the chain below is of no interest.
    let access = Access {
        no_backing: true,
        locked: true,
        ..Access::write()
    };
    let node = common.open(name, format.as_deref(), &access)?;
    let from = source
        .map(|source| {
            common.open(
                &source,
                source_format.as_deref(),
                &Access {
                    no_backing: true,
                    locked: true,
                    ..Access::read()
                },
            )
        })
        .transpose()?;
    for action in actions {
        let failed = |text: String| {
            Failure::new(format_args!(
                "Operation {} on bitmap {bitmap} failed: {text}",
                action.name()
            ))
        };
        let Some(image) = node.image() else {
            return Err(failed("Operation not supported".to_owned()));
        };
        let other = from.as_ref().and_then(|node| node.image());
        if let Some(text) = refused(&action, image, bitmap, other.map(|image| &**image)) {
            return Err(failed(text));
        }
        carry_out(
            &action,
            image,
            bitmap,
            other.map(|image| &**image),
            granularity,
        )
        .map_err(
            |error| match node::lost_bitmaps(&error, node.unfiltered().name()) {
                Some(text) => not_stored(&text),
                None => failed(text_of(&error)),
            },
        )?;
    }
    args::close_strictly(node, |text| Err(not_stored(text)))?;
    Ok(ExitCode::SUCCESS)
}

/// All bitmaps are stored at the end, as the reference program has it, so that is when there is no place; and it is tried twice.
fn not_stored(text: &str) -> Failure {
    Failure::new(text)
        .hint(args::NOT_CLOSED)
        .hint(format!("qemu-img: {text}"))
}

/// Why an action makes no sense, where the usual words need to know more than an error tells.
fn refused(action: &Action, image: &Image, bitmap: &str, other: Option<&Image>) -> Option<String> {
    match action {
        Action::Add if bitmap.is_empty() => Some("Bitmap name cannot be empty".to_owned()),
        Action::Add => {
            let known = image.bitmaps().unwrap_or_default();
            let is_taken = known.iter().any(|known| known.name == bitmap.as_bytes());
            is_taken.then(|| format!("Bitmap already exists: {bitmap}"))
        }
        Action::Merge(_) => {
            let (to, from) = (image.virtual_size(), other.unwrap_or(image).virtual_size());
            (to != from).then(|| {
                format!(
                    "Bitmaps are of different sizes (destination size is {to}, source size is {from}) and can't be merged"
                )
            })
        }
        _ => None,
    }
}

fn carry_out(
    action: &Action,
    image: &Image,
    bitmap: &str,
    other: Option<&Image>,
    granularity: Option<u64>,
) -> Result<(), ImageError> {
    let name = bitmap.as_bytes();
    match action {
        Action::Add => {
            let mut options = BitmapOptions::new();
            if let Some(bytes) = granularity {
                options = options.granularity(bytes);
            }
            image.create_bitmap(name, &options)
        }
        Action::Remove => image.remove_bitmap(name),
        Action::Clear => image.clear_bitmap(name),
        Action::Enable => image.enable_bitmap(name),
        Action::Disable => image.disable_bitmap(name),
        Action::Merge(source) => {
            image.merge_bitmap(name, other.unwrap_or(image), source.as_bytes())
        }
    }
}

fn text_of(error: &ImageError) -> String {
    match error {
        ImageError::NoBitmap { name } => format!("Dirty bitmap '{name}' not found"),
        ImageError::BitmapUnusable { name, .. } => {
            format!("Bitmap '{name}' is inconsistent and cannot be used")
        }
        ImageError::Option {
            option: "granularity",
            ..
        } => "Granularity must be power of 2 and at least 512".to_owned(),
        ImageError::Option { why, .. } => why.clone(),
        ImageError::Unsupported { what } => (*what).to_owned(),
        error => system::describe(error),
    }
}
