//! The block cipher Twofish (Schneier, Kelsey, Whiting, Wagner, Hall, Ferguson: Twofish, a 128-bit block cipher).
//!
//! With the key-dependent S-boxes worked out once for a key, as tables that hold their product with the MDS matrix too. The
//! `twofish` crate works them out anew for each byte, and is a hundred times slower for it; the tests hold both together.

use ::cipher::consts::{U1, U16};
use ::cipher::{
    Block, BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherDecrypt, BlockCipherEncBackend,
    BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser, InOut, ParBlocksSizeUser,
};
use zeroize::{Zeroize as _, Zeroizing};

/// Low bits of the polynomials of the two fields, x^8 + x^6 + x^5 + x^3 + 1 and x^8 + x^6 + x^3 + x^2 + 1.
const MDS_POLYNOMIAL: u8 = 0x69;
const RS_POLYNOMIAL: u8 = 0x4d;

const MDS: [[u8; 4]; 4] = [
    [0x01, 0xef, 0x5b, 0x5b],
    [0x5b, 0xef, 0xef, 0x01],
    [0xef, 0x5b, 0x01, 0xef],
    [0xef, 0x01, 0xef, 0x5b],
];
const RS: [[u8; 8]; 4] = [
    [0x01, 0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e],
    [0xa4, 0x56, 0x82, 0xf3, 0x1e, 0xc6, 0x68, 0xe5],
    [0x02, 0xa1, 0xfc, 0xc1, 0x47, 0xae, 0x3d, 0x19],
    [0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e, 0x03],
];

/// The two fixed permutations of bytes.
const Q: [[u8; 256]; 2] = [
    permutation([
        0x817d6f320b59eca4,
        0xecb81235f4a6709d,
        0xba5e6d90c8f32471,
        0xd7f4126e9b3085ca,
    ]),
    permutation([
        0x28bdf76e31940ac5,
        0x1e2b4c376da5f908,
        0x4c75169a0ed82b3f,
        0xb951c3de647f208a,
    ]),
];

/// Which permutations the bytes of a word go through, from the last word of a key to the first, and which one at the end.
const CHAINS: [[usize; 5]; 4] = [
    [1, 1, 0, 0, 1],
    [0, 1, 1, 0, 0],
    [0, 0, 0, 1, 1],
    [1, 0, 1, 1, 0],
];

/// Twofish with a key.
pub(super) struct Twofish {
    /// For each byte of a word, what its S-box and the matrix make of it.
    boxes: [[u32; 256]; 4],
    /// Eight for whitening, then two for each of sixteen rounds.
    subkeys: [u32; 40],
}

#[expect(
    clippy::indexing_slicing,
    clippy::many_single_char_names,
    reason = "all indices are of fixed ranges, tables have an entry for every byte; the words of a block have no names"
)]
impl Twofish {
    /// `None` when the key has not 16, 24 or 32 bytes.
    pub(super) fn new(key: &[u8]) -> Option<Box<Self>> {
        if !matches!(key.len(), 16 | 24 | 32) {
            return None;
        }
        // Filled where it stays, so that nothing of the key is left elsewhere.
        let mut twofish = Box::new(Self {
            boxes: [[0; 256]; 4],
            subkeys: [0; 40],
        });
        // Words of the key by turns, and the words that the S-boxes depend on.
        let mut even = Zeroizing::new(Vec::with_capacity(4));
        let mut odd = Zeroizing::new(Vec::with_capacity(4));
        let mut sbox_key = Zeroizing::new(Vec::with_capacity(4));
        for part in key.chunks_exact(8) {
            even.push([part[0], part[1], part[2], part[3]]);
            odd.push([part[4], part[5], part[6], part[7]]);
            sbox_key.push(RS.map(|row| {
                let products = row
                    .iter()
                    .zip(part)
                    .map(|(a, b)| multiply(*a, *b, RS_POLYNOMIAL));
                products.fold(0, |sum, product| sum ^ product)
            }));
        }
        sbox_key.reverse();

        for (column, table) in twofish.boxes.iter_mut().enumerate() {
            for (byte, entry) in (0..=255).zip(table) {
                *entry = column_of(column, byte, &sbox_key);
            }
        }
        let h = |byte, words: &[[u8; 4]]| (0..4).fold(0, |sum, i| sum ^ column_of(i, byte, words));
        for (byte, pair) in (0..).step_by(2).zip(twofish.subkeys.chunks_exact_mut(2)) {
            let a = h(byte, &even);
            let b = h(byte + 1, &odd).rotate_left(8);
            pair[0] = a.wrapping_add(b);
            pair[1] = a.wrapping_add(b).wrapping_add(b).rotate_left(9);
        }
        Some(twofish)
    }

    #[inline]
    fn g(&self, word: u32) -> u32 {
        let [a, b, c, d] = bytes_of(word).map(usize::from);
        self.boxes[0][a] ^ self.boxes[1][b] ^ self.boxes[2][c] ^ self.boxes[3][d]
    }

    /// What a round adds to the other half: of two words, under the two subkeys from `at` on.
    #[inline]
    fn f(&self, left: u32, right: u32, at: usize) -> (u32, u32) {
        let a = self.g(left);
        let b = self.g(right.rotate_left(8));
        let sum = a.wrapping_add(b);
        (
            sum.wrapping_add(self.subkeys[at]),
            sum.wrapping_add(b).wrapping_add(self.subkeys[at + 1]),
        )
    }

