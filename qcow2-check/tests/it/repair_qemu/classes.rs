//! Damage that `qemu-img check -r all` can't repair, or by whose repair it loses data: each with its result beside ours.

use qcow2_check::repair::{Level, RepairOptions, plan, undo};
use qcow2_check::{Options, Report, Severity, Verdict, check};
use qcow2_io::Memory;

use super::guest::{self, Guest};
use super::mutants::lost;
use crate::mutants::bases::{self, IMAGE};
use crate::oracle::{self, Access, Workshop, words};

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// A kind of damage.
pub(crate) struct Class {
    pub(crate) name: &'static str,
    base: &'static str,
    pub(crate) level: Level,
    damage: fn(&mut Bytes),
    /// Clusters of the active disk whose content can't be known.
    lost: &'static [usize],
}

/// The bytes of an image, with a hand for its numbers.
pub(crate) struct Bytes(pub(super) Vec<u8>);

impl Bytes {
    pub(super) fn get(&self, at: u64) -> u64 {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    pub(super) fn put(&mut self, at: u64, value: u64) {
        let at = usize::try_from(at).unwrap();
        self.0[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    pub(super) fn l1(&self) -> u64 {
        self.get(40)
    }

    /// The first L2 table.
    pub(super) fn l2(&self) -> u64 {
        self.get(self.l1()) & OFFSET_MASK
    }

    pub(super) fn refcounts(&self) -> u64 {
        self.get(48)
    }
}

pub(crate) const ALL: &[Class] = &[
    Class {
        name: "reserved bits in an L1 entry",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.l1(), b.get(b.l1()) | 1 << 60),
        lost: &[],
    },
    Class {
        name: "reserved bits in an L2 entry",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.l2(), b.get(b.l2()) | 1 << 57),
        lost: &[],
    },
    Class {
        name: "COPIED on a compressed entry",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.l2() + 40, b.get(b.l2() + 40) | COPIED),
        lost: &[],
    },
    Class {
        name: "subclusters of compressed data",
        base: "extended",
        level: Level::All,
        damage: |b| b.put(b.l2() + 4 * 16 + 8, 1),
        lost: &[],
    },
    Class {
        name: "subclusters allocated and zero at once",
        base: "extended",
        level: Level::All,
        damage: |b| b.put(b.l2() + 8, b.get(b.l2() + 8) | 1 << 40 | 1 << 8),
        lost: &[0],
    },
    Class {
        name: "subclusters of zeros allocated and zero at once",
        base: "extended",
        level: Level::All,
        damage: |b| b.put(b.l2() + 24, b.get(b.l2() + 24) | 1 << 37 | 1 << 5),
        lost: &[],
    },
    Class {
        name: "the flag of compressed data on subclusters",
        base: "extended",
        level: Level::All,
        damage: |b| b.put(b.l2(), b.get(b.l2()) | 1 << 62),
        lost: &[],
    },
    Class {
        name: "subclusters without a cluster",
        base: "extended",
        level: Level::All,
        damage: |b| b.put(b.l2(), 0),
        lost: &[0],
    },
    Class {
        name: "an unaligned data cluster",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.l2(), b.get(b.l2()) + 512),
        lost: &[0],
    },
    Class {
        name: "a data cluster past the end",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.l2(), COPIED | 1 << 40),
        lost: &[0],
    },
    Class {
        name: "reserved bits in the refcount table",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.refcounts(), b.get(b.refcounts()) | 1),
        lost: &[],
    },
    Class {
        name: "an unaligned refcount block",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.refcounts(), b.get(b.refcounts()) + 512),
        lost: &[],
    },
    Class {
        name: "a refcount block a tebibyte past the end",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.refcounts() + 8, 1 << 40),
        lost: &[],
    },
    Class {
        name: "guest data on the refcount table",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.l2() + 16, COPIED | b.refcounts()),
        lost: &[2],
    },
    Class {
        name: "guest data on its own L2 table",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.l2() + 16, COPIED | b.l2()),
        lost: &[2],
    },
    Class {
        name: "two guest clusters on one cluster",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(b.l2() + 16, b.get(b.l2())),
        lost: &[2],
    },
    Class {
        name: "two L1 entries with one L2 table",
        base: "4k",
        level: Level::All,
        damage: |b| b.put(b.l1() + 8, b.get(b.l1())),
        lost: &[512, 513, 514, 515, 517],
    },
    Class {
        name: "a zero flag in version 2",
        base: "v2",
        level: Level::All,
        damage: |b| b.put(b.l2(), b.get(b.l2()) | 1),
        lost: &[],
    },
    Class {
        name: "an unaligned L1 table of a snapshot",
        base: "snapshots",
        level: Level::All,
        damage: |b| b.put(b.get(64), b.get(b.get(64)) + 512),
        lost: &[],
    },
    Class {
        name: "unknown flags of a bitmap",
        base: "bitmaps",
        level: Level::All,
        damage: |b| b.put(0x10_0008, b.get(0x10_0008) | 4),
        lost: &[],
    },
    Class {
        name: "an L1 table past the end",
        base: "64k",
        level: Level::Salvage,
        damage: |b| b.put(40, 1 << 30),
        lost: &[],
    },
    Class {
        name: "an L1 entry that leads nowhere",
        base: "64k",
        level: Level::Salvage,
        damage: |b| b.put(b.l1(), COPIED | 1 << 50),
        lost: &[],
    },
    Class {
        name: "no header at all",
        base: "64k",
        level: Level::Salvage,
        damage: |b| b.0[..512].fill(0),
        lost: &[],
    },
    Class {
        name: "other magic bytes",
        base: "64k",
        level: Level::All,
        damage: |b| b.0[0] = 0,
        lost: &[],
    },
    Class {
        name: "an unknown version",
        base: "64k",
        level: Level::All,
        damage: |b| b.0[7] = 7,
        lost: &[],
    },
    Class {
        name: "version 2 with the fields of version 3",
        base: "64k",
        level: Level::All,
        damage: |b| b.0[7] = 2,
        lost: &[],
    },
    Class {
        name: "clusters of another size",
        base: "64k",
        level: Level::All,
        damage: |b| b.0[23] = 12,
        lost: &[],
    },
    Class {
        name: "a header shorter than any",
        base: "64k",
        level: Level::All,
        damage: |b| b.0[103] = 72,
        lost: &[],
    },
    Class {
        name: "an unaligned refcount table",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(48, b.refcounts() + 8),
        lost: &[],
    },
    Class {
        name: "a feature bit that nobody knows",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(72, 1 << 40),
        lost: &[],
    },
    Class {
        name: "the feature bit of extended entries",
        base: "64k",
        level: Level::All,
        damage: |b| b.put(72, 1 << 4),
        lost: &[],
    },
    Class {
        name: "a file cut off in its data",
        base: "64k",
        level: Level::All,
        damage: |b| b.0.truncate(0x7_0000),
        lost: &[2, 5, 6, 48],
    },
    Class {
        name: "a file cut off behind its L2 tables",
        base: "4k",
        level: Level::All,
        damage: |b| b.0.truncate(0x5000),
        lost: &[0, 1, 2, 3, 5, 1280, 1281],
    },
    Class {
        name: "a snapshot table said to be empty",
        base: "snapshots",
        level: Level::All,
        damage: |b| b.0[60..64].fill(0),
        lost: &[],
    },
    Class {
        name: "a snapshot with too much extra data",
        base: "snapshots",
        level: Level::All,
        damage: |b| {
            let at = usize::try_from(b.get(64)).unwrap();
            b.0[at + 39] = 32;
        },
        lost: &[],
    },
    Class {
        name: "a snapshot table that is elsewhere",
        base: "snapshots",
        level: Level::Salvage,
        damage: |b| b.put(64, b.refcounts()),
        lost: &[],
    },
    Class {
        name: "an L1 table that is an L2 table, and snapshots",
        base: "snapshots",
        level: Level::Salvage,
        damage: |b| b.put(40, b.l2()),
        lost: &[],
    },
    Class {
        name: "an L1 table past the end, and snapshots",
        base: "snapshots",
        level: Level::Salvage,
        damage: |b| b.put(40, 1 << 30),
        lost: &[],
    },
    Class {
        name: "an L1 table in the header",
        base: "refcount-64",
        level: Level::Salvage,
        damage: |b| b.put(40, 0),
        lost: &[],
    },
    Class {
        name: "an L1 table with too many entries",
        base: "refcount-1",
        level: Level::Salvage,
        damage: |b| b.0[36..40].copy_from_slice(&[0, 1, 0, 0]),
        lost: &[],
    },
];

