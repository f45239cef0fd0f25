//! Deep queues without threads.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use qcow2_image::Image;
use qcow2_io::{FileOptions, Op, Storage, Uring};

use super::Setting;
use super::disk::{Disk, Raw, ensure_same, full_image, full_raw};
use super::in_place::LEN;
use super::samples::{Samples, warm_in_turn};
use super::work::{Buffer, Random};

const DEPTH: usize = 32;
const SIZE: usize = 4096;
/// Batches of one turn.
const COUNT: u32 = 512;

/// Batches of reads from an image, through io_uring where it helps, beside single reads from a plain file.
pub(super) fn beside_single_reads(setting: &Setting, dir: &Path) -> Result<Samples> {
    let path = dir.join("image.qcow2");
    full_image(&path, LEN)?.close()?;
    let file = Uring::new(FileOptions::new().write(true).open(&path)?);
    let image = Image::options().open(Arc::new(file))?;
    let raw = full_raw(&dir.join("raw"), LEN)?;
    // All of it is in memory from here on.
    ensure_same(&image, &raw, LEN)?;
    warm_in_turn(
        setting.short_runs(),
        |turn| batches(&image, turn),
        |turn| singles(&raw, turn),
    )
}

fn batches(image: &Image, turn: u32) -> Result<f64> {
    run(turn, |buffer, random| {
        let buffers = buffer.bytes().chunks_exact_mut(SIZE);
        let mut ops: Vec<_> = buffers.map(|buf| Op::read(buf, place(random))).collect();
        image.submit(&mut ops);
        for op in &mut ops {
            op.take_result().context("a read has no result")??;
        }
        Ok(())
    })
}

fn singles(raw: &Raw, turn: u32) -> Result<f64> {
    run(turn, |buffer, random| {
        for buf in buffer.bytes().chunks_exact_mut(SIZE) {
            raw.read(buf, place(random))?;
        }
        Ok(())
    })
}

fn place(random: &mut Random) -> u64 {
    random.below(LEN / SIZE as u64) * SIZE as u64
}

/// Requests per second of one turn.
fn run(turn: u32, batch: impl Fn(&mut Buffer, &mut Random) -> Result<()>) -> Result<f64> {
    let mut buffer = Buffer::new(DEPTH * SIZE);
    let mut random = Random::new(u64::from(turn));
    let start = Instant::now();
    for _ in 0..COUNT {
        batch(&mut buffer, &mut random)?;
    }
    let requests = f64::from(COUNT) * f64::from(u32::try_from(DEPTH)?);
    Ok(requests / start.elapsed().as_secs_f64())
}
