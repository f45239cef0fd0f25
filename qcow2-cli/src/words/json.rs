//! Descriptions of nodes in JSON, as `json:` names and hypervisors write them, flattened to dotted keys.

use std::iter::Peekable;
use std::str::Chars;

use thiserror::Error;

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 64;

/// Why a text is no description.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("JSON parse error, {0}")]
pub struct JsonError(pub String);

/// A scalar at a dotted key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scalar {
    /// Text, a number, or `on` and `off` for a truth value.
    Text(String),
    /// `null`.
    Null,
}

/// All scalars of an object by their dotted keys, elements of lists by their numbers: `{'a': {'b': [1]}}` is `a.b.0=1`. Strings
/// may stand in single or double quotes.
///
/// # Errors
///
/// What is wrong, when the text is not JSON, or not an object.
pub fn flatten(text: &str) -> Result<Vec<(String, Scalar)>, JsonError> {
    let mut reader = Reader {
        chars: text.chars().peekable(),
        found: Vec::new(),
    };
    reader.skip_blanks();
    if reader.chars.peek().is_some_and(|&c| c != '{') {
        return Err(JsonError("expecting value".into()));
    }
    reader.value("", 0)?;
    reader.skip_blanks();
    match reader.chars.next() {
        None => Ok(reader.found),
        Some(_) => Err(JsonError("expecting end of input".into())),
    }
}

struct Reader<'a> {
    chars: Peekable<Chars<'a>>,
    found: Vec<(String, Scalar)>,
}

impl Reader<'_> {
    fn skip_blanks(&mut self) {
        while self.chars.next_if(char::is_ascii_whitespace).is_some() {}
    }

    fn next(&mut self) -> Result<char, JsonError> {
        let next = self.chars.next();
        next.ok_or_else(|| JsonError("premature EOI".into()))
    }

    /// What comes next behind blanks, or the end of the text as an error.
    fn peek(&mut self) -> Result<char, JsonError> {
        self.skip_blanks();
        let next = self.chars.peek().copied();
        next.ok_or_else(|| JsonError("premature EOI".into()))
    }

    fn value(&mut self, key: &str, depth: usize) -> Result<(), JsonError> {
        if depth > MAX_DEPTH {
            return Err(JsonError("nested too deeply".into()));
        }
        let scalar = match self.peek()? {
            '{' => return self.object(key, depth),
            '[' => return self.list(key, depth),
            '"' | '\'' => Scalar::Text(self.string()?),
            _ => self.word()?,
        };
        self.found.push((key.to_owned(), scalar));
        Ok(())
    }

    fn object(&mut self, key: &str, depth: usize) -> Result<(), JsonError> {
        self.next()?;
        if self.peek()? == '}' {
            self.next()?;
            return Ok(());
        }
        loop {
            if !matches!(self.peek()?, '"' | '\'') {
                return Err(JsonError("key is not a string in object".into()));
            }
            let name = self.string()?;
            if self.peek()? != ':' {
                return Err(JsonError("missing : in object pair".into()));
            }
            self.next()?;
            let inner = match key {
                "" => name,
                _ => format!("{key}.{name}"),
            };
            self.value(&inner, depth + 1)?;
            match self.peek()? {
                ',' => self.next()?,
                '}' => {
                    self.next()?;
                    return Ok(());
                }
                _ => return Err(JsonError("expected separator in dict".into())),
            };
        }
    }

    fn list(&mut self, key: &str, depth: usize) -> Result<(), JsonError> {
        self.next()?;
        if self.peek()? == ']' {
            self.next()?;
            return Ok(());
        }
        for index in 0_usize.. {
            self.value(&format!("{key}.{index}"), depth + 1)?;
            match self.peek()? {
                ',' => self.next()?,
                ']' => {
                    self.next()?;
                    break;
                }
                _ => return Err(JsonError("expected separator in list".into())),
            };
        }
        Ok(())
    }

    fn string(&mut self) -> Result<String, JsonError> {
        let quote = self.next()?;
        let mut text = String::new();
        loop {
            match self.next()? {
                c if c == quote => return Ok(text),
                '\\' => text.push(self.escape()?),
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Result<char, JsonError> {
        Ok(match self.next()? {
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'u' => {
                let first = self.unit()?;
                let code = match first {
                    0xd800..0xdc00 => {
                        if (self.next()?, self.next()?) != ('\\', 'u') {
                            return Err(JsonError("invalid surrogate pair".into()));
                        }
                        match self.unit()? {
                            low @ 0xdc00..0xe000 => {
                                0x10000 + ((first - 0xd800) << 10) + (low - 0xdc00)
                            }
                            _ => return Err(JsonError("invalid surrogate pair".into())),
                        }
                    }
                    code => code,
                };
                char::from_u32(code).ok_or_else(|| JsonError("invalid escape sequence".into()))?
            }
            c @ ('"' | '\'' | '\\' | '/') => c,
            c => {
                return Err(JsonError(format!(
                    "invalid escape sequence '\\{c}' in string"
                )));
            }
        })
    }

    /// Four hexadecimal digits.
    fn unit(&mut self) -> Result<u32, JsonError> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = self.next()?.to_digit(16);
            code = code * 16 + digit.ok_or_else(|| JsonError("invalid hex escape".into()))?;
        }
        Ok(code)
    }

    fn word(&mut self) -> Result<Scalar, JsonError> {
        let mut word = String::new();
        while let Some(c) = self
            .chars
            .next_if(|&c| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.'))
        {
            word.push(c);
        }
        Ok(match word.as_str() {
            "true" => Scalar::Text("on".into()),
            "false" => Scalar::Text("off".into()),
            "null" => Scalar::Null,
            number if number.parse::<f64>().is_ok() => Scalar::Text(word),
            "" => return Err(JsonError("expecting value".into())),
            other => return Err(JsonError(format!("invalid keyword '{other}'"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(text: &str) -> Vec<String> {
        let found = flatten(text).unwrap().into_iter();
        found
            .map(|(key, value)| match value {
                Scalar::Text(text) => format!("{key}={text}"),
                Scalar::Null => format!("{key} is null"),
            })
            .collect()
    }

    #[test]
    fn objects_and_lists_become_dotted_keys() {
        assert_eq!(
            flat(
                "{ 'driver': 'qcow2',\n 'file': {'filename': \"a'b\", \"x.y\": [true, 7]}, 'backing': null }"
            ),
            [
                "driver=qcow2",
                "file.filename=a'b",
                "file.x.y.0=on",
                "file.x.y.1=7",
                "backing is null"
            ]
        );
        assert_eq!(flat(r#"{"a": "\u00e9\ud83d\ude00\n"}"#), ["a=é😀\n"]);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for bad in [
            "",
            "{",
            "{'a'}",
            "{'a':}",
            "{'a':1,}",
            "[1]",
            "{'a':foo}",
            "{} x",
            "{'a': \"x",
            r#"{"a":"\ud83d"}"#,
        ] {
            assert!(flatten(bad).is_err(), "{bad:?}");
        }
        let deep = format!("{{'a':{}", "[".repeat(100_000));
        assert!(flatten(&deep).is_err());
    }
}
