//! Structured answers: as JSON, and as indented text.
//!
//! Members of an object come in the order in which the reference programs print them: by the hash of their names, as they lie in a
//! dictionary of 512 buckets. Scripts that compare text rely on it.

use std::fmt::Write as _;

use super::outside;

/// A value of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Number(i128),
    /// Text.
    Text(String),
    /// Values in order.
    List(Vec<Value>),
    /// Members by name.
    Object(Vec<(&'static str, Value)>),
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Number(value.into())
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Number(value.into())
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<Vec<Value>> for Value {
    fn from(value: Vec<Value>) -> Self {
        Self::List(value)
    }
}

/// Where a dictionary of 512 buckets keeps a name.
fn bucket(name: &str) -> u32 {
    let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
    let mut hash = 0x238f_13af_u32.wrapping_mul(len);
    for (byte, at) in name.bytes().zip(0_u32..) {
        hash = hash.wrapping_add(u32::from(byte) << (at * 5 % 24));
    }
    hash.wrapping_mul(1_103_515_243).wrapping_add(12345) % 512
}

/// Members in the order of a dictionary; in a bucket the newest comes first.
fn sorted<'a>(members: &'a [(&'static str, Value)]) -> Vec<&'a (&'static str, Value)> {
    let mut sorted: Vec<_> = members.iter().rev().collect();
    sorted.sort_by_key(|(name, _)| bucket(name));
    sorted
}

impl Value {
    /// An object of these members.
    pub fn object<const N: usize>(members: [(&'static str, Self); N]) -> Self {
        Self::Object(members.into())
    }

    /// As JSON over several lines, four spaces an indentation, without a line end.
    pub fn to_json(&self) -> String {
        let mut text = String::new();
        self.write_json(&mut text, Some(0));
        text
    }

    /// As JSON in one line.
    pub fn to_json_line(&self) -> String {
        let mut text = String::new();
        self.write_json(&mut text, None);
        text
    }

    fn write_json(&self, text: &mut String, indent: Option<usize>) {
        let inner = indent.map(|indent| indent + 1);
        let line = |text: &mut String, indent: Option<usize>| {
            if let Some(indent) = indent {
                text.push('\n');
                text.extend(std::iter::repeat_n("    ", indent));
            }
        };
        let comma = if indent.is_some() { "," } else { ", " };
        match self {
            Self::Bool(value) => text.push_str(if *value { "true" } else { "false" }),
            Self::Number(value) => _ = write!(text, "{value}"),
            Self::Text(value) => quote(value, text),
            Self::List(values) => {
                text.push('[');
                for (index, value) in values.iter().enumerate() {
                    text.push_str(if index > 0 { comma } else { "" });
                    line(text, inner);
                    value.write_json(text, inner);
                }
                line(text, indent);
                text.push(']');
            }
            Self::Object(members) => {
                text.push('{');
                for (index, (name, value)) in sorted(members).into_iter().enumerate() {
                    text.push_str(if index > 0 { comma } else { "" });
                    line(text, inner);
                    quote(name, text);
                    text.push_str(": ");
                    value.write_json(text, inner);
                }
                line(text, indent);
                text.push('}');
            }
        }
    }

    /// As lines for people, each indented by `indent` times four spaces; of an object or a list.
    pub fn to_lines(&self, indent: usize) -> String {
        let mut text = String::new();
        self.write_lines(&mut text, indent);
        text
    }

    fn write_lines(&self, text: &mut String, indent: usize) {
        let mut member = |name: &str, value: &Self| {
            text.extend(std::iter::repeat_n("    ", indent));
            match value {
                Self::List(_) | Self::Object(_) => {
                    _ = writeln!(text, "{name}:");
                    value.write_lines(text, indent + 1);
                }
                Self::Bool(value) => _ = writeln!(text, "{name}: {value}"),
                Self::Number(value) => _ = writeln!(text, "{name}: {value}"),
                Self::Text(value) => _ = writeln!(text, "{name}: {value}"),
            }
        };
        match self {
            Self::List(values) => {
                for (index, value) in values.iter().enumerate() {
                    member(&format!("[{index}]"), value);
                }
            }
            Self::Object(members) => {
                for (name, value) in sorted(members) {
                    member(&name.replace('-', " "), value);
                }
            }
            _ => {}
        }
    }
}

/// A JSON string; what is not ASCII is escaped.
fn quote(value: &str, text: &mut String) {
    text.push('"');
    for c in outside::lossy(value).chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            ' '..='~' => text.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    _ = write!(text, "\\u{unit:04X}");
                }
            }
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_in_the_order_of_a_dictionary() {
        let value = Value::object([
            ("compat", "1.1".into()),
            ("refcount-bits", 16_u64.into()),
            ("lazy-refcounts", false.into()),
            ("extended-l2", false.into()),
            ("corrupt", false.into()),
            ("compression-type", "zlib".into()),
        ]);
        assert_eq!(
            value.to_lines(1),
            "    compat: 1.1\n    compression type: zlib\n    lazy refcounts: false\n    \
             refcount bits: 16\n    corrupt: false\n    extended l2: false\n"
        );
    }

    #[test]
    fn json_is_indented_by_four_and_empty_things_take_two_lines() {
        let value = Value::object([("data", Value::object([])), ("type", "é\"".into())]);
        assert_eq!(
            value.to_json(),
            "{\n    \"type\": \"\\u00E9\\\"\",\n    \"data\": {\n    }\n}"
        );
        let list = Value::from(vec![1_u64.into(), true.into()]);
        assert_eq!(list.to_json_line(), "[1, true]");
    }
}
