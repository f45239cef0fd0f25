//! The outcome on the screen.

use super::Outcome;
use crate::bench::table::seconds;

/// The heading of the columns, as wide as [`row`] makes them.
pub(super) fn heading() -> String {
    format!(
        "{:<18} {:>10} {:>10} {:>10} {:>20}",
        "operation", "rival", "its time", "ours", "ratio"
    )
}

/// One row: medians, and the ratio with what is expected of it.
pub(super) fn row(outcome: &Outcome) -> String {
    let mark = if outcome.keeps_goal { "ok" } else { "MISSED" };
    let ratio = format!("{:.2} (>={}) {mark}", outcome.ratio, outcome.goal);
    format!(
        "{:<18} {:>10} {:>10} {:>10} {ratio:>20}",
        outcome.name,
        outcome.rival,
        seconds(outcome.rival_median),
        seconds(outcome.ours_median),
    )
}
