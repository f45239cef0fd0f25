//! Options as `getopt_long` finds them: they may follow operands, may be glued to their values, and long ones may be cut short.

use std::fmt::Write as _;

use thiserror::Error;

/// A long option.
#[derive(Clone, Copy, Debug)]
pub struct Long {
    /// Its name, without dashes.
    pub name: &'static str,
    /// Whether a value comes with it.
    pub takes_value: bool,
    /// The short option that it stands for, or a letter of its own.
    pub code: char,
}

impl Long {
    /// One that comes alone.
    pub const fn flag(name: &'static str, code: char) -> Self {
        Self {
            name,
            takes_value: false,
            code,
        }
    }

    /// One with a value.
    pub const fn value(name: &'static str, code: char) -> Self {
        Self {
            name,
            takes_value: true,
            code,
        }
    }
}

/// The options of a command.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Letters of the short options, each with a colon behind it if it takes a value.
    pub short: &'static str,
    /// The long ones.
    pub long: &'static [Long],
}

/// What a command line has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Options by their codes, in order.
    pub options: Vec<(char, String)>,
    /// What is no option, in order.
    pub operands: Vec<String>,
}

/// Why a command line is refused, in the words of the C library.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GetoptError {
    /// There is no such long option.
    #[error("unrecognized option '{0}'")]
    Unrecognized(String),
    /// There is no such short option.
    #[error("invalid option -- '{0}'")]
    Invalid(char),
    /// A long option without its value.
    #[error("option '--{0}' requires an argument")]
    ValueMissing(&'static str),
    /// A short option without its value.
    #[error("option requires an argument -- '{0}'")]
    ShortValueMissing(char),
    /// A long option with a value that it doesn't take.
    #[error("option '--{0}' doesn't allow an argument")]
    NeedlessValue(&'static str),
    /// The start of several long options.
    #[error("option '{word}' is ambiguous; possibilities:{}", list(possible))]
    Ambiguous {
        /// As it was given.
        word: String,
        /// What it could be.
        possible: Vec<&'static str>,
    },
}

fn list(names: &[&str]) -> String {
    names.iter().fold(String::new(), |mut text, name| {
        _ = write!(text, " '--{name}'");
        text
    })
}

impl Spec {
    /// Sorts a command line (without the program's and the command's name) into options and operands.
    ///
    /// # Errors
    ///
    /// The first option that is unknown, or lacks its value; and what came before it.
    pub fn parse(&self, args: &[String]) -> Result<Parsed, (GetoptError, Parsed)> {
        let mut parsed = Parsed::default();
        let mut args = args.iter();
        while let Some(word) = args.next() {
            let outcome = if word == "--" {
                parsed.operands.extend(args.by_ref().cloned());
                Ok(())
            } else if let Some(long) = word.strip_prefix("--") {
                self.long(word, long, &mut args, &mut parsed)
            } else if word.len() > 1 && word.starts_with('-') {
                self.letters(word.get(1..).unwrap_or_default(), &mut args, &mut parsed)
            } else {
                parsed.operands.push(word.clone());
                Ok(())
            };
            if let Err(error) = outcome {
                return Err((error, parsed));
            }
        }
        Ok(parsed)
    }

    fn long<'a>(
        &self,
        word: &str,
        long: &str,
        rest: &mut impl Iterator<Item = &'a String>,
        parsed: &mut Parsed,
    ) -> Result<(), GetoptError> {
        let (name, value) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (long, None),
        };
        let found = self.find(name).map_err(|possible| match possible.len() {
            0 => GetoptError::Unrecognized(format!("--{name}")),
            _ => GetoptError::Ambiguous {
                word: word.to_owned(),
                possible,
            },
        })?;
        let value = match (found.takes_value, value) {
            (false, Some(_)) => return Err(GetoptError::NeedlessValue(found.name)),
            (false, None) => String::new(),
            (true, Some(value)) => value,
            (true, None) => rest
                .next()
                .cloned()
                .ok_or(GetoptError::ValueMissing(found.name))?,
        };
        parsed.options.push((found.code, value));
        Ok(())
    }

    /// The option of that name, or the only one that starts so; else those that do.
    fn find(&self, name: &str) -> Result<Long, Vec<&'static str>> {
        if let Some(exact) = self.long.iter().find(|long| long.name == name) {
            return Ok(*exact);
        }
        let starts: Vec<_> = self
            .long
            .iter()
            .filter(|long| long.name.starts_with(name))
            .collect();
        match starts.as_slice() {
            [first, others @ ..] if others.iter().all(|long| long.code == first.code) => {
                Ok(**first)
            }
            _ => Err(starts.iter().map(|long| long.name).collect()),
        }
    }

    fn letters<'a>(
        &self,
        letters: &str,
        rest: &mut impl Iterator<Item = &'a String>,
        parsed: &mut Parsed,
    ) -> Result<(), GetoptError> {
        let mut chars = letters.chars();
        while let Some(letter) = chars.next() {
            let mut known = self.short.chars().skip_while(|&c| c != letter || c == ':');
            if known.next().is_none() {
                return Err(GetoptError::Invalid(letter));
            }
            let mut value = String::new();
            if known.next() == Some(':') {
                value = match chars.as_str() {
                    "" => rest
                        .next()
                        .cloned()
                        .ok_or(GetoptError::ShortValueMissing(letter))?,
                    glued => glued.to_owned(),
                };
                chars = "".chars();
            }
            parsed.options.push((letter, value));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: Spec = Spec {
        short: "hf:q",
        long: &[
            Long::flag("help", 'h'),
            Long::value("format", 'f'),
            Long::value("output", '\u{1}'),
            Long::value("object", '\u{2}'),
        ],
    };

    fn parse(args: &[&str]) -> Result<Parsed, GetoptError> {
        let args: Vec<_> = args.iter().map(|&arg| arg.to_owned()).collect();
        SPEC.parse(&args).map_err(|(error, _)| error)
    }

    #[test]
    fn options_are_found_wherever_they_stand() {
        let parsed =
            parse(&["a", "-qfraw", "-", "--form", "qcow2", "--out=x", "--", "-f"]).unwrap();
        let options: Vec<_> = parsed
            .options
            .iter()
            .map(|(c, v)| (*c, v.as_str()))
            .collect();
        assert_eq!(
            options,
            [('q', ""), ('f', "raw"), ('f', "qcow2"), ('\u{1}', "x")]
        );
        assert_eq!(parsed.operands, ["a", "-", "-f"]);
    }

    #[test]
    fn what_is_wrong_is_told_in_the_usual_words() {
        let error = |args| parse(args).unwrap_err().to_string();
        assert_eq!(error(&["--foo=1"]), "unrecognized option '--foo'");
        assert_eq!(error(&["-Z"]), "invalid option -- 'Z'");
        assert_eq!(error(&["-:"]), "invalid option -- ':'");
        assert_eq!(error(&["-f"]), "option requires an argument -- 'f'");
        assert_eq!(
            error(&["--output"]),
            "option '--output' requires an argument"
        );
        assert_eq!(
            error(&["--help=1"]),
            "option '--help' doesn't allow an argument"
        );
        assert_eq!(
            error(&["--o"]),
            "option '--o' is ambiguous; possibilities: '--output' '--object'"
        );
    }
}
