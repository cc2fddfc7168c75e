// out = x · weightᵀ + bias for up to a few dozen rows, where the weight is stored in four or eight bits: it is
// read once, made into the type of x in registers on its way to the tensor cores, and never lies anywhere in that
// type.
//
// A weight's row is cut into blocks of 128 numbers. Lane t of four holds of every sixteen numbers those that `mma`
// wants of it: 2t, 2t + 1, 2t + 8 and 2t + 9. Its 32 of four bits are 16 bytes, lowest bits first; its 32 of eight
// bits are two times 16 bytes. The four lanes' pieces follow each other. Sums are as in `gemm.cu`: slabs of 512,
// each from zero, in ascending order. So a row's bits are those of `gemm` with the weight that `dequantise`
// writes.
#include "slabs.cuh"

struct QuantGemm {
    const void *x;
    const u8 *weight;
    // Four bits: [groups][out_padded], and the number that stands for zero. Eight bits: null.
    const f16 *group_scales;
    const u8 *group_zeros;
    // Blocks of eight bits: [out_padded / block_rows][groups]. Else null.
    const float *block_scales;
    // Eight bits: one number, or one per output. Else null.
    const float *scales;
    const void *bias;
    // [rows, out]; of `dequantise` the weight [out, in].
    void *out;
    // Of `dequantise`: the rows to write, `out_cols` of them, multiplied by their scales. Null: all, without what sums
    // are multiplied by.
    const u32 *which;
    // In elements.
    u64 x_stride, out_stride;
    u32 rows, in, out_cols, out_padded, group, scale_stride, block_rows, unused;
};

constexpr u32 PART = 128, STEPS = PART / 16;
constexpr u32 WARPS = 8, THREADS = WARPS * WARP, STAGES = 2;
constexpr u32 STAGE = TILE * PART;

// Four bits, with a scale and a zero for each group of `group` numbers of a row.
struct u4 {};
// E4M3, with a scale for each block of outputs and of `group` numbers of their rows.
struct e4m3_blocks {};

template <class W> struct Format {
    // Numbers are multiplied by scales of their own before they are rounded, not the sums.
    static constexpr bool GROUPED = false;
    // 16-byte pieces of a lane for a block of 128.
    static constexpr u32 PIECES = 2;
    using Number = W;
};
template <> struct Format<u4> {
    static constexpr bool GROUPED = true;
    static constexpr u32 PIECES = 1;
    using Number = u4;
};
template <> struct Format<e4m3_blocks> {
    static constexpr bool GROUPED = true;
    static constexpr u32 PIECES = 2;
    using Number = e4m3;
};

// What a lane holds of one row for a block of 128.
template <class T, class W> struct Part {
    u32 words[4 * Format<W>::PIECES];
    float scale, zero;

    FN void load(const QuantGemm &p, u32 row, u32 block) {
        u32 blocks = divide_up(p.in, PART), lane = thread_index() % 4;
        for (u32 piece = 0; piece < Format<W>::PIECES; ++piece) {
            u64 at = (static_cast<u64>(row) * blocks + block) * Format<W>::PIECES + piece;
            if (block < blocks) load16(words + 4 * piece, p.weight + (at * 4 + lane) * 16);
            else for (u32 i = 0; i < 4; ++i) words[4 * piece + i] = 0;
        }
    }

    // The scale of a step's sixteen numbers, when it is another than before.
    FN void find_group(const QuantGemm &p, u32 row, u32 block, u32 step) {
        u32 at = block * PART + step * 16;
        if (!Format<W>::GROUPED || (step > 0 && at % p.group != 0)) return;
        u64 group = least(at, p.in - 1) / p.group;
        if (Format<W>::PIECES == 2) {
            scale = p.block_scales[row / p.block_rows * static_cast<u64>(divide_up(p.in, p.group)) + group];
        } else {
            scale = widen(p.group_scales[group * p.out_padded + row]);
            zero = static_cast<float>(p.group_zeros[group * p.out_padded + row]);
        }
    }

    FN float number(u32 step, u32 i) const;

    // The lane's four numbers of a step.
    FN void operand(u32 step, u32 *b) const {
        b[0] = pack<T>(number(step, 0), number(step, 1));
        b[1] = pack<T>(number(step, 2), number(step, 3));
    }
};

template <class T, class W> FN float Part<T, W>::number(u32 step, u32 i) const {
    if constexpr (Format<W>::PIECES == 1)
        return (static_cast<float>(words[step / 2] >> (step % 2 * 16 + 4 * i) & 15u) - zero) * scale;
    else {
        float x = widen(typename Format<W>::Number{static_cast<u8>(words[step] >> 8 * i & 255u)});
        return Format<W>::GROUPED ? x * scale : x;
    }
}

