//! Lists of tests.

/// A test of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The section's arguments for the suite.
    pub(super) section: Vec<String>,
    /// The test's name.
    pub(super) name: String,
    /// How many lines of its output count; all if none are given.
    pub(super) lines: Option<usize>,
}

/// Reads a list: names apart by white space, `NAME@LINES` where only the first lines count, `[ARGUMENTS]` before a section, comments behind `#`.
pub(super) fn parse(text: &str) -> Vec<Entry> {
    let mut section = Vec::new();
    let mut entries = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(arguments) = line
            .strip_prefix('[')
            .and_then(|line| line.strip_suffix(']'))
        {
            section = arguments.split_whitespace().map(str::to_owned).collect();
            continue;
        }
        for word in line.split_whitespace() {
            let (name, lines) = match word.rsplit_once('@') {
                Some((name, lines)) => (name, lines.parse().ok()),
                None => (word, None),
            };
            entries.push(Entry {
                section: section.clone(),
                name: name.to_owned(),
                lines,
            });
        }
    }
    entries
}

/// Those with one of these names; all if there are none.
pub(super) fn selected(entries: Vec<Entry>, names: &[String]) -> Vec<Entry> {
    entries
        .into_iter()
        .filter(|entry| names.is_empty() || names.contains(&entry.name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_comments_and_counts_of_lines() {
        let entries = parse("# all\n001 003 # two\n\n[-o compat=0.10]\n 031@12\n");
        let names: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["001", "003", "031"]);
        assert_eq!(entries[1].section, Vec::<String>::new());
        assert_eq!(entries[2].section, ["-o", "compat=0.10"]);
        assert_eq!(entries[2].lines, Some(12));
        assert_eq!(selected(entries, &["003".to_owned()]).len(), 1);
    }

    #[test]
    fn the_list_of_the_project_has_no_test_twice() {
        let mut names: Vec<_> = parse(super::super::LIST)
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        assert!(names.len() > 80, "{}", names.len());
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
