//! Requests to clusters that are there.

use anyhow::Result;
use qcow2_image::{Image, OverlapChecks, Template};
use qcow2_io::{FileOptions, LockMode};

use super::Setting;
use super::disk::{ensure_same, full_image, full_raw};
use super::samples::{Samples, warm_in_turn};
use super::work::{Kind, Order, Work};

/// Bytes of the disks.
pub(super) const LEN: u64 = 1 << 30;

/// The same requests to an image and to a plain file of the same content.
pub(super) fn beside_plain_file(setting: &Setting, work: Work) -> Result<Samples> {
    let image = full_image(&setting.dir.join("image.qcow2"), LEN)?;
    let raw = full_raw(&setting.dir.join("raw"), LEN)?;
    let samples = warm_in_turn(
        setting.short_runs(),
        |turn| work.rate(&image, LEN, turn),
        |turn| work.rate(&raw, LEN, turn),
    )?;
    ensure_same(&image, &raw, LEN)?;
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
    full_image(&path, LEN)?.close()?;
    // Both may have it open at once: writes in place change no metadata.
    let open = |template| -> Result<Image> {
        let file = FileOptions::new().write(true).lock(LockMode::None);
        let options = Image::options().overlap_checks(OverlapChecks::template(template));
        Ok(options.open_file(file.open(&path)?)?)
    };
    let (all, none) = (open(Template::All)?, open(Template::None)?);
    warm_in_turn(
        setting.short_runs() * 2,
        |turn| WORK.rate(&all, LEN, turn),
        |turn| WORK.rate(&none, LEN, turn),
    )
}
