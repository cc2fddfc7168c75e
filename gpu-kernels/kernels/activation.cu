// out = act(gate) · up per element. SiLU, x / (1 + exp(-x)), for SwiGLU (arXiv 2002.05202); GELU in its tanh form
// (arXiv 1606.08415) for Gemma.
#include "prelude.cuh"

struct Gated {
    const void *gate;
    const void *up;
    void *out;
    u64 gate_stride, up_stride, out_stride;
    u32 rows, cols;
    // Rows start at multiples of 16 bytes.
    u32 aligned;
};

constexpr u32 BLOCK = 256;

FN float sigmoid(float x) { return divide(1.0f, 1.0f + exp_2(-x * LOG2_E)); }

struct Silu {
    static FN float of(float x) { return x * sigmoid(x); }
};
// 1/2 (1 + tanh(u)) is sigmoid(2u).
struct Gelu {
    static FN float of(float x) { return x * sigmoid(1.5957691216057308f * fused(0.044715f * x * x, x, x)); }
};

// One thread, eight columns of a row.
template <class T, class Act> FN void gated(const Gated &p) {
    u32 pieces = divide_up(p.cols, 8);
    u64 at = static_cast<u64>(block_index()) * BLOCK + thread_index();
    if (at >= static_cast<u64>(pieces) * p.rows) return;
    u64 row = at / pieces;
    u32 first = static_cast<u32>(at % pieces) * 8;
    const T *gate = static_cast<const T *>(p.gate) + row * p.gate_stride;
    const T *up = static_cast<const T *>(p.up) + row * p.up_stride;
    T *out = static_cast<T *>(p.out) + row * p.out_stride;
    if (p.aligned && first + 8 <= p.cols) {
        Eight<T> g = load_eight(gate + first), u = load_eight(up + first);
        float y[8];
        for (u32 j = 0; j < 8; ++j) y[j] = Act::of(g[j]) * u[j];
        store_eight(out + first, y);
    } else {
        for (u32 i = first; i < least(first + 8, p.cols); ++i)
            out[i] = narrow<T>(Act::of(widen(gate[i])) * widen(up[i]));
    }
}

KERNEL(silu_mul_bf16, Gated, BLOCK) { gated<bf16, Silu>(p); }
KERNEL(silu_mul_f16, Gated, BLOCK) { gated<f16, Silu>(p); }
KERNEL(gelu_mul_bf16, Gated, BLOCK) { gated<bf16, Gelu>(p); }
KERNEL(gelu_mul_f16, Gated, BLOCK) { gated<f16, Gelu>(p); }
