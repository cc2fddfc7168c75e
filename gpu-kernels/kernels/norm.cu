// RMSNorm (arXiv 1910.07467): out = x / sqrt(mean(x²) + eps) · (weight + offset), per row of `cols` numbers.
//
// With `delta`, x += delta first, rounded to the stored type: the seam between two halves of a layer. A row may be
// one head of a token (`heads` rows in each of the tensor's), which is Qwen3's q and k norm. `offset` is 1 for
// Gemma.
//
// LANES lanes work on a row: a warp on a short one, a block on a long one. Which of the two depends on `cols`
// alone, so the order of summation does too.
#include "prelude.cuh"

struct RmsNorm {
    void *x;
    const void *delta;
    const void *weight;
    void *out;
    u64 x_stride, delta_stride, out_stride;
    u32 rows, cols, heads;
    float eps, offset;
    // Rows start at multiples of 16 bytes and `cols` is a multiple of 8: eight numbers move at once.
    u32 aligned;
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

template <class T, u32 LANES> FN void rms_norm(const RmsNorm &p) {
    u32 row = block_index() * (BLOCK / LANES) + thread_index() / LANES, lane = thread_index() % LANES;
    bool live = row < p.rows;
    u64 token = live ? row / p.heads : 0, head = live ? row % p.heads : 0;
    T *x = static_cast<T *>(p.x) + token * p.x_stride + head * p.cols;
    T *out = static_cast<T *>(p.out) + token * p.out_stride + head * p.cols;
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

    if (p.aligned) {
        for (u32 i = lane * 8; i < cols; i += LANES * 8) {
            Eight<T> v = load_eight(x + i), w = load_eight(weight + i);
            float y[8];
            for (u32 j = 0; j < 8; ++j) y[j] = v[j] * factor * (w[j] + p.offset);
            store_eight(out + i, y);
        }
    } else {
        for (u32 i = lane; i < cols; i += LANES) {
            out[i] = narrow<T>(widen(x[i]) * factor * (widen(weight[i]) + p.offset));
        }
    }
}

KERNEL(rms_norm_short_bf16, RmsNorm, BLOCK) { rms_norm<bf16, WARP>(p); }
KERNEL(rms_norm_long_bf16, RmsNorm, BLOCK) { rms_norm<bf16, BLOCK>(p); }
KERNEL(rms_norm_short_f16, RmsNorm, BLOCK) { rms_norm<f16, WARP>(p); }
KERNEL(rms_norm_long_f16, RmsNorm, BLOCK) { rms_norm<f16, BLOCK>(p); }
