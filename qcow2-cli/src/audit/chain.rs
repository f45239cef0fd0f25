//! Following what an image names: the policy as it is typed, and what became of the names.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use qcow2_check::chain::{Layer, Link, References};
use qcow2_check::{Code, Finding, Report};

use super::audited::{Below, PathName, Target};
use super::text::{quoted, shown};

/// One `--references` as it was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Nothing.
    Deny,
    /// What lies in the directory of the first image, or below.
    SameDirectory,
    /// This file, or what lies in this folder.
    Allow(PathBuf),
    /// Anything.
    All,
}

/// Reads `deny`, `same-directory`, `allow:PATH` or `all`.
///
/// # Errors
///
/// Anything else.
pub fn parse(text: &str) -> Result<Choice, String> {
    match text {
        "deny" => Ok(Choice::Deny),
        "same-directory" => Ok(Choice::SameDirectory),
        "all" => Ok(Choice::All),
        _ => match text.strip_prefix("allow:") {
            Some(path) if !path.is_empty() => Ok(Choice::Allow(path.into())),
            _ => Err("deny, same-directory, allow:PATH or all".into()),
        },
    }
}

/// The policy that all choices make: the same directory if there is none; several `allow` add up.
///
/// # Errors
///
/// Choices that contradict each other.
pub fn references(choices: &[Choice]) -> Result<References> {
    match choices {
        [] | [Choice::SameDirectory] => return Ok(References::SameDirectory),
        [Choice::Deny] => return Ok(References::Deny),
        [Choice::All] => return Ok(References::All),
        _ => {}
    }
    let mut paths = Vec::new();
    for choice in choices {
        let Choice::Allow(path) = choice else {
            bail!("only allow:PATH can be given several times, and not with another policy");
        };
        paths.push(path.clone());
    }
    Ok(References::AllowList(paths))
}

/// What became of the names in a layer.
pub(crate) fn below(layer: &Layer) -> Below {
    Below {
        depth: layer.depth,
        backing: target(&layer.backing),
        data_file: target(&layer.data_file),
    }
}

/// Adds a finding to a report that is done, where its code belongs.
pub(crate) fn add(report: &mut Report, finding: Finding) {
    let place = |code: Code| report.totals.binary_search_by_key(&code, |(code, _)| *code);
    match place(finding.code) {
        Ok(at) => {
            if let Some((_, total)) = report.totals.get_mut(at) {
                *total = total.saturating_add(finding.count);
            }
        }
        Err(at) => report.totals.insert(at, (finding.code, finding.count)),
    }
    report.findings.push(finding);
}

fn target(link: &Link) -> Option<Target> {
    let found = |path: &Path, outcome, note: String| {
        Some(Target {
            path: Some(PathName(path.to_owned())),
            outcome,
            note,
        })
    };
    match link {
        Link::None => None,
        Link::Followed { path, recorded } => {
            let guess = if *recorded {
                ""
            } else {
                "; its format is not recorded, but it starts as qcow2 does"
            };
            found(
                path,
                "followed",
                format!("followed to {}{guess}", shown(path)),
            )
        }
        Link::Present { path, format } => {
            let format = match format {
                Some(format) => format!("format {}", quoted(format)),
                None => "format not recorded, not qcow2, and not guessed".to_owned(),
            };
            let note = format!("{} is there ({format}); not looked into", shown(path));
            found(path, "present", note)
        }
        Link::Missing { path, error } => {
            found(path, "missing", format!("{}: {error}", shown(path)))
        }
        Link::Loop { path, layer } => {
            let note = format!("{} is layer {layer} of this chain: a loop", shown(path));
            found(path, "loop", note)
        }
        Link::Deep { path } => {
            let note = format!("{} lies deeper than chains are followed", shown(path));
            found(path, "deep", note)
        }
        Link::Refused(refusal) => Some(Target {
            path: None,
            outcome: "refused",
            note: format!("not followed: {refusal}; --references says what may be"),
        }),
        _ => Some(Target {
            path: None,
            outcome: "unknown",
            note: "not followed".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use qcow2_check::{Place, Structure};

    use super::*;

    #[test]
    fn policies_are_read_and_only_allowed_paths_add_up() {
        let policy = |texts: &[&str]| {
            let choices: Vec<Choice> = texts.iter().map(|text| parse(text).unwrap()).collect();
            references(&choices).ok()
        };
        assert_eq!(policy(&[]), Some(References::SameDirectory));
        assert_eq!(policy(&["deny"]), Some(References::Deny));
        assert_eq!(policy(&["all"]), Some(References::All));
        assert_eq!(
            policy(&["allow:/a", "allow:b"]),
            Some(References::AllowList(vec!["/a".into(), "b".into()]))
        );
        assert_eq!(policy(&["all", "allow:b"]), None);
        assert_eq!(policy(&["deny", "all"]), None);
        for wrong in ["", "allow", "allow:", "everything"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_added_finding_is_counted_where_its_code_belongs() {
        let mut report = Report {
            totals: vec![(Code::Leak, 2), (Code::HugeDisk, 1)],
            ..Report::default()
        };
        let finding = || {
            let place = Place::of(Structure::Header);
            Finding::new(Code::BackingMissing, place, "test")
        };
        add(&mut report, finding());
        add(&mut report, finding());
        assert_eq!(
            report.totals,
            [
                (Code::Leak, 2),
                (Code::BackingMissing, 2),
                (Code::HugeDisk, 1)
            ]
        );
        assert_eq!(report.findings.len(), 2);
    }
}
