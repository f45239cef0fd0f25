//! What a transfer asks for, and what it goes to.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use qcow2_image::Image;
use qcow2_io::{Operation, Storage, StorageError, ZeroFlags};
use rustix::io::Errno;

use super::report::Style;
use super::session::{Done, Failed, Session};
use crate::say;
use crate::words::getopt::Parsed;
use crate::words::size;

/// The longest request.
pub(super) const MAX_LEN: u64 = 0x7fff_fe00;
/// What buffers hold where nothing else was asked for.
pub(super) const READ_FILL: u8 = 0xab;
pub(super) const WRITE_FILL: u8 = 0xcd;

/// The switches of a transfer.
#[derive(Clone, Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of its own"
)]
pub(super) struct Switches {
    pub(super) style: Style,
    pub(super) pattern: Option<u8>,
    pub(super) vm_state: bool,
    pub(super) compressed: bool,
    pub(super) durable: bool,
    pub(super) zeros: bool,
    pub(super) unmap: bool,
    pub(super) no_fallback: bool,
    pub(super) verbose: bool,
    /// Which part of what was read is verified: from here, so much.
    pub(super) check_from: Option<u64>,
    pub(super) check_len: Option<u64>,
    pub(super) source: Option<String>,
}

/// A number of bytes or a place, as commands take it.
pub(super) fn number(session: &Session<'_>, text: &str) -> Result<u64, Failed> {
    let parsed = size::parse(text)
        .ok()
        .filter(|value| i64::try_from(*value).is_ok());
    parsed.ok_or_else(|| {
        match size::parse(text) {
            Ok(_) | Err(size::SizeError::Range) => {
                say!(
                    session.console,
                    "Parsing error: argument too large -- {text}"
                );
            }
            Err(_) => say!(
                session.console,
                "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
            ),
        }
        Failed
    })
}

pub(super) fn pattern(session: &Session<'_>, text: &str) -> Result<u8, Failed> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u8::from_str_radix(hex, 16).ok(),
        None => match text.strip_prefix('0') {
            Some(octal) if !octal.is_empty() => u8::from_str_radix(octal, 8).ok(),
            _ => text.parse().ok(),
        },
    };
    parsed.ok_or_else(|| {
        say!(session.console, "{text} is not a valid pattern byte");
        Failed
    })
}

impl Switches {
    /// `-s` means another thing for reads than for writes.
    pub(super) fn from(
        session: &Session<'_>,
        parsed: &Parsed,
        writes: bool,
    ) -> Result<Self, Failed> {
        let mut switches = Self::default();
        for (code, value) in &parsed.options {
            match code {
                'C' => switches.style.brief = true,
                'q' => switches.style.quiet = true,
                'P' => switches.pattern = Some(pattern(session, value)?),
                'b' => switches.vm_state = true,
                'c' => switches.compressed = true,
                'f' => switches.durable = true,
                'z' => switches.zeros = true,
                'u' => switches.unmap = true,
                'n' => switches.no_fallback = true,
                'v' => switches.verbose = true,
                's' if writes => switches.source = Some(value.clone()),
                's' => switches.check_from = Some(number(session, value)?),
                'l' => switches.check_len = Some(number(session, value)?),
                // Buffers are as the engine likes them.
                _ => {}
            }
        }
        Ok(switches)
    }

    /// What does not go together.
    pub(super) fn check(&self, session: &Session<'_>) -> Done {
        let told = |text: &str| {
            say!(session.console, "{text}");
            Err(Failed)
        };
        if self.vm_state && self.zeros {
            return told("-b and -z cannot be specified at the same time");
        }
        if self.vm_state && self.compressed {
            return told("-b and -c cannot be specified at the same time");
        }
        if self.durable && (self.vm_state || self.compressed) {
            return told("-f and -b or -c cannot be specified at the same time");
        }
        if self.zeros && self.compressed {
            return told("-c and -z cannot be specified at the same time");
        }
        if self.no_fallback && !self.zeros {
            return told("-n requires -z to be specified");
        }
        if self.unmap && !self.zeros {
            return told("-u requires -z to be specified");
        }
        let contents = [self.zeros, self.pattern.is_some(), self.source.is_some()];
        if contents.into_iter().filter(|set| *set).count() > 1 {
            return told("Only one of -z, -P, and -s can be specified at the same time");
        }
        Ok(())
    }
}

/// Where a request goes.
#[derive(Clone)]
pub(super) struct Disk {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) image: Option<Arc<Image>>,
    pub(super) writable: bool,
    pub(super) write_through: bool,
    /// Zeros are looked for in what is written; `true`: and may be unmapped.
    pub(super) detect_zeros: Option<bool>,
}

impl Disk {
    pub(super) fn of(session: &Session<'_>) -> Result<Self, Failed> {
        Ok(Self {
            storage: session.storage()?,
            image: session.image(),
            writable: session.node()?.writable,
            write_through: session.mode().writes_through(),
            detect_zeros: match session.node()?.options.text("detect-zeroes") {
                Some("on") => Some(false),
                Some("unmap") => Some(true),
                _ => None,
            },
        })
    }

