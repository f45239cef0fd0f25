//! Which requests a scripted wrapper means.

use std::ops::Range;

use crate::Operation;

/// Requests of one operation, perhaps only those that touch a range, perhaps only from the nth on.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    operation: Operation,
    within: Option<Range<u64>>,
    /// Matching requests to let pass first.
    skip: u64,
}

impl Selection {
    pub(crate) fn of(operation: Operation) -> Self {
        Self {
            operation,
            within: None,
            skip: 0,
        }
    }

    /// Only requests that touch a byte of `range`; those without a place never do.
    pub(crate) fn within(&mut self, range: Range<u64>) {
        self.within = Some(range);
    }

    /// Only the `nth` matching request, counted from 1, and those after it.
    pub(crate) fn nth(&mut self, nth: u64) {
        self.skip = nth.saturating_sub(1);
    }

    /// Whether it means this request; counts it if it matches.
    pub(crate) fn picks(&mut self, operation: Operation, place: Option<&Range<u64>>) -> bool {
        let matches = self.operation == operation
            && match (&self.within, place) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(within), Some(place)) => place.start < within.end && within.start < place.end,
            };
        if matches && self.skip > 0 {
            self.skip = self.skip.saturating_sub(1);
            return false;
        }
        matches
    }
}

/// The bytes of a request.
pub(crate) fn place(offset: u64, len: u64) -> Range<u64> {
    offset..offset.saturating_add(len)
}
