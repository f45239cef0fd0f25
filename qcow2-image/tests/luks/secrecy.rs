use std::error::Error;

use qcow2_image::luks::{KeyCost, KeySlots, LuksError};
use qcow2_io::Memory;

use crate::area::{OFFSET, new_area, secret, unlock};

/// Passphrases that are seen anywhere they are printed, as text or as numbers.
const SECRETS: [&str; 2] = ["xyzzy-plugh-plover", "fee-fie-foe-foo"];

fn assert_silent(words: &str) {
    for secret in SECRETS {
        assert!(!words.contains(secret), "{words}");
        let numbers = format!("{:?}", &secret.as_bytes()[..4]);
        let numbers = numbers.trim_matches(['[', ']']);
        assert!(!words.contains(numbers), "{words}");
    }
}

fn assert_error_is_silent(error: &LuksError) {
    assert_silent(&format!("{error} {error:?} {:?}", error.source()));
}

#[test]
fn nothing_that_is_unlocked_shows_its_key() {
    let (memory, area) = new_area();
    let unlocked = unlock(&memory, area, "old").unwrap();
    assert_eq!(
        format!("{unlocked:?}"),
        "Unlocked { slot: 0, suite: Suite { algorithm: Aes128, mode: Cbc, iv_generator: Plain64, hash: Sha256 }, .. }"
    );
    // A key would be hexadecimal digits or a list of numbers.
    let cipher = format!("{:?}", unlocked.cipher());
    assert!(!cipher.contains('['), "{cipher}");
}

#[test]
fn no_error_shows_a_passphrase() {
    let (memory, area) = new_area();
    let unlocked = unlock(&memory, area, "old").unwrap();
    let [first, second] = SECRETS.map(secret);
    assert_silent(&format!("{first:?}"));
    let slots = KeySlots::new(&memory, area);
    assert_silent(&format!("{slots:?}"));
    let quick = KeyCost::Iterations(1000);
    slots.add(&unlocked, &first, None, quick).unwrap();
    let errors = [
        unlock(&memory, area, SECRETS[1]).unwrap_err(),
        slots.erase(1, Some(&second)).unwrap_err(),
        slots.erase_matching(&second).unwrap_err(),
        slots.add(&unlocked, &second, Some(1), quick).unwrap_err(),
        unlock(&Memory::new(), area, SECRETS[1]).unwrap_err(),
    ];
    for error in &errors {
        assert_error_is_silent(error);
    }
    slots.erase(0, None).unwrap();
    assert_error_is_silent(&slots.erase_matching(&first).unwrap_err());
    assert_error_is_silent(&slots.erase(1, Some(&first)).unwrap_err());
}

#[test]
fn areas_made_alike_have_no_key_and_no_salt_in_common() {
    let (one, two) = (new_area().0, new_area().0);
    let start = usize::try_from(OFFSET).unwrap();
    let [one, two] = [one, two].map(|memory| memory.to_vec().unwrap()[start..].to_vec());
    // Digest, its salt, UUID; salt of the slot; key material.
    for range in [112..132, 132..164, 168..204, 216..248, 4096..4096 + 64000] {
        assert_ne!(one[range.clone()], two[range]);
    }
    assert_eq!(one[..112], two[..112]);
    assert_eq!(one[256..4096], two[256..4096]);
}
