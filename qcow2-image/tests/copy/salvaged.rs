use qcow2_image::copy::{CopyOptions, Target, copy};
use qcow2_image::create::CreateOptions;
use qcow2_io::codec::{Codec, Level};
use qcow2_io::{Fault, Faulty, Memory, Operation};

use crate::rig::{assert_reads, content, create, open, options};

const LEN: usize = (2 << 20) + 700;

#[test]
fn what_can_not_be_read_is_zeros_and_is_told() {
    let bytes: Vec<u8> = content(LEN, 71).iter().map(|byte| byte | 1).collect();
    let bad = [
        0..1_u64,
        70_000..70_001,
        1_000_000..1_003_000,
        LEN as u64 - 1..LEN as u64,
    ];
    let lost: Vec<_> = bad
        .iter()
        .map(|bad| bad.start / 512 * 512..bad.end.next_multiple_of(512).min(LEN as u64))
        .collect();
    let mut expected = bytes.clone();
    for range in &lost {
        expected[range.start as usize..range.end as usize].fill(0);
    }
    for (number, compress) in [(0, false), (1, false), (2, true)] {
        if compress && !Codec::Zlib.is_available() {
            continue;
        }
        let source = Faulty::new(Memory::from(bytes.clone()));
        for range in &bad {
            source.add(Fault::on(Operation::Read).within(range.clone()).forever());
        }
        if number == 1 {
            source.add(Fault::on(Operation::Extents).forever());
        }
        let copying = CopyOptions::new().threads(3).chunk(200_000).salvage(true);
        // Zeros take the place of what the target had.
        let target = Memory::from(vec![9; LEN]);
        let report = copy(&source, Target::Storage(&target), &copying).unwrap();
        assert_eq!(report.lost.ranges(), lost);
        assert_eq!(
            report.lost.bytes(),
            lost.iter().map(|range| range.end - range.start).sum()
        );
        assert_reads(&target, &expected, "memory");

        let image = open(&create(&CreateOptions::new(
            (LEN as u64).next_multiple_of(512),
        )));
        let copying = if compress {
            copying.compress(Level::default())
        } else {
            copying
        };
        let report = copy(&source, &image, &copying).unwrap();
        assert_eq!(report.lost.ranges(), lost);
        assert_reads(&image, &expected, "image");

        // Of a window, places are told as of the whole.
        let target = Memory::new();
        let copying = CopyOptions::new().salvage(true).window(60_000..1_001_000);
        let report = copy(&source, Target::Storage(&target), &copying).unwrap();
        assert_eq!(
            report.lost.ranges(),
            [lost[1].clone(), lost[2].start..1_001_000]
        );
        assert_reads(&target, &expected[60_000..1_001_000], "window");

        let error = copy(&source, Target::Storage(&target), &CopyOptions::new()).unwrap_err();
        assert!(
            error.to_string().starts_with("the source fails at"),
            "{error}"
        );
    }
}

#[test]
fn of_a_damaged_image_all_is_saved_that_its_tables_lead_to() {
    let bytes: Vec<u8> = content(LEN, 72).iter().map(|byte| byte | 1).collect();
    let file = create(&CreateOptions::new((LEN as u64).next_multiple_of(512)).cluster_size(512));
    let image = open(&file);
    crate::rig::fill(&image, &bytes);
    let header = image.header();
    image.close().unwrap();
    let mut word = [0; 8];
    qcow2_io::Storage::read_at(&*file, &mut word, header.l1_table_offset.get() + 24).unwrap();
    let table = u64::from_be_bytes(word) & ((1 << 56) - 512);
    // The L2 table of the fourth stretch of 32 KiB.
    let faulty = Faulty::new(Memory::from(file.to_vec().unwrap()));
    faulty.add(
        Fault::on(Operation::Read)
            .within(table..table + 512)
            .forever(),
    );
    let image = options()
        .read_only(true)
        .open(std::sync::Arc::new(faulty))
        .unwrap();
    let target = Memory::new();
    let copying = CopyOptions::new().salvage(true).threads(2);
    let report = copy(&image, Target::Storage(&target), &copying).unwrap();
    assert_eq!(report.lost.ranges(), vec![3 << 15..4 << 15; 1]);
    let mut expected = bytes;
    expected[3 << 15..4 << 15].fill(0);
    assert_reads(&target, &expected, "memory");
}

#[test]
fn a_source_that_can_not_tell_what_it_has_is_asked_about_all_around() {
    let bytes: Vec<u8> = content(LEN, 72).iter().map(|byte| byte | 1).collect();
    let bad = [
        70_000..70_001_u64,
        1_000_000..1_000_001,
        1_500_000..1_503_000,
    ];
    let source = Faulty::new(Memory::from(bytes.clone()));
    for range in &bad {
        source.add(
            Fault::on(Operation::Extents)
                .within(range.clone())
                .forever(),
        );
    }
    let target = Memory::from(vec![9; LEN]);
    let copying = CopyOptions::new().threads(3).chunk(262_144).salvage(true);
    let report = copy(&source, Target::Storage(&target), &copying).unwrap();
    assert_reads(&target, &bytes, "memory");
    assert!(report.lost.is_empty());
    let unmapped = report.unmapped.ranges();
    let sector = |at: u64| at / 512 * 512..at / 512 * 512 + 512;
    assert_eq!(unmapped[..2], [sector(70_000), sector(1_000_000)]);
    // Of many sectors in a row, ever more are taken at a time.
    let [last] = &unmapped[2..] else {
        panic!("{unmapped:?}")
    };
    assert!(last.start == 1_500_000 / 512 * 512 && (1_503_000..1_510_000).contains(&last.end));
}
