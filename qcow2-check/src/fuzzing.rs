//! What the fuzz targets call, beside the code so that a plain test can replay their inputs.

use std::ops::ControlFlow;

use qcow2_format::header::Header;
use qcow2_format::{GuestOffset, HostOffset};
use qcow2_io::{Fault, Faulty, Memory, Operation, Storage};

use crate::repair::{DataCipher, Key, KeyError, Level, RepairOptions, plan, undo};
use crate::{Options, Report, Severity, audit, owners, recount};

/// Audits arbitrary bytes as an image. The last eight bytes say how much longer than its content the file is and which
/// cluster's owners to name, so that far references can lie inside the file, too.
///
/// # Panics
///
/// If the report depends on the number of threads, keeps more than it may, or a recount contradicts it.
pub fn image(data: &[u8]) {
    let Some((content, head)) = data.split_last_chunk::<8>() else {
        return;
    };
    let [shift, factor, rest @ ..] = *head;
    let storage = Memory::from(content.to_vec());
    let longer = u64::from(factor) << (shift % 40);
    if storage
        .set_len((content.len() as u64).saturating_add(longer))
        .is_err()
    {
        return;
    }
    let one = Options {
        threads: 1,
        max_findings: 5,
        deep: true,
        ..Options::default()
    };
    let report = audit(&storage, &one);
    for (code, total) in &report.totals {
        let kept: Vec<u64> = report
            .findings
            .iter()
            .filter(|finding| finding.code == *code)
            .map(|finding| finding.count)
            .collect();
        assert!(kept.len() <= 5, "{code} is kept too often");
        assert!(kept.into_iter().fold(0, u64::saturating_add) <= *total);
    }
    if report.verdict() == crate::Verdict::Sound {
        assert_eq!(report.total_of(Severity::Corruption), 0);
    }
    let offset = rest
        .iter()
        .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    if let Ok(found) = owners(&storage, HostOffset::new(offset), &one) {
        assert!(found.owners.len() <= 64);
    }
    let sum = content
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    // What takes as long again as most inputs, some inputs do.
    if sum % 4 == 0 {
        recounted(&storage, &one, &report);
    }
    // So it is with starting threads. Where a check is cut off depends on them.
    if sum % 16 == 0 && report.total(crate::Code::CheckLimited) == 0 {
        let again = audit(&storage, &Options { threads: 2, ..one });
        assert_eq!(report.counts, again.counts, "counts depend on threads");
        assert_eq!(report.totals, again.totals, "totals depend on threads");
        assert_eq!(
            report.findings, again.findings,
            "findings depend on threads"
        );
    }
}

/// Bytes that a repair may let the file grow by.
const GROWTH_MAX: u64 = 4 << 20;

/// Repairs arbitrary bytes as an image, and undoes that. The last two bytes say how far the repair goes, whether it has a key and whether all of the
/// file can be read, and how much longer than its content the file is.
///
/// # Panics
///
/// If planning changes the image, a repair writes where its plan doesn't say, ends otherwise than promised, wants to do more when it is
/// repeated, or can't be undone.
pub fn repair(data: &[u8]) {
    let Some((content, [settings, longer])) = data.split_last_chunk::<2>() else {
        return;
    };
    let level = match settings % 3 {
        0 => Level::Leaks,
        1 => Level::All,
        _ => Level::Salvage,
    };
    let mut before = content.to_vec();
    before.resize(content.len() + (usize::from(*longer) << 9), 0);
    let image = Memory::from(before.clone());
    let options = RepairOptions {
        level,
        threads: 1,
        max_actions: 5,
        max_growth: Some(GROWTH_MAX),
        key: (settings / 3 % 2 == 1).then_some(&Shifted),
        ..RepairOptions::default()
    };
    if settings / 6 % 4 == 1 {
        // Any sector, and not always the same.
        let sum = content.iter().fold(0_u64, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
        });
        let sectors = (before.len() as u64).div_ceil(512).max(1);
        unreadable(&before, sum % sectors, &options);
        return;
    }
    let Ok(made) = plan(&image, &options) else {
        assert!(bytes(&image) == before, "planning changes the image");
        return;
    };
    assert!(bytes(&image) == before, "planning changes the image");
    let promised = made.after().verdict();
    let is_sound = promised == crate::Verdict::Sound;
    let (writes, new_len) = (made.writes(), made.new_len());
    let file = Memory::new();
    made.apply(Some(&file)).expect("memory can be written");
    drop(made);
    let after = bytes(&image);
    assert_eq!(after.len() as u64, new_len, "another length than promised");
    let pairs = (0_u64..).zip(before.iter().chain(std::iter::repeat(&0)).zip(&after));
    let mut told = writes.iter().peekable();
    for (at, (old, new)) in pairs {
        while told.next_if(|range| range.end <= at).is_some() {}
        let is_told = told.peek().is_some_and(|range| range.start <= at);
        assert!(
            old == new || is_told,
            "a write at {at:#x} that the plan doesn't tell"
        );
    }
    let again = plan(&image, &options);
    let again = again.as_ref().ok().filter(|_| is_sound);
    if let Some(again) = again {
        assert_eq!(
            again.before().verdict(),
            promised,
            "another end than promised"
        );
        assert!(again.is_empty(), "once more does more: {again}");
    }
    undo(&image, &file, false).expect("memory can be written");
    assert!(bytes(&image) == before, "undo brings something else back");
}

