//! Making a program that fails as small as it can be.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};

use super::action::Program;
use super::failure::Failure;
use super::shape::{CacheSize, Encryption, Layer, Origin, Shape, Step};
use crate::create::Preallocation;

thread_local! {
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps panics from being printed, for good: [`catch`] then tells them with their place.
pub fn silence_panics() {
    set_hook(Box::new(|panic| {
        LAST_PANIC.with(|last| *last.borrow_mut() = Some(panic.to_string()));
    }));
}

/// Runs `run`; a panic is a failure like others.
///
/// # Errors
///
/// As `run`, or the words of the panic.
pub fn catch<T>(run: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let place = LAST_PANIC.with(RefCell::take);
        let words = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        let told = place.or(words).unwrap_or_else(|| "panic".to_owned());
        Err(Failure::new(told))
    })
}

/// Leaves out all that a program needs not to fail: actions, then what the image held before. At most `tries` runs.
pub fn shrink(program: &Program, tries: usize, fails: impl Fn(&Program) -> bool) -> Program {
    let mut best = program.clone();
    let mut left = tries;
    let mut attempt = |candidate: Program, best: &mut Program| {
        if left == 0 {
            return false;
        }
        left -= 1;
        let smaller = fails(&candidate);
        if smaller {
            *best = candidate;
        }
        smaller
    };
    let mut chunk = best.actions.len().max(1).next_power_of_two();
    while chunk > 0 {
        let mut start = 0;
        while start < best.actions.len() {
            let mut candidate = best.clone();
            let end = (start + chunk).min(candidate.actions.len());
            candidate.actions.drain(start..end);
            if !attempt(candidate, &mut best) {
                start += chunk;
            }
        }
        chunk /= 2;
    }
    for simpler in [
        |shape: &mut Shape| shape.preallocation = Preallocation::Off,
        |shape: &mut Shape| shape.tuning.cache = CacheSize::Default,
        |shape: &mut Shape| shape.tuning.lazy_refcounts = None,
        |shape: &mut Shape| shape.tuning.discard_no_unref = false,
        |shape: &mut Shape| shape.format.lazy_refcounts = false,
        |shape: &mut Shape| shape.encryption = Encryption::None,
        |shape: &mut Shape| shape.backing.clear(),
        |shape: &mut Shape| shape.backing.truncate(1),
    ] {
        let mut candidate = best.clone();
        simpler(&mut candidate.shape);
        attempt(candidate, &mut best);
    }
    for list in 0..=best.shape.backing.len() {
        let mut index = 0;
        loop {
            let mut candidate = best.clone();
            let Some(steps) = steps(&mut candidate.shape, list) else {
                break;
            };
            if index >= steps.len() {
                break;
            }
            steps.remove(index);
            if !attempt(candidate, &mut best) {
                index += 1;
            }
        }
    }
    best
}

/// What was done to the image (0) or to one of the layers below it.
fn steps(shape: &mut Shape, list: usize) -> Option<&mut Vec<Step>> {
    if list == 0 {
        return match &mut shape.origin {
            Origin::Written(steps) | Origin::Qemu(steps) => Some(steps),
            Origin::Engine => None,
        };
    }
    match shape.backing.get_mut(list - 1) {
        Some(Layer::Qcow2 { steps, .. }) => Some(steps),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::action::Action;
    use super::super::shape::Scale;
    use super::*;

    #[test]
    fn only_what_is_needed_stays() {
        let mut program = Program::random(3, Scale::Small, false);
        program.actions = vec![Action::Flush; 20];
        program.actions[7] = Action::Reopen;
        let needs = |program: &Program| program.actions.contains(&Action::Reopen);
        let small = shrink(&program, 1000, needs);
        assert_eq!(small.actions, [Action::Reopen]);
    }
}
