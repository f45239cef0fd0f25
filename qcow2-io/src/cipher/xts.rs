//! XTS over sectors (IEEE 1619), for ciphers with blocks of 16 bytes.
//!
//! Written on the block backends of the ciphers, so that one pass makes the tweaks, masks, enciphers and masks again as many
//! blocks as the processor takes at once, across sector borders.

use cipher::array::ArraySize;
use cipher::consts::U16;
use cipher::{
    Array, BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherDecrypt, BlockCipherEncBackend,
    BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser,
};

use super::sector::{Iv, SECTOR_LEN};

type Block = Array<u8, U16>;

/// The polynomial of the field that tweaks are multiplied in.
const POLYNOMIAL: u128 = 0x87;
const BLOCKS: usize = SECTOR_LEN / 16;

/// Enciphers sectors. `tweaks` are their IVs, already enciphered under the second key.
pub(super) fn encrypt<C>(cipher: &C, tweaks: &[Iv], data: &mut [u8])
where
    C: BlockCipherEncrypt<BlockSize = U16>,
{
    cipher.encrypt_with_backend(Sectors::new(tweaks, data));
}

/// Deciphers sectors. `tweaks` are their IVs, already *enciphered* under the second key.
pub(super) fn decrypt<C>(cipher: &C, tweaks: &[Iv], data: &mut [u8])
where
    C: BlockCipherDecrypt<BlockSize = U16>,
{
    cipher.decrypt_with_backend(Sectors::new(tweaks, data));
}

/// Sectors and where they take their tweaks from: the work to do once a backend is chosen.
struct Sectors<'a> {
    tweaks: Tweaks<'a>,
    data: &'a mut [u8],
}

impl<'a> Sectors<'a> {
    fn new(tweaks: &'a [Iv], data: &'a mut [u8]) -> Self {
        Self {
            tweaks: Tweaks {
                sectors: tweaks.iter(),
                next: 0,
                left: 0,
            },
            data,
        }
    }

    /// Masks, works, masks again; `many` blocks at once as long as there are so many, then `one` by one.
    #[expect(
        clippy::inline_always,
        reason = "a backend works only where its caller has its features"
    )]
    #[inline(always)]
    fn run<N: ArraySize>(mut self, many: impl Fn(&mut Array<Block, N>), one: impl Fn(&mut Block)) {
        let (blocks, _) = Block::slice_as_chunks_mut(self.data);
        let (wide, narrow) = Array::<Block, N>::slice_as_chunks_mut(blocks);
        for blocks in wide {
            let masks: Array<Block, N> = Array::from_fn(|_| self.tweaks.mask());
            for (block, mask) in blocks.iter_mut().zip(&masks) {
                xor(block, mask);
            }
            many(blocks);
            for (block, mask) in blocks.iter_mut().zip(&masks) {
                xor(block, mask);
            }
        }
        for block in narrow {
            let mask = self.tweaks.mask();
            xor(block, &mask);
            one(block);
            xor(block, &mask);
        }
    }
}

impl BlockSizeUser for Sectors<'_> {
    type BlockSize = U16;
}

impl BlockCipherEncClosure for Sectors<'_> {
    #[expect(
        clippy::inline_always,
        reason = "a backend works only where its caller has its features"
    )]
    #[inline(always)]
    fn call<B: BlockCipherEncBackend<BlockSize = U16>>(self, backend: &B) {
        self.run::<B::ParBlocksSize>(
            |blocks| backend.encrypt_par_blocks(blocks.into()),
            |block| backend.encrypt_block(block.into()),
        );
    }
}

impl BlockCipherDecClosure for Sectors<'_> {
    #[expect(
        clippy::inline_always,
        reason = "a backend works only where its caller has its features"
    )]
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = U16>>(self, backend: &B) {
        self.run::<B::ParBlocksSize>(
            |blocks| backend.decrypt_par_blocks(blocks.into()),
            |block| backend.decrypt_block(block.into()),
        );
    }
}

/// The mask of each block of each sector, in order.
struct Tweaks<'a> {
    sectors: std::slice::Iter<'a, Iv>,
    next: u128,
    /// Blocks of this sector still to come.
    left: usize,
}

impl Tweaks<'_> {
    #[expect(
        clippy::little_endian_bytes,
        clippy::inline_always,
        reason = "tweaks are little-endian numbers; one is needed every few cycles"
    )]
    #[inline(always)]
    fn mask(&mut self) -> Block {
        if self.left == 0 {
            let sector = self.sectors.next();
            self.next = sector.map_or(0, |tweak| u128::from_le_bytes(*tweak));
            self.left = BLOCKS;
        }
        self.left -= 1;
        let mask = self.next;
        self.next = (mask << 1) ^ ((mask >> 127) * POLYNOMIAL);
        Array(mask.to_le_bytes())
    }
}

#[expect(
    clippy::host_endian_bytes,
    clippy::inline_always,
    reason = "the same order there and back; two are needed every few cycles"
)]
#[inline(always)]
fn xor(block: &mut Block, mask: &Block) {
    block.0 = (u128::from_ne_bytes(block.0) ^ u128::from_ne_bytes(mask.0)).to_ne_bytes();
}
