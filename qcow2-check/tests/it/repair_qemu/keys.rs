//! Encrypted clusters are moved with the key at hand, and without it they stay.
//!
//! The cipher here is none: each sector is changed by its number. What it is used for is what matters: `qcow2-image` has the real ones.

use qcow2_check::repair::{
    ActionKind, DataCipher, Key, KeyError, Level, PlanError, RepairOptions, plan, undo,
};
use qcow2_check::{Code, Options, Verdict, check};
use qcow2_format::header::{CryptMethod, Header};
use qcow2_format::{GuestOffset, HostOffset};
use qcow2_io::{Memory, Storage, Trace, replay};

use super::classes::Bytes;
use super::crashes::{Random, states};
use crate::mutants::bases;
use crate::oracle;

const SIZE: u64 = 64 << 10;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Changes each byte by its sector's place in the file.
#[derive(Debug)]
struct ByPlace;

impl ByPlace {
    fn change(host: u64, sectors: &mut [u8]) {
        assert!(host.is_multiple_of(512) && sectors.len().is_multiple_of(512));
        for (number, sector) in (host / 512..).zip(sectors.chunks_mut(512)) {
            let mask = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
            for (byte, mask) in sector.iter_mut().zip(mask.iter().cycle()) {
                *byte ^= mask;
            }
        }
    }
}

impl DataCipher for ByPlace {
    fn decrypt(&self, _: GuestOffset, host: HostOffset, bytes: &mut [u8]) -> Result<(), KeyError> {
        Self::change(host.get(), bytes);
        Ok(())
    }

    fn encrypt(&self, _: GuestOffset, host: HostOffset, bytes: &mut [u8]) -> Result<(), KeyError> {
        Self::change(host.get(), bytes);
        Ok(())
    }
}

struct Right;

impl Key for Right {
    fn open(&self, image: &dyn Storage, header: &Header) -> Result<Box<dyn DataCipher>, KeyError> {
        assert_eq!(header.crypt_method, CryptMethod::Luks);
        let mut magic = [0; 4];
        image.read_at(&mut magic, header.crypto().unwrap().offset.get())?;
        assert_eq!(&magic, b"LUKS");
        Ok(Box::new(ByPlace))
    }
}

struct Wrong;

impl Key for Wrong {
    fn open(&self, _: &dyn Storage, _: &Header) -> Result<Box<dyn DataCipher>, KeyError> {
        Err("the passphrase is wrong".into())
    }
}

fn with(key: Option<&dyn Key>) -> RepairOptions<'_> {
    RepairOptions {
        level: Level::All,
        threads: 1,
        key,
        ..RepairOptions::default()
    }
}

/// The LUKS image, with its first cluster for the second one, too.
fn shared() -> Bytes {
    let mut bytes = Bytes(bases::named("luks").bytes);
    let (first, second) = (bytes.l2(), bytes.l2() + 8);
    bytes.put(second, bytes.get(first));
    bytes
}

fn deciphered(image: &[u8], host: u64) -> Vec<u8> {
    let at = usize::try_from(host).unwrap();
    let mut cluster = image[at..at + usize::try_from(SIZE).unwrap()].to_vec();
    ByPlace::change(host, &mut cluster);
    cluster
}

#[test]
fn encrypted_clusters_are_moved_with_the_key() {
    if !oracle::is_available(1, "encrypted clusters that share a place") {
        return;
    }
    let damaged = shared();
    let image = Memory::from(damaged.0.clone());
    let file = Memory::new();
    let made = plan(&image, &with(Some(&Right))).unwrap();
    assert!(!made.wants_key());
    made.apply(Some(&file)).unwrap();
    drop(made);
    let report = check(&image, &Options::default());
    assert_eq!(report.verdict(), Verdict::Sound, "{:?}", report.findings);
    let repaired = Bytes(image.to_vec().unwrap());
    let host = |number: u64| repaired.get(repaired.l2() + 8 * number) & OFFSET_MASK;
    assert_ne!(host(0), host(1));
    assert!(deciphered(&repaired.0, host(0)) == deciphered(&damaged.0, host(0)));
    assert!(deciphered(&repaired.0, host(1)) == deciphered(&damaged.0, host(0)));
    undo(&image, &file, false).unwrap();
    assert!(image.to_vec().unwrap() == damaged.0);
}

