//! Lives of images: snapshots, bitmaps, sizes, versions, backing files come and go, by this engine and by QEMU in turn.
//!
//! One seed is one life. After each deed the disk, every snapshot and every bitmap must be what plain bytes say, for the engine and
//! for QEMU, and both checkers must call the image clean.

mod deed;
mod judge;
mod model;
mod ours;
mod theirs;

use std::path::Path;

use self::deed::Deed;
use self::model::Model;
use super::failure::Failure;
use super::random::Random;

/// The image, in its folder.
const IMAGE: &str = "life.qcow2";
/// The raw backing files it may have; they are there from the beginning.
const BASES: [&str; 2] = ["base0.raw", "base1.raw"];

/// Who does a deed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hand {
    Ours,
    Theirs,
}

/// Lives the life of a seed, so many deeds long, in a folder of its own.
///
/// # Errors
///
/// What went wrong, with all deeds up to then.
pub fn live(seed: u64, deeds: usize, folder: &Path) -> Result<(), Failure> {
    let mut random = Random::new(seed);
    let mut model = Model::random(&mut random);
    let mut story = vec![format!("seed {seed}: {}", model.birth())];
    let told = |story: &[String], failure: Failure| failure.during(story.join("\n"));
    ours::bear(&model, folder).map_err(|failure| told(&story, failure))?;
    for _ in 0..deeds {
        let deed = Deed::random(&mut random, &model);
        let hand = if deed.is_ours_only(&model) || random.one_in(2) {
            Hand::Ours
        } else {
            Hand::Theirs
        };
        story.push(format!("{hand:?} {deed:?}"));
        let done = match hand {
            Hand::Ours => ours::work(&deed, folder),
            Hand::Theirs => theirs::work(&deed, &model, folder),
        };
        done.map_err(|failure| told(&story, failure))?;
        model.follow(&deed);
        judge::judge(&mut model, &deed, folder).map_err(|failure| told(&story, failure))?;
    }
    Ok(())
}
