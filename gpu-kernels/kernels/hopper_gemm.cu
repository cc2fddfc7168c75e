// Products of many rows on Hopper, out = x · weightᵀ + bias, without scales: one warp group asks the memory unit for tiles of
// both, two others multiply, 64 rows by 256 columns each. Sums over `in` are one chain of the tensor cores: bits differ from
// those of `gemm.cu`.
//
// A block goes from tile to tile. While sums of one are written, by the memory unit too, those of the next are asked for.
#include "gemm.cuh"
#include "hopper.cuh"

struct HopperGemm {
    // (in, row, 1, 1) of x, and (in, column, 1, 1) of the weight; a box is 64 elements of a tile's rows or columns. And
    // (column, row, 1, 1) of out; a box is 64 columns of 64 rows.
    TensorMap x, weight, out;
    Gemm g;
    u32 unused[12];
};

template <class T> struct Tiles {
    static constexpr u32 GROUP_ROWS = 64, ROWS = 2 * GROUP_ROWS, COLUMNS = 256, STAGES = 4;
    static constexpr u32 THREADS = 3 * WARP_GROUP;
    // A stage has rows of x, then columns of the weight, each a panel of 64 elements along `in`. After the stages come two
    // panels of sums for each group, then barriers.
    static constexpr u32 WEIGHT = ROWS * PANEL_ROW, STAGE = WEIGHT + COLUMNS * PANEL_ROW, PANEL = GROUP_ROWS * PANEL_ROW;
    static constexpr u32 PANELS = STAGES * STAGE, BARRIERS = PANELS + 4 * PANEL;
    // The barrier of each group's warps.
    static constexpr u32 OWN = 1;

    const HopperGemm &h;
    const Gemm &p;
    u32 down, tiles, steps;

    FN Tiles(const HopperGemm &h)
        : h(h), p(h.g), down(divide_up(p.rows, ROWS)), tiles(down * divide_up(p.out_cols, COLUMNS)),
          steps(divide_up(p.in, STEP)) {}

    FN u32 row(u32 tile) { return tile % down * ROWS; }
    FN u32 column(u32 tile) { return tile / down * COLUMNS; }
    // Steps are counted over all tiles of the block.
    FN u8 *stage(u32 step) { return shared_memory() + step % STAGES * STAGE; }
    FN u64 *barriers() { return reinterpret_cast<u64 *>(shared_memory() + BARRIERS); }
    FN u64 *arrived(u32 step) { return barriers() + step % STAGES; }
    FN u64 *free(u32 step) { return barriers() + STAGES + step % STAGES; }

    // One thread asks for all steps, each as soon as there is room. What lies outside of the matrices comes as zeros.
    FN void ask() {
        u32 step = 0;
        ROLL for (u32 tile = block_index(); tile < tiles; tile += block_count())
            ROLL for (u32 at = 0; at < p.in; at += STEP, ++step) {
                if (step >= STAGES) barrier_wait(free(step), (step / STAGES - 1) % 2);
                barrier_expect(arrived(step), STAGE);
                tma_load(stage(step), &h.x, arrived(step), static_cast<i32>(at), static_cast<i32>(row(tile)), 0, 0);
                tma_load(stage(step) + WEIGHT, &h.weight, arrived(step), static_cast<i32>(at), static_cast<i32>(column(tile)),
                         0, 0);
            }
    }

    // The products of a step are under way while those of the next are asked for; then its stage is free.
    FN void multiply(u32 group) {
        u32 step = 0, lane = thread_index() % WARP;
        ROLL for (u32 tile = block_index(); tile < tiles; tile += block_count()) {
            float sum[COLUMNS / 2];
            UNROLL for (u32 i = 0; i < COLUMNS / 2; ++i) sum[i] = 0.0f;
            settle(sum);
            ROLL for (u32 last = step + steps, first = step; step < last; ++step) {
                barrier_wait(arrived(step), step / STAGES % 2);
                const u8 *x = stage(step) + group * GROUP_ROWS * PANEL_ROW, *weight = stage(step) + WEIGHT;
                wgmma_fence();
                UNROLL for (u32 k = 0; k < STEP / 16; ++k)
                    wgmma<T, COLUMNS>(sum, descriptor(x + k * 32, 0, 8 * PANEL_ROW),
                                      descriptor(weight + k * 32, 0, 8 * PANEL_ROW), true);
                wgmma_commit();
                wgmma_wait<1>();
                if (step > first && lane == 0) barrier_arrive(free(step - 1));
            }
            wgmma_wait<0>();
            settle(sum);
            if (lane == 0) barrier_arrive(free(step - 1));
            write(group, tile, sum);
        }
        if (thread_index() % WARP_GROUP == 0) stores_read<0>();
    }

    // A group's sums, 64 columns after the other: while some are written, the next are put beside them.
    FN void write(u32 group, u32 tile, const float *sum) {
        u32 thread = thread_index() % WARP_GROUP, lane = thread % WARP, own = thread / WARP * 16 + lane / 4;
        UNROLL for (u32 part = 0; part < COLUMNS / 64; ++part) {
            u8 *panel = shared_memory() + PANELS + (2 * group + part % 2) * PANEL;
            u32 first = column(tile) + 64 * part;
            // Of what was asked to be written, all but the latest has been read.
            if (thread == 0) stores_read<1>();
            group_sync(OWN + group, WARP_GROUP);
            UNROLL for (u32 n = 0; n < 8; ++n) {
                float bias[2];
                for (u32 j = 0; j < 2; ++j) bias[j] = bias_of(first + 8 * n + 2 * (lane % 4) + j);
                for (u32 i = 0; i < 2; ++i) {
                    const float *two = sum + 4 * (8 * part + n) + 2 * i;
                    u32 row = own + 8 * i;
                    store4(panel + row * PANEL_ROW + swizzle(row, n) * 16 + lane % 4 * 4,
                           pack<T>(two[0] + bias[0], two[1] + bias[1]));
                }
            }
            async_fence();
            group_sync(OWN + group, WARP_GROUP);
            if (thread > 0) continue;
            tma_store(&h.out, panel, static_cast<i32>(first), static_cast<i32>(row(tile) + group * GROUP_ROWS), 0, 0);
            stores_commit();
        }
    }

    FN float bias_of(u32 at) { return p.bias && at < p.out_cols ? widen(static_cast<const T *>(p.bias)[at]) : 0.0f; }

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

KERNEL(hopper_gemm_bf16, HopperGemm, Tiles<bf16>::THREADS) { Tiles<bf16>(p).run(); }
KERNEL(hopper_gemm_f16, HopperGemm, Tiles<f16>::THREADS) { Tiles<f16>(p).run(); }
