// A token's latent and its rotated key on their way into the cache (multi-head latent attention, arXiv
// 2405.04434): an RMSNorm of the latent, the rotation of the key, and both as one row of a slot. A warp per token.
#include "prelude.cuh"

struct LatentAppend {
    // [tokens, latent_dim] and [tokens, rope_dim]; they stay as they are.
    const void *latent;
    const void *rope;
    // Of the norm, or null.
    const void *weight;
    // [positions, rope_dim / 2], or null: the key is rotated already.
    const float *cos;
    const float *sin;
    const u32 *positions;
    // -1 is nowhere.
    const i64 *slots;
    void *rows;
    // What the row is divided by before it is stored: one number, or one per slot, which is made here; or null.
    float *scale;
    u64 scale_stride;
    // In elements.
    u64 latent_stride, rope_stride, page_stride, token_stride;
    u32 tokens, latent_dim, rope_dim, interleaved, block_size, scale_each;
    float eps;
    u32 unused;
};

constexpr u32 BLOCK = 128;
// Elements of the latent that a lane holds.
constexpr u32 HELD = 16;

template <class T, class C> FN void latent_append(const LatentAppend &p) {
    u32 token = block_index() * (BLOCK / WARP) + thread_index() / WARP, lane = thread_index() % WARP;
    if (token >= p.tokens || p.slots[token] < 0) return;
    u64 slot = static_cast<u64>(p.slots[token]);
    const T *latent = static_cast<const T *>(p.latent) + token * p.latent_stride;
    const T *rope = static_cast<const T *>(p.rope) + token * p.rope_stride;
    const T *weight = static_cast<const T *>(p.weight);
    float v[HELD], squares = 0.0f;
    for (u32 i = 0; i < HELD; ++i) {
        u32 e = lane + i * WARP;
        v[i] = e < p.latent_dim ? widen(latent[e]) : 0.0f;
        squares = fused(v[i], v[i], squares);
    }
    if (weight) {
        squares = warp_sum(squares);
        float factor = divide(1.0f, square_root(divide(squares, static_cast<float>(p.latent_dim)) + p.eps));
        for (u32 i = 0; i < HELD; ++i) {
            u32 e = lane + i * WARP;
            if (e < p.latent_dim) v[i] *= factor * widen(weight[e]);
        }
    }
    // A lane turns one pair.
    u32 half = p.rope_dim / 2, first = p.interleaved ? 2 * lane : lane, second = p.interleaved ? 2 * lane + 1 : lane + half;
    float a = 0.0f, b = 0.0f;
    if (lane < half) {
        a = widen(rope[first]), b = widen(rope[second]);
        if (p.cos) {
            u64 at = static_cast<u64>(p.positions[token]) * half + lane;
            float x = a, y = b, cos = p.cos[at], sin = p.sin[at];
            a = fused(x, cos, -(y * sin));
            b = fused(x, sin, y * cos);
        }
    }
    float scale = 1.0f, *scale_at = p.scale ? p.scale + slot * p.scale_stride : nullptr;
    if (scale_at && p.scale_each) {
        auto size_of = [](float x) { return x < 0.0f ? -x : x; };
        float size = most(size_of(a), size_of(b));
        for (u32 i = 0; i < HELD; ++i) size = most(size, size_of(v[i]));
        size = warp_most(size);
        scale = size > 0.0f ? divide(size, largest<C>()) : 1.0f;
        if (lane == 0) *scale_at = scale;
    } else if (scale_at) {
        scale = *scale_at;
    }
    auto stored = [&](float x) { return narrow<C>(scale_at ? divide(x, scale) : x); };
    C *to = static_cast<C *>(p.rows) + slot / p.block_size * p.page_stride + slot % p.block_size * p.token_stride;
    for (u32 i = 0; i < HELD; ++i) {
        u32 e = lane + i * WARP;
        if (e < p.latent_dim) to[e] = stored(v[i]);
    }
    if (lane < half) {
        to[p.latent_dim + first] = stored(a);
        to[p.latent_dim + second] = stored(b);
    }
}

KERNEL(latent_append_bf16, LatentAppend, BLOCK) { latent_append<bf16, bf16>(p); }
KERNEL(latent_append_f16, LatentAppend, BLOCK) { latent_append<f16, f16>(p); }
KERNEL(latent_append_bf16_e4m3, LatentAppend, BLOCK) { latent_append<bf16, e4m3>(p); }
KERNEL(latent_append_f16_e4m3, LatentAppend, BLOCK) { latent_append<f16, e4m3>(p); }
