//! `check`: is an image consistent, and mend it.

use std::process::ExitCode;

use qcow2_check::repair::Level;
use qcow2_check::{Counts, Report};
use qcow2_format::HeaderError;
use qcow2_io::Storage;
use rustix::io::Errno;

use super::args::{self, Common, Failure, Output};
use crate::node::{self, Access, Node, SnapshotRefusal};
use crate::words::dict::Value;
use crate::words::getopt::{Long, Spec};
use crate::words::system;
use crate::{Console, complain, mend, say};

const SPEC: Spec = Spec {
    short: "hf:r:T:qU",
    long: &[
        Long::flag("help", 'h'),
        Long::value("format", 'f'),
        Long::value("repair", 'r'),
        Long::value("output", '\u{1}'),
        Long::value("object", '\u{2}'),
        Long::flag("image-opts", '\u{3}'),
        Long::flag("force-share", 'U'),
        Long::flag("quiet", 'q'),
        Long::value("cache", 'T'),
    ],
};

const USAGE: &str = "qemu-img check [-f FMT | --image-opts] [-T CACHE_MODE] [-r leaks|all] [-q] [-U]
        [--output human|json] [--object OBJDEF] FILE

Check whether an image is consistent. Exit code: 0 it is, 1 the check was not completed, 2 it is corrupt,
3 clusters are lost, 63 images of this format can't be checked.
  -f, --format FMT         format of the image (default: what it looks like)
  --image-opts             FILE is a list of options
  -r, --repair leaks|all   mend lost clusters, or all that can be mended
  -U, --force-share        read beside a program that writes
  --output human|json      for people (the default) or for programs
  --object OBJDEF          define an object, such as a secret
  -q, --quiet              say nothing unless something is wrong";

/// The format has no checker.
const NO_CHECKER: u8 = 63;

