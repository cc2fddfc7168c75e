// out = x · weightᵀ + bias, with tensor cores: x is [rows, in], weight [out, in], both as they lie in memory.
//
// Sums run over slabs of 512 of `in`: within a slab from zero in ascending order, and slabs are added in ascending
// order. Both block shapes below keep to that, so a row's bits do not depend on the other rows or their number:
// `tall` gives a block 64 rows and 128 columns and lets it walk along `in`; `flat`, for up to 16 rows, gives a
// block 16 columns and each of its warps every eighth slab, because then time is what it takes to read the weight.
#include "gemm.cuh"

// Eight warps; each brings its own slabs, so nobody waits for another until the end.
constexpr u32 FLAT_WARPS = 8, FLAT_THREADS = FLAT_WARPS * WARP, FLAT_STAGES = 2;
constexpr u32 FLAT_STAGE = 2 * TILE * STEP;

template <class T> FN void flat(const Gemm &p) {
    u32 column = block_index() * TILE, lane = thread_index() % WARP, warp = thread_index() / WARP;
    T *stages = reinterpret_cast<T *>(shared_memory()) + warp * FLAT_STAGES * FLAT_STAGE;
    // [slab][row][column]
    float *sums = reinterpret_cast<float *>(shared_memory() + FLAT_WARPS * FLAT_STAGES * FLAT_STAGE * 2);
    constexpr u32 STEPS = SLAB / STEP;
    u32 slabs = divide_up(p.in, SLAB), steps = warp < slabs ? (slabs - warp + FLAT_WARPS - 1) / FLAT_WARPS * STEPS : 0;
    // Where the warp's step lies on `in`.
    auto place = [&](u32 step) { return ((step / STEPS * FLAT_WARPS + warp) * STEPS + step % STEPS) * STEP; };
    auto fetch = [&](u32 step) {
        T *stage = stages + step % FLAT_STAGES * FLAT_STAGE;
        for (u32 i = lane; i < 2 * TILE * (STEP / 8); i += WARP) {
            u32 r = i / (STEP / 8), piece = i % (STEP / 8), at = place(step) + piece * 8;
            T *to = stage + r * STEP + swizzle(r, piece) * 8;
            if (r < TILE)
                bring(to, p.x, p.x_stride, r, p.rows, at, p.in);
            else
                bring(to, p.weight, p.weight_stride, column + r - TILE, p.out_cols, at, p.in);
        }
    };
    for (u32 step = 0; step + 1 < FLAT_STAGES; ++step) {
        if (step < steps) fetch(step);
        cp_async_commit();
    }
    float sum[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    for (u32 step = 0; step < steps; ++step) {
        cp_async_wait<FLAT_STAGES - 2>();
        warp_sync();
        if (step + FLAT_STAGES - 1 < steps) fetch(step + FLAT_STAGES - 1);
        cp_async_commit();
        const T *x = stages + step % FLAT_STAGES * FLAT_STAGE, *weight = x + TILE * STEP;
        UNROLL for (u32 k = 0; k < STEP / 16; ++k) {
            u32 a[4], b[4], x_row = lane % 16, row = lane / 16 * 8 + lane % 8;
            ldmatrix(a, x + x_row * STEP + swizzle(x_row, 2 * k + lane / 16) * 8);
            ldmatrix(b, weight + row * STEP + swizzle(row, 2 * k + lane / 8 % 2) * 8);
            mma<T>(sum[0], a, b[0], b[1]);
            mma<T>(sum[1], a, b[2], b[3]);
        }
        if ((step + 1) % STEPS == 0) leave_slab(sums, step / STEPS * FLAT_WARPS + warp, sum);
    }
    block_sync();
    for (u32 i = thread_index(); i < TILE * TILE; i += FLAT_THREADS)
        put<T>(p, i / TILE, column + i % TILE, add_slabs(sums, slabs, i));
}

// Rows lie in their order.
struct Plain {
    FN u32 from(u32 row) const { return row; }
    template <class T> FN void put(const Gemm &p, u32 row, u32 column, float x) const { ::put<T>(p, row, column, x); }
};

template <class T> FN void tall_tile(const Gemm &p) {
    u32 down = divide_up(p.rows, TALL_ROWS);
    tall<T>(p, Plain(), block_index() % down * TALL_ROWS, p.rows, block_index() / down * TALL_COLUMNS);
}

KERNEL(gemm_tall_bf16, Gemm, TALL_THREADS) { tall_tile<bf16>(p); }
KERNEL(gemm_tall_f16, Gemm, TALL_THREADS) { tall_tile<f16>(p); }
KERNEL(gemm_flat_bf16, Gemm, FLAT_THREADS) { flat<bf16>(p); }
KERNEL(gemm_flat_f16, Gemm, FLAT_THREADS) { flat<f16>(p); }
