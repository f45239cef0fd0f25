//! What a code means, and the table of all of them.

use std::fmt::Write as _;

use anyhow::{Result, bail};
use qcow2_check::Code;

use super::text::{Look, clean, wrap};

/// Codes that an unknown one could have meant, at most.
const SUGGESTIONS: usize = 12;

/// The catalogue entry of one code.
///
/// # Errors
///
/// There is no such code; the message names some that are close.
pub(crate) fn one(id: &str, look: Look) -> Result<String> {
    let Some(code) = Code::from_id(id) else {
        let close = close_to(id);
        if close.is_empty() {
            bail!(
                "there is no code {}; `{} list` names all",
                clean(id),
                look.typed.explain
            );
        }
        let ids: Vec<&str> = close.iter().map(|code| code.id()).collect();
        bail!(
            "there is no code {}; close are {}",
            clean(id),
            ids.join(", ")
        );
    };
    let mut out = format!("{} ({})\n", look.bold(code.id()), code.severity());
    for line in wrap(code.explanation(), look.width - 2) {
        _ = writeln!(out, "  {line}");
    }
    for line in wrap(&format!("Repair: {}", code.repair()), look.width - 2) {
        _ = writeln!(out, "  {line}");
    }
    let qemu = if code.counted_by_qemu() {
        "qemu-img check counts it, too."
    } else {
        "qemu-img check does not count it."
    };
    _ = writeln!(out, "  {qemu}");
    Ok(out)
}

/// All codes, a line each.
pub(crate) fn list(look: Look) -> String {
    let mut out = String::new();
    for code in Code::ALL {
        let text = format!("{:<25} {:<10} ", code.id(), code.severity());
        let width = look.width.saturating_sub(text.len());
        for (number, line) in wrap(code.explanation(), width).iter().enumerate() {
            let label = if number == 0 { text.as_str() } else { "" };
            _ = writeln!(out, "{label:<37}{line}");
        }
    }
    out
}

/// All codes as JSON, a line each.
pub(crate) fn list_json() -> Result<String> {
    let mut out = String::new();
    for code in Code::ALL {
        out.push_str(&json(*code)?);
    }
    Ok(out)
}

/// One code as JSON.
pub(crate) fn json(code: Code) -> Result<String> {
    let entry = serde_json::json!({
        "code": code.id(),
        "severity": code.severity(),
        "counted-by-qemu": code.counted_by_qemu(),
        "explanation": code.explanation(),
        "repair": code.repair(),
    });
    Ok(super::json::to_ascii(&entry)? + "\n")
}

/// `docs/findings.md`.
pub(crate) fn markdown() -> String {
    let mut out = String::from(
        "# Findings\n\n\
         What `qcow2 audit` can say about an image, as `cargo xtask check-image` in this workspace. A code is stable: it is never renamed and never used for something else.\n\n\
         `qcow2 explain --markdown` prints this page; a test compares the two.\n\n\
         | severity | what it means | exit code |\n\
         |---|---|---|\n\
         | error | something could not be checked | 1 |\n\
         | corruption | data is lost, unreachable or in danger | 2 |\n\
         | leak | space that nothing uses; harmless | 3 |\n\
         | hazard | the image is consistent, but opening or using it may harm who does | 0, or 2 with `--deny-hazards` |\n\
         | note | worth knowing, nothing is wrong | 0 |\n\n\
         | code | severity | counted by qemu-img check | meaning | repair |\n\
         |---|---|---|---|---|\n",
    );
    for code in Code::ALL {
        let qemu = if code.counted_by_qemu() { "yes" } else { "no" };
        let cell = |text: &str| text.replace('|', "\\|");
        _ = writeln!(
            out,
            "| {} | {} | {qemu} | {} | {} |",
            code.id(),
            code.severity(),
            cell(code.explanation()),
            cell(code.repair())
        );
    }
    out
}

/// Codes that share a word with an id, or are few letters away; the closest first.
fn close_to(id: &str) -> Vec<Code> {
    let id = id.to_ascii_uppercase();
    let mut ranked: Vec<(usize, Code)> = Code::ALL
        .iter()
        .map(|code| {
            let letters = distance(&id, code.id());
            let contains = !id.is_empty() && code.id().contains(&id);
            (if contains { 0 } else { letters }, *code)
        })
        .filter(|(letters, code)| *letters <= code.id().len() / 3)
        .collect();
    ranked.sort();
    ranked.truncate(SUGGESTIONS);
    ranked.into_iter().map(|(_, code)| code).collect()
}

/// How many letters must be put in, left out or replaced to make one of the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut next = vec![i + 1];
        for ((y, pair), left) in b.bytes().zip(row.windows(2)).zip(0_usize..) {
            let (Some(diagonal), Some(above), Some(before)) =
                (pair.first(), pair.last(), next.get(left))
            else {
                break;
            };
            let best = (diagonal + usize::from(x != y))
                .min(above + 1)
                .min(before + 1);
            next.push(best);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_code_leads_to_the_right_one() {
        assert_eq!(close_to("L2-UNALIGEND").first(), Some(&Code::L2Unaligned));
        assert!(close_to("backing").contains(&Code::BackingLoop));
        assert_eq!(close_to("nothing-of-the-kind-at-all"), []);
    }

    #[test]
    fn distances_are_those_of_levenshtein() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
    }
}
