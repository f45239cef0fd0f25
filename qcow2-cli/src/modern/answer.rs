//! What commands say: one thing, for people or for programs.

use serde::Serialize;

use super::args::OutputArgs;
use super::failure::Failure;
use crate::Console;
use crate::audit::json::to_ascii;
use crate::audit::{Look, Typed};

/// How commands under the program's own name are typed.
pub(crate) const TYPED: Typed = Typed {
    explain: "qcow2 explain",
    undo: "qcow2 repair --undo",
    level: "--level",
};

/// Where answers go, and in which form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer<'a> {
    console: &'a Console,
    output: OutputArgs,
    /// How text looks.
    pub(crate) look: Look,
}

impl<'a> Answer<'a> {
    /// As the command line asks for it.
    pub(crate) fn new(console: &'a Console, output: OutputArgs) -> Self {
        Self {
            console,
            output,
            look: Look::of_stdout(&TYPED),
        }
    }

    /// Whether a program listens.
    pub(crate) fn is_json(&self) -> bool {
        self.output.json
    }

    /// Gives an object on a line of its own, or else the text, which ends its lines itself. What was asked for is told to the
    /// quiet, too; see [`note`](Self::note).
    pub(crate) fn tell<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        if self.output.json {
            self.console.out(format_args!("{}\n", to_ascii(value)?));
        } else {
            self.console.out(format_args!("{}", text()));
        }
        Ok(())
    }

    /// As [`tell`](Self::tell), for one of many, which nobody may want to hear to the end.
    pub(crate) fn row<T: Serialize>(&self, value: &T) -> Result<(), Failure> {
        self.tell(value, String::new)?;
        match self.console.trouble() {
            Some(_) => Err(Failure::unread()),
            None => Ok(()),
        }
    }

    /// As [`tell`](Self::tell), for what only says that something was done: not to the quiet.
    pub(crate) fn give<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        if self.output.quiet && !self.output.json {
            return Ok(());
        }
        self.tell(value, text)
    }

    /// Text that is what it is in either form.
    pub(crate) fn print(&self, text: &str) {
        self.console.out(format_args!("{text}"));
    }

    /// Text for people only.
    pub(crate) fn text(&self, text: &str) {
        if !self.output.json {
            self.console.out(format_args!("{text}"));
        }
    }
}

/// A path as text; what is no UTF-8 is replaced.
pub(crate) fn name(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A name in an image as text; what is no UTF-8 is replaced.
pub(crate) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A table: columns as wide as what is in them, two blanks between them. Columns whose heading ends in a blank are for
/// numbers, which stand to the right.
pub(crate) fn table(heads: &[&str], rows: &[Vec<String>], look: Look) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widths = cells.map(|cell| cell.chars().count());
        let head = heads.get(column).map_or(0, |head| head.trim_end().len());
        widths.max().unwrap_or(0).max(head)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |cells: &[&str]| {
        let mut text = String::new();
        for ((cell, head), width) in cells.iter().zip(heads).zip(&widths) {
            if !text.is_empty() {
                text.push_str("  ");
            }
            let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
            if head.ends_with(' ') {
                text.push_str(&padding);
                text.push_str(cell);
            } else {
                text.push_str(cell);
                text.push_str(&padding);
            }
        }
        text.trim_end().to_owned()
    };
    let names: Vec<&str> = heads.iter().map(|head| head.trim_end()).collect();
    let mut text = look.bold(&line(&names)) + "\n";
    for row in rows {
        let cells: Vec<&str> = row.iter().map(String::as_str).collect();
        text.push_str(&line(&cells));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_to_the_right_and_lines_have_no_tail() {
        let look = Look {
            colours: false,
            width: 80,
            typed: &TYPED,
        };
        let rows = [
            vec!["a".to_owned(), "1".to_owned(), "x".to_owned()],
            vec!["long".to_owned(), "1000".to_owned(), String::new()],
        ];
        let text = table(&["NAME", "BYTES ", "REST"], &rows, look);
        assert_eq!(text, "NAME  BYTES  REST\na         1  x\nlong   1000\n");
    }
}
