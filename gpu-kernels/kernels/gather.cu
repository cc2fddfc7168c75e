// out[i] = from[rows[i]]: tokens out of an embedding table, or the rows whose logits are wanted. Nothing is computed,
// so one kernel serves every type of two bytes.
#include "prelude.cuh"

struct Gather {
    const void *from;
    const u32 *rows;
    void *out;
    // In elements; rows start at multiples of 16 bytes and end in padding up to one.
    u64 from_stride, out_stride;
    u32 count, cols;
};

constexpr u32 BLOCK = 256;

KERNEL(gather, Gather, BLOCK) {
    u32 pieces = divide_up(p.cols, 8);
    u64 at = static_cast<u64>(block_index()) * BLOCK + thread_index();
    if (at >= static_cast<u64>(pieces) * p.count) return;
    u64 row = at / pieces, column = at % pieces * 8;
    u32 piece[4];
    load16(piece, static_cast<const u16 *>(p.from) + p.rows[row] * p.from_stride + column);
    store16(static_cast<u16 *>(p.out) + row * p.out_stride + column, piece);
}