impl Class {
    fn sound(&self) -> Vec<u8> {
        bases::named(self.base).bytes
    }

    pub(crate) fn damaged(&self) -> Vec<u8> {
        let mut bytes = Bytes(self.sound());
        (self.damage)(&mut bytes);
        bytes.0
    }
}

/// What QEMU makes of it.
struct Theirs {
    exit: Option<i32>,
    bytes: Vec<u8>,
    report: Report,
    len: u64,
}

fn by_qemu(damaged: &[u8]) -> Theirs {
    let shop = Workshop::new();
    shop.write(IMAGE, damaged);
    // Its exit code is of no use here: the check that follows says what it is worth.
    _ = shop.run(
        "qemu-img",
        &words(&format!("check -q -f qcow2 -r all {IMAGE}")),
    );
    let exit = shop.check(IMAGE, Access::Plain).exit;
    let path = shop.path(IMAGE);
    let len = std::fs::metadata(&path).unwrap().len();
    let bytes = if len > 1 << 30 {
        Vec::new()
    } else {
        shop.read(IMAGE)
    };
    let report = check(&Memory::from(bytes.clone()), &Options::default());
    Theirs {
        exit,
        bytes,
        report,
        len,
    }
}

/// Clusters of the active disk, and snapshots, that read otherwise than in the sound image.
fn differences(sound: &Guest, now: &Guest) -> Vec<usize> {
    let pairs = sound.active.iter().zip(&now.active).enumerate();
    let active = pairs
        .filter(|(_, (a, b))| a.content != b.content)
        .map(|(n, _)| n);
    active.collect()
}

