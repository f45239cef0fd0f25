//! What the file has, brought into memory.

use qcow2_format::bitmap::BitmapCluster;

use super::directory::Known;
use super::record::full_page;
use super::tracker::{PAGE_WORDS, Tracker};
use crate::{Image, ImageError};

impl Image {
    /// Makes a page, and brings what the file has into it.
    pub(super) fn load_page(
        &self,
        known: &Known,
        tracker: &Tracker,
        number: u64,
        kind: BitmapCluster,
    ) -> Result<(), ImageError> {
        let Some(page) = tracker.make_page(number) else {
            return Ok(());
        };
        if page.is_loaded() {
            return Ok(());
        }
        let full = full_page(number, self.bit_count(known));
        let mut words = match kind {
            BitmapCluster::AllZeros => [0; PAGE_WORDS],
            BitmapCluster::AllOnes => full,
            BitmapCluster::Cluster(offset) => {
                let pages = self.bits_of(known).read_pages(offset, number, 1)?;
                pages.first().copied().unwrap_or([0; PAGE_WORDS])
            }
        };
        for (word, full) in words.iter_mut().zip(full) {
            *word &= full;
        }
        page.load(&words);
        Ok(())
    }

    /// Brings a cluster of data of which the file has nothing into memory: all its pages.
    pub(super) fn load_empty(
        &self,
        known: &Known,
        tracker: &Tracker,
        number: u64,
    ) -> Result<Vec<u64>, ImageError> {
        let pages = self.pages_in(number, self.bit_count(known));
        for page in pages.clone() {
            self.load_page(known, tracker, page, BitmapCluster::AllZeros)?;
        }
        Ok(pages.collect())
    }
}