/// What a check came to.
struct Outcome {
    counts: Counts,
    leaks_fixed: u64,
    corruptions_fixed: u64,
}

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("check", &SPEC, words)?;
    let mut common = Common::default();
    let (mut format, mut output, mut level) = (None, Output::Human, None);
    let (mut quiet, mut force_share) = (false, false);
    for (code, value) in parsed.options {
        match code {
            'h' => {
                say!(console, "{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            'f' => format = Some(value),
            'U' => force_share = true,
            'q' => quiet = true,
            'r' => {
                level = Some(match value.as_str() {
                    "leaks" => Level::Leaks,
                    "all" => Level::All,
                    other => {
                        return Err(Failure::usage(
                            "check",
                            format_args!("--repair (-r) expects 'leaks' or 'all' not '{other}'"),
                        ));
                    }
                });
            }
            '\u{1}' => output = Output::from_name("check", &value)?,
            '\u{2}' => common.objects.add(&value).map_err(Failure::new)?,
            '\u{3}' => common.image_opts = true,
            _ => {}
        }
    }
    let [name] = parsed.operands.as_slice() else {
        return Err(Failure::usage("check", "Expecting one image file name"));
    };
    let access = Access {
        force_share,
        for_check: true,
        ..Access::read()
    };
    let node = common.open(name, format.as_deref(), &access)?;
    if node.image().is_none() && node.driver != "qcow2" {
        return Err(Failure::new("This image format does not support checks").code(NO_CHECKER));
    }
    if level < Some(Level::All)
        && let Some(refusal) = node::snapshot_refusal(&node)
    {
        return Err(snapshots_refused(&refusal));
    }
    let unknown = node
        .image()
        .is_some_and(|image| image.header().autoclear.unknown() != 0);
    // What is done on the way is not told to programs, and not to the quiet.
    let listener = (output == Output::Human && !quiet).then_some(console);
    let (report, fixed) = match level {
        None => (mend::inspect(&*file_of(&node)), None),
        Some(level) => mend(
            &common,
            node,
            name,
            format.as_deref(),
            level,
            console,
            listener,
        )?,
    };
    if unknown && level.is_some() && report.counts.corruptions == 0 {
        // Whoever opens an image for writing clears the bits that it does not know.
        args::close(common.open(name, format.as_deref(), &Access::write())?)?;
    }
    if report.fatal {
        return Ok(ExitCode::from(1));
    }
    let (leaks_fixed, corruptions_fixed) = fixed.unwrap_or_default();
    let outcome = Outcome {
        counts: report.counts,
        leaks_fixed,
        corruptions_fixed,
    };
    match output {
        Output::Json => say!(console, "{}", outcome.to_value(name).to_json()),
        Output::Human if !quiet => outcome.tell(console),
        Output::Human => {}
    }
    let counts = outcome.counts;
    Ok(ExitCode::from(if counts.check_errors > 0 {
        1
    } else if counts.corruptions > 0 {
        2
    } else if counts.leaks > 0 {
        3
    } else {
        0
    }))
}

/// A check that ends before it begins, since the snapshots can't be read.
fn snapshots_refused(refusal: &SnapshotRefusal) -> Failure {
    let (text, hints, errno) = match refusal {
        SnapshotRefusal::Table(error) => (
            format!("failed to read the snapshot table: {}", error.text),
            error.hints.clone(),
            Errno::FBIG,
        ),
        SnapshotRefusal::Header(HeaderError::TableTooLarge { found, limit, .. }) => {
            let overhanging = found.saturating_sub(*limit);
            let hint = format!(
                "You can force-remove all {overhanging} overhanging snapshots with qemu-img check -r all"
            );
            let text = "snapshot table too large".to_owned();
            (text, vec![hint], Errno::FBIG)
        }
        SnapshotRefusal::Header(_) => {
            let text = "snapshot table offset invalid".to_owned();
            (text, Vec::new(), Errno::INVAL)
        }
    };
    let failure = Failure::new(format_args!("ERROR {text}"));
    let failure = hints.into_iter().fold(failure, Failure::hint);
    failure.then(Failure::new(format_args!(
        "Check failed: {}",
        system::text(errno)
    )))
}

/// The file that an image lies in.
fn file_of(node: &Node) -> std::sync::Arc<dyn Storage> {
    node.child("file")
        .map_or_else(|| node.storage(), Node::storage)
}

/// Mends what can be mended; gives the report of a second look, and how much was mended.
fn mend(
    common: &Common,
    node: Node,
    name: &str,
    format: Option<&str>,
    level: Level,
    console: &Console,
    listener: Option<&Console>,
) -> Result<(Report, Option<(u64, u64)>), Failure> {
    // The image knows nothing of repairs: it is closed before its file is opened for writing.
    drop(node);
    let access = Access {
        write: true,
        ..Access::read()
    };
    let node = common.open_file(name, format, &access)?;
    let file = node.storage();
    let failed = |error: &dyn std::error::Error| {
        Failure::new(format_args!("Check failed: {}", mend::with_causes(error)))
    };
    let plan = mend::plan(&*file, level).map_err(|error| failed(&error))?;
    let mut before = mend::found_before(&plan).counts;
    for cut in plan.snapshot_cuts() {
        before.corruptions = before.corruptions.saturating_add(cut.entries());
    }
    let after = plan.after().counts;
    if level == Level::Leaks && mend::lacks_refcounts(plan.before()) {
        // Before a rebuild nobody looks at flags.
        mend::tell_before_flags(&*file, plan.before(), "ERROR");
        complain!(console, "ERROR need to rebuild refcount structures");
        return Err(Failure::new("Check failed: Input/output error"));
    }
    if plan.is_empty() {
        mend::tell(&*file, plan.before());
        return Ok((plan.after().clone(), None));
    }
    let (flags, turned) = mend::tell_of_repair(&*file, &plan);
    plan.apply(None).map_err(|error| failed(&error))?;
    drop(plan);
    file.flush()
        .map_err(|error| Failure::new(system::describe(&error)))?;
    let fixed = (
        before.leaks.saturating_sub(after.leaks),
        // Flags that a refcount has put right are nobody's work.
        before
            .corruptions
            .saturating_sub(after.corruptions)
            .saturating_sub(flags)
            .saturating_add(turned),
    );
    if fixed == (0, 0) {
        return Ok((mend::inspect(&*file), None));
    }
    if let Some(listener) = listener {
        say!(
            listener,
            "The following inconsistencies were found and repaired:\n"
        );
        say!(
            listener,
            "    {} leaked clusters\n    {} corruptions\n",
            fixed.0,
            fixed.1
        );
        say!(listener, "Double checking the fixed image now...");
        console.flush();
    }
    Ok((mend::inspect(&*file), Some(fixed)))
}

impl Outcome {
    fn to_value(&self, name: &str) -> Value {
        let counts = &self.counts;
        let mut members = vec![
            ("filename", name.into()),
            ("format", "qcow2".into()),
            ("check-errors", counts.check_errors.into()),
        ];
        for (key, count) in [
            ("image-end-offset", counts.image_end_offset),
            ("corruptions", counts.corruptions),
            ("leaks", counts.leaks),
            ("corruptions-fixed", self.corruptions_fixed),
            ("leaks-fixed", self.leaks_fixed),
            ("total-clusters", counts.total_clusters),
            ("allocated-clusters", counts.allocated_clusters),
            ("fragmented-clusters", counts.fragmented_clusters),
            ("compressed-clusters", counts.compressed_clusters),
        ] {
            if count > 0 {
                members.push((key, count.into()));
            }
        }
        Value::Object(members)
    }

    fn tell(&self, console: &Console) {
        let counts = &self.counts;
        if counts.corruptions == 0 && counts.leaks == 0 && counts.check_errors == 0 {
            say!(console, "No errors were found on the image.");
        }
        if counts.corruptions > 0 {
            say!(
                console,
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
                counts.corruptions
            );
        }
        if counts.leaks > 0 {
            say!(
                console,
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
                counts.leaks
            );
        }
        if counts.check_errors > 0 {
            say!(
                console,
                "\n{} internal errors have occurred during the check.",
                counts.check_errors
            );
        }
        if counts.total_clusters > 0 && counts.allocated_clusters > 0 {
            say!(
                console,
                "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
                counts.allocated_clusters,
                counts.total_clusters,
                percent(counts.allocated_clusters, counts.total_clusters),
                percent(counts.fragmented_clusters, counts.allocated_clusters),
                percent(counts.compressed_clusters, counts.allocated_clusters)
            );
        }
        if counts.image_end_offset > 0 {
            say!(console, "Image end offset: {}", counts.image_end_offset);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}