    #[inline]
    fn encrypt(&self, block: [u8; 16]) -> [u8; 16] {
        let keys = &self.subkeys;
        let [a, b, c, d] = words_of(block);
        let (mut a, mut b, mut c, mut d) = (a ^ keys[0], b ^ keys[1], c ^ keys[2], d ^ keys[3]);
        // Two rounds, after which the halves are in their places again.
        for at in (8..40).step_by(4) {
            let (x, y) = self.f(a, b, at);
            (c, d) = ((c ^ x).rotate_right(1), d.rotate_left(1) ^ y);
            let (x, y) = self.f(c, d, at + 2);
            (a, b) = ((a ^ x).rotate_right(1), b.rotate_left(1) ^ y);
        }
        block_of([c ^ keys[4], d ^ keys[5], a ^ keys[6], b ^ keys[7]])
    }

    #[inline]
    fn decrypt(&self, block: [u8; 16]) -> [u8; 16] {
        let keys = &self.subkeys;
        let [c, d, a, b] = words_of(block);
        let (mut a, mut b, mut c, mut d) = (a ^ keys[6], b ^ keys[7], c ^ keys[4], d ^ keys[5]);
        for at in (8..40).step_by(4).rev() {
            let (x, y) = self.f(c, d, at + 2);
            (a, b) = (a.rotate_left(1) ^ x, (b ^ y).rotate_right(1));
            let (x, y) = self.f(a, b, at);
            (c, d) = (c.rotate_left(1) ^ x, (d ^ y).rotate_right(1));
        }
        block_of([a ^ keys[0], b ^ keys[1], c ^ keys[2], d ^ keys[3]])
    }
}

impl Drop for Twofish {
    fn drop(&mut self) {
        self.boxes.zeroize();
        self.subkeys.zeroize();
    }
}

impl BlockSizeUser for Twofish {
    type BlockSize = U16;
}

impl ParBlocksSizeUser for Twofish {
    type ParBlocksSize = U1;
}

impl BlockCipherEncrypt for Twofish {
    fn encrypt_with_backend(&self, f: impl BlockCipherEncClosure<BlockSize = U16>) {
        f.call(self);
    }
}

impl BlockCipherEncBackend for Twofish {
    #[inline]
    fn encrypt_block(&self, mut block: InOut<'_, '_, Block<Self>>) {
        let encrypted = self.encrypt(block.get_in().0);
        block.get_out().0 = encrypted;
    }
}

impl BlockCipherDecrypt for Twofish {
    fn decrypt_with_backend(&self, f: impl BlockCipherDecClosure<BlockSize = U16>) {
        f.call(self);
    }
}

impl BlockCipherDecBackend for Twofish {
    #[inline]
    fn decrypt_block(&self, mut block: InOut<'_, '_, Block<Self>>) {
        let decrypted = self.decrypt(block.get_in().0);
        block.get_out().0 = decrypted;
    }
}

/// What byte number `column` of a word becomes on its way through the S-box made by `words` and the matrix.
#[expect(
    clippy::indexing_slicing,
    reason = "columns are four, words at most four"
)]
fn column_of(column: usize, byte: u8, words: &[[u8; 4]]) -> u32 {
    let chain = &CHAINS[column];
    let mut byte = byte;
    for (q, word) in chain[4 - words.len()..].iter().zip(words.iter().rev()) {
        byte = Q[*q][usize::from(byte)] ^ word[column];
    }
    byte = Q[chain[4]][usize::from(byte)];
    word_of(MDS.map(|row| multiply(row[column], byte, MDS_POLYNOMIAL)))
}

/// The product in the field of 256 elements by this polynomial.
const fn multiply(a: u8, b: u8, polynomial: u8) -> u8 {
    let (mut a, mut b, mut product) = (a, b, 0);
    while a != 0 {
        product ^= (a & 1) * b;
        b = (b << 1) ^ ((b >> 7) * polynomial);
        a >>= 1;
    }
    product
}

/// A permutation of bytes, from four of nibbles, each written as the number whose digits it lists.
#[expect(
    clippy::indexing_slicing,
    reason = "a nibble's number of 16 digits, a table of 256 bytes"
)]
const fn permutation(nibbles: [u64; 4]) -> [u8; 256] {
    const fn mix(a: u8, b: u8) -> (u8, u8) {
        (a ^ b, (a ^ (b >> 1 | b << 3) ^ (a << 3)) & 15)
    }
    #[expect(clippy::cast_possible_truncation, reason = "one digit is taken")]
    const fn digit(of: u64, index: u8) -> u8 {
        (of >> (60 - 4 * index)) as u8 & 15
    }
    let mut table = [0; 256];
    let mut byte = 0_u8;
    loop {
        let (a, b) = mix(byte >> 4, byte & 15);
        let (a, b) = mix(digit(nibbles[0], a), digit(nibbles[1], b));
        table[byte as usize] = digit(nibbles[3], b) << 4 | digit(nibbles[2], a);
        if byte == u8::MAX {
            return table;
        }
        byte += 1;
    }
}

#[expect(clippy::little_endian_bytes, reason = "Twofish is little-endian")]
fn word_of(bytes: [u8; 4]) -> u32 {
    u32::from_le_bytes(bytes)
}

#[expect(clippy::little_endian_bytes, reason = "Twofish is little-endian")]
fn bytes_of(word: u32) -> [u8; 4] {
    word.to_le_bytes()
}

#[expect(clippy::many_single_char_names, reason = "bytes have no names")]
#[inline]
fn words_of(block: [u8; 16]) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = block;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]].map(word_of)
}

#[expect(clippy::many_single_char_names, reason = "bytes have no names")]
#[inline]
fn block_of(words: [u32; 4]) -> [u8; 16] {
    let [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]] = words.map(bytes_of);
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}
