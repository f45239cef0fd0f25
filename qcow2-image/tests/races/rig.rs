use std::sync::Arc;
use std::thread::{Scope, ScopedJoinHandle};

use qcow2_check::{Options, Verdict, audit};
use qcow2_image::create::CreateOptions;
use qcow2_image::testing::Random;
use qcow2_image::{Image, ImageOptions};
use qcow2_io::{Blocking, Event, Memory, Storage, Trace, replay};

/// Bits of an entry that hold a host offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What lies below an image under test.
pub(crate) type Store = Blocking<Trace<Memory>>;

/// An image whose requests can be stopped, and are recorded.
pub(crate) struct Rig {
    pub(crate) store: Arc<Store>,
    pub(crate) image: Image,
    /// The file before the first recorded event.
    start: Vec<u8>,
}

impl Rig {
    /// A new image, opened as `options` say.
    pub(crate) fn new(create: &CreateOptions, options: ImageOptions) -> Self {
        let memory = Memory::new();
        Image::create(&memory, create).unwrap();
        Self::over(memory, options)
    }

    /// An image that is there.
    pub(crate) fn over(memory: Memory, options: ImageOptions) -> Self {
        let start = memory.to_vec().unwrap();
        let store = Arc::new(Blocking::new(Trace::new(memory)));
        let image = options.open(store.clone()).unwrap();
        Self {
            store,
            image,
            start,
        }
    }

    pub(crate) fn memory(&self) -> &Memory {
        self.store.get_ref().get_ref()
    }

    pub(crate) fn write(&self, offset: u64, byte: u8, len: usize) {
        self.image.write_at(&vec![byte; len], offset).unwrap();
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xa5; len];
        self.image.read_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// Where the guest cluster that holds `guest` lies according to the file; 0 if nowhere. Flush first.
    pub(crate) fn host(&self, guest: u64) -> u64 {
        let header = self.image.header();
        let geometry = header.geometry;
        let word = |at: u64| {
            let mut bytes = [0; 8];
            self.memory().read_at(&mut bytes, at).unwrap();
            u64::from_be_bytes(bytes)
        };
        let entries = geometry.l2_entries();
        let cluster = guest / geometry.cluster_size();
        let table = word(header.l1_table_offset.get() + cluster / entries * 8) & OFFSET;
        if table == 0 {
            return 0;
        }
        word(table + cluster % entries * geometry.l2_entry_size()) & OFFSET
    }

    pub(crate) fn flush(&self) {
        self.image.flush().unwrap();
    }

    /// Closes the image, which must be sound then, and gives the file.
    pub(crate) fn finish(self) -> Vec<u8> {
        let file = self.finish_with_leaks();
        assert_sound(&Memory::from(file.clone()));
        file
    }

    /// Closes the image, which may have leaks then, as bitmaps become when they are given up, and gives the file.
    pub(crate) fn finish_with_leaks(self) -> Vec<u8> {
        let Self { store, image, .. } = self;
        image.close().unwrap();
        let memory = store.get_ref().get_ref();
        assert_no_corruption(memory, format_args!("closed"));
        memory.to_vec().unwrap()
    }

    /// Files as a crash may have left them: all that was flushed is there, and of what came later nothing, everything, or
    /// some of it in any order. `look` gets each with the number of events before it. The moments are those before and after
    /// each flush, and some between.
    pub(crate) fn each_crash(&self, mut look: impl FnMut(usize, &Arc<dyn Storage>)) {
        let events = self.store.get_ref().events();
        let mut random = Random::new(1);
        let mut durable = 0;
        for end in 0..=events.len() {
            if end > 0 && events[end - 1].is_flush() {
                durable = end;
            }
            let before_flush = events.get(end).is_none_or(Event::is_flush);
            if durable != end && !before_flush && !end.is_multiple_of(32) {
                continue;
            }
            let since: Vec<Event> = events[durable..end]
                .iter()
                .flat_map(|event| event.torn(512))
                .collect();
            let mut tries = vec![since.iter().collect()];
            if !since.is_empty() {
                tries.push(Vec::new());
            }
            for _ in 0..since.len().min(6) {
                let mut some: Vec<&Event> = since.iter().filter(|_| random.one_in(2)).collect();
                random.shuffle(&mut some);
                tries.push(some);
            }
            for later in tries {
                let crashed = Memory::from(self.start.clone());
                replay(&events[..durable], &crashed).unwrap();
                replay(later, &crashed).unwrap();
                let crashed: Arc<dyn Storage> = Arc::new(crashed);
                look(end, &crashed);
            }
        }
    }

    /// Events so far.
    pub(crate) fn position(&self) -> usize {
        self.store.get_ref().position()
    }
}

/// Neither damaged nor leaking.
pub(crate) fn assert_sound(storage: &dyn Storage) {
    let report = audit(storage, &Options::default());
    assert_eq!(report.verdict(), Verdict::Sound, "{:?}", report.findings);
}

/// Perhaps leaking, but not damaged.
pub(crate) fn assert_no_corruption(storage: &dyn Storage, when: std::fmt::Arguments<'_>) {
    let report = audit(storage, &Options::default());
    let sound = matches!(report.verdict(), Verdict::Sound | Verdict::Leaks);
    assert!(sound, "{when}: {:?}", report.findings);
}

/// A flush in a thread of its own.
pub(crate) fn flush_in<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    rig: &'env Rig,
) -> ScopedJoinHandle<'scope, ()> {
    scope.spawn(|| rig.flush())
}
