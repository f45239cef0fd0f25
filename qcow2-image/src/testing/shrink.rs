//! Making a program that fails as small as it can be.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::action::Program;
use super::failure::Failure;
use super::shape::Origin;

/// Runs `run`; a panic is a failure like others.
///
/// # Errors
///
/// As `run`, or the words of the panic.
pub fn catch<T>(run: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let words = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no words");
        Err(Failure::new(format!("panic: {words}")))
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
    let mut index = 0;
    loop {
        let mut candidate = best.clone();
        let (Origin::Written(steps) | Origin::Qemu(steps)) = &mut candidate.shape.origin else {
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
    best
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
