//! XTS over sectors (IEEE 1619), for ciphers with blocks of 16 bytes.

use cipher::consts::U16;
use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt};

use super::sector::{Iv, SECTOR_LEN};

type Block = Array<u8, U16>;

/// The polynomial of the field that tweaks are multiplied in.
const POLYNOMIAL: u128 = 0x87;
/// Blocks of a sector.
const BLOCKS: usize = SECTOR_LEN / 16;
/// Sectors that a cipher gets at once: as many blocks as the widest processors work on together, and few enough for their
/// masks to stay close.
const GROUP: usize = 2;

/// Enciphers sectors. `tweaks` are their IVs, already enciphered under the second key.
pub(super) fn encrypt<C>(cipher: &C, tweaks: &[Iv], data: &mut [u8])
where
    C: BlockCipherEncrypt<BlockSize = U16>,
{
    run(tweaks, data, |blocks| cipher.encrypt_blocks(blocks));
}

/// Deciphers sectors. `tweaks` are their IVs, already *enciphered* under the second key.
pub(super) fn decrypt<C>(cipher: &C, tweaks: &[Iv], data: &mut [u8])
where
    C: BlockCipherDecrypt<BlockSize = U16>,
{
    run(tweaks, data, |blocks| cipher.decrypt_blocks(blocks));
}

/// Masks, works, masks again.
fn run(tweaks: &[Iv], data: &mut [u8], work: impl Fn(&mut [Block])) {
    let (blocks, _) = Block::slice_as_chunks_mut(data);
    let mut masks = [Block::default(); GROUP * BLOCKS];
    for (blocks, tweaks) in blocks.chunks_mut(GROUP * BLOCKS).zip(tweaks.chunks(GROUP)) {
        for (masks, tweak) in masks.chunks_exact_mut(BLOCKS).zip(tweaks) {
            fill(masks, tweak);
        }
        xor(blocks, &masks);
        work(blocks);
        xor(blocks, &masks);
    }
}

/// The masks of a sector's blocks: each is the one before times x.
#[expect(
    clippy::little_endian_bytes,
    reason = "tweaks are little-endian numbers"
)]
fn fill(masks: &mut [Block], tweak: &Iv) {
    let mut next = u128::from_le_bytes(*tweak);
    for mask in masks {
        mask.0 = next.to_le_bytes();
        next = (next << 1) ^ ((next >> 127) * POLYNOMIAL);
    }
}

#[expect(clippy::host_endian_bytes, reason = "the same order there and back")]
fn xor(blocks: &mut [Block], masks: &[Block]) {
    for (block, mask) in blocks.iter_mut().zip(masks) {
        block.0 = (u128::from_ne_bytes(block.0) ^ u128::from_ne_bytes(mask.0)).to_ne_bytes();
    }
}
