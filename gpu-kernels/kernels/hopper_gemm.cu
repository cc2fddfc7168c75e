// Products of many rows on Hopper, out = x · weightᵀ + bias, without scales: one warp group asks the memory unit for tiles of
// both, two others multiply, 64 rows by 256 columns each. Sums over `in` are one chain of the tensor cores: bits differ from
// those of `gemm.cu`.
#include "gemm.cuh"
#include "hopper.cuh"

struct HopperGemm {
    // (in, row, 1, 1) of x, and (in, column, 1, 1) of the weight; a box is 64 elements of a tile's rows or columns.
    TensorMap x, weight;
    Gemm g;
    u32 unused[12];
};

template <class T> struct Tile {
    static constexpr u32 GROUP_ROWS = 64, ROWS = 2 * GROUP_ROWS, COLUMNS = 256, STAGES = 4;
    static constexpr u32 THREADS = 3 * WARP_GROUP;
    // A stage has rows of x, then columns of the weight, each a panel of 64 elements along `in`; barriers follow the stages.
    static constexpr u32 WEIGHT = ROWS * PANEL_ROW, STAGE = WEIGHT + COLUMNS * PANEL_ROW;

    const HopperGemm &h;
    const Gemm &p;
    u32 row, column, steps;

    FN Tile(const HopperGemm &h) : h(h), p(h.g), steps(divide_up(h.g.in, STEP)) {
        u32 down = divide_up(p.rows, ROWS);
        row = block_index() % down * ROWS;
        column = block_index() / down * COLUMNS;
    }

    FN u8 *stage(u32 step) { return shared_memory() + step % STAGES * STAGE; }
    FN u64 *barriers() { return reinterpret_cast<u64 *>(shared_memory() + STAGES * STAGE); }
    FN u64 *arrived(u32 step) { return barriers() + step % STAGES; }
    FN u64 *free(u32 step) { return barriers() + STAGES + step % STAGES; }

    // One thread asks for all tiles, each as soon as there is room. What lies outside of the matrices comes as zeros.
    FN void ask() {
        ROLL for (u32 step = 0; step < steps; ++step) {
            if (step >= STAGES) barrier_wait(free(step), (step / STAGES - 1) % 2);
            i32 at = static_cast<i32>(step * STEP);
            barrier_expect(arrived(step), STAGE);
            tma_load(stage(step), &h.x, arrived(step), at, static_cast<i32>(row), 0, 0);
            tma_load(stage(step) + WEIGHT, &h.weight, arrived(step), at, static_cast<i32>(column), 0, 0);
        }
    }

    // The products of a step are under way while those of the next are asked for; then its stage is free.
    FN void multiply(u32 group) {
        u32 lane = thread_index() % WARP;
        float sum[COLUMNS / 2];
        UNROLL for (u32 i = 0; i < COLUMNS / 2; ++i) sum[i] = 0.0f;
        settle(sum);
        ROLL for (u32 step = 0; step < steps; ++step) {
            barrier_wait(arrived(step), step / STAGES % 2);
            const u8 *x = stage(step) + group * GROUP_ROWS * PANEL_ROW, *weight = stage(step) + WEIGHT;
            wgmma_fence();
            UNROLL for (u32 k = 0; k < STEP / 16; ++k)
                wgmma<T, COLUMNS>(sum, descriptor(x + k * 32, 0, 8 * PANEL_ROW), descriptor(weight + k * 32, 0, 8 * PANEL_ROW),
                                  true);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0 && lane == 0) barrier_arrive(free(step - 1));
        }
        wgmma_wait<0>();
        settle(sum);
        u32 first = row + group * GROUP_ROWS + thread_index() % WARP_GROUP / WARP * 16 + lane / 4;
        UNROLL for (u32 n = 0; n < COLUMNS / 8; ++n)
            UNROLL for (u32 i = 0; i < 2; ++i)
                put_two(first + 8 * i, column + 8 * n + 2 * (lane % 4), sum[4 * n + 2 * i], sum[4 * n + 2 * i + 1]);
    }

    // Two sums side by side; the second may have no place.
    FN void put_two(u32 at, u32 to, float first, float second) {
        if (at >= p.rows || to >= p.out_cols) return;
        bool both = to + 1 < p.out_cols;
        if (p.bias) {
            const T *bias = static_cast<const T *>(p.bias) + to;
            first += widen(bias[0]);
            if (both) second += widen(bias[1]);
        }
        T *out = static_cast<T *>(p.out) + at * p.out_stride + to;
        u32 two = pack<T>(first, second);
        if (both) *reinterpret_cast<u32 *>(out) = two;
        else out->bits = static_cast<u16>(two);
    }

    FN void run() {
        if (thread_index() == 0) {
            for (u32 step = 0; step < STAGES; ++step) {
                barrier_init(arrived(step), 1);
                barrier_init(free(step), 2 * WARP_GROUP / WARP);
            }
            barrier_init_fence();
        }
        block_sync();
        u32 group = thread_index() / WARP_GROUP;
        if (group == 0) {
            registers_give<24>();
            if (thread_index() == 0) ask();
        } else {
            registers_take<240>();
            multiply(group - 1);
        }
    }
};

KERNEL(hopper_gemm_bf16, HopperGemm, Tile<bf16>::THREADS) { Tile<bf16>(p).run(); }
KERNEL(hopper_gemm_f16, HopperGemm, Tile<f16>::THREADS) { Tile<f16>(p).run(); }
