// A mixture of experts: who gets which token, tokens in the order of their experts, and the sum of what experts gave.
// Nothing is counted by whoever comes first: the same scores give the same lists.
#include "prelude.cuh"

struct Route {
    // [tokens, experts].
    const void *logits;
    // Per expert, or null: added to scores for the choice alone (arXiv 2412.19437).
    const float *bias;
    // [tokens, chosen].
    u32 *experts;
    float *weights;
    u64 stride;
    u32 tokens, expert_count, chosen;
    // Experts are in `groups` equal groups, of which the `groups_chosen` best stay; 1 and 1: all.
    u32 groups, groups_chosen;
    // Scores are sigmoids of logits, else a softmax; weights are made to sum to 1, and multiplied.
    u32 sigmoid, renormalise;
    float factor;
};

constexpr u32 BLOCK = 128;

// The larger of two scores, of equal ones the first.
struct Best {
    float score;
    u32 index;
};
FN bool better(Best a, Best b) { return a.score > b.score || (a.score == b.score && a.index < b.index); }

FN Best block_best(Best best, Best *shared) {
    for (u32 step = WARP / 2; step > 0; step /= 2) {
        Best other{shuffle_xor(best.score, step), shuffle_xor(best.index, step)};
        if (better(other, best)) best = other;
    }
    block_sync();
    if (thread_index() % WARP == 0) shared[thread_index() / WARP] = best;
    block_sync();
    for (u32 i = 0; i < BLOCK / WARP; ++i)
        if (better(shared[i], best)) best = shared[i];
    return best;
}

// A block per token. Shared memory: what each expert is chosen by, its score, each group's, and the best of warps.
template <class T> FN void route(const Route &p) {
    u32 n = p.expert_count, token = block_index();
    float *choice = reinterpret_cast<float *>(shared_memory()), *score = choice + n, *group = score + n;
    Best *best_of = reinterpret_cast<Best *>(group + round_up(p.groups, 2));
    const T *logits = static_cast<const T *>(p.logits) + token * p.stride;
    Best top{NEGATIVE_INFINITY, ~0u};
    for (u32 i = thread_index(); i < n; i += BLOCK) top = better(Best{widen(logits[i]), i}, top) ? Best{widen(logits[i]), i} : top;
    top = block_best(top, best_of);
    // A softmax's denominator is left out where weights are made to sum to 1; else it is summed in order.
    for (u32 i = thread_index(); i < n; i += BLOCK) {
        float x = widen(logits[i]);
        score[i] = p.sigmoid ? divide(1.0f, 1.0f + exp_2(-x * LOG2_E)) : exp_2((x - top.score) * LOG2_E);
    }
    block_sync();
    float sum = 0.0f;
    if (!p.sigmoid)
        for (u32 i = 0; i < n; ++i) sum += score[i];
    block_sync();
    for (u32 i = thread_index(); i < n; i += BLOCK) {
        if (!p.sigmoid) score[i] = divide(score[i], sum);
        choice[i] = score[i] + (p.bias ? p.bias[i] : 0.0f);
    }
    block_sync();
    if (p.groups_chosen < p.groups) {
        // A group is as good as its two best experts, or its best where experts are chosen by their score alone.
        u32 size = n / p.groups;
        for (u32 g = thread_index(); g < p.groups; g += BLOCK) {
            float first = NEGATIVE_INFINITY, second = NEGATIVE_INFINITY;
            for (u32 i = g * size; i < (g + 1) * size; ++i) {
                second = most(second, least(first, choice[i]));
                first = most(first, choice[i]);
            }
            group[g] = p.bias && size > 1 ? first + second : first;
        }
        block_sync();
        for (u32 g = thread_index(); g < p.groups; g += BLOCK) {
            u32 ahead = 0;
            for (u32 other = 0; other < p.groups; ++other)
                ahead += better(Best{group[other], other}, Best{group[g], g});
            if (ahead >= p.groups_chosen)
                for (u32 i = g * size; i < (g + 1) * size; ++i) choice[i] = NEGATIVE_INFINITY;
        }
        block_sync();
    }
    float total = 0.0f;
    for (u32 round = 0; round < p.chosen; ++round) {
        Best best{NEGATIVE_INFINITY, ~0u};
        for (u32 i = thread_index(); i < n; i += BLOCK)
            if (better(Best{choice[i], i}, best)) best = Best{choice[i], i};
        best = block_best(best, best_of);
        u32 expert = least(best.index, n - 1);
        total += score[expert];
        if (thread_index() == 0) {
            p.experts[token * p.chosen + round] = expert;
            p.weights[token * p.chosen + round] = score[expert];
            // Not minus infinity, which those of other groups have: it is chosen once.
            choice[expert] = as_float(0xffc00000u);
        }
        block_sync();
    }
    float factor = p.renormalise ? divide(p.factor, total) : p.factor;
    for (u32 i = thread_index(); i < p.chosen; i += BLOCK) p.weights[token * p.chosen + i] *= factor;
}