    /// Refuses what reaches beyond the end, which no request changes.
    pub(super) fn check(
        &self,
        offset: u64,
        len: u64,
        operation: Operation,
    ) -> Result<(), StorageError> {
        let end = self.storage.len()?.next_multiple_of(512);
        match offset.checked_add(len) {
            Some(wanted) if wanted <= end => Ok(()),
            _ => Err(StorageError::from_io(operation, Errno::IO).at(offset, len)),
        }
    }

    pub(super) fn check_writable(&self, operation: Operation) -> Result<(), StorageError> {
        if self.writable {
            return Ok(());
        }
        Err(StorageError::from_io(operation, Errno::PERM))
    }

    /// Whether what is written reads as zeros, and zeros are looked for.
    pub(super) fn finds_zeros(&self, parts: &[Vec<u8>]) -> bool {
        self.detect_zeros.is_some() && parts.iter().flatten().all(|byte| *byte == 0)
    }

    pub(super) fn read(&self, parts: &mut [Vec<u8>], offset: u64) -> Result<(), StorageError> {
        self.check(offset, len_of(parts), Operation::Read)?;
        let mut slices: Vec<_> = parts.iter_mut().map(|part| IoSliceMut::new(part)).collect();
        self.storage.read_vectored_at(&mut slices, offset)
    }

    pub(super) fn write(
        &self,
        parts: &[Vec<u8>],
        offset: u64,
        durable: bool,
    ) -> Result<(), StorageError> {
        self.check_writable(Operation::Write)?;
        self.check(offset, len_of(parts), Operation::Write)?;
        if self.finds_zeros(parts) {
            let flags = match self.detect_zeros {
                Some(true) => ZeroFlags::MAY_UNMAP,
                _ => ZeroFlags::NONE,
            };
            return self.zero(offset, len_of(parts), flags, durable);
        }
        let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        self.storage.write_vectored_at(&slices, offset)?;
        self.settle(durable)
    }

    pub(super) fn zero(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
        durable: bool,
    ) -> Result<(), StorageError> {
        self.check_writable(Operation::WriteZeroes)?;
        self.check(offset, len, Operation::WriteZeroes)?;
        self.storage.write_zeroes(offset..offset + len, flags)?;
        self.settle(durable)
    }

    /// What a request of the guest does in a mode that keeps nothing back.
    pub(super) fn settle(&self, durable: bool) -> Result<(), StorageError> {
        if durable || self.write_through {
            self.storage.flush()?;
        }
        Ok(())
    }
}

pub(super) fn len_of(parts: &[Vec<u8>]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}

/// Place and lengths of a request.
pub(super) fn extent(session: &Session<'_>, parsed: &Parsed) -> Result<(u64, Vec<u64>), Failed> {
    let mut numbers = parsed.operands.iter();
    let offset = match numbers.next() {
        Some(text) => number(session, text)?,
        None => 0,
    };
    let lens: Result<Vec<u64>, Failed> = numbers.map(|text| number(session, text)).collect();
    Ok((offset, lens?))
}

pub(super) fn buffers(
    session: &Session<'_>,
    lens: &[u64],
    fill: u8,
) -> Result<Vec<Vec<u8>>, Failed> {
    let total = lens.iter().fold(0_u64, |sum, len| sum.saturating_add(*len));
    if total > MAX_LEN {
        say!(session.console, "too large a request: {total} bytes");
        return Err(Failed);
    }
    Ok(lens
        .iter()
        .map(|len| vec![fill; usize::try_from(*len).unwrap_or(0)])
        .collect())
}

pub(super) fn one_len(
    session: &Session<'_>,
    lens: &[u64],
    text: Option<&String>,
    zeros: bool,
) -> Result<u64, Failed> {
    let len = lens.first().copied().unwrap_or(0);
    if len > MAX_LEN && !zeros {
        let given = text.map_or("", String::as_str);
        say!(
            session.console,
            "length cannot exceed {MAX_LEN} without -n, given {given}"
        );
        return Err(Failed);
    }
    Ok(len)
}

/// Looks whether a part of what was read is what it should be.
pub(super) fn verify(
    console: &crate::Console,
    bytes: &[u8],
    offset: u64,
    switches: &Switches,
) -> bool {
    let Some(pattern) = switches.pattern else {
        return true;
    };
    let from = switches.check_from.unwrap_or(0);
    let len = switches
        .check_len
        .unwrap_or((bytes.len() as u64).saturating_sub(from));
    let range = usize::try_from(from).unwrap_or(usize::MAX)
        ..usize::try_from(from.saturating_add(len)).unwrap_or(usize::MAX);
    let same = bytes
        .get(range)
        .is_some_and(|part| part.iter().all(|byte| *byte == pattern));
    if !same {
        say!(
            console,
            "Pattern verification failed at offset {}, {len} bytes",
            offset.saturating_add(from)
        );
    }
    same
}
