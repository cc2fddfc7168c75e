// The tile of a matrix product that `gemm.cu` and `grouped.cu` share.
#pragma once
#include "slabs.cuh"

struct Gemm {
    const void *x;
    const void *weight;
    const void *bias;
    // What sums are multiplied by: one number, or one per output (a stride of 0 or 1); or null.
    const float *scales;
    void *out;
    // In elements; rows start at multiples of 16 bytes.
    u64 x_stride, weight_stride, out_stride;
    u32 rows, in, out_cols, scale_stride;
};

// Numbers of `in` that are brought at once: a row of 128 bytes.
constexpr u32 STEP = 64;

// Brings 16 bytes of a row: zeros beyond the rows and the columns.
template <class T>
FN void bring(T *to, const void *from, u64 stride, u32 row, u32 rows, u32 at, u32 in) {
    bool here = row < rows && at < in;
    u32 bytes = here ? least((in - at) * 2, 16u) : 0;
    cp_async(to, static_cast<const T *>(from) + (here ? row * stride + at : 0), bytes);
}

// Four warps, each 32 rows by 64 columns; three stages.
constexpr u32 TALL_ROWS = 64, TALL_COLUMNS = 128, TALL_THREADS = 128, TALL_STAGES = 3;
constexpr u32 TALL_STAGE = (TALL_ROWS + TALL_COLUMNS) * STEP;

// `rows` from `row` on and columns from `column` on; where a row of x and of out lies is the map's to say.
template <class T, class Map> FN void tall(const Gemm &p, const Map &map, u32 row, u32 rows, u32 column) {
    u32 lane = thread_index() % WARP, warp = thread_index() / WARP;
    u32 warp_row = warp % 2 * 32, warp_column = warp / 2 * 64;
    T *stages = reinterpret_cast<T *>(shared_memory());
    u32 steps = divide_up(p.in, STEP);
    auto fetch = [&](u32 step) {
        T *stage = stages + step % TALL_STAGES * TALL_STAGE;
        ROLL for (u32 i = thread_index(); i < (TALL_ROWS + TALL_COLUMNS) * (STEP / 8); i += TALL_THREADS) {
            u32 r = i / (STEP / 8), piece = i % (STEP / 8), at = step * STEP + piece * 8;
            T *to = stage + r * STEP + swizzle(r, piece) * 8;
            if (r < TALL_ROWS)
                bring(to, p.x, p.x_stride, row + r < rows ? map.from(row + r) : ~0u, ~0u, at, p.in);
            else
                bring(to, p.weight, p.weight_stride, column + r - TALL_ROWS, p.out_cols, at, p.in);
        }
    };
    float slab[2][8][4], total[2][8][4];
    UNROLL for (u32 m = 0; m < 2; ++m)
        UNROLL for (u32 n = 0; n < 8; ++n)
            UNROLL for (u32 i = 0; i < 4; ++i) slab[m][n][i] = total[m][n][i] = 0.0f;
    for (u32 step = 0; step + 1 < TALL_STAGES; ++step) {
        if (step < steps) fetch(step);
        cp_async_commit();
    }
    for (u32 step = 0; step < steps; ++step) {
        cp_async_wait<TALL_STAGES - 2>();
        block_sync();
        if (step + TALL_STAGES - 1 < steps) fetch(step + TALL_STAGES - 1);
        cp_async_commit();
        const T *x = stages + step % TALL_STAGES * TALL_STAGE, *weight = x + TALL_ROWS * STEP;
        UNROLL for (u32 k = 0; k < STEP / 16; ++k) {
            u32 a[2][4];
            for (u32 m = 0; m < 2; ++m) {
                u32 r = warp_row + 16 * m + lane % 16;
                ldmatrix(a[m], x + r * STEP + swizzle(r, 2 * k + lane / 16) * 8);
            }
            UNROLL for (u32 n = 0; n < 8; n += 2) {
                u32 b[4], r = warp_column + 8 * n + lane / 16 * 8 + lane % 8;
                ldmatrix(b, weight + r * STEP + swizzle(r, 2 * k + lane / 8 % 2) * 8);
                for (u32 m = 0; m < 2; ++m) {
                    mma<T>(slab[m][n], a[m], b[0], b[1]);
                    mma<T>(slab[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
        if ((step + 1) % (SLAB / STEP) == 0 || step + 1 == steps)
            UNROLL for (u32 m = 0; m < 2; ++m)
                UNROLL for (u32 n = 0; n < 8; ++n)
                    UNROLL for (u32 i = 0; i < 4; ++i) {
                        total[m][n][i] += slab[m][n][i];
                        slab[m][n][i] = 0.0f;
                    }
    }
    UNROLL for (u32 m = 0; m < 2; ++m)
        UNROLL for (u32 n = 0; n < 8; ++n)
            UNROLL for (u32 i = 0; i < 4; ++i)
                map.template put<T>(p, row + warp_row + 16 * m + lane / 4 + 8 * (i / 2),
                                    column + warp_column + 8 * n + 2 * (lane % 4) + i % 2, total[m][n][i]);
}
