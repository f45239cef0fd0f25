//! Prefix codes: how long each symbol's is, and what it is.

/// The longest code of a symbol of the data.
pub(super) const MAX_BITS: usize = 15;
/// The longest code of a code's length.
pub(super) const MAX_LENGTH_BITS: usize = 7;
/// Symbols in the largest alphabet.
const MOST: usize = 288;
/// No tree over 16 bits of occurrences is deeper.
const DEEPEST: usize = 32;

/// The lengths of the codes that make the symbols shortest in sum, none above `limit` bits, 0 for symbols that don't occur.
///
/// At least two symbols get a code, whether they occur or not: not all readers take an incomplete code.
pub(super) fn lengths<const N: usize>(counts: &[u16; N], limit: usize) -> [u8; N] {
    let mut lengths = [0; N];
    let mut order = [0u32; MOST];
    let mut used = 0;
    for (symbol, count) in counts.iter().enumerate() {
        // Without a branch: the entry is overwritten unless the symbol occurs.
        order[used] = u32::from(*count) << 16 | symbol as u32;
        used += usize::from(*count > 0);
    }
    if used < 2 {
        let only = if used == 0 { 0 } else { order[0] as u16 };
        lengths[usize::from(only)] = 1;
        lengths[usize::from(only == 0)] = 1;
        return lengths;
    }
    let order = &mut order[..used];
    order.sort_unstable();
    let mut leaves = depths(order);
    limit_depths(&mut leaves, limit);
    // The rarest symbols get the longest codes.
    let mut rest = order.iter();
    for bits in (1..=limit).rev() {
        for key in rest.by_ref().take(leaves[bits] as usize) {
            lengths[usize::from(*key as u16)] = bits as u8;
        }
    }
    lengths
}

/// How many leaves of the best tree lie at each depth. The upper halves of the keys are the weights, in order.
fn depths(order: &[u32]) -> [u32; DEEPEST] {
    // Nodes are made in the order of their weights: those that exist and the leaves are two queues.
    let mut weights = [0u32; MOST];
    let mut parents = [0u16; MOST];
    let nodes = order.len() - 1;
    let (mut leaf, mut inner) = (0, 0);
    for node in 0..nodes {
        let mut weight = 0;
        for _ in 0..2 {
            let of_leaf = order.get(leaf).map_or(u32::MAX, |key| key >> 16);
            if inner < node && weights[inner] < of_leaf {
                weight += weights[inner];
                parents[inner] = node as u16;
                inner += 1;
            } else {
                weight += of_leaf;
                leaf += 1;
            }
        }
        weights[node] = weight;
    }
    // Now the weights are of no more use, and their room takes the depths.
    let mut inners = [0u32; DEEPEST];
    let depths = &mut weights;
    for node in (0..nodes).rev() {
        depths[node] = if node + 1 == nodes {
            0
        } else {
            depths[usize::from(parents[node])] + 1
        };
        inners[depths[node] as usize % DEEPEST] += 1;
    }
    let mut leaves = [0; DEEPEST];
    for depth in 1..DEEPEST {
        leaves[depth] = 2 * inners[depth - 1] - inners[depth];
    }
    leaves
}

/// Lifts leaves that lie too deep, and lets others down to make room for them.
fn limit_depths(leaves: &mut [u32; DEEPEST], limit: usize) {
    let deep: u32 = leaves[limit + 1..].iter().sum();
    if deep == 0 {
        return;
    }
    leaves[limit] += deep;
    leaves[limit + 1..].fill(0);
    // In units of the smallest share.
    let shares: u32 = (1..=limit).map(|bits| leaves[bits] << (limit - bits)).sum();
    for _ in 1 << limit..shares {
        // A leaf becomes a node, of itself and of one of the deepest.
        if let Some(bits) = (1..limit).rev().find(|bits| leaves[*bits] > 0) {
            leaves[bits] -= 1;
            leaves[bits + 1] += 2;
            leaves[limit] -= 1;
        }
    }
}

/// A code as it is written, the first bit lowest.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Code {
    pub(super) bits: u32,
    pub(super) count: u32,
}

/// The codes with these lengths.
pub(super) fn codes<const N: usize>(lengths: &[u8; N]) -> [Code; N] {
    let mut counts = [0u16; MAX_BITS + 1];
    for length in lengths {
        counts[usize::from(*length) & MAX_BITS] += 1;
    }
    let mut next = [0u16; MAX_BITS + 1];
    for bits in 2..=MAX_BITS {
        next[bits] = (next[bits - 1] + counts[bits - 1]) << 1;
    }
    lengths.map(|length| {
        if length == 0 {
            return Code::default();
        }
        let next = &mut next[usize::from(length) & MAX_BITS];
        let bits = u32::from(next.reverse_bits() >> (16 - length));
        *next = next.wrapping_add(1);
        Code {
            bits,
            count: length.into(),
        }
    })
}
