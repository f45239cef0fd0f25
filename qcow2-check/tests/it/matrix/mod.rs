//! Every image that QEMU makes is judged as QEMU judges it.

mod formats;
mod recipe;
mod works;

use qcow2_check::{Options, Report, Severity, check};
use qcow2_io::File;

use crate::oracle::{self, Workshop};
use recipe::{IMAGE, Recipe};

#[test]
fn qemu_and_the_checker_agree_on_every_image_that_qemu_makes() {
    let recipes = works::recipes();
    if !oracle::is_available(recipes.len(), "images") {
        return;
    }
    let verdicts = oracle::on_all_cores(&recipes, judge);
    let failures: Vec<_> = verdicts.iter().filter_map(|v| v.as_ref().err()).collect();
    let sound = verdicts.iter().filter(|v| **v == Ok(0)).count();
    let leaky = verdicts.iter().filter(|v| **v == Ok(3)).count();
    let corrupt = verdicts.iter().filter(|v| **v == Ok(2)).count();
    eprintln!(
        "{} images: {sound} sound, {leaky} leaky, {corrupt} corrupt",
        recipes.len()
    );
    assert!(
        failures.is_empty(),
        "{} of {} images judged differently:\n{}",
        failures.len(),
        recipes.len(),
        failures
            .iter()
            .take(40)
            .map(|f| f.as_str())
            .collect::<Vec<_>>()
            .join("\n"),
    );
    assert!(
        sound > 400 && leaky >= 5 && corrupt >= 3,
        "the matrix lost a kind of image"
    );
}

/// Makes an image and compares. Gives the exit code that both agree on, or what differs.
fn judge(recipe: &Recipe) -> Result<i32, String> {
    let shop = Workshop::new();
    recipe
        .make(&shop)
        .map_err(|error| format!("{}: not made: {error}", recipe.name()))?;
    let theirs = shop.check(IMAGE, recipe.format.access());
    let image = File::open(shop.path(IMAGE)).map_err(|error| error.to_string())?;
    let ours = check(&image, &with_threads(1));
    let again = check(&image, &with_threads(4));

    let mut differences = Vec::new();
    if theirs.exit != Some(i32::from(ours.verdict().exit_code())) {
        differences.push(format!("exit {:?}, ours {:?}", theirs.exit, ours.verdict()));
    }
    if theirs.counts != Some(ours.counts) {
        differences.push(format!(
            "counts {:?}\n    ours   {:?}",
            theirs.counts, ours.counts
        ));
    }
    if theirs.exit == Some(0) && findings_above_notes(&ours) > 0 {
        differences.push("findings in a sound image".to_owned());
    }
    if facts(&ours) != facts(&again) {
        differences.push(format!(
            "four threads give another report: {:?}",
            facts(&again)
        ));
    }
    if differences.is_empty() {
        return theirs
            .exit
            .ok_or_else(|| format!("{}: QEMU gave no exit code", recipe.name()));
    }
    let findings: Vec<_> = ours
        .findings
        .iter()
        .take(5)
        .map(ToString::to_string)
        .collect();
    Err(format!(
        "{}: {}\n    findings {:?} {}\n    QEMU: {}",
        recipe.name(),
        differences.join("\n    "),
        ours.totals,
        findings.join("; "),
        theirs
            .message
            .lines()
            .take(5)
            .collect::<Vec<_>>()
            .join("; "),
    ))
}

fn with_threads(threads: usize) -> Options<'static> {
    Options {
        threads,
        ..Options::default()
    }
}

fn findings_above_notes(report: &Report) -> u64 {
    [
        Severity::Hazard,
        Severity::Leak,
        Severity::Corruption,
        Severity::Error,
    ]
    .into_iter()
    .map(|severity| report.total_of(severity))
    .sum()
}

/// All of a report that may not depend on the threads.
fn facts(report: &Report) -> impl PartialEq + std::fmt::Debug + use<'_> {
    let flags = (report.fatal, report.cancelled, report.complete);
    (report.counts, &report.findings, &report.totals, flags)
}
