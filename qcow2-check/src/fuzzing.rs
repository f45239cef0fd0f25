//! What the fuzz targets call, beside the code so that a plain test can replay their inputs.

use std::ops::ControlFlow;

use qcow2_format::HostOffset;
use qcow2_io::{Memory, Storage};

use crate::{Options, Report, Severity, audit, owners, recount};

/// Audits arbitrary bytes as an image. The last eight bytes say how much longer than its content the file is and which
/// cluster's owners to name, so that far references can lie inside the file, too.
///
/// # Panics
///
/// If the report depends on the number of threads, keeps more than it may, or a recount contradicts it.
pub fn image(data: &[u8]) {
    let Some((content, head)) = data.split_last_chunk::<8>() else {
        return;
    };
    let [shift, factor, rest @ ..] = *head;
    let storage = Memory::from(content.to_vec());
    let longer = u64::from(factor) << (shift % 40);
    if storage
        .set_len((content.len() as u64).saturating_add(longer))
        .is_err()
    {
        return;
    }
    let one = Options {
        threads: 1,
        max_findings: 5,
        deep: true,
        ..Options::default()
    };
    let report = audit(&storage, &one);
    for (code, total) in &report.totals {
        let kept: Vec<u64> = report
            .findings
            .iter()
            .filter(|finding| finding.code == *code)
            .map(|finding| finding.count)
            .collect();
        assert!(kept.len() <= 5, "{code} is kept too often");
        assert!(kept.into_iter().fold(0, u64::saturating_add) <= *total);
    }
    if report.verdict() == crate::Verdict::Sound {
        assert_eq!(report.total_of(Severity::Corruption), 0);
    }
    let offset = rest
        .iter()
        .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    if let Ok(found) = owners(&storage, HostOffset::new(offset), &one) {
        assert!(found.owners.len() <= 64);
    }
    let sum = content
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    // What takes as long again as most inputs, some inputs do.
    if sum % 4 == 0 {
        recounted(&storage, &one, &report);
    }
    // So it is with starting threads. Where a check is cut off depends on them.
    if sum % 16 == 0 && report.total(crate::Code::CheckLimited) == 0 {
        let again = audit(&storage, &Options { threads: 2, ..one });
        assert_eq!(report.counts, again.counts, "counts depend on threads");
        assert_eq!(report.totals, again.totals, "totals depend on threads");
        assert_eq!(
            report.findings, again.findings,
            "findings depend on threads"
        );
    }
}

/// Recounts the references of an image that `report` tells of.
fn recounted(storage: &Memory, options: &Options<'_>, report: &Report) {
    let Ok(count) = recount(storage, options) else {
        assert!(report.total_of(Severity::Error) > 0);
        return;
    };
    assert_eq!(count.is_complete(), report.complete);
    let mut last = None;
    let mut calls = 0;
    let refcounts = count.refcount_differences(|difference| {
        assert_ne!(difference.found, difference.expected);
        assert!(last < Some(difference.cluster), "clusters out of order");
        last = Some(difference.cluster);
        calls += 1;
        if calls < 1000 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    assert!(refcounts.is_ok(), "memory can be read");
    let mut flags = 0;
    let flags = count.copied_differences(|_| {
        flags += 1;
        if flags < 1000 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    assert!(flags.is_ok(), "memory can be read");
}
