use qcow2_check::repair::{Level, RepairOptions, plan};
use qcow2_io::{Fault, Faulty, Memory, Operation};

use super::*;

const MIB: u64 = 1 << 20;
const DISK: u64 = 256 * MIB;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// A disk of clusters of 4 KiB with data in three places: two in the first L2 table, one in a table of the second sector of the L1 table.
fn disk() -> Vec<u8> {
    let memory = Arc::new(Memory::new());
    Image::create(&*memory, &CreateOptions::new(DISK).cluster_size(4096)).unwrap();
    let image = Image::options()
        .open(Arc::clone(&memory) as Arc<dyn Storage>)
        .unwrap();
    image.write_at(&[1; 8192], 0).unwrap();
    image.write_at(&[2; 4096], 300 << 10).unwrap();
    image.write_at(&[3; 4096], 130 * MIB).unwrap();
    image.close().unwrap();
    memory.to_vec().unwrap()
}

fn number(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What a salvage of the image makes if a sector can't be read: the first bytes of the three places, and what is lost.
fn salvaged(bytes: &[u8], sector: u64) -> (Vec<u8>, Vec<(u64, u64)>) {
    let image = Faulty::new(Memory::from(bytes.to_vec()));
    let fault = Fault::on(Operation::Read).within(sector..sector + 512);
    image.add(fault.forever());
    let image: &'static Faulty<Memory> = Box::leak(Box::new(image));
    let options = RepairOptions {
        level: Level::Salvage,
        threads: 1,
        ..RepairOptions::default()
    };
    let source = Source {
        storage: plan(image, &options).unwrap().into_preview(),
        path: Path::new("disk.qcow2"),
        references: &References::Deny,
        secrets: &[],
    };
    let from = source.open().unwrap();
    let out = Arc::new(Memory::new());
    Image::create(&*out, &CreateOptions::new(DISK)).unwrap();
    let to = Image::options().open(out).unwrap();
    let lost = transfer(&from, &to, &Interrupt::default()).unwrap();
    assert!(image.struck() > 0);
    let places = [0, 4096, 300 << 10, 130 * MIB];
    let first = places.map(|at| {
        let mut byte = [9];
        to.read_at(&mut byte, at).unwrap();
        byte[0]
    });
    (first.to_vec(), lost)
}

#[test]
fn of_data_the_sector_is_lost() {
    let bytes = disk();
    let l2 = number(&bytes, number(&bytes, 40)) & OFFSET_MASK;
    let data = number(&bytes, l2) & OFFSET_MASK;
    let (first, lost) = salvaged(&bytes, data + 1024);
    assert_eq!(first, [1, 1, 2, 3]);
    assert_eq!(lost, [(1024, 1536)]);
}

#[test]
fn of_an_l2_table_the_entries_in_the_sector_are_lost() {
    let bytes = disk();
    let l2 = number(&bytes, number(&bytes, 40)) & OFFSET_MASK;
    let (first, lost) = salvaged(&bytes, l2 + 512);
    assert_eq!(first, [1, 1, 0, 3]);
    assert_eq!(lost, [(256 << 10, 512 << 10)]);
}

#[test]
fn of_an_l1_table_the_entries_in_the_sector_are_lost() {
    let bytes = disk();
    let (first, lost) = salvaged(&bytes, number(&bytes, 40) + 512);
    assert_eq!(first, [1, 1, 2, 0]);
    assert_eq!(lost, [(128 * MIB, 256 * MIB)]);
}