/// The same, with a sector that can't be read until the repair is through.
fn unreadable(before: &[u8], sector: u64, options: &RepairOptions<'_>) {
    let image = Faulty::new(Memory::from(before.to_vec()));
    let fault = Fault::on(Operation::Read).within(sector * 512..(sector + 1) * 512);
    image.add(fault.forever());
    let file = Memory::new();
    let made = plan(&image, options).ok();
    let applied = made.is_some_and(|made| {
        let applied = made.apply(Some(&file));
        applied.expect("what can't be read is not written");
        true
    });
    image.clear();
    if applied {
        undo(&image, &file, false).expect("memory can be written");
    }
    assert!(
        bytes(image.get_ref()) == before,
        "undo brings something else back"
    );
}

/// A key for anything, and a cipher that adds the sector's number.
#[derive(Debug)]
struct Shifted;

impl Key for Shifted {
    fn open(&self, _: &dyn Storage, _: &Header) -> Result<Box<dyn DataCipher>, KeyError> {
        Ok(Box::new(Self))
    }
}

impl DataCipher for Shifted {
    fn decrypt(&self, _: GuestOffset, host: HostOffset, bytes: &mut [u8]) -> Result<(), KeyError> {
        for (number, sector) in (host.get() / 512..).zip(bytes.chunks_mut(512)) {
            let [.., shift] = number.to_be_bytes();
            for byte in sector {
                *byte = byte.wrapping_sub(shift);
            }
        }
        Ok(())
    }

    fn encrypt(&self, _: GuestOffset, host: HostOffset, bytes: &mut [u8]) -> Result<(), KeyError> {
        for (number, sector) in (host.get() / 512..).zip(bytes.chunks_mut(512)) {
            let [.., shift] = number.to_be_bytes();
            for byte in sector {
                *byte = byte.wrapping_add(shift);
            }
        }
        Ok(())
    }
}

fn bytes(image: &Memory) -> Vec<u8> {
    image.to_vec().expect("memory can be read")
}

/// Recounts the references of an image that `report` tells of.
fn recounted(storage: &Memory, options: &Options<'_>, report: &Report) {
    let Ok(count) = recount(storage, options) else {
        assert!(report.total_of(Severity::Error) > 0);
        return;
    };
    assert_eq!(count.is_complete(), report.complete);
    let mut last = None;
    let mut calls = 0;
    let refcounts = count.refcount_differences(|difference| {
        assert_ne!(difference.found, difference.expected);
        assert!(last < Some(difference.cluster), "clusters out of order");
        last = Some(difference.cluster);
        calls += 1;
        if calls < 1000 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    assert!(refcounts.is_ok(), "memory can be read");
    let mut flags = 0;
    let flags = count.copied_differences(|_| {
        flags += 1;
        if flags < 1000 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    assert!(flags.is_ok(), "memory can be read");
}