template <class T, class W> FN void quant_gemm(const QuantGemm &p) {
    u32 down = divide_up(p.rows, TILE), first_row = block_index() % down * TILE;
    u32 column = block_index() / down * TILE, lane = thread_index() % WARP, warp = thread_index() / WARP;
    T *stages = reinterpret_cast<T *>(shared_memory()) + warp * STAGES * STAGE;
    // [slab][row][column]
    float *sums = reinterpret_cast<float *>(shared_memory() + WARPS * STAGES * STAGE * 2);
    constexpr u32 PARTS = SLAB / PART;
    u32 slabs = divide_up(p.in, SLAB), parts = warp < slabs ? (slabs - warp + WARPS - 1) / WARPS * PARTS : 0;
    // Which block of 128 the warp's part is.
    auto place = [&](u32 part) { return (part / PARTS * WARPS + warp) * PARTS + part % PARTS; };
    auto fetch = [&](u32 part) {
        T *stage = stages + part % STAGES * STAGE;
        for (u32 i = lane; i < STAGE / 8; i += WARP) {
            u32 r = i / (PART / 8), piece = i % (PART / 8), at = place(part) * PART + piece * 8;
            bool here = first_row + r < p.rows && at < p.in;
            u64 from = here ? (first_row + r) * p.x_stride + at : 0;
            cp_async(stage + r * PART + swizzle(r, piece) * 8, static_cast<const T *>(p.x) + from,
                     here ? least((p.in - at) * 2, 16u) : 0);
        }
    };
    Part<T, W> weight[2];
    if (parts > 0) {
        fetch(0);
        for (u32 n = 0; n < 2; ++n) weight[n].load(p, column + 8 * n + lane / 4, place(0));
    }
    cp_async_commit();
    float sum[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    for (u32 part = 0; part < parts; ++part) {
        cp_async_wait<0>();
        warp_sync();
        Part<T, W> next[2] = {weight[0], weight[1]};
        if (part + 1 < parts) {
            fetch(part + 1);
            for (u32 n = 0; n < 2; ++n) next[n].load(p, column + 8 * n + lane / 4, place(part + 1));
        }
        cp_async_commit();
        const T *x = stages + part % STAGES * STAGE;
        UNROLL for (u32 step = 0; step < STEPS; ++step) {
            u32 a[4], b[2], row = lane % 16;
            ldmatrix(a, x + row * PART + swizzle(row, 2 * step + lane / 16) * 8);
            for (u32 n = 0; n < 2; ++n) {
                weight[n].find_group(p, column + 8 * n + lane / 4, place(part), step);
                weight[n].operand(step, b);
                mma<T>(sum[n], a, b[0], b[1]);
            }
        }
        for (u32 n = 0; n < 2; ++n) weight[n] = next[n];
        if ((part + 1) % PARTS == 0) leave_slab(sums, part / PARTS * WARPS + warp, sum);
    }
    block_sync();
    for (u32 i = thread_index(); i < TILE * TILE; i += THREADS)
        put<T>(p, first_row + i / TILE, column + i % TILE, add_slabs(sums, slabs, i));
}

// The weight as rows of T: what many rows are multiplied by, or rows of an embedding table.
template <class T, class W> FN void dequantise(const QuantGemm &p) {
    u32 blocks = divide_up(p.in, PART);
    u64 at = static_cast<u64>(block_index()) * (THREADS / 4) + thread_index() / 4;
    u32 to_row = static_cast<u32>(at / blocks), block = static_cast<u32>(at % blocks), lane = thread_index() % 4;
    if (to_row >= p.out_cols) return;
    u32 row = p.which ? p.which[to_row] : to_row;
    float scale = p.which && p.scales ? p.scales[row * p.scale_stride] : 1.0f;
    Part<T, W> part;
    part.load(p, row, block);
    T *out = static_cast<T *>(p.out) + to_row * p.out_stride;
    UNROLL for (u32 step = 0; step < STEPS; ++step) {
        part.find_group(p, row, block, step);
        for (u32 i = 0; i < 4; ++i) {
            u32 to = block * PART + step * 16 + 2 * lane + i / 2 * 8 + i % 2;
            if (to < p.in) out[to] = narrow<T>(part.number(step, i) * scale);
        }
    }
}

#define QUANT_KERNELS(T, W)                                                       \
    KERNEL(quant_gemm_##W##_##T, QuantGemm, THREADS) { quant_gemm<T, W>(p); }     \
    KERNEL(dequantise_##W##_##T, QuantGemm, THREADS) { dequantise<T, W>(p); }
QUANT_KERNELS(bf16, u4)
QUANT_KERNELS(f16, u4)
QUANT_KERNELS(bf16, i8)
QUANT_KERNELS(f16, i8)
QUANT_KERNELS(bf16, e4m3)
QUANT_KERNELS(f16, e4m3)
QUANT_KERNELS(bf16, e4m3_blocks)
QUANT_KERNELS(f16, e4m3_blocks)

// Columns of x in another order: a weight whose groups are not in the order of its input.
struct Permute {
    const void *x;
    const u32 *order;
    void *out;
    u64 x_stride, out_stride;
    u32 rows, cols;
};

KERNEL(permute_columns, Permute, THREADS) {
    u64 at = static_cast<u64>(block_index()) * THREADS + thread_index();
    u64 row = at / p.cols, column = at % p.cols;
    if (row >= p.rows) return;
    static_cast<u16 *>(p.out)[row * p.out_stride + column] =
        static_cast<const u16 *>(p.x)[row * p.x_stride + p.order[column]];
}
