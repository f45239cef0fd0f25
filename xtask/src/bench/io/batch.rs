//! Deep queues.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use qcow2_image::Image;
use qcow2_io::{FileOptions, Op, Storage, Uring};

use super::Setting;
use super::clock::{Clock, Stopwatch};
use super::disk::{self, Disk, Inside};
use super::in_place::LEN;
use super::samples::{Samples, warm_in_turn};
use super::work::{Buffer, Random};

const DEPTH: usize = 32;
const SIZE: usize = 4096;
/// Batches of one turn.
const COUNT: u32 = 512;

/// Batches of reads from an image, through io_uring where it helps, shared with so many helper threads, beside single reads of the
/// same bytes.
pub(super) fn beside_single_reads(
    setting: &Setting,
    dir: &Path,
    helpers: usize,
) -> Result<Samples> {
    let path = dir.join("image.qcow2");
    disk::create_full(&path, LEN)?;
    let file = Uring::new(FileOptions::new().write(true).open(&path)?).with_helpers(helpers);
    let image = Image::options().open(Arc::new(file))?;
    let inside = Inside::open(&path, &image)?;
    // What helpers spend on their processors is not seen by the thread that measures.
    let clock = if helpers > 0 {
        Clock::Wall
    } else {
        setting.clock
    };
    warm_in_turn(
        setting.short_runs(),
        |turn| batches(clock, &image, turn),
        |turn| singles(clock, &inside, turn),
    )
}

fn batches(clock: Clock, image: &Image, turn: u32) -> Result<f64> {
    run(clock, turn, |buffer, random| {
        let buffers = buffer.bytes().chunks_exact_mut(SIZE);
        let mut ops: Vec<_> = buffers.map(|buf| Op::read(buf, place(random))).collect();
        image.submit(&mut ops);
        for op in &mut ops {
            op.take_result().context("a read has no result")??;
        }
        Ok(())
    })
}

fn singles(clock: Clock, inside: &Inside, turn: u32) -> Result<f64> {
    run(clock, turn, |buffer, random| {
        for buf in buffer.bytes().chunks_exact_mut(SIZE) {
            inside.read(buf, place(random))?;
        }
        Ok(())
    })
}

fn place(random: &mut Random) -> u64 {
    random.below(LEN / SIZE as u64) * SIZE as u64
}

/// Requests per second of one turn.
fn run(
    clock: Clock,
    turn: u32,
    batch: impl Fn(&mut Buffer, &mut Random) -> Result<()>,
) -> Result<f64> {
    let mut buffer = Buffer::new(DEPTH * SIZE);
    let mut random = Random::new(u64::from(turn));
    let watch = Stopwatch::start();
    for _ in 0..COUNT {
        batch(&mut buffer, &mut random)?;
    }
    Ok(watch.rate(clock, COUNT * u32::try_from(DEPTH)?))
}
