//! What a fuzzing run came to, as read from libFuzzer's output.

use std::fmt::Write as _;
use std::path::PathBuf;

/// One target's run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The target.
    pub(crate) name: &'static str,
    /// Inputs tried.
    pub(crate) executions: u64,
    /// Edges of the program reached by any input.
    pub(crate) coverage: u64,
    /// Edges, and how often each was taken, in classes.
    pub(crate) features: u64,
    /// Inputs kept in the corpus.
    pub(crate) corpus: u64,
    /// Saved inputs that crashed, hung or took too much memory.
    pub(crate) reproducers: Vec<PathBuf>,
    /// How the fuzzer ended, where it failed without an input to blame.
    pub(crate) failure: Option<String>,
}

impl Outcome {
    /// Before the first line of output.
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            ..Self::default()
        }
    }

    /// Takes in a line; whether it was one of libFuzzer's reports of progress.
    pub(crate) fn read_line(&mut self, line: &str) -> bool {
        // The last word on the count, also after a crash: stat::number_of_executed_units: 123
        if let Some(count) = line.strip_prefix("stat::number_of_executed_units:") {
            self.executions = count.trim().parse().unwrap_or(self.executions);
            return false;
        }
        // #123	NEW    cov: 4 ft: 5 corp: 6/7b lim: 8 exec/s: 9 rss: 10Mb ...
        let Some(rest) = line.strip_prefix('#') else {
            return false;
        };
        let mut words = rest.split_whitespace();
        let Some(executions) = words.next().and_then(|word| word.parse().ok()) else {
            return false;
        };
        self.executions = executions;
        while let Some(word) = words.next() {
            let field = match word {
                "cov:" => &mut self.coverage,
                "ft:" => &mut self.features,
                "corp:" => &mut self.corpus,
                _ => continue,
            };
            let value = words
                .next()
                .and_then(|word| word.split('/').next())
                .and_then(|word| word.parse().ok());
            *field = value.unwrap_or(*field);
        }
        true
    }

    /// What the last column of the table says.
    fn verdict(&self) -> String {
        match (&self.failure, self.reproducers.len()) {
            (Some(failure), _) => failure.clone(),
            (None, 0) => "none".to_owned(),
            (None, count) => count.to_string(),
        }
    }
}

/// The outcomes as a table for people, and below it where the reproducers are.
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let mut text = format!(
        "\n{:<16}{:>14}{:>8}{:>10}{:>8}  {}\n",
        "target", "executions", "cov", "ft", "corpus", "crashes"
    );
    for outcome in outcomes {
        let Outcome {
            name,
            executions,
            coverage,
            features,
            corpus,
            ..
        } = outcome;
        let verdict = outcome.verdict();
        writeln!(
            text,
            "{name:<16}{executions:>14}{coverage:>8}{features:>10}{corpus:>8}  {verdict}"
        )
        .expect("writing to a string");
    }
    for path in outcomes.iter().flat_map(|outcome| &outcome.reproducers) {
        writeln!(text, "saved: {}", path.display()).expect("writing to a string");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_report_and_the_final_count_win() {
        let mut outcome = Outcome::new("header");
        assert!(outcome.read_line("#2\tINITED cov: 30 ft: 31 corp: 1/1b exec/s: 0 rss: 40Mb"));
        assert!(outcome.read_line("#900\tNEW    cov: 42 ft: 57 corp: 5/6b lim: 4 exec/s: 8 rss: 41Mb L: 2/4 MS: 1 CrossOver-"));
        assert!(!outcome.read_line("stat::number_of_executed_units: 1234"));
        let expected = Outcome {
            executions: 1234,
            coverage: 42,
            features: 57,
            corpus: 5,
            ..Outcome::new("header")
        };
        assert_eq!(outcome, expected);
    }

    #[test]
    fn a_backtrace_is_no_report() {
        let mut outcome = Outcome::new("header");
        assert!(!outcome.read_line("    #14 0x563770987a48 in main"));
        assert!(!outcome.read_line("#x"));
        assert_eq!(outcome, Outcome::new("header"));
    }

    #[test]
    fn the_table_names_what_was_saved() {
        let broken = Outcome {
            reproducers: vec!["fuzz/regressions/luks/ab".into()],
            ..Outcome::new("luks")
        };
        let text = table(&[Outcome::new("header"), broken]);
        assert!(text.contains("saved: fuzz/regressions/luks/ab"), "{text}");
        assert!(
            text.lines()
                .any(|line| line.starts_with("header") && line.ends_with("none")),
            "{text}"
        );
    }
}
