//! A check beside a writer: what several passes agree on.
//!
//! A pass that runs while the image changes sees half of a change here and there. What is really wrong stays, so only what
//! the last passes have in common is told. A writer that keeps changes in memory for long can still show what it has
//! not written as a finding.

use std::collections::{BTreeMap, HashMap};

use qcow2_check::{Code, Finding, Place, Report, Severity};

use super::audited::Reading;

/// Passes after which the image is taken as it is.
pub(crate) const MAX_PASSES: usize = 8;
/// The last passes that must agree on a finding where no two have agreed on everything.
const AGREEING: usize = 3;

/// Whether two passes found the same. The order of findings follows from the image alone.
pub(crate) fn agree(a: &Report, b: &Report) -> bool {
    a.totals == b.totals && a.fatal == b.fatal && a.findings == b.findings
}

/// What the passes say together, oldest first; the last one's facts and counts, without what did not last.
pub(crate) fn settle(mut passes: Vec<Report>) -> (Report, Reading) {
    let count = passes.len();
    let last = passes.pop().unwrap_or_default();
    let settled = passes.last().is_some_and(|before| agree(before, &last));
    let others = if settled { 1 } else { AGREEING - 1 };
    let earlier = passes.split_off(passes.len().saturating_sub(others));
    let report = earlier.iter().fold(last, common);
    let stable = |code| report.total(code);
    let transient = passes
        .iter()
        .chain(&earlier)
        .map(|pass| {
            pass.totals.iter().fold(0, |sum: u64, (code, total)| {
                sum.saturating_add(total.saturating_sub(stable(*code)))
            })
        })
        .max()
        .unwrap_or(0);
    let reading = Reading {
        passes: count,
        settled,
        transient,
    };
    (report, reading)
}

/// The later report without the findings that the earlier one lacks.
fn common(mut later: Report, earlier: &Report) -> Report {
    let mut known: BTreeMap<(Code, &Place), Vec<&Finding>> = BTreeMap::new();
    for finding in &earlier.findings {
        let key = (finding.code, &finding.place);
        known.entry(key).or_default().push(finding);
    }
    let complete = kept_whole(earlier);
    later.findings.retain(|finding| {
        // Of a kind of which not all were kept, a place alone proves nothing.
        !complete(finding.code)
            || known
                .get(&(finding.code, &finding.place))
                .is_some_and(|findings| findings.contains(&finding))
    });
    let mut lost = [0_u64; 3];
    let mut totals = Vec::new();
    for (code, total) in std::mem::take(&mut later.totals) {
        let kept = later
            .findings
            .iter()
            .filter(|finding| finding.code == code)
            .fold(0, |sum: u64, finding| sum.saturating_add(finding.count));
        let stays = if complete(code) {
            kept.min(total)
        } else {
            total.min(earlier.total(code)).max(kept)
        };
        if code.counted_by_qemu() {
            let of = match code.severity() {
                Severity::Error => Some(0),
                Severity::Corruption => Some(1),
                Severity::Leak => Some(2),
                _ => None,
            };
            if let Some(sum) = of.and_then(|index| lost.get_mut(index)) {
                *sum = sum.saturating_add(total - stays.min(total));
            }
        }
        if stays > 0 {
            totals.push((code, stays));
        }
    }
    later.totals = totals;
    let [errors, corruptions, leaks] = lost;
    let counts = &mut later.counts;
    counts.check_errors = counts.check_errors.saturating_sub(errors);
    counts.corruptions = counts.corruptions.saturating_sub(corruptions);
    counts.leaks = counts.leaks.saturating_sub(leaks);
    later.fatal &= earlier.fatal;
    later.complete |= earlier.complete;
    later
}

/// Tells of which codes a report has kept every finding.
fn kept_whole(report: &Report) -> impl Fn(Code) -> bool {
    let mut kept: HashMap<Code, u64> = HashMap::new();
    for finding in &report.findings {
        let sum = kept.entry(finding.code).or_default();
        *sum = sum.saturating_add(finding.count);
    }
    let totals: HashMap<Code, u64> = report.totals.iter().copied().collect();
    move |code| kept.get(&code) == totals.get(&code)
}

#[cfg(test)]
mod tests {
    use qcow2_check::{Structure, Verdict};

    use super::*;

    fn pass(findings: &[(Code, u64)]) -> Report {
        let mut report = Report {
            complete: true,
            ..Report::default()
        };
        for (code, at) in findings {
            let place = Place::of(Structure::Data).at(*at, 512);
            report.findings.push(Finding::new(*code, place, "test"));
            match report.totals.iter_mut().find(|(known, _)| known == code) {
                Some((_, total)) => *total += 1,
                None => report.totals.push((*code, 1)),
            }
            match code.severity() {
                Severity::Leak => report.counts.leaks += 1,
                Severity::Corruption => report.counts.corruptions += 1,
                _ => {}
            }
        }
        report.totals.sort();
        report
    }

    #[test]
    fn what_two_passes_agree_on_is_told_and_the_rest_is_counted() {
        let torn = pass(&[(Code::Leak, 512), (Code::RefcountLow, 1024)]);
        let rest = pass(&[(Code::Leak, 512)]);
        let (report, reading) = settle(vec![torn, rest.clone(), rest]);
        assert_eq!(report.totals, [(Code::Leak, 1)]);
        assert_eq!(report.verdict(), Verdict::Leaks);
        assert!(reading.settled);
        assert_eq!((reading.passes, reading.transient), (3, 1));
    }

    #[test]
    fn an_image_that_never_rests_shows_only_what_the_last_passes_share() {
        let passes = vec![
            pass(&[(Code::RefcountLow, 0)]),
            pass(&[(Code::RefcountLow, 512), (Code::Leak, 4096)]),
            pass(&[(Code::RefcountLow, 1024), (Code::Leak, 4096)]),
            pass(&[(Code::RefcountLow, 1536), (Code::Leak, 4096)]),
        ];
        let (report, reading) = settle(passes);
        assert!(!reading.settled);
        assert_eq!(report.totals, [(Code::Leak, 1)]);
        assert_eq!(report.counts.corruptions, 0);
        assert_eq!(report.counts.leaks, 1);
        assert_eq!(reading.transient, 1);
    }

    #[test]
    fn a_single_pass_is_told_as_it_is() {
        let (report, reading) = settle(vec![pass(&[(Code::Leak, 0)])]);
        assert_eq!(report.counts.leaks, 1);
        assert!(!reading.settled);
        assert_eq!(reading.transient, 0);
    }
}
