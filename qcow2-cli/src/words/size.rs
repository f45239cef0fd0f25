//! Numbers of bytes: `64k`, `1.5G`, `0x10000`, and back.

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

/// The binary exponent of a suffix.
fn suffix_shift(suffix: &str) -> Option<u32> {
    Some(match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    })
}

/// A number of bytes: decimal, with a fraction where a suffix says of what, or hexadecimal. Suffixes are `b`, `k`, `M`, `G`, `T`,
/// `P` and `E` in either case, powers of 1024.
///
/// # Errors
///
/// [`SizeError::Invalid`] for what is no number, [`SizeError::Range`] for 2^64 and more.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let end = hex
            .find(|c: char| !c.is_ascii_hexdigit())
            .unwrap_or(hex.len());
        let (digits, suffix) = hex.split_at(end);
        if digits.is_empty() {
            return Err(SizeError::Invalid);
        }
        // `b` and `e` are digits here.
        let shift = suffix_shift(suffix).ok_or(SizeError::Invalid)?;
        let value = u64::from_str_radix(digits, 16).map_err(|_| SizeError::Range)?;
        return shifted(value, shift);
    }
    let number_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return Err(SizeError::Invalid);
    }
    let shift = suffix_shift(suffix).ok_or(SizeError::Invalid)?;
    let fraction = fraction.trim_end_matches('0');
    if shift == 0 && !fraction.is_empty() {
        return Err(SizeError::Invalid);
    }
    let whole = match whole {
        "" => 0,
        digits => digits.parse().map_err(|_| SizeError::Range)?,
    };
    let part = fraction_of(fraction, shift);
    shifted(whole, shift)?
        .checked_add(part)
        .ok_or(SizeError::Range)
}

fn shifted(value: u64, shift: u32) -> Result<u64, SizeError> {
    value.checked_mul(1_u64 << shift).ok_or(SizeError::Range)
}

/// `0.DIGITS` of `2^shift`, rounded down.
fn fraction_of(digits: &str, shift: u32) -> u64 {
    // 18 digits are more than a fraction of 2^60 can tell apart by whole bytes.
    let mut numerator = 0_u128;
    let mut denominator = 1_u128;
    for digit in digits.bytes().take(18) {
        numerator = numerator * 10 + u128::from(digit - b'0');
        denominator *= 10;
    }
    u64::try_from((numerator << shift) / denominator).unwrap_or(u64::MAX)
}

/// A size with the unit that suits it, three digits precise: `64 KiB`, `1.5 GiB`, `512 B`. From 1000 of a unit on, the next one is
/// used: `0.999 MiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let unit = UNITS.get(unit).copied().unwrap_or_default();
    format!("{} {unit}B", three_digits(value))
}

/// A number from 0 to 1024 as C prints it with `%.3g`.
fn three_digits(value: f64) -> String {
    if value >= 999.5 {
        return "1e+03".to_owned();
    }
    let decimals = match value {
        _ if value >= 99.95 => 0,
        _ if value >= 9.995 => 1,
        _ if value >= 0.9995 => 2,
        _ => 3,
    };
    let number = format!("{value:.decimals$}");
    if number.contains('.') {
        number
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned()
    } else {
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_and_fractions() {
        assert_eq!(parse("1024"), Ok(1024));
        assert_eq!(parse("1024b"), Ok(1024));
        assert_eq!(parse("1024.0b"), Ok(1024));
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("0.5K"), Ok(512));
        assert_eq!(parse("0x10000"), Ok(65536));
        assert_eq!(parse("7E"), Ok(7 << 60));
        assert_eq!(parse("16E"), Err(SizeError::Range));
        assert_eq!(parse("1.5"), Err(SizeError::Invalid));
        for bad in ["", "-1", "1kb", "1k2", "k", "1..5k", "foo", "1 k"] {
            assert_eq!(parse(bad), Err(SizeError::Invalid), "{bad:?}");
        }
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(512), "512 B");
        assert_eq!(human(197_120), "192 KiB");
        assert_eq!(human(200_704), "196 KiB");
        assert_eq!(human(1 << 20), "1 MiB");
        assert_eq!(human(1023 << 10), "0.999 MiB");
        assert_eq!(human(10 << 20), "10 MiB");
        assert_eq!(human(100 << 20), "100 MiB");
        assert_eq!(human(976 << 20), "976 MiB");
        assert_eq!(human(1 << 40), "1 TiB");
        assert_eq!(human(3 << 29), "1.5 GiB");
    }
}
