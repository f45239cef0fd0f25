//! Options as `qemu-img create -o` takes them: a key and a value, both text.

use qcow2_format::header::{CompressionType, Version};

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
    integer(digits, radix).ok_or_else(|| CreateError::NotANumber {
        option,
        value: value.to_owned(),
    })
}

pub(crate) fn size(option: &'static str, value: &str) -> Result<u64, CreateError> {
    parse_size(value).ok_or_else(|| CreateError::NotASize {
        option,
        value: value.to_owned(),
    })
}

/// Decimal digits of a fraction that are looked at; the rest is less than a byte of the largest unit.
const FRACTION_DIGITS: usize = 18;

/// A number of bytes: hexadecimal without a unit, or decimal, perhaps with a fraction, and a unit. A fraction is rounded to
/// the nearest byte and needs a unit of more than one.
fn parse_size(value: &str) -> Option<u64> {
    let text = unsigned(value);
    if let Some(digits) = hexadecimal(text) {
        return integer(digits, 16);
    }
    let (number, shift) = match text.chars().next_back()?.to_ascii_lowercase() {
        'b' => (text.split_at_checked(text.len().checked_sub(1)?)?.0, 0),
        last => match "kmgtpe".find(last) {
            Some(power) => {
                let number = text.split_at_checked(text.len().checked_sub(1)?)?.0;
                (
                    number,
                    u32::try_from(power).ok()?.checked_add(1)?.checked_mul(10)?,
                )
            }
            None => (text, 0),
        },
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole = if whole.is_empty() {
        0
    } else {
        integer(whole, 10)?
    };
    let fraction = fraction_of(fraction, shift)?;
    whole
        .checked_mul(1_u64.checked_shl(shift)?)?
        .checked_add(fraction)
}

/// `0.digits` of a unit of 2^`shift` bytes, in bytes.
fn fraction_of(digits: &str, shift: u32) -> Option<u64> {
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    if shift == 0 {
        return digits.bytes().all(|digit| digit == b'0').then_some(0);
    }
    let mut numerator = 0_u128;
    let mut denominator = 1_u128;
    for digit in digits.bytes().take(FRACTION_DIGITS) {
        numerator = numerator * 10 + u128::from(digit - b'0');
        denominator *= 10;
    }
    u64::try_from(((numerator << (shift + 1)) + denominator) / (denominator * 2)).ok()
}

/// Without the white space and the plus sign that may lead.
fn unsigned(value: &str) -> &str {
    let value = value.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    value.strip_prefix('+').unwrap_or(value)
}

fn hexadecimal(text: &str) -> Option<&str> {
    text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"))
}

/// Digits and nothing else.
fn integer(digits: &str, radix: u32) -> Option<u64> {
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

#[cfg(test)]
mod tests {
    use qcow2_format::header::CryptMethod;

    use super::*;

    #[test]
    fn sizes_have_units_and_fractions() {
        let cases = [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("1K", 1024),
            ("65536b", 65536),
            ("1.5k", 1536),
            (".5M", 512 << 10),
            ("1.M", 1 << 20),
            ("0.", 0),
            ("1.000b", 1),
            ("0x200", 512),
            ("0Xb", 11),
            ("064k", 64 << 10),
            (" +64k", 64 << 10),
            ("0.0000001G", 107),
            ("0.9999999999999999999k", 1024),
            ("15.5E", 31 << 59),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            " ",
            "+",
            ".",
            ".k",
            "k",
            "b",
            "1kk",
            "1 k",
            "64k ",
            "1ki",
            "64kb",
            "0x",
            "0x1k",
            "1e3",
            "1e3k",
            "-1",
            "-0",
            "1.1",
            "0.1b",
            "1.2.3k",
            "inf",
            "nan",
            "16E",
            "18446744073709551616",
            "é",
            "1é",
            "+-1",
            "++1",
        ] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

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
