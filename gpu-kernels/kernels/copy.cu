// Whole blocks of the paged memory, K and V of all layers in one launch. The two sides may be one pool, or a pool and
// a buffer on its way to another tier. No pair of one launch reads what another writes.
#include "prelude.cuh"

struct CopyBlocks {
    const u8 *from;
    u8 *to;
    // (from, to) of each copy.
    const u32 *pairs;
    // Bytes from one plane (K or V of a layer) to the next, from one block to the next in it, and of a block in a
    // plane: multiples of 4.
    u64 from_plane, to_plane, from_block, to_block, block_bytes;
    u32 count, planes;
    // Thread blocks that share one block of a plane.
    u32 parts;
};

constexpr u32 BLOCK = 256;

KERNEL(copy_blocks, CopyBlocks, BLOCK) {
    u32 part = block_index() % p.parts, of = block_index() / p.parts;
    u64 plane = of % p.planes, pair = of / p.planes;
    const u8 *from = p.from + plane * p.from_plane + p.pairs[2 * pair] * p.from_block;
    u8 *to = p.to + plane * p.to_plane + p.pairs[2 * pair + 1] * p.to_block;
    bool aligned = (p.from_plane | p.to_plane | p.from_block | p.to_block | p.block_bytes) % 16 == 0;
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

// Single tokens of one pool, K and V of all layers: what a tree of drafts wrote at slots of its own goes to where
// the next tokens belong. A run of moves is made in order; runs do not touch each other's slots.
struct CopySlots {
    u8 *memory;
    // (from, to) of each move, and where each run of them starts and ends.
    const u64 *moves;
    const u32 *runs;
    // In bytes; `bytes` of each head, a multiple of 4.
    u64 plane_stride, page_stride, token_stride, head_stride;
    u32 planes, kv_heads, block_size, bytes;
};

constexpr u32 SLOT_BLOCK = 128;

// A thread keeps to its own four bytes of a token, so it reads what it wrote.
KERNEL(copy_slots, CopySlots, SLOT_BLOCK) {
    u32 run = block_index() / p.planes, pieces = p.bytes / 4;
    u8 *plane = p.memory + block_index() % p.planes * p.plane_stride;
    for (u32 i = thread_index(); i < p.kv_heads * pieces; i += SLOT_BLOCK) {
        u8 *at = plane + i / pieces * p.head_stride + i % pieces * 4;
        for (u32 move = p.runs[run]; move < p.runs[run + 1]; ++move) {
            auto of = [&](u64 slot) { return slot / p.block_size * p.page_stride + slot % p.block_size * p.token_stride; };
            const u8 *from = at + of(p.moves[2 * move]);
            *reinterpret_cast<u32 *>(at + of(p.moves[2 * move + 1])) = *reinterpret_cast<const u32 *>(from);
        }
    }
}
