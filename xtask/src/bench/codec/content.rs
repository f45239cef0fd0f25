//! What is copied: a disk such as people have, with programs, texts, pictures, noise and emptiness.
//!
//! Of every 16 MiB, one is random and one is zeros; the others are the files of this system, sorted by name. Where there are too few,
//! words of a small language follow. So two runs on one system have the same disk.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use qcow2_image::testing::Random;

const MIB: usize = 1 << 20;
/// Mebibytes until the mixture repeats.
const PERIOD: u64 = 16;
/// Where files are taken from.
const FOLDERS: [&str; 2] = ["/usr/lib", "/usr/share"];
/// Letters of the small language, the frequent ones several times.
const LETTERS: &[u8] = b"eeeetttaaaooiinnsshhrrdlcumwfgypbvk";
/// Words of it.
const WORDS: usize = 4096;

/// Writes a disk of `len` bytes.
pub(super) fn write(path: &Path, len: u64) -> Result<()> {
    let file = File::create_new(path).with_context(|| path.display().to_string())?;
    let mut out = BufWriter::with_capacity(MIB, file);
    let mut files = Files::new();
    let mut random = Random::new(len);
    let words = words(&mut random);
    let mut piece = vec![0; MIB];
    for number in 0..len / MIB as u64 {
        match number % PERIOD {
            5 => noise(&mut piece, &mut random),
            11 => piece.fill(0),
            _ => {
                let filled = files.read(&mut piece);
                text(
                    piece.get_mut(filled..).unwrap_or_default(),
                    &words,
                    &mut random,
                );
            }
        }
        out.write_all(&piece)?;
    }
    out.flush()?;
    Ok(())
}

fn noise(bytes: &mut [u8], random: &mut Random) {
    for chunk in bytes.chunks_mut(8) {
        let word = random.draw().to_be_bytes();
        chunk.copy_from_slice(word.get(..chunk.len()).unwrap_or_default());
    }
}

fn words(random: &mut Random) -> Vec<Vec<u8>> {
    (0..WORDS)
        .map(|_| {
            let len = random.within(2..11);
            let mut word: Vec<u8> = (0..len).map(|_| random.pick(LETTERS)).collect();
            word.push(b' ');
            word
        })
        .collect()
}

/// Fills with words, short numbers of which are frequent.
fn text(bytes: &mut [u8], words: &[Vec<u8>], random: &mut Random) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let limit = random.within(1..WORDS as u64 + 1);
        let index = usize::try_from(random.below(limit)).unwrap_or(0);
        let word = words.get(index).map_or(&b" "[..], Vec::as_slice);
        let len = word.len().min(rest.len());
        let (part, behind) = rest.split_at_mut(len);
        part.copy_from_slice(word.get(..len).unwrap_or_default());
        rest = behind;
    }
}

/// The bytes of all files, one after the other.
struct Files {
    /// Not read yet, the next one last.
    paths: Vec<PathBuf>,
    open: Option<File>,
}

impl Files {
    fn new() -> Self {
        let mut paths: Vec<PathBuf> = FOLDERS.iter().rev().map(PathBuf::from).collect();
        paths.retain(|path| path.is_dir());
        Self { paths, open: None }
    }

    /// Fills as much as there is; tells how much.
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            if self.open.is_none() {
                match self.next() {
                    Some(file) => self.open = Some(file),
                    None => break,
                }
            }
            // What can't be read is passed over.
            match self.open.as_mut().map(|file| file.read(rest)) {
                Some(Ok(len)) if len > 0 => filled += len,
                _ => self.open = None,
            }
        }
        filled
    }

    /// The next file that can be opened. Folders give way to what is in them, sorted.
    fn next(&mut self) -> Option<File> {
        loop {
            let path = self.paths.pop()?;
            let Ok(about) = fs::symlink_metadata(&path) else {
                continue;
            };
            if about.is_dir() {
                let inside = fs::read_dir(&path).into_iter().flatten().flatten();
                let mut inside: Vec<_> = inside.map(|entry| entry.path()).collect();
                inside.sort_unstable_by(|a, b| b.cmp(a));
                self.paths.extend(inside);
            } else if about.is_file()
                && let Ok(file) = File::open(&path)
            {
                return Some(file);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_has_noise_and_zeros_where_they_are_expected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        write(&path, 16 << 20).unwrap();
        let disk = fs::read(&path).unwrap();
        assert_eq!(disk.len(), 16 << 20);
        let mib = |number: usize| &disk[number << 20..(number + 1) << 20];
        assert!(mib(11).iter().all(|byte| *byte == 0));
        assert!((0..=255).all(|byte: u8| mib(5).contains(&byte)));
    }

    #[test]
    fn text_repeats_its_words() {
        let mut random = Random::new(1);
        let words = words(&mut random);
        let mut bytes = vec![0; 10_000];
        text(&mut bytes, &words, &mut random);
        assert!(
            bytes
                .iter()
                .all(|byte| *byte == b' ' || LETTERS.contains(byte))
        );
    }
}
