// out = act(gate) · up per element. SiLU, x / (1 + exp(-x)), for SwiGLU (arXiv 2002.05202); GELU in its tanh form
// (arXiv 1606.08415) for Gemma, and by the error function. gpt-oss's SwiGLU has (up + 1), and cuts both at a limit.
#include "prelude.cuh"

struct Gated {
    const void *gate;
    const void *up;
    void *out;
    u64 gate_stride, up_stride, out_stride;
    u32 rows, cols;
    // Of gpt-oss's SwiGLU.
    float alpha, limit;
};

constexpr u32 BLOCK = 256;

FN float sigmoid(float x) { return divide(1.0f, 1.0f + exp_2(-x * LOG2_E)); }

struct Silu {
    static FN float of(const Gated &, float x, float up) { return x * sigmoid(x) * up; }
};
// 1/2 (1 + tanh(u)) is sigmoid(2u).
struct GeluTanh {
    static FN float of(const Gated &, float x, float up) {
        return x * sigmoid(1.5957691216057308f * fused(0.044715f * x * x, x, x)) * up;
    }
};
// The normal distribution function is 1/2 erfc(-x / sqrt(2)).
struct Gelu {
    static FN float of(const Gated &, float x, float up) {
        return x * (0.5f * erfc_of(-0.7071067811865476f * x)) * up;
    }
};
struct SwigluOai {
    static FN float of(const Gated &p, float x, float up) {
        x = least(p.limit, x);
        up = most(least(p.limit, up), -p.limit);
        return x * sigmoid(p.alpha * x) * (up + 1.0f);
    }
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
    if (first + 8 <= p.cols) {
        Eight<T> g = load_eight(gate + first), u = load_eight(up + first);
        float y[8];
        for (u32 j = 0; j < 8; ++j) y[j] = Act::of(p, g[j], u[j]);
        store_eight(out + first, y);
    } else {
        for (u32 i = first; i < least(first + 8, p.cols); ++i)
            out[i] = narrow<T>(Act::of(p, widen(gate[i]), widen(up[i])));
    }
}

KERNEL(silu_mul_bf16, Gated, BLOCK) { gated<bf16, Silu>(p); }
KERNEL(silu_mul_f16, Gated, BLOCK) { gated<f16, Silu>(p); }
KERNEL(gelu_mul_bf16, Gated, BLOCK) { gated<bf16, GeluTanh>(p); }
KERNEL(gelu_mul_f16, Gated, BLOCK) { gated<f16, GeluTanh>(p); }
KERNEL(gelu_erf_mul_bf16, Gated, BLOCK) { gated<bf16, Gelu>(p); }
KERNEL(gelu_erf_mul_f16, Gated, BLOCK) { gated<f16, Gelu>(p); }
KERNEL(swiglu_oai_bf16, Gated, BLOCK) { gated<bf16, SwigluOai>(p); }
KERNEL(swiglu_oai_f16, Gated, BLOCK) { gated<f16, SwigluOai>(p); }
