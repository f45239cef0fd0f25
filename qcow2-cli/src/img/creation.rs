//! `-o`: what was chosen about a new image.

use std::fmt::Write as _;

use qcow2_image::create::{CreateError, CreateOptions, Preallocation};

use super::Failure;
use super::choices::{Format, Kind};
use crate::Objects;
use crate::node;
use crate::words::{keyval, outside, size};

/// The chosen options of a new image, in words.
#[derive(Clone, Debug)]
pub(crate) struct Creation {
    pub(crate) format: Format,
    values: Vec<(&'static str, String)>,
}

/// An option that is refused: the text, and lines below.
pub(crate) type Refusal = (String, Vec<String>);

/// Whether it is a plain number below zero.
fn is_negative(value: &str) -> bool {
    let digits = value.strip_prefix('-').unwrap_or_default();
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// What to say of a value that is no number of bytes.
pub(crate) fn no_size(key: &str) -> Refusal {
    (
        format!("Parameter '{key}' expects a non-negative number below 2^64"),
        vec![
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-".to_owned(),
            "and exabytes, respectively.".to_owned(),
        ],
    )
}

impl Creation {
    /// Nothing chosen.
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            values: Vec::new(),
        }
    }

    /// Takes over a list; what comes later counts.
    pub(crate) fn add_list(&mut self, list: &str) -> Result<(), Refusal> {
        for (key, value) in keyval::parse(list, None) {
            self.set(&key, &value)?;
        }
        Ok(())
    }

    /// Takes over one option. The kind of its value is checked, not the value.
    pub(crate) fn set(&mut self, key: &str, value: &str) -> Result<(), Refusal> {
        let plain = |text: String| (text, Vec::new());
        let Some((name, kind, ..)) = self.format.all().find(|(name, ..)| *name == key) else {
            return Err(plain(format!("Invalid parameter '{key}'")));
        };
        let value = match kind {
            Kind::Text => value.to_owned(),
            Kind::Switch => match value {
                "on" | "yes" | "true" | "y" => "on".to_owned(),
                "off" | "no" | "false" | "n" => "off".to_owned(),
                _ => return Err(plain(format!("Parameter '{key}' expects 'on' or 'off'"))),
            },
            Kind::Number => {
                let number = value.strip_prefix('-').unwrap_or(value);
                let parsed = match number.strip_prefix("0x") {
                    Some(hex) => u64::from_str_radix(hex, 16).ok(),
                    None => number.parse().ok(),
                };
                if parsed.is_none() {
                    return Err(plain(format!("Parameter '{key}' expects a number")));
                }
                value.to_owned()
            }
            Kind::Size => match size::parse(value) {
                Ok(bytes) => bytes.to_string(),
                Err(_) if is_negative(value) => {
                    return Err(plain(format!(
                        "Value '{value}' is out of range for parameter '{key}'"
                    )));
                }
                Err(size::SizeError::Range) => {
                    return Err(plain(format!(
                        "Value '{value}' is out of range for parameter '{key}'"
                    )));
                }
                Err(size::SizeError::Invalid) => return Err(no_size(key)),
            },
        };
        self.values.retain(|(found, _)| found != name);
        self.values.push((name, value));
        Ok(())
    }

    /// What was chosen for an option.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        let mut values = self.values.iter();
        values
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value.as_str())
    }

    /// The line that announces the new image: ` key=value` for each option, defaults among them.
    pub(crate) fn line(&self) -> String {
        let mut line = String::new();
        for (name, _, _, default) in self.format.all() {
            if let Some(value) = self.get(name).or(*default) {
                _ = write!(line, " {name}={}", keyval::escape(value));
            }
        }
        line
    }

    /// The options of a qcow2 image, as far as the format has them.
    pub(crate) fn to_options(&self, objects: &Objects) -> Result<CreateOptions, String> {
        let mut options = CreateOptions::default();
        let aes = self.get("encryption") == Some("on");
        let encrypted = aes || self.get("encrypt.format").is_some();
        if !encrypted
            && self
                .values
                .iter()
                .any(|(name, _)| name.starts_with("encrypt."))
        {
            return Err("Parameter 'encrypt.format' is missing".to_owned());
        }
        for (key, value) in &self.values {
            match *key {
                "encrypt.key-secret" | "nocow" | "extent_size_hint" => {}
                "data_file" | "backing_file" | "backing_fmt" if value.is_empty() => {}
                "refcount_bits" if value.starts_with('-') => {
                    return Err(text_of(&CreateError::RefcountBits { found: u64::MAX }));
                }
                key => options.set(key, value).map_err(|error| text_of(&error))?,
            }
        }
        // Names as they came, whatever they are made of.
        let named = |key| self.get(key).filter(|value| !value.is_empty());
        if let (Some(name), Some(format)) = (named("backing_file"), named("backing_fmt")) {
            options = options.backing_file(outside::bytes(name), format);
        }
        if let Some(name) = named("data_file") {
            options = options.data_file(outside::bytes(&node::without_protocol(name)));
        }
        if encrypted {
            let id = self
                .get("encrypt.key-secret")
                .ok_or("Parameter 'encrypt.key-secret' is required for cipher")?;
            let secret = objects.secret(id).map_err(|error| error.0)?;
            options = options.secret(secret);
        }
        Ok(options)
    }

    /// How a plain file is laid out.
    pub(crate) fn preallocation(&self) -> Result<Preallocation, String> {
        match self.get("preallocation") {
            None | Some("off") => Ok(Preallocation::Off),
            Some("falloc") => Ok(Preallocation::Falloc),
            Some("full") => Ok(Preallocation::Full),
            Some("metadata") => Err("Unsupported preallocation mode 'metadata'".to_owned()),
            Some(other) => Err(format!(
                "Parameter 'preallocation' does not accept value '{other}'"
            )),
        }
    }
}

