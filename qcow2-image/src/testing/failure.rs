//! Why a run is not what it should be.

use std::fmt;

/// What went wrong, in words for whoever debugs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    what: String,
}

impl Failure {
    /// A failure in these words.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into() }
    }

    /// The failure of an operation that must not fail.
    pub fn of(what: &str, error: &dyn std::error::Error) -> Self {
        let mut text = format!("{what}: {error}");
        let mut source = error.source();
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        Self { what: text }
    }

    /// The failure, with where it happened in front.
    #[must_use]
    pub fn during(self, place: impl fmt::Display) -> Self {
        Self {
            what: format!("{place}: {}", self.what),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// Makes errors failures.
pub(super) trait OrFail<T> {
    /// The value, or a failure that says what was tried.
    fn or_fail(self, what: &str) -> Result<T, Failure>;
}

impl<T, E: std::error::Error> OrFail<T> for Result<T, E> {
    fn or_fail(self, what: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure::of(what, &error))
    }
}
