//! Numbers of bytes: `64k`, `1.5G`, `0x10000`.

use thiserror::Error;

/// Why a text is no number of bytes.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SizeError {
    /// It is no number, or has something behind it.
    #[error("not a number of bytes")]
    Invalid,
    /// It is more than can be counted.
    #[error("too large")]
    Range,
}

/// Decimal digits of a fraction that are looked at; the rest is less than a byte of the largest unit.
const FRACTION_DIGITS: usize = 20;

/// A number of bytes as QEMU reads it: hexadecimal without a unit, or decimal, perhaps with a fraction, and a unit: `b`, `k`, `M`,
/// `G`, `T`, `P` or `E` of either case, powers of 1024. A fraction is rounded to the nearest byte and needs a unit of more than
/// one. White space and a plus sign may lead.
///
/// # Errors
///
/// [`SizeError::Invalid`] for what is no number, [`SizeError::Range`] for 2^64 and more.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = unsigned(text);
    if let Some(digits) = hexadecimal(text) {
        return integer(digits, 16);
    }
    let (number, shift) = unit(text);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return Err(SizeError::Invalid);
    }
    // What is no number is that however large it is.
    let fraction = fraction_of(fraction, shift)?;
    let whole = match whole {
        "" => 0,
        digits => integer(digits, 10)?,
    };
    let whole = whole.checked_mul(1 << shift);
    let sum = whole.and_then(|whole| whole.checked_add(fraction));
    sum.ok_or(SizeError::Range)
}

/// The number in front of a unit, and the unit's binary exponent.
fn unit(text: &str) -> (&str, u32) {
    for (unit, shift) in ["bB", "kK", "mM", "gG", "tT", "pP", "eE"]
        .into_iter()
        .zip((0..).step_by(10))
    {
        if let Some(number) = text.strip_suffix(|last| unit.contains(last)) {
            return (number, shift);
        }
    }
    (text, 0)
}

/// `0.digits` of a unit of 2^`shift` bytes, in bytes.
fn fraction_of(digits: &str, shift: u32) -> Result<u64, SizeError> {
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(SizeError::Invalid);
    }
    if shift == 0 {
        let is_zero = digits.bytes().all(|digit| digit == b'0');
        return if is_zero {
            Ok(0)
        } else {
            Err(SizeError::Invalid)
        };
    }
    let mut numerator = 0_u128;
    let mut denominator = 1_u128;
    for digit in digits.bytes().take(FRACTION_DIGITS) {
        numerator = numerator * 10 + u128::from(digit - b'0');
        denominator *= 10;
    }
    let rounded = ((numerator << (shift + 1)) + denominator) / (denominator * 2);
    u64::try_from(rounded).map_err(|_| SizeError::Range)
}

/// Without the white space and the plus sign that may lead.
pub(super) fn unsigned(value: &str) -> &str {
    let value = value.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    value.strip_prefix('+').unwrap_or(value)
}

pub(super) fn hexadecimal(text: &str) -> Option<&str> {
    text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"))
}

/// Digits and nothing else.
pub(super) fn integer(digits: &str, radix: u32) -> Result<u64, SizeError> {
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(SizeError::Invalid);
    }
    u64::from_str_radix(digits, radix).map_err(|_| SizeError::Range)
}

#[cfg(test)]
mod tests {
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
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", " ", "+", ".", ".k", "k", "b", "1kk", "1 k", "64k ", "1ki", "64kb", "0x", "0x1k",
            "1e3", "1e3k", "-1", "-0", "1.1", "0.1b", "1.2.3k", "inf", "nan", "é", "1é", "+-1",
            "++1",
        ] {
            assert_eq!(parse_size(text), Err(SizeError::Invalid), "{text}");
        }
    }

    #[test]
    fn what_is_too_large_is_a_number_all_the_same() {
        for text in [
            "16E",
            "18446744073709551616",
            "0x10000000000000000",
            "15.99999999999999999999E",
        ] {
            assert_eq!(parse_size(text), Err(SizeError::Range), "{text}");
        }
        assert_eq!(parse_size("99999999999999999999x"), Err(SizeError::Invalid));
    }
}
