//! What describes a node: values by dotted keys.

use std::collections::BTreeMap;

use super::OpenError;
use crate::words::json::{self, Scalar};
use crate::words::{keyval, size};

/// A value of a description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Text, or a number or truth value in words.
    Text(String),
    /// Explicitly nothing: `'backing': null`.
    Null,
}

/// Values by dotted keys: `driver`, `file.filename`, `backing.file.filename`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions(BTreeMap<String, Value>);

impl NodeOptions {
    /// From the words of `--image-opts`: `driver=qcow2,file.filename=a.qcow2`.
    pub fn from_list(text: &str) -> Self {
        let mut options = Self::default();
        for (key, value) in keyval::parse(text, None) {
            options.set(key, value);
        }
        options
    }

    /// From what stands behind `json:`.
    ///
    /// # Errors
    ///
    /// When it is not JSON.
    pub fn from_json(text: &str) -> Result<Self, OpenError> {
        let found = json::flatten(text);
        let found = found.map_err(|error| {
            OpenError::new(format!("Could not parse the JSON options: {error}"))
        })?;
        Ok(Self(
            found
                .into_iter()
                .map(|(key, value)| match value {
                    Scalar::Text(text) => (key, Value::Text(text)),
                    Scalar::Null => (key, Value::Null),
                })
                .collect(),
        ))
    }

    /// Sets one.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.0.insert(key.into(), Value::Text(value.into()));
    }

    /// Sets one that is not there.
    pub fn set_default(&mut self, key: &str, value: &str) {
        if !self.0.contains_key(key) {
            self.set(key, value);
        }
    }

    /// Looks one up.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key)? {
            Value::Text(text) => Some(text),
            Value::Null => None,
        }
    }

    /// Whether there is one, be it null.
    pub fn contains(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// Takes one out.
    pub fn take(&mut self, key: &str) -> Option<String> {
        match self.0.remove(key)? {
            Value::Text(text) => Some(text),
            Value::Null => None,
        }
    }

    /// Takes a truth value out.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn take_switch(&mut self, key: &str) -> Result<Option<bool>, OpenError> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => Err(OpenError::new(format!(
                "Parameter '{key}' expects 'on' or 'off'"
            ))),
        }
    }

    /// Takes a number of bytes out.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>, OpenError> {
        let Some(text) = self.take(key) else {
            return Ok(None);
        };
        size::parse(&text).map(Some).map_err(|_| {
            let mut error = OpenError::new(format!(
                "Parameter '{key}' expects a non-negative number below 2^64"
            ));
            error.hints = vec![
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-".into(),
                "and exabytes, respectively.".into(),
            ];
            error
        })
    }

    /// Takes out all that describes a child: what stands behind `ROLE.`, and whether the role itself is null.
    pub fn take_child(&mut self, role: &str) -> (Self, bool) {
        let prefix = format!("{role}.");
        let mut child = Self::default();
        self.0.retain(|key, value| match key.strip_prefix(&prefix) {
            Some(inner) => {
                child.0.insert(inner.to_owned(), value.clone());
                false
            }
            None => true,
        });
        let is_null = matches!(self.0.get(role), Some(Value::Null));
        if is_null {
            self.0.remove(role);
        }
        (child, is_null)
    }

    /// As a `json:` name.
    pub fn to_name(&self) -> String {
        let mut root = serde_json::Map::new();
        for (key, value) in &self.0 {
            let mut keys: Vec<&str> = key.split('.').collect();
            let Some(last) = keys.pop() else { continue };
            let mut at = &mut root;
            for key in keys {
                let inner = at
                    .entry(key)
                    .or_insert_with(|| serde_json::Value::Object(serde_json::Map::new()));
                if !inner.is_object() {
                    *inner = serde_json::Value::Object(serde_json::Map::new());
                }
                let serde_json::Value::Object(inner) = inner else {
                    return String::new();
                };
                at = inner;
            }
            let value = match value {
                Value::Text(text) => serde_json::Value::String(text.clone()),
                Value::Null => serde_json::Value::Null,
            };
            at.insert(last.to_owned(), value);
        }
        format!("json:{}", serde_json::Value::Object(root))
    }

    /// Whether a plain file name would not say it all.
    pub fn says_more_than_a_name(&self) -> bool {
        self.0
            .keys()
            .any(|key| key.starts_with("encrypt.") || matches!(key.as_str(), "offset" | "size"))
            || self
                .text("file.driver")
                .is_some_and(|driver| driver != "file")
    }

    /// Moves what describes the child of a role up to be this node's own.
    pub fn lift(&mut self, role: &str) {
        let (child, _) = self.take_child(role);
        for (key, value) in child.0 {
            self.0.entry(key).or_insert(value);
        }
    }

    /// The first key that is left.
    pub fn first_key(&self) -> Option<&str> {
        self.0.keys().next().map(String::as_str)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All keys and values in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Adds what `other` has; `other` wins.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_taken_out_by_their_role() {
        let mut options = NodeOptions::from_json(
            "{'driver':'qcow2','file':{'driver':'file','filename':'a,b'},'backing':null}",
        )
        .unwrap();
        let (file, is_null) = options.take_child("file");
        assert!(!is_null);
        assert_eq!(file.text("filename"), Some("a,b"));
        let (backing, is_null) = options.take_child("backing");
        assert!(is_null && backing.is_empty());
        assert_eq!(options.take("driver").as_deref(), Some("qcow2"));
        assert!(options.is_empty());
    }

    #[test]
    fn values_that_are_none_are_named() {
        let mut options = NodeOptions::from_list("a=foo,b=1M,c=maybe");
        assert_eq!(options.take_size("b"), Ok(Some(1 << 20)));
        let error = options.take_size("a").unwrap_err();
        assert_eq!(
            error.text,
            "Parameter 'a' expects a non-negative number below 2^64"
        );
        assert!(options.take_switch("c").is_err());
    }
}
