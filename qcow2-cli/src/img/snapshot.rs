//! `snapshot`: the states that an image keeps inside.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use qcow2_image::{ImageError, SnapshotInfo, SnapshotKey, SnapshotOptions};
use rustix::io::Errno;

use super::args::{self, Common, Failure};
use crate::node::{self, Access, Node};
use crate::words::getopt::{Long, Spec};
use crate::words::{size, system};
use crate::{Console, say};

const SPEC: Spec = Spec {
    short: "hla:c:d:f:qU",
    long: &[
        Long {
            name: "help",
            takes_value: false,
            code: 'h',
        },
        Long {
            name: "list",
            takes_value: false,
            code: 'l',
        },
        Long {
            name: "apply",
            takes_value: true,
            code: 'a',
        },
        Long {
            name: "create",
            takes_value: true,
            code: 'c',
        },
        Long {
            name: "delete",
            takes_value: true,
            code: 'd',
        },
        Long {
            name: "format",
            takes_value: true,
            code: 'f',
        },
        Long {
            name: "quiet",
            takes_value: false,
            code: 'q',
        },
        Long {
            name: "object",
            takes_value: true,
            code: '\u{1}',
        },
        Long {
            name: "image-opts",
            takes_value: false,
            code: '\u{2}',
        },
        Long {
            name: "force-share",
            takes_value: false,
            code: 'U',
        },
    ],
};

const USAGE: &str = "qemu-img snapshot [-l | -a|-c|-d SNAPSHOT] [-f FMT | --image-opts] [-U] [-q]
        [--object OBJDEF] FILE

List (the default), take, apply or delete the snapshots inside of an image.
  -l, --list                list them
  -c, --create SNAPSHOT     take one
  -a, --apply SNAPSHOT      bring the disk back to one
  -d, --delete SNAPSHOT     delete one
  -f, --format FMT          format of the image
  --image-opts              FILE is a list of options
  -U, --force-share         read beside a program that writes
  --object OBJDEF           define an object, such as a secret
  -q, --quiet               say nothing unless something is wrong";

/// What is to be done.
enum Action {
    List,
    Create(String),
    Apply(String),
    Delete(String),
}

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("snapshot", &SPEC, words)?;
    let mut common = Common::default();
    let (mut action, mut format, mut force_share) = (None, None, false);
    for (code, value) in parsed.options {
        let wanted = match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'l' => Action::List,
            'c' => Action::Create(value),
            'a' => Action::Apply(value),
            'd' => Action::Delete(value),
            other => {
                match other {
                    'f' => format = Some(value),
                    'U' => force_share = true,
                    '\u{1}' => common.objects.add(&value).map_err(Failure::new)?,
                    '\u{2}' => common.image_opts = true,
                    _ => {}
                }
                continue;
            }
        };
        if action.replace(wanted).is_some() {
            return Err(Failure::usage(
                "snapshot",
                "Cannot mix '-l', '-a', '-c', '-d'",
            ));
        }
    }
    let [name] = parsed.operands.as_slice() else {
        return Err(Failure::usage("snapshot", "Expecting one image file name"));
    };
    let action = action.unwrap_or(Action::List);
    let lists = matches!(action, Action::List);
    let access = Access {
        write: !lists,
        locked: lists,
        force_share,
        ..Access::read()
    };
    let node = common.open(name, format.as_deref(), &access)?;
    match action {
        Action::List => list(&node, console),
        Action::Create(snapshot) => create(&node, &snapshot)?,
        Action::Apply(snapshot) => apply(&node, &snapshot)?,
        Action::Delete(snapshot) => delete(&node, &snapshot)?,
    }
    args::close(node)?;
    Ok(ExitCode::SUCCESS)
}

fn list(node: &Node, console: &Console) {
    let snapshots = node.image().map(|image| image.snapshots());
    if let Some(Ok(snapshots)) = snapshots
        && !snapshots.is_empty()
    {
        say!(console, "Snapshot list:");
        console.out(format_args!("{}", table(&snapshots)));
    }
}