KERNEL(route_bf16, Route, BLOCK) { route<bf16>(p); }
KERNEL(route_f16, Route, BLOCK) { route<f16>(p); }

struct GroupTile {
    u32 weight, first, last;
};

struct Sort {
    // [pairs]: the expert of each pair of a token and a choice.
    const u32 *experts;
    // [experts]: how many pairs each has.
    u32 *counts;
    // [pairs]: pairs in the order of their experts, and the token of each.
    u32 *pairs_sorted;
    u32 *tokens_sorted;
    // Tiles of at most `tile_rows` pairs of one expert; what is left of the list says ~0.
    GroupTile *tiles;
    u32 pairs, expert_count, chosen, tile_rows, tiles_max, unused;
};

// The sum of a number over all threads before this one, and over all.
FN u32 block_before(u32 x, u32 &all, u32 *shared) {
    block_sync();
    shared[thread_index()] = x;
    block_sync();
    u32 before = 0;
    all = 0;
    for (u32 i = 0; i < BLOCK; ++i) {
        if (i < thread_index()) before += shared[i];
        all += shared[i];
    }
    return before;
}

// A block per expert.
KERNEL(moe_count, Sort, BLOCK) {
    u32 count = 0, all;
    for (u32 i = thread_index(); i < p.pairs; i += BLOCK) count += p.experts[i] == block_index();
    block_before(count, all, reinterpret_cast<u32 *>(shared_memory()));
    if (thread_index() == 0) p.counts[block_index()] = all;
}

// A block per expert: each thread looks through pairs that follow each other.
KERNEL(moe_sort, Sort, BLOCK) {
    u32 expert = block_index(), at = 0, tile = 0, all;
    for (u32 i = 0; i < expert; ++i) {
        at += p.counts[i];
        tile += divide_up(p.counts[i], p.tile_rows);
    }
    u32 first = at, length = divide_up(p.pairs, BLOCK);
    u32 from = least(thread_index() * length, p.pairs), to = least(from + length, p.pairs), count = 0;
    for (u32 i = from; i < to; ++i) count += p.experts[i] == expert;
    at += block_before(count, all, reinterpret_cast<u32 *>(shared_memory()));
    for (u32 i = from; i < to; ++i) {
        if (p.experts[i] != expert) continue;
        p.pairs_sorted[at] = i;
        p.tokens_sorted[at] = i / p.chosen;
        at += 1;
    }
    u32 tiles = divide_up(all, p.tile_rows), last = first + all;
    for (u32 i = thread_index(); i < tiles; i += BLOCK)
        p.tiles[tile + i] = GroupTile{expert, first + i * p.tile_rows, least(first + (i + 1) * p.tile_rows, last)};
    if (expert + 1 == p.expert_count)
        for (u32 i = tile + tiles + thread_index(); i < p.tiles_max; i += BLOCK) p.tiles[i] = GroupTile{~0u, 0, 0};
}

// out[token] = sum over choices, in their order, of weight · what the expert gave.
struct Combine {
    // [pairs, cols].
    const void *parts;
    const float *weights;
    void *out;
    u64 parts_stride, out_stride;
    u32 tokens, chosen, cols, accumulate;
};

template <class T> FN void combine(const Combine &p) {
    u64 at = static_cast<u64>(block_index()) * BLOCK + thread_index();
    u32 token = static_cast<u32>(at / p.cols), column = static_cast<u32>(at % p.cols);
    if (token >= p.tokens) return;
    T *out = static_cast<T *>(p.out) + token * p.out_stride + column;
    float sum = p.accumulate ? widen(*out) : 0.0f;
    for (u32 i = 0; i < p.chosen; ++i) {
        u64 pair = static_cast<u64>(token) * p.chosen + i;
        sum = fused(widen(static_cast<const T *>(p.parts)[pair * p.parts_stride + column]), p.weights[pair], sum);
    }
    *out = narrow<T>(sum);
}

KERNEL(combine_bf16, Combine, BLOCK) { combine<bf16>(p); }
KERNEL(combine_f16, Combine, BLOCK) { combine<f16>(p); }