fn judge(name: &str) {
    if !oracle::is_available(1, "damage classes") {
        return;
    }
    let class = ALL.iter().find(|class| class.name == name).unwrap();
    let (sound, damaged) = (class.sound(), class.damaged());
    let theirs = by_qemu(&damaged);
    let sound_guest = guest::read(&sound).unwrap();
    let their_guest = guest::read(&theirs.bytes).unwrap_or_default();
    let their_losses: Vec<usize> = differences(&sound_guest, &their_guest)
        .into_iter()
        .filter(|cluster| !class.lost.contains(cluster))
        .collect();
    let corrupt = theirs.report.total_of(Severity::Corruption);
    let they_fail = theirs.exit != Some(0)
        || corrupt > 0
        || theirs.len > 1 << 30
        || !their_losses.is_empty()
        || sound_guest
            .snapshots
            .keys()
            .any(|key| !their_guest.snapshots.contains_key(key));
    assert!(they_fail, "QEMU is as good at this");

    let image = Memory::from(damaged.clone());
    let options = RepairOptions {
        level: class.level,
        ..RepairOptions::default()
    };
    let made = plan(&image, &options).unwrap();
    let file = Memory::new();
    made.apply(Some(&file)).unwrap();
    let ours = check(&image, &Options::default());
    assert_eq!(
        ours.verdict(),
        Verdict::Sound,
        "{made}\n{:?}",
        ours.findings
    );
    let bytes = image.to_vec().unwrap();
    let shop = Workshop::new();
    shop.write(IMAGE, &bytes);
    assert_eq!(shop.check(IMAGE, Access::Plain).exit, Some(0), "{made}");
    let guest = guest::read(&bytes).unwrap();
    let losses: Vec<usize> = differences(&sound_guest, &guest)
        .into_iter()
        .filter(|cluster| !class.lost.contains(cluster))
        .collect();
    eprintln!(
        "{name}: QEMU ends with {:?}, {corrupt} corruptions, {} clusters lost, {} bytes; here clean, {} lost, {} bytes",
        theirs.exit,
        their_losses.len(),
        theirs.len,
        losses.len(),
        bytes.len(),
    );
    assert!(losses.is_empty(), "{losses:?}\n{made}");
    if class.name != "an unaligned L1 table of a snapshot" {
        for (key, disk) in &sound_guest.snapshots {
            let now = guest.snapshots.get(key);
            let now = now.unwrap_or_else(|| panic!("{key:?} is lost\n{made}"));
            let pairs = disk.iter().zip(now);
            assert!(
                pairs.clone().all(|(a, b)| a.content == b.content),
                "{key:?}\n{made}"
            );
        }
    }
    if let Some(before) = guest::read(&damaged) {
        assert_eq!(
            lost(&sound_guest, &before, &guest),
            Vec::<String>::new(),
            "{made}"
        );
    }
    undo(&image, &file, false).unwrap();
    assert!(image.to_vec().unwrap() == damaged);
}

