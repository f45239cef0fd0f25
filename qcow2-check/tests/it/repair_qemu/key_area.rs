//! The area of LUKS keys: whoever loses it has lost the disk. No repair frees or overwrites any of it.

use qcow2_check::repair::{Level, PlanError, RepairOptions, plan};
use qcow2_io::Memory;

use super::classes::Bytes;
use super::mutants::damaged;
use crate::mutants::bases;
use crate::mutants::damage;
use crate::oracle;

const CLUSTER_BITS: u64 = 16;
/// One in so many kinds of damage is tried, and all of those in the first cluster.
const STEP: usize = 5;

/// The refcount of a cluster, by an image's own table; `None` where there is no block.
fn refcount(bytes: &[u8], cluster: u64) -> Option<u8> {
    let number = |at: u64| {
        let at = usize::try_from(at).ok()?;
        let word = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_be_bytes(word.try_into().unwrap()))
    };
    let block = number(number(48)?)? & !511;
    let at = usize::try_from(block.checked_add(cluster * 2 + 1)?).ok()?;
    (block != 0).then(|| bytes.get(at).copied())?
}

#[test]
fn no_repair_frees_or_overwrites_the_area_of_luks_keys() {
    if !oracle::is_available(300, "repairs of LUKS images") {
        return;
    }
    let base = bases::named("luks");
    let start = base.bytes.windows(6).position(|w| w == b"LUKS\xba\xbe");
    let start = start.unwrap() as u64;
    let end = start + 2_068_480;
    let clusters = start >> CLUSTER_BITS..((end - 1) >> CLUSTER_BITS) + 1;
    assert!(
        clusters
            .clone()
            .all(|c| refcount(&base.bytes, c) == Some(1))
    );
    let mut tried = 0;
    let mut repaired_by = [0; 3];
    for (number, mutant) in damage::all(&base.bytes).into_iter().enumerate() {
        if number % STEP != 0 {
            continue;
        }
        let before = damaged(&base, &mutant);
        for (level, repaired) in [Level::Leaks, Level::All, Level::Salvage]
            .into_iter()
            .zip(&mut repaired_by)
        {
            tried += 1;
            let what = format!("{mutant}, {level}");
            let image = Memory::from(before.clone());
            let options = RepairOptions {
                level,
                threads: 1,
                ..RepairOptions::default()
            };
            let made = match plan(&image, &options) {
                Ok(made) => made,
                Err(PlanError::Hopeless(_)) => continue,
                Err(error) => panic!("{what}: {error}"),
            };
            for range in made.writes() {
                let apart = range.end <= start || end <= range.start;
                // Behind the end of a file that was cut there is nothing.
                let behind = range.start >= before.len() as u64;
                assert!(apart || behind, "{what}: {range:?}\n{made}");
            }
            made.apply(None).unwrap();
            *repaired += usize::from(!made.is_empty());
            let after = Bytes(image.to_vec().unwrap());
            // What lies behind the end of a file that was cut is gone.
            let there = |cluster: &u64| cluster << CLUSTER_BITS < before.len() as u64;
            for cluster in clusters.clone().filter(there) {
                let was = refcount(&before, cluster).unwrap_or(0);
                let is = refcount(&after.0, cluster).unwrap_or(0);
                assert!(
                    was == 0 || is > 0,
                    "{what}: cluster {cluster} is free\n{made}"
                );
            }
        }
    }
    assert!(
        tried > 100 && repaired_by.iter().all(|n| *n > 0),
        "{tried} {repaired_by:?}"
    );
}
