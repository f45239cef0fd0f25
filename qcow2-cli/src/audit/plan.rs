//! The plan of a repair for people.

use std::fmt::Write as _;

use qcow2_check::repair::{Effect, Plan};
use qcow2_check::{Severity, Verdict};

use super::repair::Request;
use super::text::{Look, clean, cut, plural, shown, size, wrap};

/// Actions told one by one unless all are asked for.
const ACTIONS_SHOWN: usize = 40;

/// What the check of the outcome still finds.
pub(super) fn left<'a>(plan: &'a Plan<'_>) -> impl Iterator<Item = &'a qcow2_check::Finding> {
    let findings = plan.after().findings.iter();
    findings.filter(|finding| finding.severity() >= Severity::Leak)
}

fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Sound => "sound",
        Verdict::Leaks => "sound, with leaks",
        Verdict::Corrupt => "corrupt",
        Verdict::Incomplete => "not fully checked",
    }
}

fn colour(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Sound => "1;32",
        Verdict::Leaks => "1;33",
        _ => "1;31",
    }
}

/// The plan for people.
pub(super) fn told(plan: &Plan<'_>, request: &Request<'_>) -> String {
    let look = request.look;
    let mut text = String::new();
    let name = look.bold(&shown(request.image));
    let (before, after) = (plan.before().verdict(), plan.after().verdict());
    if plan.is_empty() {
        let what = if before == Verdict::Sound {
            "nothing is wrong"
        } else {
            "nothing can be done at this level"
        };
        _ = writeln!(
            text,
            "{name}: {}, {what}",
            look.paint(colour(before), verdict_word(before))
        );
        tell_left(plan, look, &mut text);
        tell_key(plan, look, &mut text);
        return text;
    }
    let writes = plan.writes();
    let bytes: u64 = writes.iter().map(|range| range.end - range.start).sum();
    let grown = plan.new_len().saturating_sub(plan.old_len());
    let growth = match grown {
        0 => "the file keeps its length".to_owned(),
        grown => format!("the file grows by {}", size(grown)),
    };
    _ = writeln!(
        text,
        "{name}: {} now, {} after {}",
        look.paint(colour(before), verdict_word(before)),
        look.paint(colour(after), verdict_word(after)),
        plural(plan.actions().len() as u64, "action"),
    );
    _ = writeln!(
        text,
        "  {} written in {}, {growth}",
        size(bytes),
        plural(writes.len() as u64, "place")
    );
    _ = writeln!(text);
    let limit = if request.all {
        usize::MAX
    } else {
        ACTIONS_SHOWN
    };
    for (number, action) in (1..).zip(plan.actions()).take(limit) {
        let times = match action.count {
            1 => String::new(),
            count => format!(" ×{count}"),
        };
        let effect = match action.effect {
            Effect::None => String::new(),
            effect => {
                let colour = match effect {
                    Effect::Lost => "31",
                    Effect::Ambiguous => "33",
                    _ => "32",
                };
                format!(" ({})", look.paint(colour, &effect.to_string()))
            }
        };
        _ = writeln!(
            text,
            "{number:>4}. {}{times}{effect}",
            look.bold(action.kind.id())
        );
        let why = clean(&format!("{}: {}", action.place, action.reason));
        for line in wrap(&why, look.width.saturating_sub(8)) {
            _ = writeln!(text, "      {}", cut(&line, look.width.saturating_sub(6)));
        }
    }
    let hidden = plan.actions().len().saturating_sub(limit);
    if hidden > 0 {
        let line = format!(
            "      {} not shown; --all shows everything",
            plural(hidden as u64, "action")
        );
        _ = writeln!(text, "{}", look.dim(&line));
    }
    _ = writeln!(text);
    _ = writeln!(text, "  Guest data: {}", effects(plan));
    if plan.keeps_orphans() {
        let line = "What lost its references stays allocated, since it may be what was lost.";
        for line in wrap(line, look.width.saturating_sub(2)) {
            _ = writeln!(text, "  {line}");
        }
    }
    tell_left(plan, look, &mut text);
    tell_key(plan, look, &mut text);
    text
}

/// What becomes of guest data, in one line.
fn effects(plan: &Plan<'_>) -> String {
    let count = |effect: Effect| {
        let actions = plan
            .actions()
            .iter()
            .filter(|action| action.effect == effect);
        actions.fold(0_u64, |sum, action| sum.saturating_add(action.count))
    };
    let parts: Vec<String> = [
        (Effect::Reachable, "made reachable"),
        (Effect::Ambiguous, "ambiguous"),
        (Effect::Lost, "lost"),
    ]
    .into_iter()
    .map(|(effect, word)| (count(effect), word))
    .filter(|(count, _)| *count > 0)
    .map(|(count, word)| format!("{} {word}", plural(count, "place")))
    .collect();
    if parts.is_empty() {
        "each byte reads as before".to_owned()
    } else {
        format!("{}; the rest reads as before", parts.join(", "))
    }
}

/// What a passphrase would be good for.
fn tell_key(plan: &Plan<'_>, look: Look, text: &mut String) {
    if plan.wants_key() {
        let line = "Encrypted clusters have to be moved, and that takes the key: --passphrase-file or --passphrase-env gives it.";
        for line in wrap(line, look.width.saturating_sub(2)) {
            _ = writeln!(text, "  {line}");
        }
    }
}

fn tell_left(plan: &Plan<'_>, look: Look, text: &mut String) {
    for (told, finding) in left(plan).take(ACTIONS_SHOWN).enumerate() {
        if told == 0 {
            _ = writeln!(text, "  Left as it is:");
        }
        let line = clean(&finding.to_string());
        _ = writeln!(text, "    - {}", cut(&line, look.width.saturating_sub(6)));
    }
}