#[test]
fn encrypted_clusters_stay_without_the_key() {
    if !oracle::is_available(2, "encrypted clusters without the key") {
        return;
    }
    let damaged = shared();
    let image = Memory::from(damaged.0.clone());
    let made = plan(&image, &with(None)).unwrap();
    assert!(made.wants_key());
    let is_copy = |kind| kind == ActionKind::CopyCluster;
    assert!(!made.actions().iter().any(|action| is_copy(action.kind)));
    let left = made.after().findings.iter();
    let left: Vec<_> = left
        .filter(|finding| finding.code == Code::DataShared)
        .collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left[0].place.host.is_some());

    let refused = plan(&image, &with(Some(&Wrong))).unwrap_err();
    assert!(matches!(refused, PlanError::Key(_)), "{refused}");
    assert!(image.to_vec().unwrap() == damaged.0);
}

#[test]
fn the_key_is_not_asked_for_where_nothing_moves() {
    if !oracle::is_available(1, "encrypted images without shared places") {
        return;
    }
    let mut bytes = Bytes(bases::named("luks").bytes);
    bytes.put(bytes.l2(), bytes.get(bytes.l2()) | 1 << 57);
    let image = Memory::from(bytes.0);
    let made = plan(&image, &with(Some(&Wrong))).unwrap();
    assert_eq!(made.after().verdict(), Verdict::Sound, "{made}");
}

#[test]
fn legacy_encryption_goes_by_the_place_on_the_disk_and_needs_no_key() {
    if !oracle::is_available(1, "clusters with legacy encryption") {
        return;
    }
    let mut damaged = Bytes(bases::named("aes").bytes);
    damaged.put(damaged.l2() + 8, damaged.get(damaged.l2()));
    let image = Memory::from(damaged.0.clone());
    let made = plan(&image, &with(None)).unwrap();
    assert!(!made.wants_key());
    made.apply(None).unwrap();
    let repaired = Bytes(image.to_vec().unwrap());
    let host = |number: u64| repaired.get(repaired.l2() + 8 * number) & OFFSET_MASK;
    let cluster = |host| {
        let at = usize::try_from(host).unwrap();
        &repaired.0[at..at + 4096]
    };
    assert_ne!(host(0), host(1));
    assert!(cluster(host(0)) == cluster(host(1)));
}

#[test]
fn a_crash_while_encrypted_clusters_move_leaves_a_way_back_and_a_way_on() {
    if !oracle::is_available(1, "crashes with encrypted clusters") {
        return;
    }
    let damaged = shared();
    let image = Trace::new(Memory::from(damaged.0.clone()));
    let saved = Memory::new();
    let made = plan(&image, &with(Some(&Right))).unwrap();
    made.apply(Some(&saved)).unwrap();
    drop(made);
    let host = damaged.get(damaged.l2()) & OFFSET_MASK;
    let expected = deciphered(&damaged.0, host);
    for state in states(&image.events(), &mut Random(3)) {
        let crashed = Memory::from(damaged.0.clone());
        replay(&state, &crashed).unwrap();
        let again = plan(&crashed, &with(Some(&Right))).unwrap();
        again.apply(None).unwrap();
        drop(again);
        assert_eq!(
            check(&crashed, &Options::default()).verdict(),
            Verdict::Sound
        );
        let now = Bytes(crashed.to_vec().unwrap());
        for number in 0..2 {
            let host = now.get(now.l2() + 8 * number) & OFFSET_MASK;
            assert!(deciphered(&now.0, host) == expected, "cluster {number}");
        }

        let crashed = Memory::from(damaged.0.clone());
        replay(&state, &crashed).unwrap();
        undo(&crashed, &Memory::from(saved.to_vec().unwrap()), true).unwrap();
        assert!(crashed.to_vec().unwrap() == damaged.0);
    }
}
