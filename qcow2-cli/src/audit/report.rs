//! The report for people: what it means first, then the findings, worst first, on no more than a screen.

use std::fmt::Write as _;

use qcow2_check::{Code, Report, Severity, Verdict};

use super::audited::Audited;
use super::text::{Look, clean, cut, percent, plural, shown, size, wrap};

/// Lines of a report that was not asked for more: a small screen, and one left for the prompt.
const SCREEN_LINES: usize = 23;
/// Places shown of each kind, where there is room.
const PLACES_SHOWN: usize = 3;

/// How much is told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Most lines; `None` for as many as it takes.
    lines: Option<usize>,
    /// Most places of each kind.
    places: usize,
}

impl Extent {
    /// What fits a screen.
    pub(crate) const SCREEN: Self = Self {
        lines: Some(SCREEN_LINES),
        places: PLACES_SHOWN,
    };

    /// That many places of each kind, however long it gets.
    pub(crate) fn places(places: usize) -> Self {
        Self {
            lines: None,
            places,
        }
    }
}

/// The verdict in a word or two.
pub(crate) fn verdict_words(audited: &Audited) -> &'static str {
    match audited.verdict() {
        _ if audited.error.is_some() => "can't be checked",
        _ if !audited.is_qcow2 => "no qcow2 image",
        _ if audited.report.cancelled => "not checked to the end",
        Verdict::Incomplete => "can't be checked in full",
        Verdict::Corrupt => "corrupt",
        Verdict::Leaks => "leaks",
        Verdict::Sound if audited.hazards() > 0 => "sound, with hazards",
        Verdict::Sound => "sound",
    }
}

/// The name and the verdict.
pub(crate) fn headline(audited: &Audited, look: Look) -> String {
    let colour = match audited.verdict() {
        Verdict::Incomplete | Verdict::Corrupt => "1;31",
        Verdict::Leaks => "1;33",
        Verdict::Sound if audited.hazards() > 0 => "1;33",
        Verdict::Sound => "1;32",
    };
    let name = look.bold(&shown(&audited.name));
    format!("{name}: {}", look.paint(colour, verdict_words(audited)))
}

/// The whole report of an image.
pub(crate) fn render(audited: &Audited, extent: Extent, look: Look) -> String {
    let mut lines = vec![headline(audited, look)];
    let indented = |lines: &mut Vec<String>, text: &str| {
        lines.extend(
            wrap(text, look.width - 2)
                .into_iter()
                .map(|l| format!("  {l}")),
        );
    };
    indented(&mut lines, &meaning(audited));
    if let Some(facts) = &audited.facts {
        indented(&mut lines, &clean(&facts.words().join(", ")));
    }
    // Counts of a part would mislead.
    if audited.error.is_none()
        && !audited.report.fatal
        && !audited.report.cancelled
        && audited.report.counts.image_end_offset > 0
    {
        indented(&mut lines, &counts(audited));
    }
    if let Some(decoded) = audited.report.decoded {
        let untried =
            audited.report.cancelled || audited.report.total(Code::CompressedUnchecked) > 0;
        let text = match decoded {
            0 if !untried => "There is no compressed data to decode.".to_owned(),
            0 => "No compressed data was decoded.".to_owned(),
            1 => "1 piece of compressed data was decoded.".to_owned(),
            n => format!("{n} pieces of compressed data were decoded."),
        };
        indented(&mut lines, &text);
    }
    if let Some(reading) = audited.reading {
        let settled = if reading.settled {
            "the last two found the same"
        } else {
            "it never came to rest"
        };
        let transient = match reading.transient {
            0 => String::new(),
            1 => " A finding that came and went is left out.".to_owned(),
            n => format!(" {n} findings that came and went are left out."),
        };
        let passes = plural(reading.passes as u64, "time");
        let text = format!("Read {passes} beside a writer; {settled}.{transient}");
        indented(&mut lines, &text);
    }
    for reference in references(audited) {
        indented(&mut lines, &reference);
    }
    findings(&audited.report, extent, look, &mut lines);
    let mut out = lines.join("\n");
    out.push('\n');
    out
}

