use std::vec;

use super::*;

fn geometry() -> Geometry {
    Geometry::new(16, 4, false).unwrap()
}

/// A bitmap of a disk of 1 GiB.
fn entry(name: &[u8]) -> BitmapEntry {
    BitmapEntry {
        table_offset: HostOffset::new(0x50000),
        table_entries: 1,
        flags: BitmapFlags::new(false, true),
        kind: DIRTY_TRACKING,
        granularity_bits: 16,
        name: name.to_vec(),
        extra_data: Vec::new(),
    }
}

fn defects(change: impl FnOnce(&mut BitmapEntry)) -> Vec<BitmapError> {
    let mut entry = entry(b"x");
    change(&mut entry);
    entry.defects(geometry(), 1 << 30)
}

#[test]
fn each_rule_has_its_own_error() {
    use BitmapError::*;

    assert_eq!(defects(|_| {}), []);
    assert_eq!(
        defects(|e| e.table_offset = HostOffset::new(0)),
        [TableOffsetZero]
    );
    assert_eq!(
        defects(|e| e.table_offset = HostOffset::new(0x50200)),
        [TableUnaligned {
            found: HostOffset::new(0x50200),
            cluster_size: 65536
        }]
    );
    assert_eq!(
        defects(|e| e.table_entries = 0),
        [
            TableEmpty,
            TableTooShort {
                found: 0,
                needed: 1
            }
        ]
    );
    assert_eq!(
        defects(|e| {
            e.table_entries = 8193;
            e.flags = BitmapFlags::new(true, false);
        }),
        [TableTooLarge {
            found: 8193,
            limit: 8192
        }]
    );
    assert_eq!(
        defects(|e| e.table_entries = 2),
        [TableTooLong {
            found: 2,
            needed: 1
        }]
    );
    assert_eq!(
        defects(|e| e.granularity_bits = 9),
        [TableTooShort {
            found: 1,
            needed: 4
        }]
    );
    assert_eq!(
        defects(|e| {
            e.granularity_bits = 9;
            e.flags = BitmapFlags::new(true, true);
        }),
        []
    );
    for found in [0, 8, 32, 255] {
        assert_eq!(
            defects(|e| e.granularity_bits = found),
            [Granularity {
                found,
                min: 9,
                max: 31
            }]
        );
    }
    assert_eq!(
        defects(|e| e.flags = BitmapFlags::from_bits(0x8000_000f)),
        [Flags { bits: 0x8000_0008 }, ExtraDataFlag]
    );
    assert_eq!(defects(|e| e.kind = 2), [Kind { found: 2 }]);
    assert_eq!(
        defects(|e| e.name = vec![b'x'; 1024]),
        [NameTooLong {
            found: 1024,
            limit: 1023
        }]
    );
    assert_eq!(defects(|e| e.name.clear()), [NameEmpty]);
    assert_eq!(
        defects(|e| e.extra_data = vec![0; 8]),
        [ExtraData { found: 8 }]
    );
}

#[test]
fn a_walk_ends_exactly_at_the_end() {
    let entries = [entry(b"first"), entry(b"second one"), entry(b"12345678")];
    let bytes: Vec<u8> = entries
        .iter()
        .flat_map(|entry| entry.encode().unwrap())
        .collect();
    assert_eq!(bytes.len(), 32 + 40 + 32);
    let walk = |bytes: &[u8], count| BitmapDirectory::new(bytes, count).collect::<Vec<_>>();
    assert_eq!(walk(&bytes, 3), entries.clone().map(Ok));
    assert_eq!(
        walk(&bytes, 2)[2],
        Err(BitmapError::TrailingBytes { left: 32 })
    );
    let too_few = BitmapError::TooFew {
        found: 3,
        expected: 4,
    };
    assert_eq!(walk(&bytes, 4)[3], Err(too_few));
    let truncated = BitmapError::Truncated {
        needed: 32,
        available: 31,
    };
    let cut = walk(&bytes[..103], 3);
    assert_eq!((cut.len(), &cut[2]), (3, &Err(truncated)));
    let truncated = BitmapError::Truncated {
        needed: 24,
        available: 23,
    };
    assert_eq!(walk(&bytes[..23], 3), [Err(truncated)]);
}

#[test]
fn extra_data_lies_before_the_name() {
    let mut with_extra = entry(b"name");
    with_extra.extra_data = vec![7; 13];
    let bytes = with_extra.encode().unwrap();
    assert_eq!(
        &bytes[24..48],
        b"\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07name\0\0\0\0\0\0\0"
    );
    assert_eq!(BitmapEntry::decode(&bytes).unwrap(), (with_extra, 48));
    let mut hostile = bytes;
    hostile[20..24].fill(0xff);
    let truncated = BitmapError::Truncated {
        needed: 24 + 0xffff_ffff + 4 + 5,
        available: 48,
    };
    assert_eq!(BitmapEntry::decode(&hostile), Err(truncated));
}
