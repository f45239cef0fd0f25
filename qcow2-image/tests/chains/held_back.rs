use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2_image::chain::{BackingFile, ChainError};
use qcow2_image::commit::CommitOptions;
use qcow2_image::create::CreateOptions;
use qcow2_image::difference::{Changes, Comparison, ExportOptions, export};
use qcow2_image::rebase::RebaseOptions;
use qcow2_image::{Image, Monitor};
use qcow2_io::{Memory, Storage};

const LEN: u64 = 1 << 40;
const PIECE: u64 = 3 << 20;

/// Ends the work after its first piece.
#[derive(Default)]
struct Once(AtomicU64);

impl Monitor for Once {
    fn progress(&self, _done: u64, _total: u64) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// A large overlay with a few pieces of data over an empty disk.
fn overlay() -> (Image, Arc<Memory>) {
    let base = Arc::new(Memory::new());
    Image::create(&base, &CreateOptions::new(LEN)).unwrap();
    let base = Image::options().open(base).unwrap();
    let base = BackingFile::image("base", Arc::new(base));
    let top = Arc::new(Memory::new());
    let options = CreateOptions::new(LEN).backing_file("base", "qcow2");
    Image::create(&top, &options).unwrap();
    let options = Image::options().backing_file(&base);
    let image = options.open(top.clone()).unwrap();
    let piece = vec![7; usize::try_from(PIECE).unwrap()];
    image.write_at(&piece, LEN / 2).unwrap();
    (image, top)
}

type Work = fn(&mut Image, u64, Option<&Once>) -> Result<(), ChainError>;

fn commit(image: &mut Image, rate: u64, monitor: Option<&Once>) -> Result<(), ChainError> {
    let mut options = CommitOptions::new().rate(rate).threads(2);
    if let Some(monitor) = monitor {
        options = options.monitor(monitor);
    }
    image.commit(&options).map(drop)
}

/// Its data comes from an overlay below.
fn rebase(image: &mut Image, rate: u64, monitor: Option<&Once>) -> Result<(), ChainError> {
    let mut options = RebaseOptions::new().rate(rate).threads(2);
    if let Some(monitor) = monitor {
        options = options.monitor(monitor);
    }
    image.rebase(None, &options).map(drop)
}

/// What differs from an empty disk.
fn store(image: &mut Image, rate: u64, monitor: Option<&Once>) -> Result<(), ChainError> {
    let target = Arc::new(Memory::new());
    Image::create(&target, &CreateOptions::new(LEN)).unwrap();
    let below = Arc::new(Memory::new());
    let target = Image::options().backing(below).open(target).unwrap();
    let mut options = ExportOptions::new().rate(rate).threads(2);
    if let Some(monitor) = monitor {
        options = options.monitor(monitor);
    }
    let chain = image.chain();
    let changes = Changes::Between {
        old: &chain.clone().below(1),
        comparison: Comparison::Structure,
    };
    export(&chain, changes, &target, &options).map(drop)
}

fn image_for(work: Work) -> Image {
    let (image, file) = overlay();
    if !std::ptr::fn_addr_eq(work, rebase as Work) {
        return image;
    }
    drop(file);
    let below = BackingFile::image("below", Arc::new(image));
    let top = Arc::new(Memory::new());
    let options = CreateOptions::new(LEN).backing_file("below", "qcow2");
    Image::create(&top, &options).unwrap();
    Image::options().backing_file(&below).open(top).unwrap()
}

#[test]
fn work_on_chains_can_be_held_back_by_its_data_and_not_by_its_length() {
    for (name, work) in [
        ("commit", commit as Work),
        ("rebase", rebase),
        ("export", store),
    ] {
        // The first piece comes at once, the second after a moment, the third after one more.
        let mut image = image_for(work);
        let start = Instant::now();
        work(&mut image, PIECE, None).unwrap();
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(600), "{name}: {took:?}");
        assert!(took < Duration::from_secs(60), "{name}: {took:?}");

        // The second piece would come in a day, if nobody ended it.
        let mut image = image_for(work);
        let once = Once::default();
        let error = work(&mut image, 10, Some(&once)).unwrap_err();
        assert!(matches!(error, ChainError::Cancelled), "{name}: {error}");
        let mut bytes = [0; 4096];
        image.read_at(&mut bytes, LEN / 2 + PIECE - 4096).unwrap();
        assert_eq!(bytes, [7; 4096], "{name}");
    }
}