/// Why an image can't be made, in the usual words.
pub(crate) fn text_of(error: &CreateError) -> String {
    let newer = "with compatibility level 1.1 and above (use version=v3 or greater)";
    match error {
        CreateError::UnknownValue { option, value, .. } => {
            let option = match *option {
                "compat" => "version",
                "compression_type" => "compression-type",
                "encrypt.format" => "format",
                other => other,
            };
            format!("Parameter '{option}' does not accept value '{value}'")
        }
        CreateError::ClusterSize { .. } => {
            "Cluster size must be a power of two between 512 and 2048k".to_owned()
        }
        CreateError::ExtendedClusterSize { .. } => {
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
                .to_owned()
        }
        CreateError::RefcountBits { .. } => {
            "Refcount width must be a power of two and may not exceed 64 bits".to_owned()
        }
        CreateError::NeedsVersion3 { option, .. } => match *option {
            "lazy_refcounts" => format!("Lazy refcounts only supported {newer}"),
            "refcount_bits" => {
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)"
                    .to_owned()
            }
            "extended_l2" => format!("Extended L2 entries are only supported {newer}"),
            "compression_type" => format!("Non-zlib compression type is only supported {newer}"),
            _ => format!("External data files are only supported {newer}"),
        },
        CreateError::SizeTooLarge { .. } => {
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
                .to_owned()
        }
        CreateError::BackingFileMissing => {
            "Backing format cannot be used without backing file".to_owned()
        }
        CreateError::PreallocatedOverlay { .. } => {
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
                .to_owned()
        }
        CreateError::RawWithoutDataFile => "data-file-raw requires data-file".to_owned(),
        CreateError::RawWithBackingFile => {
            "Backing file and data-file-raw cannot be used at the same time".to_owned()
        }
        CreateError::NameTooLong { .. } => "Backing file name too long".to_owned(),
        CreateError::Luks(error) => luks_text(error),
        other => {
            let mut text = other.to_string();
            let mut cause = std::error::Error::source(other);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            text
        }
    }
}

fn luks_text(error: &qcow2_image::luks::LuksError) -> String {
    use qcow2_image::luks::LuksError;
    match error {
        LuksError::UnknownVectors { value } => {
            format!("Parameter 'ivgen-alg' does not accept value '{value}'")
        }
        other => other.to_string(),
    }
}

/// A refusal as a failure of the program, with the file it is about.
pub(crate) fn refused(name: &str, (text, hints): Refusal) -> Failure {
    hints
        .into_iter()
        .fold(Failure::new(format_args!("{name}: {text}")), Failure::hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_what_was_chosen_and_the_defaults_in_a_fixed_order() {
        let mut creation = Creation::new(Format::Qcow2);
        creation
            .add_list("size=1M,compat=v3,cluster_size=4k,cluster_size=8k")
            .unwrap();
        creation.set("backing_file", "a,b").unwrap();
        assert_eq!(
            creation.line(),
            " cluster_size=8192 extended_l2=off compression_type=zlib size=1048576 compat=v3 \
             backing_file=a,,b lazy_refcounts=off refcount_bits=16"
        );
        assert_eq!(
            creation.set("foo", "1").unwrap_err().0,
            "Invalid parameter 'foo'"
        );
        assert!(creation.set("lazy_refcounts", "maybe").is_err());
    }
}
