use std::io::{IoSlice, IoSliceMut};

use proptest::prelude::*;
use qcow2_io::{
    Faulty, File, FileOptions, Memory, Op, Slice, Storage, StorageErrorKind, Trace, ZeroFlags,
};

/// How far programs reach; small, so that steps meet.
const REACH: u64 = 48 << 10;

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Read {
        offset: u64,
        len: usize,
    },
    Write {
        offset: u64,
        len: usize,
        byte: u8,
    },
    WriteVectored {
        offset: u64,
        cuts: Vec<usize>,
        byte: u8,
    },
    Batch {
        offset: u64,
        lens: Vec<usize>,
        byte: u8,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    SetLen {
        len: u64,
    },
    Extents {
        offset: u64,
        len: u64,
        max: usize,
    },
    Flush,
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..REACH,
        (0..REACH / 512).prop_map(|sector| sector * 512),
        (0..REACH / 4096).prop_map(|page| page * 4096),
    ]
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![0..20usize, 0..9000usize, Just(512), Just(4096), Just(8192)]
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (offset(), len()).prop_map(|(offset, len)| Step::Read { offset, len }),
        4 => (offset(), len(), 1..=255u8)
            .prop_map(|(offset, len, byte)| Step::Write { offset, len, byte }),
        2 => (offset(), prop::collection::vec(0..3000usize, 0..5), 1..=255u8)
            .prop_map(|(offset, cuts, byte)| Step::WriteVectored { offset, cuts, byte }),
        1 => (offset(), prop::collection::vec(1..3000usize, 0..4), 1..=255u8)
            .prop_map(|(offset, lens, byte)| Step::Batch { offset, lens, byte }),
        2 => (offset(), len(), any::<bool>())
            .prop_map(|(offset, len, unmap)| Step::Zero { offset, len: len as u64, unmap }),
        2 => (offset(), len()).prop_map(|(offset, len)| Step::Discard { offset, len: len as u64 }),
        1 => offset().prop_map(|len| Step::SetLen { len }),
        1 => (offset(), len(), 0..6usize)
            .prop_map(|(offset, len, max)| Step::Extents { offset, len: len as u64, max }),
        1 => Just(Step::Flush),
    ]
}

/// The disk as a vector of bytes.
struct Model(Vec<u8>);

impl Model {
    fn write(&mut self, offset: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let start = usize::try_from(offset).unwrap();
        let end = start + data.len();
        if self.0.len() < end {
            self.0.resize(end, 0);
        }
        self.0[start..end].copy_from_slice(data);
    }

    fn discard(&mut self, offset: u64, len: u64) {
        let end = usize::try_from(offset + len).unwrap().min(self.0.len());
        let start = usize::try_from(offset).unwrap().min(end);
        self.0[start..end].fill(0);
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = self
            .0
            .iter()
            .skip(usize::try_from(offset).unwrap())
            .take(len)
            .copied()
            .collect();
        bytes.resize(len, 0);
        bytes
    }
}

/// Bytes that differ with their place, so that a shifted write shows.
fn data(len: usize, byte: u8) -> Vec<u8> {
    (0..len)
        .map(|i| byte.wrapping_add(u8::try_from(i % 251).unwrap()))
        .collect()
}

