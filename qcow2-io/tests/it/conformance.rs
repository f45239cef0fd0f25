use std::sync::Arc;

use qcow2_io::{
    Blocking, Faulty, File, FileOptions, LockMode, Memory, Slice, Storage, Trace, conformance,
};

fn temporary(options: &FileOptions) -> File {
    let dir = tempfile::tempdir().unwrap();
    // The name goes with the directory; the open file stays.
    options.open(dir.path().join("disk")).unwrap()
}

#[test]
fn a_buffered_file_conforms() {
    let options = FileOptions::new().write(true).create_new(true);
    conformance::run(|| Box::new(temporary(&options)));
}

#[test]
fn a_direct_file_conforms() {
    let options = FileOptions::new().write(true).create_new(true).direct(true);
    if crate::direct_io_works() {
        conformance::run(|| Box::new(temporary(&options)));
    }
}

#[test]
fn an_unlocked_file_conforms() {
    let options = FileOptions::new()
        .write(true)
        .create(true)
        .lock(LockMode::None);
    conformance::run(|| Box::new(temporary(&options)));
}

#[test]
fn a_file_from_the_standard_library_conforms() {
    conformance::run(|| Box::new(File::from_std(tempfile::tempfile().unwrap()).unwrap()));
}

#[test]
fn memory_conforms() {
    conformance::run(|| Box::new(Memory::new()));
}

#[test]
fn a_slice_conforms() {
    let make = |offset| Slice::new(Memory::from(vec![0; 1 << 21]), offset, 1 << 20).unwrap();
    conformance::run(|| Box::new(make(0)));
    conformance::run(|| Box::new(make(777)));
}

#[test]
fn a_slice_past_the_end_of_its_storage_conforms() {
    conformance::run(|| Box::new(Slice::new(Memory::new(), 1 << 40, 1 << 20).unwrap()));
}

#[test]
fn a_faulty_storage_without_faults_conforms() {
    conformance::run(|| Box::new(Faulty::new(Memory::new())));
}

#[test]
fn a_blocking_storage_without_pauses_conforms() {
    conformance::run(|| Box::new(Blocking::new(Memory::new())));
}

#[test]
fn a_trace_conforms() {
    conformance::run(|| Box::new(Trace::new(Memory::new())));
}

#[test]
fn pointers_conform() {
    conformance::run(|| Box::new(Arc::new(Memory::new()) as Arc<dyn Storage>));
    conformance::run(|| Box::new(Box::new(Memory::new()) as Box<dyn Storage>));
    let kept = Memory::with_len(0).unwrap();
    kept.set_len(0).unwrap();
    let leaked: &'static Memory = Box::leak(Box::new(kept));
    conformance::run(move || {
        leaked.set_len(0).unwrap();
        Box::new(leaked)
    });
}
