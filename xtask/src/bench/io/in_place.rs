//! Requests to clusters that are there.

use anyhow::Result;
use qcow2_image::{Image, OverlapChecks, Template};
use qcow2_io::{FileOptions, LockMode};

use super::Setting;
use super::disk::{self, Inside};
use super::samples::{Samples, warm_in_turn};
use super::work::{Kind, Order, Work};

/// Bytes of the disks.
pub(super) const LEN: u64 = 1 << 30;

/// The same requests to an image and to the same bytes of its file.
pub(super) fn beside_plain_calls(setting: &Setting, work: Work) -> Result<Samples> {
    let path = setting.dir.join("image.qcow2");
    disk::create_full(&path, LEN)?;
    let image = disk::open(&path)?;
    let inside = Inside::open(&path, &image)?;
    let samples = warm_in_turn(
        setting.short_runs(),
        |turn| work.rate(setting.clock, &image, LEN, turn),
        |turn| work.rate(setting.clock, &inside, LEN, turn),
    )?;
    image.close()?;
    Ok(samples)
}

/// Writes with all checks, beside writes to the same file without any.
pub(super) fn overlap_checks(setting: &Setting) -> Result<Samples> {
    const WORK: Work = Work {
        kind: Kind::Write,
        order: Order::Random,
        size: 4096,
        count: 1 << 14,
        threads: 1,
    };
    let path = setting.dir.join("image.qcow2");
    disk::create_full(&path, LEN)?;
    // Both may have it open at once: writes in place change no metadata.
    let open = |template| -> Result<Image> {
        let file = FileOptions::new().write(true).lock(LockMode::None);
        let options = Image::options().overlap_checks(OverlapChecks::template(template));
        Ok(options.open_file(file.open(&path)?)?)
    };
    let (all, none) = (open(Template::All)?, open(Template::None)?);
    warm_in_turn(
        setting.short_runs() * 2,
        |turn| WORK.rate(setting.clock, &all, LEN, turn),
        |turn| WORK.rate(setting.clock, &none, LEN, turn),
    )
}
