//! CBC, CTR and ECB over sectors. Ciphers get as many blocks at once as a mode allows: processors work on several together.

use cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt};

use super::sector::{BATCH, Iv, SECTOR_LEN};

/// Sectors whose old content fits on the stack.
const GROUP: usize = 8;
const GROUP_LEN: usize = GROUP * SECTOR_LEN;

/// Bytes, whole blocks of them, as blocks.
pub(super) fn blocks<C: BlockCipherEncrypt>(bytes: &mut [u8]) -> &mut [Block<C>] {
    let (blocks, rest) = Array::slice_as_chunks_mut(bytes);
    debug_assert!(rest.is_empty(), "sectors are whole blocks");
    blocks
}

/// Each IV enciphered by itself.
pub(super) fn encrypt_ivs<C: BlockCipherEncrypt>(cipher: &C, ivs: &mut [Iv]) {
    let mut lanes = lanes::<C>(ivs);
    if let Some(lanes) = lanes.get_mut(..ivs.len()) {
        cipher.encrypt_blocks(lanes);
    }
    for (iv, lane) in ivs.iter_mut().zip(&lanes) {
        for (byte, new) in iv.iter_mut().zip(lane) {
            *byte = *new;
        }
    }
}

pub(super) fn encrypt_ecb<C: BlockCipherEncrypt>(cipher: &C, data: &mut [u8]) {
    cipher.encrypt_blocks(blocks::<C>(data));
}

pub(super) fn decrypt_ecb<C>(cipher: &C, data: &mut [u8])
where
    C: BlockCipherEncrypt + BlockCipherDecrypt,
{
    cipher.decrypt_blocks(blocks::<C>(data));
}

/// A block waits for the one before it, so that what can be done at once are blocks of different sectors.
pub(super) fn encrypt_cbc<C: BlockCipherEncrypt>(cipher: &C, ivs: &[Iv], data: &mut [u8]) {
    let mut lanes = lanes::<C>(ivs);
    let Some(lanes) = lanes.get_mut(..ivs.len()) else {
        return;
    };
    let block_len = C::block_size();
    for start in (0..SECTOR_LEN).step_by(block_len) {
        for (lane, sector) in lanes.iter_mut().zip(data.chunks_exact(SECTOR_LEN)) {
            xor(lane, sector.get(start..).unwrap_or_default());
        }
        cipher.encrypt_blocks(lanes);
        for (lane, sector) in lanes.iter().zip(data.chunks_exact_mut(SECTOR_LEN)) {
            if let Some(block) = sector.get_mut(start..start + block_len) {
                block.copy_from_slice(lane);
            }
        }
    }
}

pub(super) fn decrypt_cbc<C>(cipher: &C, ivs: &[Iv], data: &mut [u8])
where
    C: BlockCipherEncrypt + BlockCipherDecrypt,
{
    let block_len = C::block_size();
    let mut before = [0; GROUP_LEN];
    for (data, ivs) in data.chunks_mut(GROUP_LEN).zip(ivs.chunks(GROUP)) {
        for (old, byte) in before.iter_mut().zip(&*data) {
            *old = *byte;
        }
        cipher.decrypt_blocks(blocks::<C>(data));
        let sectors = data.chunks_exact_mut(SECTOR_LEN);
        for ((sector, before), iv) in sectors.zip(before.chunks_exact(SECTOR_LEN)).zip(ivs) {
            if let Some((first, rest)) = sector.split_at_mut_checked(block_len) {
                xor(first, iv);
                xor(rest, before);
            }
        }
    }
}

/// Enciphers, and doing it again deciphers.
pub(super) fn apply_ctr<C: BlockCipherEncrypt>(cipher: &C, ivs: &[Iv], data: &mut [u8]) {
    let mut stream = [0; GROUP_LEN];
    for (data, ivs) in data.chunks_mut(GROUP_LEN).zip(ivs.chunks(GROUP)) {
        for (sector, iv) in stream.chunks_exact_mut(SECTOR_LEN).zip(ivs) {
            let mut counter = block_of::<C>(iv);
            for block in blocks::<C>(sector) {
                block.copy_from_slice(&counter);
                increment(&mut counter);
            }
        }
        if let Some(stream) = stream.get_mut(..data.len()) {
            cipher.encrypt_blocks(blocks::<C>(stream));
        }
        xor(data, &stream);
    }
}

/// One block a sector, from its IV.
fn lanes<C: BlockCipherEncrypt>(ivs: &[Iv]) -> [Block<C>; BATCH] {
    debug_assert!(ivs.len() <= BATCH, "batches have at most {BATCH} sectors");
    let mut ivs = ivs.iter();
    std::array::from_fn(|_| ivs.next().map_or_else(Array::default, block_of::<C>))
}

fn block_of<C: BlockCipherEncrypt>(iv: &Iv) -> Block<C> {
    let mut block = Block::<C>::default();
    xor(&mut block, iv);
    block
}

/// Counts as one big-endian number does.
fn increment(counter: &mut [u8]) {
    for byte in counter.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            return;
        }
    }
}

/// As far as both go.
fn xor(bytes: &mut [u8], with: &[u8]) {
    for (byte, with) in bytes.iter_mut().zip(with) {
        *byte ^= with;
    }
}
