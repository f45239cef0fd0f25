use qcow2_format::LuksHeader;
use qcow2_format::luks::LuksParameters;
use qcow2_io::cipher::{Secret, Zeroizing, random};
use qcow2_io::{Storage, ZeroFlags};

use super::area::Area;
use super::{LuksArea, LuksError, LuksOptions, Unlocked};

/// Makes an area of [`LuksOptions::area_len`] bytes at `offset`, with a new master key in slot 0 and seven slots that are not
/// active. What lay there is lost; the key material of the seven is zeros, as QEMU leaves it.
///
/// Takes as long as the options say. The area is durable on return, so a header may point to it.
///
/// # Errors
///
/// Options that don't go together, no random numbers, or a storage that fails; then there is no usable area.
pub fn create(
    storage: &dyn Storage,
    offset: u64,
    options: &LuksOptions,
    passphrase: &Secret,
) -> Result<Unlocked, LuksError> {
    const ACTION: &str = "write the LUKS area";
    let suite = options.suite()?;
    let len = options.area_len()?;
    let end = offset
        .checked_add(len)
        .filter(|end| *end <= qcow2_io::MAX_LEN);
    let end = end.ok_or(LuksError::BeyondFile {
        end: offset.saturating_add(len),
        len: qcow2_io::MAX_LEN,
    })?;
    let area = Area::new(storage, LuksArea { offset, len });

    let mut master = Zeroizing::new(vec![0; suite.key_len()]);
    random(&mut master)?;
    let (mut master_salt, mut slot_salt) = ([0; 32], [0; 32]);
    random(&mut master_salt)?;
    random(&mut slot_salt)?;
    let cost = options.key_cost();
    let master_iterations = suite.digest_iterations(cost)?;
    let slot_iterations = cost.iterations(suite.hash, suite.key_len())?;
    let mut header = LuksHeader::new(&LuksParameters {
        cipher_name: suite.algorithm.luks_name().as_bytes(),
        cipher_mode: options.cipher_mode().as_bytes(),
        hash_spec: suite.hash.to_string().as_bytes(),
        master_key_len: suite.key_len_bytes(),
        master_key_digest: suite.digest(&master, &master_salt, master_iterations),
        master_key_salt: master_salt,
        master_key_iterations: master_iterations,
        uuid: uuid()?.as_bytes(),
    })?;
    header.enable_slot(0, slot_iterations, slot_salt)?;
    let material = suite.seal(&master, passphrase, &slot_salt, slot_iterations)?;

    storage
        .write_zeroes(offset..end, ZeroFlags::NONE)
        .map_err(LuksError::while_trying(ACTION))?;
    let place = area.material(&header, 0)?;
    area.write(place.offset, &material, ACTION)?;
    area.write(0, &header.encode(), ACTION)?;
    area.flush(ACTION)?;
    Unlocked::new(suite, &header, 0, master)
}

/// A random UUID, as text.
fn uuid() -> Result<String, LuksError> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    let mut number = u128::from_be_bytes(bytes);
    // Version 4, variant 1: RFC 9562.
    number = number & !(0xf << 76) | (4 << 76);
    number = number & !(3 << 62) | (2 << 62);
    let mut text = format!("{number:032x}");
    for at in [20, 16, 12, 8] {
        text.insert(at, '-');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_random_and_of_version_4() {
        let one = uuid().unwrap();
        assert_eq!(one.len(), 36);
        let parts: Vec<_> = one.split('-').collect();
        let lens: Vec<_> = parts.iter().map(|part| part.len()).collect();
        assert_eq!(lens, [8, 4, 4, 4, 12]);
        assert!(parts[2].starts_with('4'));
        assert!(parts[3].starts_with(['8', '9', 'a', 'b']));
        assert_ne!(one, uuid().unwrap());
    }
}
