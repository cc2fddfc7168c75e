// Whole blocks of the paged memory, K and V of all layers in one launch. The two sides may be one pool, or a pool and
// a buffer on its way to another tier. No pair of one launch reads what another writes.
#include "prelude.cuh"

// Bytes from layer to layer, from K to V, from block to block, from head to head and from token to token: multiples of 4.
struct Strides {
    u64 layer, value, page, head, token;
};

struct CopyBlocks {
    const u8 *from;
    u8 *to;
    // (from, to) of each copy.
    const u32 *pairs;
    Strides from_strides, to_strides;
    // Of a head of a token, a multiple of 4; or of all of a block, as one head of one token. A block is below 2^32.
    u32 row_bytes, heads, tokens;
    // K and V of each layer, or latents.
    u32 layers, planes;
    // Thread blocks that share one block of a plane.
    u32 parts;
};

constexpr u32 BLOCK = 256;

FN u64 aligned_at(const Strides &s) { return s.layer | s.value | s.page | s.head | s.token; }
FN u64 plane_at(const Strides &s, u32 plane, u32 planes) { return plane / planes * s.layer + plane % planes * s.value; }

template <u32 UNIT> FN void copy_part(const CopyBlocks &p, const u8 *from, u8 *to, u32 part) {
    u32 units = p.row_bytes / UNIT, rows = p.heads * p.tokens;
    for (u32 i = part * BLOCK + thread_index(); i < rows * units; i += p.parts * BLOCK) {
        u64 from_at = static_cast<u64>(i) * UNIT, to_at = from_at;
        if (rows > 1) {
            u32 head = i / units / p.tokens, token = i / units % p.tokens, at = i % units * UNIT;
            from_at = head * p.from_strides.head + token * p.from_strides.token + at;
            to_at = head * p.to_strides.head + token * p.to_strides.token + at;
        }
        if (UNIT == 16) {
            u32 piece[4];
            load16(piece, from + from_at);
            store16(to + to_at, piece);
        } else {
            *reinterpret_cast<u32 *>(to + to_at) = *reinterpret_cast<const u32 *>(from + from_at);
        }
    }
}

KERNEL(copy_blocks, CopyBlocks, BLOCK) {
    u32 part = block_index() % p.parts, of = block_index() / p.parts, all_planes = p.layers * p.planes;
    u32 plane = of % all_planes, pair = of / all_planes;
    const u8 *from = p.from + plane_at(p.from_strides, plane, p.planes) + p.pairs[2 * pair] * p.from_strides.page;
    u8 *to = p.to + plane_at(p.to_strides, plane, p.planes) + p.pairs[2 * pair + 1] * p.to_strides.page;
    bool aligned = (aligned_at(p.from_strides) | aligned_at(p.to_strides) | p.row_bytes) % 16 == 0;
    if (aligned)
        copy_part<16>(p, from, to, part);
    else
        copy_part<4>(p, from, to, part);
}

// Single tokens of one pool, K and V of all layers: what a tree of drafts wrote at slots of its own goes to where
// the next tokens belong. A run of moves is made in order; runs do not touch each other's slots.
struct CopySlots {
    u8 *memory;
    // (from, to) of each move, and where each run of them starts and ends.
    const u64 *moves;
    const u32 *runs;
    Strides strides;
    // Planes of all layers, and of one; `bytes` of each head, a multiple of 4.
    u32 all_planes, planes, kv_heads, block_size, bytes, unused;
};

constexpr u32 SLOT_BLOCK = 128;

// A thread keeps to its own four bytes of a token, so it reads what it wrote.
KERNEL(copy_slots, CopySlots, SLOT_BLOCK) {
    u32 run = block_index() / p.all_planes, pieces = p.bytes / 4;
    u8 *plane = p.memory + plane_at(p.strides, block_index() % p.all_planes, p.planes);
    for (u32 i = thread_index(); i < p.kv_heads * pieces; i += SLOT_BLOCK) {
        u8 *at = plane + i / pieces * p.strides.head + i % pieces * 4;
        for (u32 move = p.runs[run]; move < p.runs[run + 1]; ++move) {
            auto of = [&](u64 slot) { return slot / p.block_size * p.strides.page + slot % p.block_size * p.strides.token; };
            const u8 *from = at + of(p.moves[2 * move]);
            *reinterpret_cast<u32 *>(at + of(p.moves[2 * move + 1])) = *reinterpret_cast<const u32 *>(from);
        }
    }
}
