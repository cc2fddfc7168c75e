// Attention of prompts on Hopper (arXiv 2407.08608): one warp group asks the memory unit for whole pages of K and
// V, two others multiply. The rows are those of `attention.cuh`: query heads that share a kv head side by side,
// 128 a block. A block goes through the whole context of its rows, 128 positions at a time, with two tiles of K
// and V on their way or in use.
//
// The two warp groups that multiply take turns (ping-pong): while one has the tensor cores, the other is at its
// exponentials. Sums are in another order than those of `attention.cuh`: bits differ.
#pragma once
#include "attention.cuh"
#include "hopper.cuh"

struct HopperAttention {
    // K and V of a layer: (dim, token of a page, kv head, page); a box is 64 elements of `box_rows` tokens.
    TensorMap keys, values;
    Attention a;
    u32 box_rows, unused[3];
};

template <class T, u32 D> struct Prompt {
    static constexpr u32 TILE = 128, ROWS = 128, GROUP_ROWS = 64, STAGES = 2, PANELS = D / 64;
    static constexpr u32 THREADS = 3 * WARP_GROUP;
    // Shared memory: queries, stages of K and V, barriers. All tiles are panels of 64 columns.
    static constexpr u32 PANEL = TILE * PANEL_ROW, STAGE = PANELS * PANEL;
    static constexpr u32 KEYS = PANELS * ROWS * PANEL_ROW, VALUES = KEYS + STAGES * STAGE;
    static constexpr u32 BARRIERS = VALUES + STAGES * STAGE;
    static constexpr u32 SHARED_BYTES = BARRIERS + 3 * STAGES * sizeof(u64);
    // Barriers of some warps: each group's own, both groups', and each group's turn at the tensor cores.
    static constexpr u32 OWN = 1, BOTH = 3, TURN = 4;

    const HopperAttention &h;
    const Attention &p;
    const Item item;
    const Span span;
    const u32 head;
    // Positions that some row of the item sees.
    u32 low, high;

    FN u64 *arrived(u32 stage, u32 which) { return reinterpret_cast<u64 *>(shared_memory() + BARRIERS) + 2 * stage + which; }
    FN u64 *free(u32 stage) { return reinterpret_cast<u64 *>(shared_memory() + BARRIERS) + 2 * STAGES + stage; }
    FN u8 *keys(u32 stage) { return shared_memory() + KEYS + stage * STAGE; }
    FN u8 *values(u32 stage) { return shared_memory() + VALUES + stage * STAGE; }

    FN u32 rows() { return span.query_len * p.group; }
    FN u64 token(u32 row) { return span.query_start + row / p.group; }
    FN u32 query_head(u32 row) { return head * p.group + row % p.group; }

    // The positions that a row sees: as `Attend`, without masks.
    FN void seen(u32 row, u32 &from, u32 &to) {
        from = to = 0;
        if (row >= rows()) return;
        u32 before = span.context_len + row / p.group + 1, reach = before - least(before, span.query_len);
        to = least(p.causal ? reach : span.context_len, span.context_len);
        if (p.window && reach > p.window) from = reach - p.window;
    }

    FN Prompt(const HopperAttention &h)
        : h(h), p(h.a), item(h.a.items[block_index() / h.a.kv_heads]), span(h.a.spans[item.span]),
          head(block_index() % h.a.kv_heads) {
        u32 unused;
        seen(item.row, low, unused);
        seen(least(item.row + ROWS, rows()) - 1, unused, high);
    }

    FN u32 start() { return low / TILE * TILE; }

    // One thread asks for all tiles, each as soon as there is room.
    FN void ask() {
        const u32 *table = p.block_tables + static_cast<u64>(item.span) * p.blocks_max;
        u32 turn = 0;
        ROLL for (u32 first = start(); first < high; first += TILE, ++turn) {
            u32 stage = turn % STAGES, last = least(first + TILE, high);
            u32 boxes = divide_up(last - first, h.box_rows), bytes = boxes * h.box_rows * PANEL_ROW * PANELS;
            if (turn >= STAGES) barrier_wait(free(stage), (turn / STAGES - 1) % 2);
            for (u32 which = 0; which < 2; ++which) {
                const TensorMap *map = which == 0 ? &h.keys : &h.values;
                u8 *tile = which == 0 ? keys(stage) : values(stage);
                barrier_expect(arrived(stage, which), bytes);
                ROLL for (u32 box = 0; box < boxes; ++box) {
                    u32 at = first + box * h.box_rows;
                    i32 page = static_cast<i32>(table[at / p.block_size]), in_page = static_cast<i32>(at % p.block_size);
                    for (u32 panel = 0; panel < PANELS; ++panel)
                        tma_load(tile + panel * PANEL + box * h.box_rows * PANEL_ROW, map, arrived(stage, which),
                                 static_cast<i32>(64 * panel), in_page, static_cast<i32>(head), page);
                }
            }
        }
    }

    // A warp group's queries, permuted as the matrix unit takes them. Rows and elements that are not there are zeros.
    FN void load_queries(u32 group) {
        for (u32 i = thread_index() % WARP_GROUP; i < GROUP_ROWS * (D / 8); i += WARP_GROUP) {
            u32 at = group * GROUP_ROWS + i / (D / 8), piece = i % (D / 8), row = item.row + at;
            u32 eight[4] = {0, 0, 0, 0};
            if (row < rows() && piece * 8 < p.dim)
                load16(eight, static_cast<const T *>(p.q) + token(row) * p.q_stride +
                                  static_cast<u64>(query_head(row)) * p.dim + piece * 8);
            store16(shared_memory() + piece / 8 * ROWS * PANEL_ROW + at * PANEL_ROW + swizzle(at, piece % 8) * 16, eight);
        }
    }

    // Values beyond the context or before all windows are no numbers, perhaps: a weight of zero does not undo that.
    FN void clear_unseen(u32 stage, u32 first) {
        group_sync(BOTH, 2 * WARP_GROUP);
        u32 zeros[4] = {0, 0, 0, 0};
        for (u32 i = thread_index() - WARP_GROUP; i < TILE * PANELS * 8; i += 2 * WARP_GROUP) {
            u32 row = i / (PANELS * 8), piece = i % (PANELS * 8);
            if (first + row >= low && first + row < high) continue;
            store16(values(stage) + piece / 8 * PANEL + row * PANEL_ROW + piece % 8 * 16, zeros);
        }
        async_fence();
        group_sync(BOTH, 2 * WARP_GROUP);
    }

    // Scale, cap and minus infinity where a row does not see.
    FN void shape_scores(u32 first, u32 warp_row, float *score) {
        u32 lane = thread_index() % WARP, plain_start, plain_end, unused;
        seen(warp_row, unused, plain_end);
        seen(least(warp_row + 15, rows() - 1), plain_start, unused);
        bool plain = first >= plain_start && first + TILE <= plain_end && warp_row + 16 <= rows();
        float factor = p.softcap > 0.0f ? divide(p.scale, p.softcap) : p.scale * LOG2_E;
        for (u32 i = 0; i < TILE / 2; ++i) score[i] *= factor;
        if (p.softcap > 0.0f)
            for (u32 i = 0; i < TILE / 2; ++i) score[i] = tanh_of(score[i]) * (p.softcap * LOG2_E);
        if (plain) return;
        for (u32 i = 0; i < 2; ++i) {
            u32 from, to;
            seen(warp_row + lane / 4 + 8 * i, from, to);
            for (u32 n = 0; n < TILE / 8; ++n)
                for (u32 j = 0; j < 2; ++j) {
                    u32 at = first + 8 * n + 2 * (lane % 4) + j;
                    if (at < from || at >= to) score[4 * n + 2 * i + j] = NEGATIVE_INFINITY;
                }
        }
    }

    FN void multiply(u32 group) {
        u32 thread = thread_index() % WARP_GROUP, lane = thread % WARP;
        u32 warp_row = item.row + group * GROUP_ROWS + thread / WARP * 16;
        load_queries(group);
        async_fence();
        group_sync(OWN + group, WARP_GROUP);
        const u8 *queries = shared_memory() + group * GROUP_ROWS * PANEL_ROW;
        Softmax total[2] = {softmax_of_nothing(), softmax_of_nothing()};
        float sum[D / 2], score[TILE / 2];
        for (u32 i = 0; i < D / 2; ++i) sum[i] = 0.0f;
        u32 turn = 0;
        if (group == 1 && start() < high) group_arrive(TURN, 2 * WARP_GROUP);
        ROLL for (u32 first = start(); first < high; first += TILE, ++turn) {
            u32 stage = turn % STAGES, parity = turn / STAGES % 2;
            barrier_wait(arrived(stage, 0), parity);
            group_sync(TURN + group, 2 * WARP_GROUP);
            wgmma_fence();
            UNROLL for (u32 k = 0; k < D / 16; ++k)
                wgmma<T, TILE>(score, descriptor(queries + k / 4 * ROWS * PANEL_ROW + k % 4 * 32, 0, 8 * PANEL_ROW),
                               descriptor(keys(stage) + k / 4 * PANEL + k % 4 * 32, 0, 8 * PANEL_ROW), k > 0);
            wgmma_commit();
            wgmma_wait<0>();
            // The other group's turn; the last is the second's, and nobody comes after it.
            if (group == 0 || first + TILE < high) group_arrive(TURN + 1 - group, 2 * WARP_GROUP);
            shape_scores(first, warp_row, score);
            float fade[2];
            for (u32 i = 0; i < 2; ++i) {
                float top = total[i].most;
                for (u32 n = 0; n < TILE / 8; ++n) top = most(top, most(score[4 * n + 2 * i], score[4 * n + 2 * i + 1]));
                top = warp_most<4>(top);
                float base = softmax_base(top), part = 0.0f;
                fade[i] = exp_2(total[i].most - base);
                for (u32 n = 0; n < TILE / 8; ++n)
                    for (u32 j = 0; j < 2; ++j) {
                        float &s = score[4 * n + 2 * i + j];
                        s = exp_2(s - base);
                        part += s;
                    }
                total[i] = Softmax{top, fused(total[i].sum, fade[i], part)};
            }
            u32 weight[TILE / 16][4];
            for (u32 k = 0; k < TILE / 16; ++k)
                for (u32 i = 0; i < 4; ++i)
                    weight[k][i] = pack<T>(score[8 * k + 4 * (i / 2) + 2 * (i % 2)], score[8 * k + 4 * (i / 2) + 2 * (i % 2) + 1]);
            for (u32 i = 0; i < D / 2; ++i) sum[i] *= fade[i / 2 % 2];
            barrier_wait(arrived(stage, 1), parity);
            if (first < low || first + TILE > high) clear_unseen(stage, first);
            wgmma_fence();
            UNROLL for (u32 k = 0; k < TILE / 16; ++k)
                wgmma_turned<T, D>(sum, weight[k], descriptor(values(stage) + k * 16 * PANEL_ROW, PANEL, 8 * PANEL_ROW));
            wgmma_commit();
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(free(stage));
        }
        write(warp_row, total, sum);
    }

    FN void write(u32 warp_row, Softmax *total, const float *sum) {
        u32 lane = thread_index() % WARP;
        for (u32 i = 0; i < 2; ++i) {
            total[i].sum = warp_sum<4>(total[i].sum);
            u32 row = warp_row + lane / 4 + 8 * i;
            if (row >= rows()) continue;
            u32 query = query_head(row);
            float lse, factor = softmax_finish(total[i], p.sinks ? p.sinks + query : nullptr, lse);
            if (p.lse && lane % 4 == 0) p.lse[token(row) * p.kv_heads * p.group + query] = lse;
            T *to = static_cast<T *>(p.out) + token(row) * p.out_stride + static_cast<u64>(query) * p.dim;
            for (u32 n = 0; n < D / 8; ++n) {
                u32 d = 8 * n + 2 * (lane % 4);
                u32 two = pack<T>(sum[4 * n + 2 * i] * factor, sum[4 * n + 2 * i + 1] * factor);
                if (d < p.dim) *reinterpret_cast<u32 *>(to + d) = two;
            }
        }
    }

    FN void run() {
        if (thread_index() == 0) {
            for (u32 stage = 0; stage < STAGES; ++stage) {
                for (u32 which = 0; which < 2; ++which) barrier_init(arrived(stage, which), 1);
                barrier_init(free(stage), 2 * WARP_GROUP / WARP);
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

#define HOPPER_KERNEL(name, T, D) \
    KERNEL(name, HopperAttention, (Prompt<T, D>::THREADS)) { Prompt<T, D>(p).run(); }
