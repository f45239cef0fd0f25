//! What became of a request, in the words of the reference program.

use std::fmt::Write as _;
use std::time::Duration;

use crate::{Console, say};

/// A number of bytes: `512 bytes`, `64 KiB`, `1.500 MiB`.
pub(super) fn bytes(count: f64) -> String {
    const UNITS: [(f64, &str); 6] = [
        (1_152_921_504_606_846_976.0, "EiB"),
        (1_125_899_906_842_624.0, "PiB"),
        (1_099_511_627_776.0, "TiB"),
        (1_073_741_824.0, "GiB"),
        (1_048_576.0, "MiB"),
        (1024.0, "KiB"),
    ];
    let (value, unit) = UNITS
        .iter()
        .find(|(size, _)| count >= *size)
        .map_or((count, "bytes"), |(size, unit)| (count / size, *unit));
    let number = if unit == "bytes" && value.fract() != 0.0 {
        format!("{value:.6}")
    } else {
        format!("{value:.3}")
    };
    let number = number.strip_suffix(".000").unwrap_or(&number);
    format!("{number} {unit}")
}

/// The same of a whole number.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(super) fn size(count: u64) -> String {
    bytes(count as f64)
}

/// How requests are told of.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Style {
    /// One line with figures only.
    pub(super) brief: bool,
    /// Nothing.
    pub(super) quiet: bool,
}

/// Tells that `total` of `count` bytes at `offset` were worked on, in so much time.
pub(super) fn tell(
    console: &Console,
    style: Style,
    what: &str,
    offset: u64,
    count: u64,
    total: u64,
    time: Duration,
) {
    if style.quiet {
        return;
    }
    // As if a request could take no time at all.
    let seconds = time.as_secs_f64().max(1e-9);
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let rate = total as f64 / seconds;
    if style.brief {
        say!(
            console,
            "{total},1,{},{rate:.3},{:.3}",
            clock(time, true),
            1.0 / seconds
        );
        return;
    }
    // In one piece: others may speak at the same time.
    say!(
        console,
        "{what} {total}/{count} bytes at offset {offset}\n{}, 1 ops; {} ({}/sec and {:.4} ops/sec)",
        size(total),
        clock(time, false),
        bytes(rate),
        1.0 / seconds
    );
}

/// `00.01 sec`, or with hours and minutes.
fn clock(time: Duration, always_long: bool) -> String {
    let seconds = time.as_secs();
    let hundredths = time.subsec_millis() / 10;
    if seconds >= 60 || always_long {
        format!(
            "{}:{:02}:{:02}.{hundredths:02}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        )
    } else {
        format!("{seconds:02}.{hundredths:02} sec")
    }
}

/// The bytes in hexadecimal and as text, sixteen a line.
pub(super) fn dump(console: &Console, offset: u64, bytes: &[u8]) {
    for (line, chunk) in (0_u64..).zip(bytes.chunks(16)) {
        let mut text = format!("{:08x}:  ", offset.wrapping_add(line * 16));
        for byte in chunk {
            _ = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        for byte in chunk {
            let shown = byte.is_ascii_graphic() || *byte == b' ';
            text.push(if shown { char::from(*byte) } else { '.' });
        }
        say!(console, "{text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_behind_the_point_or_none() {
        assert_eq!(size(0), "0 bytes");
        assert_eq!(size(512), "512 bytes");
        assert_eq!(size(65536), "64 KiB");
        assert_eq!(size(1536), "1.500 KiB");
        assert_eq!(size(1 << 40), "1 TiB");
        assert_eq!(clock(Duration::from_millis(1234), false), "01.23 sec");
        assert_eq!(clock(Duration::from_secs(3723), false), "1:02:03.00");
    }
}
