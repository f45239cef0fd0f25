//! The outcome on the screen.

use super::Outcome;

/// The heading of the columns, as wide as [`row`] makes them.
pub(super) fn heading() -> String {
    format!(
        "{:<20} {:>10} {:>10} {:<12} {:>22}  {}",
        "row", "ours", "rival's", "rival", "ratio", "middle half"
    )
}

/// One row: medians, and the ratio with what is expected of it.
pub(super) fn row(outcome: &Outcome) -> String {
    let mark = match outcome.is_kept {
        Some(true) => "ok",
        Some(false) => "MISSED",
        None => "",
    };
    let goal = outcome.goal.to_string();
    let goal = if goal.is_empty() {
        goal
    } else {
        format!("({goal})")
    };
    let Some((ratio, rival)) = outcome.ratio.zip(outcome.rival_median) else {
        let took = format!("{:.2} ms", outcome.ours_median);
        let judged = format!("{goal} {mark}");
        return format!("{:<20} {took:>10} {:>46}", outcome.name, judged.trim());
    };
    let (low, high) = outcome.samples.middle_half();
    let judged = format!("{} {goal} {mark}", times(ratio));
    format!(
        "{:<20} {:>10} {:>10} {:<12} {:>22}  {}..{}",
        outcome.name,
        rate(outcome.ours_median),
        rate(rival),
        outcome.rival.unwrap_or_default(),
        judged.trim(),
        times(low),
        times(high)
    )
}

/// A ratio with as many digits as matter.
fn times(ratio: f64) -> String {
    if ratio < 2.0 {
        format!("{ratio:.3}")
    } else {
        format!("{ratio:.1}")
    }
}

/// Requests per second.
fn rate(per_second: f64) -> String {
    if per_second < 1e6 {
        format!("{:.1} k/s", per_second / 1e3)
    } else {
        format!("{:.3} M/s", per_second / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_matter() {
        assert_eq!(times(0.9516), "0.952");
        assert_eq!(times(8.26), "8.3");
        assert_eq!(rate(29_870.0), "29.9 k/s");
        assert_eq!(rate(1_234_567.0), "1.235 M/s");
    }
}
