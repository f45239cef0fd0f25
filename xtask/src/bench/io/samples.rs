//! Two sides that take turns.

use anyhow::Result;
use serde::Serialize;

use crate::bench::measure::median;

/// What was measured, turn by turn.
#[derive(Debug, Default, Serialize)]
pub(super) struct Samples {
    /// Requests per second, or milliseconds where there is no rival.
    pub(super) ours: Vec<f64>,
    /// Requests per second.
    #[serde(rename = "rivals")]
    pub(super) rival: Vec<f64>,
}

impl Samples {
    /// How fast we were, in rivals, in each turn: what disturbs the machine for longer than a turn disturbs both.
    pub(super) fn ratios(&self) -> Vec<f64> {
        let pairs = self.ours.iter().zip(&self.rival);
        pairs.map(|(ours, rival)| ours / rival).collect()
    }

    /// The middle half of the ratios.
    pub(super) fn middle_half(&self) -> (f64, f64) {
        let mut ratios = self.ratios();
        ratios.sort_by(f64::total_cmp);
        let half = ratios.len().div_ceil(2);
        let low = ratios.get(..half).unwrap_or_default();
        let high = ratios
            .get(ratios.len().saturating_sub(half)..)
            .unwrap_or_default();
        (median(low), median(high))
    }
}

/// Measures both sides as often as `turns` says; who begins alternates. Both are told which turn it is.
pub(super) fn in_turn(
    turns: u32,
    mut ours: impl FnMut(u32) -> Result<f64>,
    mut rival: impl FnMut(u32) -> Result<f64>,
) -> Result<Samples> {
    let mut samples = Samples::default();
    for turn in 0..turns {
        if turn % 2 == 0 {
            samples.ours.push(ours(turn)?);
            samples.rival.push(rival(turn)?);
        } else {
            samples.rival.push(rival(turn)?);
            samples.ours.push(ours(turn)?);
        }
    }
    Ok(samples)
}

/// As [`in_turn`], after a turn that does not count.
pub(super) fn warm_in_turn(
    turns: u32,
    mut ours: impl FnMut(u32) -> Result<f64>,
    mut rival: impl FnMut(u32) -> Result<f64>,
) -> Result<Samples> {
    ours(turns)?;
    rival(turns)?;
    in_turn(turns, ours, rival)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_those_of_each_turn() {
        let samples = in_turn(
            4,
            |turn| Ok(f64::from(turn + 1) * 2.0),
            |turn| Ok(f64::from(turn + 1)),
        )
        .unwrap();
        assert_eq!(samples.ratios(), [2.0; 4]);
    }

    #[test]
    fn who_begins_alternates_and_the_first_turn_only_warms() {
        let calls = std::cell::RefCell::new(Vec::new());
        let call = |side: &'static str| {
            let calls = &calls;
            move |turn| {
                calls.borrow_mut().push((side, turn));
                Ok(1.0)
            }
        };
        let samples = warm_in_turn(2, call("ours"), call("rival")).unwrap();
        assert_eq!((samples.ours.len(), samples.rival.len()), (2, 2));
        let order = [
            ("ours", 2),
            ("rival", 2),
            ("ours", 0),
            ("rival", 0),
            ("rival", 1),
            ("ours", 1),
        ];
        assert_eq!(*calls.borrow(), order);
    }

    #[test]
    fn the_middle_half_lies_between_the_quartiles() {
        let samples = Samples {
            ours: vec![9.0, 1.0, 3.0, 2.0, 4.0],
            rival: vec![1.0; 5],
        };
        let (low, high) = samples.middle_half();
        assert!((low - 2.0).abs() < 1e-9 && (high - 4.0).abs() < 1e-9);
        assert_eq!(Samples::default().middle_half(), (0.0, 0.0));
    }
}
