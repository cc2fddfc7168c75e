// Adds up what attention's work items left: the chunks of a tile's rows, in ascending order, as one item would have.
// And the public operator: two finished attentions over different parts of a context (a shared prefix and a request's
// own), each an average of values with its natural-logarithm LSE, become one.
#include "softmax.cuh"

struct MergeTile {
    // First of `count` partials.
    u32 partial, count;
    // Where the tile's rows go.
    u32 query_start, row, rows;
};

struct MergePartials {
    const MergeTile *tiles;
    // [partial][kv head][tile_rows][padded]
    const float *values;
    const Softmax *states;
    void *out;
    float *lse;
    const float *sinks;
    // What all values are still to be multiplied by; or null.
    const float *value_scale;
    u64 out_stride;
    u32 kv_heads, group, dim, padded, tile_rows;
};

constexpr u32 BLOCK = 128, ROWS = BLOCK / WARP;

// A warp per row of a tile and kv head, of which a lane holds HELD elements.
template <class T, u32 HELD> FN void merge_partials(const MergePartials &p) {
    u32 index = block_index() / (p.tile_rows / ROWS), head = index % p.kv_heads, lane = thread_index() % WARP;
    u32 r = block_index() % (p.tile_rows / ROWS) * ROWS + thread_index() / WARP;
    MergeTile tile = p.tiles[index / p.kv_heads];
    if (r >= tile.rows) return;
    u64 token = tile.query_start + (tile.row + r) / p.group;
    u32 query = head * p.group + (tile.row + r) % p.group;
    Softmax total = softmax_of_nothing();
    float values[HELD];
    for (u32 i = 0; i < HELD; ++i) values[i] = 0.0f;
    for (u32 chunk = 0; chunk < tile.count; ++chunk) {
        u64 at = (static_cast<u64>(tile.partial + chunk) * p.kv_heads + head) * p.tile_rows + r;
        float keep, add;
        softmax_merge(total, p.states[at], keep, add);
        for (u32 i = 0; i < HELD; ++i) {
            u32 d = lane + i * WARP;
            if (d < p.dim) values[i] = fused(p.values[at * p.padded + d], add, values[i] * keep);
        }
    }
    float lse, factor = softmax_finish(total, p.sinks ? p.sinks + query : nullptr, lse);
    if (p.lse && lane == 0) p.lse[token * p.kv_heads * p.group + query] = lse;
    if (p.value_scale) factor *= *p.value_scale;
    T *out = static_cast<T *>(p.out) + token * p.out_stride + static_cast<u64>(query) * p.dim;
    for (u32 i = 0; i < HELD; ++i) {
        u32 d = lane + i * WARP;
        if (d < p.dim) out[d] = narrow<T>(values[i] * factor);
    }
}

KERNEL(merge_partials_bf16, MergePartials, BLOCK) { merge_partials<bf16, 8>(p); }
KERNEL(merge_partials_f16, MergePartials, BLOCK) { merge_partials<f16, 8>(p); }
KERNEL(merge_partials_latent_bf16, MergePartials, BLOCK) { merge_partials<bf16, 16>(p); }
KERNEL(merge_partials_latent_f16, MergePartials, BLOCK) { merge_partials<f16, 16>(p); }

struct MergeStates {
    // [tokens, heads · dim] and [tokens, heads]; the result replaces the first.
    void *a;
    float *lse_a;
    const void *b;
    const float *lse_b;
    u64 a_stride, b_stride;
    u32 tokens, heads, dim;
};

// A warp per token and head.
template <class T> FN void merge_states(const MergeStates &p) {
    u64 at = static_cast<u64>(block_index()) * (BLOCK / WARP) + thread_index() / WARP;
    if (at >= static_cast<u64>(p.tokens) * p.heads) return;
    u64 token = at / p.heads, head = at % p.heads;
    Softmax total{p.lse_a[at] * LOG2_E, 1.0f}, part{p.lse_b[at] * LOG2_E, 1.0f};
    float keep, add, lse;
    if (total.most == NEGATIVE_INFINITY) total.sum = 0.0f;
    if (part.most == NEGATIVE_INFINITY) part.sum = 0.0f;
    softmax_merge(total, part, keep, add);
    float factor = softmax_finish(total, nullptr, lse);
    T *a = static_cast<T *>(p.a) + token * p.a_stride + head * p.dim;
    const T *b = static_cast<const T *>(p.b) + token * p.b_stride + head * p.dim;
    for (u32 d = thread_index() % WARP; d < p.dim; d += WARP)
        a[d] = narrow<T>(fused(widen(b[d]), add, widen(a[d]) * keep) * factor);
    // All lanes have read the logarithm before it changes.
    warp_sync();
    if (thread_index() % WARP == 0) p.lse_a[at] = lse;
}

KERNEL(merge_states_bf16, MergeStates, BLOCK) { merge_states<bf16>(p); }
KERNEL(merge_states_f16, MergeStates, BLOCK) { merge_states<f16>(p); }
