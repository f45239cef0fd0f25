use super::*;

/// What qemu-img made for aes-256-xts.
const QEMU: &[u8; 592] = include_bytes!("../../testdata/qemu-10.0/luks-header.bin");

fn defects(change: impl FnOnce(&mut raw::LuksHeader)) -> Vec<LuksError> {
    let mut header = LuksHeader::decode(QEMU).unwrap();
    change(&mut header.raw);
    let defects = header.defects();
    let decoded = LuksHeader::decode(&header.encode());
    assert_eq!(decoded.err(), defects.first().copied());
    defects
}

#[test]
fn a_header_of_qemu_is_sound_and_tells_all() {
    let header = LuksHeader::decode(QEMU).unwrap();
    assert_eq!(header.encode(), *QEMU);
    assert_eq!(header.version(), 1);
    assert_eq!(header.cipher_name(), b"aes");
    assert_eq!(header.cipher_mode(), b"xts-plain64");
    assert_eq!(header.hash_spec(), b"sha256");
    assert_eq!(header.uuid().len(), 36);
    assert_eq!(header.master_key_len(), 64);
    assert_eq!(header.payload_offset(), 2068480);
    let slots = header.slots();
    assert_eq!(slots[0].state(), LuksSlotState::Enabled);
    assert_eq!(slots[7].state(), LuksSlotState::Disabled);
    assert_eq!(slots[0].salt()[0], 0x57);
    let material = header.key_material();
    assert_eq!(
        material[1],
        LuksKeyMaterial {
            offset: 512 * 512,
            len_bytes: 256000,
            area_len_bytes: 504 * 512,
        }
    );
}

#[test]
fn each_rule_has_its_own_error() {
    use LuksError::*;

    assert_eq!(defects(|_| {}), []);
    assert_eq!(
        defects(|h| h.magic[5] = 0),
        [Magic {
            found: *b"LUKS\xba\0"
        }]
    );
    assert_eq!(defects(|h| h.version.set(2)), [Version { found: 2 }]);
    let unterminated = |field| [Unterminated { field }];
    assert_eq!(
        defects(|h| h.cipher_name.fill(b'a')),
        unterminated(LuksText::CipherName)
    );
    assert_eq!(
        defects(|h| h.cipher_mode.fill(b'a')),
        unterminated(LuksText::CipherMode)
    );
    assert_eq!(
        defects(|h| h.hash_spec.fill(b'a')),
        unterminated(LuksText::HashSpec)
    );
    let payload = defects(|h| h.payload_sector.set(7));
    assert_eq!(payload[0], PayloadInHeader { found: 7, min: 8 });
    assert_eq!(payload.len(), 9);
    assert_eq!(
        defects(|h| h.master_key_iterations.set(0)),
        [MasterIterationsZero]
    );
    for found in [0, 15] {
        let error = MasterKeyLength {
            found,
            min: 16,
            max: 64,
        };
        assert_eq!(defects(|h| h.master_key_len.set(found)), [error]);
    }
    assert_eq!(
        defects(|h| h.slots[3].stripes.set(3999)),
        [SlotStripes {
            slot: 3,
            found: 3999
        }]
    );
    assert_eq!(
        defects(|h| h.slots[0].key_material_sector.set(7)),
        [SlotInHeader {
            slot: 0,
            found: 7,
            min: 8
        }]
    );
    assert_eq!(
        defects(|h| h.slots[2].state.set(1)),
        [SlotState { slot: 2, found: 1 }]
    );
    assert_eq!(
        defects(|h| h.slots[0].iterations.set(0)),
        [SlotIterationsZero { slot: 0 }]
    );
    assert_eq!(defects(|h| h.slots[1].iterations.set(0)), []);
    assert_eq!(
        defects(|h| h.payload_sector.set(4039)),
        [SlotInPayload {
            slot: 7,
            end: 4040,
            payload: 4039
        }]
    );
    assert_eq!(
        defects(|h| h.slots[5].key_material_sector.set(9)),
        [
            SlotsOverlap {
                first: 0,
                second: 5
            },
            SlotsOverlap {
                first: 1,
                second: 5
            }
        ]
    );
}

#[test]
fn a_short_header_is_an_error() {
    let truncated = LuksError::Truncated {
        needed: 592,
        available: 591,
    };
    assert_eq!(LuksHeader::decode(&QEMU[..591]), Err(truncated));
}

#[test]
fn the_largest_numbers_do_not_overflow() {
    let header = LuksHeader::from_bytes([0xff; 592]);
    assert!(!header.defects().is_empty());
    let material = header.key_material()[0];
    assert_eq!(material.offset, 0xffff_ffff * 512);
    assert_eq!(material.len_bytes, 0xffff_ffff * 0xffff_ffff);
}
