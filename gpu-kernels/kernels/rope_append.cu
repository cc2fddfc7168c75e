// What happens to q, k and v between their projection and attention, for one head of one token by one warp:
// an RMSNorm of the head (Qwen3), the rotation of RoPE (arXiv 2104.09864), and the way of k and v into their slot.
// Each of the three can be left out, so the same kernel is `rope`, `append` and their fusion.
#include "prelude.cuh"

struct RopeAppend {
    // q, k and v; what is null is left out.
    void *x[3];
    u64 stride[3];
    // Norm weights of q and k, or null.
    const void *weight[2];
    // [positions, rotary / 2], or null: no rotation.
    const float *cos;
    const float *sin;
    const u32 *positions;
    // Null: k and v are written back to where they came from.
    const i64 *slots;
    void *keys;
    void *values;
    // What k and v are divided by before they are stored: one number, or one per [slot][kv head]; or null.
    float *key_scale;
    float *value_scale;
    // In elements.
    u64 scale_token_stride, scale_head_stride;
    u64 page_stride, token_stride, head_stride;
    u32 tokens, query_heads, kv_heads, dim, rotary, interleaved, block_size;
    float eps;
    // The scale of a head of a token is made here, so that its largest number becomes the largest that is stored.
    u32 scale_each, unused;
};

constexpr u32 BLOCK = 128;
constexpr u32 HELD = 8;

// The elements that a lane holds. Of the rotated part, both of a pair: element 2i of the list turns with 2i + 1. A
// lane beyond the end holds none.
FN u32 element(const RopeAppend &p, u32 lane, u32 i) {
    u32 half = p.rotary / 2, pair = lane + i / 2 * WARP, rest = p.rotary + 2 * (pair - half) + i % 2;
    if (pair >= half) return rest;
    return p.interleaved ? 2 * pair + i % 2 : pair + i % 2 * half;
}

template <class T, class C> FN void rope_append(const RopeAppend &p) {
    u32 heads = p.query_heads + 2 * p.kv_heads;
    u64 at = static_cast<u64>(block_index()) * (BLOCK / WARP) + thread_index() / WARP;
    u32 lane = thread_index() % WARP, token = static_cast<u32>(at / heads), head = static_cast<u32>(at % heads);
    if (token >= p.tokens) return;
    u32 which = head < p.query_heads ? 0 : head < p.query_heads + p.kv_heads ? 1 : 2;
    if (which > 0) head -= p.query_heads + (which - 1) * p.kv_heads;
    if (!p.x[which]) return;
    i64 slot = which > 0 && p.slots ? p.slots[token] : -1;
    // Appending alone, to nowhere.
    if (which > 0 && p.slots && slot < 0) return;

    T *x = static_cast<T *>(p.x[which]) + token * p.stride[which] + static_cast<u64>(head) * p.dim;
    float v[HELD];
    for (u32 i = 0; i < HELD; ++i) {
        u32 e = element(p, lane, i);
        v[i] = e < p.dim ? widen(x[e]) : 0.0f;
    }
    if (which < 2 && p.weight[which]) {
        float squares = 0.0f;
        for (u32 i = 0; i < HELD; ++i) squares = fused(v[i], v[i], squares);
        squares = warp_sum(squares);
        float factor = divide(1.0f, square_root(divide(squares, static_cast<float>(p.dim)) + p.eps));
        const T *weight = static_cast<const T *>(p.weight[which]);
        for (u32 i = 0; i < HELD; ++i) {
            u32 e = element(p, lane, i);
            if (e < p.dim) v[i] *= factor * widen(weight[e]);
        }
    }
    if (which < 2 && p.cos) {
        u64 row = static_cast<u64>(p.positions[token]) * (p.rotary / 2);
        for (u32 i = 0; i < HELD; i += 2) {
            u32 pair = lane + i / 2 * WARP;
            if (pair >= p.rotary / 2) continue;
            float cos = p.cos[row + pair], sin = p.sin[row + pair], a = v[i], b = v[i + 1];
            v[i] = fused(a, cos, -(b * sin));
            v[i + 1] = fused(a, sin, b * cos);
        }
    }
    if (slot < 0) {
        for (u32 i = 0; i < HELD; ++i) {
            u32 e = element(p, lane, i);
            if (e < p.dim) x[e] = narrow<T>(v[i]);
        }
        return;
    }
    float *scale_at = which == 1 ? p.key_scale : p.value_scale, scale = 1.0f;
    if (scale_at) scale_at += slot * p.scale_token_stride + head * p.scale_head_stride;
    if (scale_at && p.scale_each) {
        float size = 0.0f;
        for (u32 i = 0; i < HELD; ++i) size = most(size, v[i] < 0.0f ? -v[i] : v[i]);
        size = warp_most(size);
        scale = size > 0.0f ? divide(size, largest<C>()) : 1.0f;
        if (lane == 0) *scale_at = scale;
    } else if (scale_at) {
        scale = *scale_at;
    }
    u64 page = slot / p.block_size, offset = slot % p.block_size;
    C *to = static_cast<C *>(which == 1 ? p.keys : p.values) + page * p.page_stride + offset * p.token_stride +
            head * p.head_stride;
    for (u32 i = 0; i < HELD; ++i) {
        u32 e = element(p, lane, i);
        if (e < p.dim) to[e] = narrow<C>(scale_at ? divide(v[i], scale) : v[i]);
    }
}

KERNEL(rope_append_bf16, RopeAppend, BLOCK) { rope_append<bf16, bf16>(p); }
KERNEL(rope_append_f16, RopeAppend, BLOCK) { rope_append<f16, f16>(p); }
KERNEL(rope_append_bf16_e4m3, RopeAppend, BLOCK) { rope_append<bf16, e4m3>(p); }
KERNEL(rope_append_f16_e4m3, RopeAppend, BLOCK) { rope_append<f16, e4m3>(p); }
KERNEL(rope_append_bf16_i8, RopeAppend, BLOCK) { rope_append<bf16, i8>(p); }
KERNEL(rope_append_f16_i8, RopeAppend, BLOCK) { rope_append<f16, i8>(p); }