fn apply(storage: &dyn Storage, model: &mut Model, step: &Step) {
    match step {
        Step::Read { offset, len } => {
            let mut buf = vec![0xcc; *len];
            storage.read_at(&mut buf, *offset).unwrap();
            assert_eq!(buf, model.read(*offset, *len));
            let (a, b) = buf.split_at_mut(len / 3);
            a.fill(0xdd);
            b.fill(0xdd);
            let mut bufs = [IoSliceMut::new(a), IoSliceMut::new(b)];
            storage.read_vectored_at(&mut bufs, *offset).unwrap();
            assert_eq!(buf, model.read(*offset, *len));
        }
        Step::Write { offset, len, byte } => {
            let data = data(*len, *byte);
            storage.write_at(&data, *offset).unwrap();
            model.write(*offset, &data);
        }
        Step::WriteVectored { offset, cuts, byte } => {
            let parts: Vec<Vec<u8>> = cuts.iter().map(|len| data(*len, *byte)).collect();
            let bufs: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            storage.write_vectored_at(&bufs, *offset).unwrap();
            model.write(*offset, &parts.concat());
        }
        Step::Batch { offset, lens, byte } => {
            let parts: Vec<Vec<u8>> = lens.iter().map(|len| data(*len, *byte)).collect();
            let mut position = *offset;
            let mut ops = Vec::new();
            for part in &parts {
                ops.push(Op::write(part, position));
                model.write(position, part);
                position += part.len() as u64 + 100;
            }
            storage.submit(&mut ops);
            for mut op in ops {
                op.take_result().unwrap().unwrap();
            }
        }
        Step::Zero { offset, len, unmap } => {
            let flags = if *unmap {
                ZeroFlags::MAY_UNMAP
            } else {
                ZeroFlags::NONE
            };
            storage.write_zeroes(*offset..offset + len, flags).unwrap();
            model.write(*offset, &vec![0; usize::try_from(*len).unwrap()]);
        }
        Step::Discard { offset, len } => match storage.discard(*offset..offset + len) {
            Ok(()) => model.discard(*offset, *len),
            Err(error) => assert_eq!(error.kind(), StorageErrorKind::Unsupported, "{error}"),
        },
        Step::SetLen { len } => match storage.set_len(*len) {
            Ok(()) => model.0.resize(usize::try_from(*len).unwrap(), 0),
            Err(error) => assert_eq!(error.kind(), StorageErrorKind::Unsupported, "{error}"),
        },
        Step::Extents { offset, len, max } => {
            let mut position = *offset;
            for extent in storage.extents(*offset..offset + len, *max).unwrap() {
                assert_eq!(extent.offset, position);
                position = extent.end();
                if extent.kind.reads_as_zeros() {
                    let bytes = model.read(extent.offset, usize::try_from(extent.len).unwrap());
                    assert!(bytes.iter().all(|byte| *byte == 0), "{extent:?} holds data");
                }
            }
            assert!(position <= offset + len);
        }
        Step::Flush => storage.flush().unwrap(),
    }
}

pub(crate) fn judge(storage: &dyn Storage, steps: &[Step]) {
    let len = usize::try_from(storage.len().unwrap()).unwrap();
    let mut model = Model(vec![0; len]);
    for step in steps {
        apply(storage, &mut model, step);
        assert_eq!(
            storage.len().unwrap(),
            model.0.len() as u64,
            "after {step:?}"
        );
    }
    let mut found = vec![0; model.0.len() + 100];
    storage.read_at(&mut found, 0).unwrap();
    assert!(
        found == model.read(0, found.len()),
        "the final content differs"
    );
}

fn file(options: &FileOptions) -> File {
    let dir = tempfile::tempdir().unwrap();
    options.open(dir.path().join("disk")).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn memory_equals_the_model(steps in prop::collection::vec(step(), 1..60)) {
        judge(&Memory::new(), &steps);
    }

    #[test]
    fn a_file_equals_the_model(steps in prop::collection::vec(step(), 1..40)) {
        judge(&file(&FileOptions::new().write(true).create(true)), &steps);
    }

    #[test]
    fn a_direct_file_equals_the_model(steps in prop::collection::vec(step(), 1..40)) {
        if crate::direct_io_works() {
            judge(&file(&FileOptions::new().write(true).create(true).direct(true)), &steps);
        }
    }

    #[test]
    fn a_slice_equals_the_model(offset in 0..10_000u64, steps in prop::collection::vec(step(), 1..60)) {
        judge(&Slice::new(Memory::new(), offset, 4 * REACH).unwrap(), &steps);
    }

    #[test]
    fn wrappers_equal_the_model_and_a_trace_replays(steps in prop::collection::vec(step(), 1..60)) {
        let trace = Trace::new(Faulty::new(Memory::new()));
        judge(&trace, &steps);
        let copy = Memory::new();
        qcow2_io::replay(&trace.events(), &copy).unwrap();
        prop_assert_eq!(copy.to_vec().unwrap(), trace.get_ref().get_ref().to_vec().unwrap());
    }
}
