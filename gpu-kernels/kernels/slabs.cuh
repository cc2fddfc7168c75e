// Sums of products that do not depend on who adds them up: those over slabs of 512 of `in`, each from zero, are added in
// ascending order. Warps that share 16 rows by 16 columns leave theirs in shared memory, for the block to add up.
#pragma once
#include "prelude.cuh"

constexpr u32 SLAB = 512;
constexpr u32 TILE = 16;

// A warp's sums of a slab, as `mma` leaves them, to `sums` [slab][row][column]; they start anew.
FN void leave_slab(float *sums, u32 slab, float (&sum)[2][4]) {
    u32 lane = thread_index() % WARP;
    for (u32 n = 0; n < 2; ++n)
        for (u32 i = 0; i < 4; ++i) {
            u32 row = lane / 4 + 8 * (i / 2), at = 8 * n + 2 * (lane % 4) + i % 2;
            sums[(slab * TILE + row) * TILE + at] = sum[n][i];
            sum[n][i] = 0.0f;
        }
}

// One of the tile's 256 sums.
FN float add_slabs(const float *sums, u32 slabs, u32 i) {
    float total = 0.0f;
    for (u32 slab = 0; slab < slabs; ++slab) total += sums[slab * TILE * TILE + i];
    return total;
}

// Writes a sum of a product with scales (one, or one for each output) and bias, if it has any and the place is there.
template <class T, class Product> FN void put(const Product &p, u32 row, u32 column, float x) {
    if (row >= p.rows || column >= p.out_cols) return;
    if (p.scales) x *= p.scales[column * p.scale_stride];
    if (p.bias) x += widen(static_cast<const T *>(p.bias)[column]);
    static_cast<T *>(p.out)[row * p.out_stride + column] = narrow<T>(x);
}