/// A sound image among several: the name, the verdict, and what it refers to if that was followed.
pub(crate) fn short(audited: &Audited, look: Look) -> String {
    let mut out = headline(audited, look) + "\n";
    for reference in references(audited) {
        _ = writeln!(out, "  {reference}");
    }
    out
}

/// What became of the names in the image.
fn references(audited: &Audited) -> Vec<String> {
    let Some(below) = &audited.below else {
        return Vec::new();
    };
    [("backing", &below.backing), ("data", &below.data_file)]
        .into_iter()
        .filter_map(|(what, target)| {
            let note = &target.as_ref()?.note;
            Some(clean(&format!("{what} file: {note}")))
        })
        .collect()
}

/// What the verdict means for whoever has the image.
fn meaning(audited: &Audited) -> String {
    if let Some(error) = &audited.error {
        return clean(error);
    }
    let report = &audited.report;
    let mut text = match report.verdict() {
        _ if !audited.is_qcow2 => "It does not start as qcow2 images do.".to_owned(),
        _ if report.cancelled => "You ended the check early; this is what it had found.".to_owned(),
        Verdict::Incomplete => {
            "Something could not be read or understood; what it hides is unknown.".to_owned()
        }
        Verdict::Corrupt => {
            "Data is lost or in danger. Copy the file, and don't write to it before a repair."
                .to_owned()
        }
        Verdict::Leaks => lost_space(audited),
        Verdict::Sound if audited.hazards() > 0 => {
            "It is consistent, but opening it can harm whoever trusts it.".to_owned()
        }
        Verdict::Sound => "Nothing is wrong with it.".to_owned(),
    };
    let qemu = report.qemu_verdict();
    if !report.cancelled && qemu < report.verdict() {
        let theirs = match qemu {
            Verdict::Sound => "sound",
            Verdict::Leaks => "a leak",
            _ => "corrupt",
        };
        _ = write!(text, " (To qemu-img check it is {theirs}.)");
    }
    text
}

fn lost_space(audited: &Audited) -> String {
    let leaks = audited.report.total_of(Severity::Leak);
    let bytes = audited
        .facts
        .as_ref()
        .map_or(0, |facts| facts.cluster_size.saturating_mul(leaks));
    let clusters = plural(leaks, "cluster");
    if audited.report.complete {
        format!(
            "The data is safe; {clusters} ({}) of space are lost until a repair.",
            size(bytes)
        )
    } else {
        format!(
            "The data is safe; {clusters} ({}) seem to be lost space, but references may be hidden.",
            size(bytes)
        )
    }
}

fn counts(audited: &Audited) -> String {
    let counts = &audited.report.counts;
    let (allocated, total) = (counts.allocated_clusters, counts.total_clusters);
    format!(
        "{allocated}/{total} = {} allocated, {} fragmented, {} compressed; image ends at {:#x}; checked in {:.2} s",
        percent(allocated, total),
        percent(counts.fragmented_clusters, allocated),
        percent(counts.compressed_clusters, allocated),
        counts.image_end_offset,
        audited.elapsed.as_secs_f64(),
    )
}

/// Everything of one code.
struct Group {
    head: Vec<String>,
    places: Vec<String>,
    repair: Vec<String>,
    /// Findings, counted with their multiplicity.
    total: u64,
    /// Those that the first so many places stand for.
    covered: Vec<u64>,
    /// How much of it is shown.
    show_head: bool,
    show_places: usize,
    show_repair: bool,
}

