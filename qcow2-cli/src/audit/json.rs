//! The report for programs: one JSON object an image, described in `docs/json.md`.

use std::io;

use qcow2_check::{Counts, Finding, Severity, Verdict};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::ser::Formatter;

use super::audited::{Audited, Below, Reading};
use super::facts::Facts;

/// Everything that is known of an image.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Image<'a> {
    filename: String,
    format: &'static str,
    #[serde(flatten)]
    counts: Counts,
    verdict: Verdict,
    exit_code: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    qemu_verdict: Option<Verdict>,
    complete: bool,
    cancelled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    beyond_qemu: Beyond,
    hazards: u64,
    totals: Totals<'a>,
    findings: &'a [Finding],
    findings_omitted: u64,
    bytes_read: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    decoded: Option<u64>,
    #[serde(rename = "image", skip_serializing_if = "Option::is_none")]
    facts: Option<&'a Facts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    online: Option<Reading>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chain: Option<&'a Below>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Beyond {
    check_errors: u64,
    corruptions: u64,
    leaks: u64,
}

/// How many findings there are of each code, in the order of the catalogue.
struct Totals<'a>(&'a [(qcow2_check::Code, u64)]);

impl Serialize for Totals<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (code, total) in self.0 {
            map.serialize_entry(code.id(), total)?;
        }
        map.end()
    }
}

/// The object of an image, without a line end.
pub(crate) fn object(audited: &Audited, deny_hazards: bool) -> serde_json::Result<String> {
    let report = &audited.report;
    let kept = report
        .findings
        .iter()
        .fold(0, |sum: u64, finding| sum.saturating_add(finding.count));
    let all = report
        .totals
        .iter()
        .fold(0, |sum: u64, (_, total)| sum.saturating_add(*total));
    to_ascii(&Image {
        filename: audited.name.to_string_lossy().into_owned(),
        format: if audited.is_qcow2 { "qcow2" } else { "unknown" },
        counts: Counts {
            check_errors: report
                .counts
                .check_errors
                .max(audited.error.is_some().into()),
            ..report.counts
        },
        verdict: audited.verdict(),
        exit_code: audited.exit_code(deny_hazards),
        qemu_verdict: audited.error.is_none().then(|| report.qemu_verdict()),
        complete: report.complete && !report.cancelled && audited.error.is_none(),
        cancelled: report.cancelled,
        error: audited.error.as_deref(),
        beyond_qemu: Beyond {
            check_errors: report.beyond_qemu(Severity::Error),
            corruptions: report.beyond_qemu(Severity::Corruption),
            leaks: report.beyond_qemu(Severity::Leak),
        },
        hazards: report.total_of(Severity::Hazard),
        totals: Totals(&report.totals),
        findings: &report.findings,
        findings_omitted: all.saturating_sub(kept),
        bytes_read: report.bytes_read,
        decoded: report.decoded,
        facts: audited.facts.as_ref(),
        online: audited.reading,
        chain: audited.below.as_ref(),
    })
}

/// JSON on one line without any byte that a terminal could take for a command: all but printable ASCII is escaped.
pub(crate) fn to_ascii(value: &impl Serialize) -> serde_json::Result<String> {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, Ascii);
    value.serialize(&mut serializer)?;
    // Nothing but ASCII is in it.
    Ok(String::from_utf8_lossy(&out).into_owned())
}

struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for c in fragment.chars() {
            if c == ' ' || c.is_ascii_graphic() {
                write!(writer, "{c}")?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_printable_ascii_and_mean_the_same() {
        let hostile = "\x1b[0m\u{9b}\u{7f}\u{202e}é𝄞\"\\\n";
        let json = to_ascii(&hostile).unwrap();
        assert!(json.bytes().all(|b| b == b' ' || b.is_ascii_graphic()));
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), hostile);
    }
}
