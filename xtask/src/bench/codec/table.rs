//! The outcome on the screen.

use super::{Outcome, Sizes};
use crate::bench::table::seconds;

/// The heading of the columns, as wide as [`row`] makes them.
pub(super) fn heading() -> String {
    format!(
        "{:<16} {:>10} {:>10} {:>5} {:>18}  {}",
        "row", "ours", "qemu-img", "-m", "ratio", "size of the file, ours and QEMU's"
    )
}

/// One row: medians, the ratio and the sizes with what is expected of them.
pub(super) fn row(outcome: &Outcome) -> String {
    let ratio = format!(
        "{:.2} (>={}) {}",
        outcome.ratio,
        outcome.goal,
        mark(outcome.keeps_ratio)
    );
    let size = outcome.sizes.as_ref().map(size).unwrap_or_default();
    format!(
        "{:<16} {:>10} {:>10} {:>5} {ratio:>18}  {size}",
        outcome.name,
        seconds(outcome.ours_median),
        seconds(outcome.rival_median),
        outcome.coroutines,
    )
    .trim_end()
    .to_owned()
}

fn size(sizes: &Sizes) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
    let ratio = sizes.ours as f64 / sizes.rivals as f64;
    format!(
        "{} {} ({:+.2} %) {}",
        sizes.ours,
        sizes.rivals,
        (ratio - 1.0) * 100.0,
        mark(sizes.is_kept())
    )
}

fn mark(is_kept: bool) -> &'static str {
    if is_kept { "ok" } else { "MISSED" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_judged_beside_their_difference() {
        let (ours, rivals) = (99, 100);
        assert_eq!(size(&Sizes { ours, rivals }), "99 100 (-1.00 %) ok");
        assert_eq!(
            size(&Sizes { ours: 101, rivals }),
            "101 100 (+1.00 %) MISSED"
        );
    }
}