/// An id as it is shown: up to a zero, and not all of a long one.
pub(super) fn id(one: &SnapshotInfo) -> String {
    shown(&one.id, 127)
}

/// A name as it is shown.
pub(super) fn name(one: &SnapshotInfo) -> String {
    shown(&one.name, 255)
}

fn shown(bytes: &[u8], max: usize) -> String {
    let shown = bytes.iter().take_while(|byte| **byte != 0).take(max);
    let shown: Vec<u8> = shown.copied().collect();
    String::from_utf8_lossy(&shown).into_owned()
}

/// The lines of a list.
pub(super) fn table(snapshots: &[SnapshotInfo]) -> String {
    let mut text = format!(
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for one in snapshots {
        let clock = one.vm_clock;
        let seconds = clock.as_secs();
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            clock.subsec_millis()
        );
        let icount = one
            .icount
            .map_or("--".to_owned(), |count| count.to_string());
        _ = writeln!(
            text,
            "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
            id(one),
            name(one),
            size::human(one.vm_state_size),
            system::local_time(one.date),
            clock,
            icount
        );
    }
    text
}

fn create(node: &Node, name: &str) -> Result<(), Failure> {
    let wrap =
        |text: String| Failure::new(format_args!("Could not create snapshot '{name}': {text}"));
    let image = node
        .image()
        .ok_or_else(|| wrap("Operation not supported".to_owned()))?;
    let mut options = SnapshotOptions::new(name);
    options.keep_loose_state = true;
    // Machines don't run here, and their instructions are not counted.
    options.icount = Some(0);
    options.vm_clock = Duration::ZERO;
    match image.create_snapshot(&options) {
        Ok(_) => Ok(()),
        Err(error) => Err(wrap(words(&error))),
    }
}

/// Why a snapshot can't be taken, in the system's words.
fn words(error: &ImageError) -> String {
    match error {
        ImageError::Uncounted {
            can_be_counted: true,
            ..
        } => system::text(Errno::AGAIN),
        ImageError::Uncounted { .. } | ImageError::Snapshots(_) => {
            system::text(system::of_kind(error.kind()))
        }
        error => system::describe(error),
    }
}

fn key(name: &str) -> SnapshotKey {
    SnapshotKey::any(name)
}

fn apply(node: &Node, name: &str) -> Result<(), Failure> {
    let wrap = |text: &str| Failure::new(format_args!("Could not apply snapshot '{name}': {text}"));
    let image = node
        .image()
        .ok_or_else(|| wrap("Block driver does not support snapshots"))?;
    image
        .apply_snapshot(&key(name))
        .map_err(|error| match error {
            ImageError::NoSnapshot { .. } => {
                wrap("Failed to load snapshot: No such file or directory")
            }
            ImageError::SnapshotL1 { problem, .. } => {
                let errno = system::text(system::of_kind(error.kind()));
                let last = wrap(&format!("Failed to load snapshot: {errno}"));
                Failure::new(node::snapshot_l1_text(problem)).then(last)
            }
            error => wrap(&system::describe(&error)),
        })
}

fn delete(node: &Node, name: &str) -> Result<(), Failure> {
    let wrap =
        |text: &str| Failure::new(format_args!("Could not delete snapshot '{name}': {text}"));
    let missing = "snapshot not found";
    let image = node.image().ok_or_else(|| wrap(missing))?;
    image
        .delete_snapshot(&key(name))
        .map_err(|error| match error {
            ImageError::NoSnapshot { .. } => wrap(missing),
            ImageError::SnapshotL1 { problem, .. } => wrap(node::snapshot_l1_text(problem)),
            error => {
                let left = image.snapshots().unwrap_or_default();
                let is_left = left
                    .iter()
                    .any(|one| one.name == name.as_bytes() || one.id == name.as_bytes());
                let text = system::describe(&error);
                if is_left {
                    wrap(&text)
                } else {
                    wrap(&format!("Failed to free the cluster and L1 table: {text}"))
                }
            }
        })
}
