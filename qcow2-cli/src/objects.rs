//! `--object`: named things that options refer to.

use std::collections::BTreeMap;
use std::sync::Arc;

use qcow2_io::cipher::Secret;
use thiserror::Error;

use crate::words::keyval;

/// Objects by their ids; today secrets.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    secrets: BTreeMap<String, Arc<Secret>>,
}

/// An object that can't be made.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct ObjectError(pub String);

impl Objects {
    /// Makes an object from the words of an `--object` option: `secret,id=sec0,data=...`.
    ///
    /// # Errors
    ///
    /// The words in which the reference program refuses it.
    pub fn add(&mut self, text: &str) -> Result<(), ObjectError> {
        let mut options = keyval::parse(text, Some("qom-type"));
        let mut take = |key: &str| {
            let at = options.iter().rposition(|(found, _)| found == key)?;
            Some(options.remove(at).1)
        };
        let refuse = |text: String| Err(ObjectError(text));
        let Some(kind) = take("qom-type") else {
            return refuse("Parameter 'qom-type' is missing".into());
        };
        let Some(id) = take("id") else {
            return refuse("Parameter 'id' is missing".into());
        };
        if kind != "secret" {
            return refuse(format!("invalid object type: {kind}"));
        }
        let (data, file, format) = (take("data"), take("file"), take("format"));
        if let Some((key, _)) = options.first() {
            return refuse(format!("Invalid parameter '{key}'"));
        }
        let secret = match (data, file) {
            (Some(_), Some(_)) => return refuse("'file' and 'data' are mutually exclusive".into()),
            (Some(data), None) => Secret::new(data.into_bytes()),
            (None, Some(file)) => {
                Secret::from_file(&file).map_err(|error| ObjectError(error.to_string()))?
            }
            (None, None) => return refuse("Must provide 'file' or 'data'".into()),
        };
        let secret = match format.as_deref() {
            None | Some("raw") => secret,
            Some("base64") => secret
                .decode_base64()
                .map_err(|error| ObjectError(error.to_string()))?,
            Some(other) => {
                return refuse(format!(
                    "Parameter 'format' does not accept value '{other}'"
                ));
            }
        };
        if self.secrets.contains_key(&id) {
            return refuse(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            ));
        }
        self.secrets.insert(id, Arc::new(secret));
        Ok(())
    }

    /// The secret with this id.
    ///
    /// # Errors
    ///
    /// The words in which the reference program says that there is none.
    pub fn secret(&self, id: &str) -> Result<Arc<Secret>, ObjectError> {
        let found = self.secrets.get(id).cloned();
        found.ok_or_else(|| ObjectError(format!("No secret with id '{id}'")))
    }
}
