//! The outcome of a benchmark on the screen.

use super::check::Outcome;

const MIB: f64 = 1_048_576.0;

/// The heading of the columns, as wide as [`row`] makes them.
pub(super) fn heading() -> String {
    format!(
        "{:<20} {:>10} {:>10} {:>22} {:>10} {:>22} {:>27}",
        "image", "qemu-img", "ours", "ratio", "read", "ours/read", "memory"
    )
}

/// One case: medians, and every ratio with what is expected of it.
pub(super) fn row(outcome: &Outcome) -> String {
    let judged = |value: String, is_kept: bool| {
        let mark = if is_kept { "ok" } else { "MISSED" };
        format!("{value} {mark}")
    };
    // A run that was broken off proves a part of the ratio only.
    let at_least = if outcome.qemu_timed_out { ">" } else { "" };
    let ratio = format!(
        "{at_least}{:.1} (>={:.0})",
        outcome.ratio, outcome.budget.faster_than_qemu
    );
    let ratio = if outcome.qemu_timed_out && !outcome.keeps_ratio() {
        format!("{ratio} unknown")
    } else {
        judged(ratio, outcome.keeps_ratio())
    };
    let reading = match outcome.budget.times_reading {
        Some(most) => judged(
            format!("{:.2} (<={most})", outcome.times_reading),
            outcome.keeps_reading(),
        ),
        None => format!("{:.2}", outcome.times_reading),
    };
    let memory = judged(
        format!(
            "{} (<={} MiB)",
            mib(outcome.peak_bytes),
            mib(outcome.peak_budget_bytes)
        ),
        outcome.keeps_memory(),
    );
    format!(
        "{:<20} {:>10} {:>10} {ratio:>22} {:>10} {reading:>22} {memory:>27}",
        outcome.name,
        format!("{at_least}{}", seconds(outcome.qemu_median)),
        seconds(outcome.ours_median),
        seconds(outcome.read_median),
    )
}

/// A duration with three digits that count.
pub(super) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 0.1 => format!("{:.2} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 100.0 => format!("{s:.2} s"),
        s => format!("{s:.0} s"),
    }
}

fn mib(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
    let mib = bytes as f64 / MIB;
    format!("{mib:.1}")
}
