// Whole blocks of the paged memory, K and V of all layers in one launch. The two sides may be one pool, or a pool and
// a buffer on its way to another tier. No pair of one launch reads what another writes.
#include "prelude.cuh"

struct CopyBlocks {
    const u8 *from;
    u8 *to;
    // (from, to) of each copy.
    const u32 *pairs;
    // Bytes from one plane (K or V of a layer) to the next, and of a block in a plane: multiples of 4.
    u64 from_plane, to_plane, block_bytes;
    u32 count, planes;
    // Thread blocks that share one block of a plane.
    u32 parts;
};

constexpr u32 BLOCK = 256;

KERNEL(copy_blocks, CopyBlocks, BLOCK) {
    u32 part = block_index() % p.parts, of = block_index() / p.parts;
    u64 plane = of % p.planes, pair = of / p.planes;
    const u8 *from = p.from + plane * p.from_plane + p.pairs[2 * pair] * p.block_bytes;
    u8 *to = p.to + plane * p.to_plane + p.pairs[2 * pair + 1] * p.block_bytes;
    bool aligned = (p.from_plane | p.to_plane | p.block_bytes) % 16 == 0;
    u64 first = static_cast<u64>(part) * BLOCK + thread_index(), step = static_cast<u64>(p.parts) * BLOCK;
    if (aligned) {
        for (u64 at = first * 16; at < p.block_bytes; at += step * 16) {
            u32 piece[4];
            load16(piece, from + at);
            store16(to + at, piece);
        }
    } else {
        for (u64 at = first * 4; at < p.block_bytes; at += step * 4)
            *reinterpret_cast<u32 *>(to + at) = *reinterpret_cast<const u32 *>(from + at);
    }
}
