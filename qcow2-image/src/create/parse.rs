//! Options as `qemu-img create -o` takes them: a key and a value, both text.

use qcow2_format::header::{CompressionType, Version};

use super::size::{hexadecimal, integer, parse_size, unsigned};
use super::{CreateError, CreateOptions, Preallocation};

impl CreateOptions {
    /// Sets an option as `qemu-img create -o key=value` does.
    ///
    /// Keys: `size`, `compat`, `cluster_size`, `refcount_bits`, `preallocation`, `lazy_refcounts`, `extended_l2`,
    /// `compression_type`, `backing_file`, `backing_fmt`, `data_file`, `data_file_raw`, `encryption` (`on` is another word for
    /// `encrypt.format=aes`), and with the feature `encryption` `encrypt.format`, `encrypt.cipher-alg`, `encrypt.cipher-mode`,
    /// `encrypt.ivgen-alg`, `encrypt.ivgen-hash-alg`, `encrypt.hash-alg` and `encrypt.iter-time`. Sizes may be hexadecimal, or decimal
    /// with a fraction and a suffix `b`, `k`, `M`, `G`, `T`, `P` or `E` of either case (powers of 1024). Switches are `on`,
    /// `yes`, `true`, `y` and `off`, `no`, `false`, `n`.
    ///
    /// # Errors
    ///
    /// An unknown key, or a value that the key doesn't know; nothing is changed then. Whether the options go together
    /// is only judged when the image is written.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), CreateError> {
        match key {
            "size" => self.size = Some(size("size", value)?),
            "compat" => {
                self.version = choose(
                    "compat",
                    value,
                    &[
                        ("0.10", Version::V2),
                        ("v2", Version::V2),
                        ("1.1", Version::V3),
                        ("v3", Version::V3),
                    ],
                    "0.10 (or v2) and 1.1 (or v3)",
                )?;
            }
            "cluster_size" => self.cluster_size = size("cluster_size", value)?,
            "refcount_bits" => self.refcount_bits = number("refcount_bits", value)?,
            "preallocation" => {
                self.preallocation = choose(
                    "preallocation",
                    value,
                    &[
                        ("off", Preallocation::Off),
                        ("metadata", Preallocation::Metadata),
                        ("falloc", Preallocation::Falloc),
                        ("full", Preallocation::Full),
                    ],
                    "off, metadata, falloc and full",
                )?;
            }
            "lazy_refcounts" => self.lazy_refcounts = switch("lazy_refcounts", value)?,
            "extended_l2" => self.extended_l2 = switch("extended_l2", value)?,
            "compression_type" => {
                self.compression_type = choose(
                    "compression_type",
                    value,
                    &[
                        ("zlib", CompressionType::Zlib),
                        ("zstd", CompressionType::Zstd),
                    ],
                    "zlib and zstd",
                )?;
            }
            "backing_file" => self.backing_file = Some(value.into()),
            "backing_fmt" => self.backing_format = Some(value.into()),
            "data_file" => self.data_file = Some(value.into()),
            "data_file_raw" => self.data_file_raw = switch("data_file_raw", value)?,
            "encryption" => {
                if switch("encryption", value)? {
                    self.encryption.set("encrypt.format", "aes")?;
                }
            }
            other if other.starts_with("encrypt.") => self.encryption.set(other, value)?,
            other => {
                return Err(CreateError::UnknownOption {
                    option: other.to_owned(),
                });
            }
        }
        Ok(())
    }
}

pub(crate) fn choose<T: Copy>(
    option: &'static str,
    value: &str,
    choices: &[(&str, T)],
    allowed: &'static str,
) -> Result<T, CreateError> {
    let found = choices.iter().find(|(name, _)| *name == value);
    found
        .map(|(_, choice)| *choice)
        .ok_or_else(|| CreateError::UnknownValue {
            option,
            value: value.to_owned(),
            allowed,
        })
}

pub(crate) fn switch(option: &'static str, value: &str) -> Result<bool, CreateError> {
    let choices = [
        ("on", true),
        ("yes", true),
        ("true", true),
        ("y", true),
        ("off", false),
        ("no", false),
        ("false", false),
        ("n", false),
    ];
    choose(option, value, &choices, "on and off")
}

/// A plain number as C reads it: white space and a plus sign may lead, 0x means hexadecimal and 0 octal.
pub(crate) fn number(option: &'static str, value: &str) -> Result<u64, CreateError> {
    let digits = unsigned(value);
    let (digits, radix) = match (hexadecimal(digits), digits.strip_prefix('0')) {
        (Some(digits), _) => (digits, 16),
        (None, Some(octal)) if !octal.is_empty() => (octal, 8),
        _ => (digits, 10),
    };
    integer(digits, radix).map_err(|_| CreateError::NotANumber {
        option,
        value: value.to_owned(),
    })
}

pub(crate) fn size(option: &'static str, value: &str) -> Result<u64, CreateError> {
    parse_size(value).map_err(|_| CreateError::NotASize {
        option,
        value: value.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use qcow2_format::header::CryptMethod;

    use super::*;

    #[test]
    fn numbers_are_read_as_c_reads_them() {
        for (text, value) in [("16", 16), ("0x10", 16), ("020", 16), (" +8", 8), ("0", 0)] {
            assert_eq!(number("refcount_bits", text).unwrap(), value, "{text}");
        }
        for text in [
            "",
            "08",
            "8 ",
            "1.0",
            "-8",
            "0x",
            "8k",
            "18446744073709551616",
        ] {
            assert!(number("refcount_bits", text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_refused_value_changes_nothing_and_names_the_choices() {
        let mut options = CreateOptions::new(1);
        let error = options.set("preallocation", "FULL").unwrap_err();
        assert_eq!(
            error.to_string(),
            "preallocation is 'FULL', allowed are off, metadata, falloc and full"
        );
        assert_eq!(options.preallocation, Preallocation::Off);
        for (key, value) in [
            ("lazy_refcounts", "1"),
            ("extended_l2", "On"),
            ("compat", "2"),
            ("compression_type", "lz4"),
            ("encryption", "maybe"),
            ("encrypt.format", "zip"),
            ("encrypt.key-secret", "s"),
            ("encrypt.cipher-alg", "des"),
            ("", ""),
        ] {
            assert!(options.set(key, value).is_err(), "{key}={value}");
        }
        assert_eq!(options.encryption.method, CryptMethod::None);
    }

    #[test]
    #[cfg(feature = "encryption")]
    fn encryption_is_chosen_as_for_qemu() {
        let mut options = CreateOptions::new(1);
        options.set("encryption", "off").unwrap();
        assert_eq!(options.encryption.method, CryptMethod::None);
        options.set("encryption", "on").unwrap();
        assert_eq!(options.encryption.method, CryptMethod::Aes);
        for (key, value) in [
            ("encrypt.format", "luks"),
            ("encrypt.cipher-alg", "serpent-256"),
            ("encrypt.hash-alg", "sha512"),
            ("encrypt.iter-time", "10"),
        ] {
            options.set(key, value).unwrap();
        }
        assert_eq!(options.encryption.method, CryptMethod::Luks);
    }
}