/// Adds the findings, as much of them as there is room for, and says what was left out.
fn findings(report: &Report, extent: Extent, look: Look, lines: &mut Vec<String>) {
    // Beside them there is an empty line, and one for what is left out.
    let room = extent
        .lines
        .map_or(usize::MAX, |max| max.saturating_sub(lines.len() + 2));
    let mut codes: Vec<(Code, u64)> = report.totals.clone();
    codes.sort_by_key(|(code, _)| std::cmp::Reverse(code.severity()));
    let mut groups: Vec<Group> = codes
        .iter()
        .map(|code| group(report, *code, extent, look))
        .collect();
    if !groups.is_empty() {
        lines.push(String::new());
    }
    let heads: usize = groups.iter().map(|group| group.head.len()).sum();
    if heads > room {
        for group in &mut groups {
            if group.head.len() > 1 {
                group.head.truncate(1);
                if let Some(line) = group.head.last_mut() {
                    line.push_str(" …");
                }
            }
        }
    }
    let mut left = room;
    let mut take = |n: usize| {
        let fits = n <= left;
        if fits {
            left -= n;
        }
        fits
    };
    for group in &mut groups {
        group.show_head = take(group.head.len());
    }
    for round in 0..extent.places.max(1) {
        for group in groups.iter_mut().filter(|group| group.show_head) {
            if group.places.len() > round && group.show_places == round && take(1) {
                group.show_places += 1;
            }
        }
        if round == 0 {
            for group in groups.iter_mut().filter(|group| group.show_head) {
                group.show_repair = take(group.repair.len());
            }
        }
        // Rounds without anything to show are many when all is asked for.
        if groups.iter().all(|group| group.places.len() <= round + 1) {
            break;
        }
    }
    let mut hidden = 0_u64;
    let mut hidden_kinds = 0_u64;
    for group in groups {
        if !group.show_head {
            hidden_kinds += 1;
            hidden = hidden.saturating_add(group.total);
            continue;
        }
        lines.extend(group.head);
        let shown = group
            .covered
            .iter()
            .take(group.show_places)
            .fold(0, |sum: u64, count| sum.saturating_add(*count));
        hidden = hidden.saturating_add(group.total.saturating_sub(shown));
        lines.extend(group.places.into_iter().take(group.show_places));
        if group.show_repair {
            lines.extend(group.repair);
        }
    }
    if hidden > 0 {
        let kinds = match hidden_kinds {
            0 => String::new(),
            n => format!(", among them {}", plural(n, "more kind")),
        };
        let text = format!(
            "{} not shown{kinds}; --all shows everything, `{} CODE` tells more",
            plural(hidden, "finding"),
            look.typed.explain
        );
        let width = look.width.saturating_sub(2);
        lines.extend(
            wrap(&text, width)
                .iter()
                .map(|line| look.dim(&format!("  {line}"))),
        );
    }
}

fn group(report: &Report, (code, total): (Code, u64), extent: Extent, look: Look) -> Group {
    let severity = code.severity();
    let times = match total {
        1 => String::new(),
        n => format!(" ×{n}"),
    };
    let label = format!("{severity} {code}{times}");
    let colour = match severity {
        Severity::Error | Severity::Corruption => "31",
        Severity::Leak | Severity::Hazard => "33",
        Severity::Note => "36",
    };
    let text = format!("{label}: {}", code.explanation());
    let mut head: Vec<String> = wrap(&text, look.width - 4)
        .into_iter()
        .enumerate()
        .map(|(number, line)| format!("{}{line}", if number == 0 { "  " } else { "    " }))
        .collect();
    if let Some(first) = head.first_mut() {
        // A label is shorter than a line.
        *first = first.replacen(&label, &look.paint(colour, &label), 1);
    }
    let mut covered = Vec::new();
    let mut shown = Vec::new();
    for finding in report
        .findings
        .iter()
        .filter(|finding| finding.code == code)
        .take(extent.places)
    {
        let times = match finding.count {
            1 => String::new(),
            n => format!(" (×{n})"),
        };
        let text = clean(&format!("{}: {}{times}", finding.place, finding.detail));
        let text = if extent.lines.is_some() {
            cut(&text, look.width.saturating_sub(6))
        } else {
            text
        };
        shown.push(format!("    - {text}"));
        covered.push(finding.count);
    }
    let repair = if severity == Severity::Note || code.repair() == "None needed." {
        Vec::new()
    } else {
        wrap(&format!("repair: {}", code.repair()), look.width - 4)
            .into_iter()
            .map(|line| look.dim(&format!("    {line}")))
            .collect()
    };
    Group {
        head,
        places: shown,
        repair,
        total,
        covered,
        show_head: false,
        show_places: 0,
        show_repair: false,
    }
}
