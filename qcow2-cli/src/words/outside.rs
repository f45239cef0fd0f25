//! Names from outside, which need not be UTF-8, as text.
//!
//! Each byte that is no part of UTF-8 becomes a character of its own, far up in the last private plane, and becomes that byte again where
//! the name leaves the program: for the system, for an image, for a terminal. Where such characters come from outside, their bytes are
//! treated in the same way, so no two names are ever the same text.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

/// The character for the byte 0.
const BASE: u32 = 0x10_fe00;
/// How the characters for bytes from 0x80 on begin in UTF-8.
const START: [u8; 2] = [0xf4, 0x8f];

/// The byte that a character stands for.
fn byte_of(c: char) -> Option<u8> {
    let byte = u32::from(c).checked_sub(BASE)?;
    u8::try_from(byte).ok().filter(|byte| !byte.is_ascii())
}

/// Bytes as text.
pub fn text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let stand_for = |bytes: &[u8], text: &mut String| {
        let chars = bytes.iter().map(|byte| BASE + u32::from(*byte));
        text.extend(chars.filter_map(char::from_u32));
    };
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match byte_of(c) {
                None => text.push(c),
                Some(_) => stand_for(c.encode_utf8(&mut [0; 4]).as_bytes(), &mut text),
            }
        }
        stand_for(chunk.invalid(), &mut text);
    }
    text
}

/// An argument, or a path, as text.
pub fn of_os(name: &OsStr) -> String {
    text(name.as_bytes())
}

/// The bytes of a text.
pub fn bytes(text: &str) -> Cow<'_, [u8]> {
    if !text.as_bytes().windows(2).any(|pair| pair == START) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(bytes)
}

/// A text as a path.
pub fn path(text: &str) -> PathBuf {
    OsString::from_vec(bytes(text).into_owned()).into()
}

/// A text for who reads UTF-8 only: U+FFFD is in place of what is none.
pub fn lossy(text: &str) -> Cow<'_, str> {
    match bytes(text) {
        Cow::Borrowed(_) => Cow::Borrowed(text),
        Cow::Owned(bytes) => Cow::Owned(String::from_utf8_lossy(&bytes).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_as_they_were() {
        let far_up: String = [BASE, BASE + 0x7f, BASE + 0x80, BASE + 0xff, BASE + 0x100]
            .into_iter()
            .filter_map(char::from_u32)
            .collect();
        for name in [
            &b"plain"[..],
            b"",
            "\u{e9}\u{1d11e}".as_bytes(),
            b"caf\xe9.qcow2",
            b"\xff\xfe\x80",
            b"\xf4\x8f\xb8",
            far_up.as_bytes(),
        ] {
            assert_eq!(&*bytes(&text(name)), name, "{name:?}");
        }
        assert_eq!(text("\u{e9}".as_bytes()), "\u{e9}");
        assert_ne!(text(b"\xe9"), text("\u{10fee9}".as_bytes()));
        assert_eq!(lossy(&text(b"a\xe9")), "a\u{fffd}");
    }
}
