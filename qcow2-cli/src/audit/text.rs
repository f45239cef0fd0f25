//! Words for a terminal: sizes, colours, and what an image's author wrote made harmless.

use std::env;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::Path;

/// Text in which nothing moves the cursor, switches colours or turns the direction of writing.
pub(crate) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\'' | '"' | '\\' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
    }
    out
}

/// A path, harmless to print.
pub fn shown(path: &Path) -> String {
    clean(&path.to_string_lossy())
}

/// Bytes in quotes; what is no printable UTF-8 is escaped.
pub(crate) fn quoted(bytes: &[u8]) -> String {
    let mut out = String::from("\"");
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\'' => out.push(c),
                _ => out.extend(c.escape_debug()),
            }
        }
        for byte in chunk.invalid() {
            _ = write!(out, "\\x{byte:02x}");
        }
    }
    out.push('"');
    out
}

/// A number of bytes in the largest unit that keeps it above 1; `1.5 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut shift = 0;
    let mut name = "bytes";
    for (unit, step) in UNITS.into_iter().zip((10_u32..).step_by(10)) {
        if bytes >> step == 0 {
            break;
        }
        (name, shift) = (unit, step);
    }
    let whole = bytes >> shift;
    let rest = u128::from(bytes - (whole << shift));
    let hundredths = (rest * 100) >> shift;
    match hundredths {
        0 => format!("{whole} {name}"),
        n if n % 10 == 0 => format!("{whole}.{} {name}", n / 10),
        n => format!("{whole}.{n:02} {name}"),
    }
}

/// `part` of `whole` as `qemu-img check` prints it: two digits, 0.00% of nothing.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    let hundredths = (u128::from(part) * 10_000 + u128::from(whole / 2))
        .checked_div(whole.into())
        .unwrap_or(0);
    format!("{}.{:02}%", hundredths / 100, hundredths % 100)
}

/// A count and its noun, which takes an s if need be.
pub(crate) fn plural(count: u64, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        _ => format!("{count} {noun}s"),
    }
}

/// Breaks a text at spaces into lines of at most `width` characters, where it has spaces.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut used = 0;
    for word in text.split(' ') {
        let len = word.chars().count();
        match lines.last_mut() {
            Some(line) if used + 1 + len <= width => {
                line.push(' ');
                line.push_str(word);
                used += 1 + len;
            }
            _ => {
                lines.push(word.to_owned());
                used = len;
            }
        }
    }
    lines
}

/// The text cut to `width` characters, with an ellipsis where something is missing.
pub(crate) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut out: String = text.chars().take(width.saturating_sub(1)).collect();
    out.push('…');
    out
}

/// How the report looks where it goes.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Whether colours are welcome.
    pub(crate) colours: bool,
    /// Characters in a line.
    pub(crate) width: usize,
    /// How the caller's commands are typed.
    pub(crate) typed: &'static Typed,
}

/// How the caller's commands are typed, for hints that name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Typed {
    /// What comes before a finding's code, to have it explained.
    pub explain: &'static str,
    /// What comes before the undo file and the image, to go back.
    pub undo: &'static str,
    /// What comes before the level of a repair.
    pub level: &'static str,
}

impl Look {
    /// The look for standard output: colours only on a terminal that has them, and not against `NO_COLOR`.
    pub fn of_stdout(typed: &'static Typed) -> Self {
        let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        let terminal = std::io::stdout().is_terminal();
        let width = if terminal {
            usize::from(console::Term::stdout().size().1)
        } else {
            100
        };
        Self {
            colours: terminal
                && !set("NO_COLOR")
                && env::var_os("TERM").is_none_or(|t| t != "dumb"),
            width: width.clamp(60, 120),
            typed,
        }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    /// The text between a colour's code and its end.
    pub(crate) fn paint(self, code: &str, text: &str) -> String {
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_keep_to_two_digits() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (65536, "64 KiB"),
            (1536, "1.5 KiB"),
            (1376256, "1.31 MiB"),
            (u64::MAX, "15.99 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn percentages_are_those_of_qemu() {
        assert_eq!(percent(16, 160), "10.00%");
        assert_eq!(percent(2, 3), "66.67%");
        assert_eq!(percent(0, 0), "0.00%");
        assert_eq!(percent(u64::MAX, u64::MAX), "100.00%");
    }

    #[test]
    fn nothing_that_steers_a_terminal_gets_through() {
        let hostile = "a\x1b[31m\r\n\u{9b}2J\u{202e}b\u{7f}";
        let harmless = clean(hostile);
        assert!(harmless.starts_with("a\\u{1b}[31m\\r\\n\\u{9b}2J\\u{202e}b"));
        assert!(!harmless.chars().any(char::is_control));
        assert_eq!(quoted(b"\x1b\xff\"\0"), r#""\u{1b}\xff\"\0""#);
    }

    #[test]
    fn long_texts_are_broken_at_spaces_or_cut() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("unbreakable", 4), ["unbreakable"]);
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("abcd", 4), "abcd");
    }
}
