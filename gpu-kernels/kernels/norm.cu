// RMSNorm (arXiv 1910.07467): out = x / sqrt(mean(x²) + eps) · (weight + offset), per row of `cols` numbers.
//
// With `delta`, x += delta first, rounded to the stored type: the seam between two halves of a layer. A row may be
// one head of a token (`heads` rows in each of the tensor's), which is Qwen3's q and k norm. `offset` is 1 for
// Gemma.
//
// `out` may be in one byte, for a product of eight-bit numbers: each row is divided by a scale of its own, with
// which its largest number becomes the largest that is stored, or by one scale for all. Nothing is rounded before
// that.
//
// LANES lanes work on a row: a warp on a short one, a block on a long one. Which of the two depends on `cols`
// alone, so the order of summation does too.
#include "prelude.cuh"

struct RmsNorm {
    void *x;
    const void *delta;
    const void *weight;
    void *out;
    // Of one-byte rows: made here, one per row; or one that is given.
    float *scales;
    u64 x_stride, delta_stride, out_stride;
    u32 rows, cols, heads;
    // 1 for Gemma, whose weights are kept less 1.
    float eps, offset;
    // Rows start at multiples of 16 bytes and `cols` is a multiple of 8: eight numbers move at once.
    u32 aligned;
    u32 scale_each, unused;
};

constexpr u32 BLOCK = 256;

// The sum over a block's lanes, in `scratch`: one number per warp.
FN float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    u32 warps = thread_count() / WARP;
    if (thread_index() % WARP == 0) scratch[thread_index() / WARP] = x;
    block_sync();
    float sum = 0.0f;
    for (u32 i = 0; i < warps; ++i) sum += scratch[i];
    return sum;
}

// The largest over a block's lanes.
FN float block_most(float x, float *scratch) {
    x = warp_most(x);
    block_sync();
    if (thread_index() % WARP == 0) scratch[thread_index() / WARP] = x;
    block_sync();
    for (u32 i = 0; i < thread_count() / WARP; ++i) x = most(x, scratch[i]);
    return x;
}

template <class T, class Q, u32 LANES> FN void rms_norm(const RmsNorm &p) {
    u32 row = block_index() * (BLOCK / LANES) + thread_index() / LANES, lane = thread_index() % LANES;
    bool live = row < p.rows;
    u64 token = live ? row / p.heads : 0, head = live ? row % p.heads : 0;
    T *x = static_cast<T *>(p.x) + token * p.x_stride + head * p.cols;
    Q *out = static_cast<Q *>(p.out) + token * p.out_stride + head * p.cols;
    const T *delta = static_cast<const T *>(p.delta);
    const T *weight = static_cast<const T *>(p.weight);
    u32 cols = live ? p.cols : 0;
    if (delta) delta += token * p.delta_stride + head * p.cols;

    float squares = 0.0f;
    if (p.aligned) {
        for (u32 i = lane * 8; i < cols; i += LANES * 8) {
            Eight<T> v = load_eight(x + i);
            if (delta) {
                Eight<T> d = load_eight(delta + i);
                float sum[8];
                for (u32 j = 0; j < 8; ++j) sum[j] = v[j] + d[j];
                store_eight(x + i, sum);
                v = load_eight(x + i);
            }
            for (u32 j = 0; j < 8; ++j) squares = fused(v[j], v[j], squares);
        }
    } else {
        for (u32 i = lane; i < cols; i += LANES) {
            if (delta) x[i] = narrow<T>(widen(x[i]) + widen(delta[i]));
            float v = widen(x[i]);
            squares = fused(v, v, squares);
        }
    }
    float sum = LANES == WARP ? warp_sum(squares) : block_sum(squares, reinterpret_cast<float *>(shared_memory()));
    float factor = divide(1.0f, square_root(divide(sum, static_cast<float>(p.cols)) + p.eps));

    auto normed = [&](u32 i) { return widen(x[i]) * factor * (widen(weight[i]) + p.offset); };
    // A lane keeps to the elements that it had above: it may have changed them.
    u32 width = p.aligned ? 8 : 1;
    if constexpr (sizeof(Q) == 1) {
        float scale = p.scale_each ? 0.0f : *p.scales;
        if (p.scale_each) {
            float size = 0.0f;
            for (u32 i = lane * width; i < cols; i += LANES * width)
                for (u32 j = i; j < i + width; ++j) size = most(size, most(normed(j), -normed(j)));
            size = LANES == WARP ? warp_most(size) : block_most(size, reinterpret_cast<float *>(shared_memory()));
            scale = size > 0.0f ? divide(size, largest<Q>()) : 1.0f;
            if (live && lane == 0) p.scales[row] = scale;
        }
        for (u32 i = lane * width; i < cols; i += LANES * width)
            for (u32 j = i; j < i + width; ++j) out[j] = narrow<Q>(divide(normed(j), scale));
    } else if (p.aligned) {
        for (u32 i = lane * 8; i < cols; i += LANES * 8) {
            Eight<T> v = load_eight(x + i), w = load_eight(weight + i);
            float y[8];
            for (u32 j = 0; j < 8; ++j) y[j] = v[j] * factor * (w[j] + p.offset);
            store_eight(out + i, y);
        }
    } else {
        for (u32 i = lane; i < cols; i += LANES) {
            out[i] = narrow<T>(normed(i));
        }
    }
}

#define NORM_KERNELS(suffix, T, Q)                                              \
    KERNEL(rms_norm_short_##suffix, RmsNorm, BLOCK) { rms_norm<T, Q, WARP>(p); } \
    KERNEL(rms_norm_long_##suffix, RmsNorm, BLOCK) { rms_norm<T, Q, BLOCK>(p); }
NORM_KERNELS(bf16, bf16, bf16)
NORM_KERNELS(f16, f16, f16)
NORM_KERNELS(bf16_e4m3, bf16, e4m3)
NORM_KERNELS(f16_e4m3, f16, e4m3)
NORM_KERNELS(bf16_i8, bf16, i8)
NORM_KERNELS(f16_i8, f16, i8)
