//! Numbers of bytes for people. What they type, the library reads.

pub use qcow2_image::create::{SizeError, parse_size as parse};

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