macro_rules! classes {
    ($( $test:ident: $name:literal; )*) => {
        $( #[test] fn $test() { judge($name); } )*

        #[test]
        fn every_class_has_its_test() {
            let named = [$( $name, )*];
            assert!(ALL.iter().all(|class| named.contains(&class.name)));
            assert!(ALL.len() >= 10);
        }
    };
}

classes! {
    reserved_bits_of_l1_entries_are_cleared: "reserved bits in an L1 entry";
    reserved_bits_of_l2_entries_are_cleared: "reserved bits in an L2 entry";
    compressed_entries_lose_the_copied_flag: "COPIED on a compressed entry";
    compressed_data_with_subclusters_is_kept: "subclusters of compressed data";
    contradictory_subclusters_are_settled: "subclusters allocated and zero at once";
    zeros_are_zeros_either_way: "subclusters of zeros allocated and zero at once";
    what_does_not_decode_is_not_compressed: "the flag of compressed data on subclusters";
    subclusters_without_a_cluster_read_as_zeros: "subclusters without a cluster";
    unaligned_data_is_given_up: "an unaligned data cluster";
    data_past_the_end_is_given_up: "a data cluster past the end";
    a_reserved_bit_in_the_refcount_table_is_cleared: "reserved bits in the refcount table";
    an_unaligned_refcount_block_is_made_anew: "an unaligned refcount block";
    a_far_refcount_block_does_not_grow_the_file: "a refcount block a tebibyte past the end";
    data_and_refcount_table_are_parted: "guest data on the refcount table";
    data_and_l2_table_are_parted: "guest data on its own L2 table";
    guest_clusters_are_parted: "two guest clusters on one cluster";
    l2_tables_are_parted: "two L1 entries with one L2 table";
    zero_flags_of_version_2_are_cleared: "a zero flag in version 2";
    a_lost_snapshot_frees_nothing: "an unaligned L1 table of a snapshot";
    a_broken_bitmap_does_not_keep_the_image_closed: "unknown flags of a bitmap";
    a_lost_l1_table_is_found: "an L1 table past the end";
    a_lost_l2_table_is_found: "an L1 entry that leads nowhere";
    a_lost_header_is_made: "no header at all";
    magic_bytes_are_put_back: "other magic bytes";
    an_unknown_version_is_put_right: "an unknown version";
    a_wrong_version_is_put_right: "version 2 with the fields of version 3";
    the_size_of_clusters_is_put_right: "clusters of another size";
    the_length_of_the_header_is_put_right: "a header shorter than any";
    an_unaligned_refcount_table_is_made_anew: "an unaligned refcount table";
    an_unknown_feature_bit_is_cleared: "a feature bit that nobody knows";
    a_wrong_feature_bit_is_cleared: "the feature bit of extended entries";
    a_file_without_its_end_keeps_the_rest: "a file cut off in its data";
    a_file_without_data_is_consistent: "a file cut off behind its L2 tables";
    forgotten_snapshots_are_counted: "a snapshot table said to be empty";
    the_length_of_a_snapshot_is_put_right: "a snapshot with too much extra data";
    a_lost_snapshot_table_is_found: "a snapshot table that is elsewhere";
    a_wrong_l1_table_gives_way_to_the_right_one: "an L1 table that is an L2 table, and snapshots";
    an_l1_table_is_not_in_the_header: "an L1 table in the header";
    an_l1_table_is_as_long_as_the_disk_needs: "an L1 table with too many entries";
    a_lost_l1_table_is_not_a_snapshot_s: "an L1 table past the end, and snapshots";
}
