// Attention of prompts on Hopper (arXiv 2407.08608): one warp group asks the memory unit for whole pages of K and
// V, two others multiply. The rows are those of `attention.cuh`: query heads that share a kv head side by side,
// 128 a block. A block goes through the context of its rows, or a part of it, 128 positions at a time, with two
// tiles of K and V on their way or in use.
//
// The two warp groups that multiply take turns (ping-pong): while one has the tensor cores, the other is at its
// exponentials.
//
// **Bits.** Tiles of 128 positions and chunks of `chunk`, a multiple of that, begin at multiples of their length from
// position 0. Within a chunk each tile fades the sum of those before it; a chunk starts from zero and is added to the
// total, in ascending order. An item may hold all chunks of its rows, and brings the total to memory between them; or
// it gives chunks out for `merge` to add: the additions are the same. A tile or chunk of which a row sees nothing
// multiplies its sums by one and adds zeros. So a row's bits depend on its own query and context and on `chunk`; not
// on the rows beside it, on where a tile of rows begins, or on who adds up what. They are not those of
// `attention.cuh`, which adds in another order and has the spans of up to 16 rows.
//
// Caches of one byte a number come as they are stored, and the warp group that asks for them makes them into the type of
// the queries on their way to the tensor cores. That is exact; scales go to scores and weights.
#pragma once
#include "attention.cuh"
#include "hopper.cuh"

struct HopperAttention {
    // K and V of a layer: (dim, token of a page, kv head, page); a box is 64 elements of `box_rows` tokens, or all of
    // one byte.
    TensorMap keys, values;
    Attention a;
    // Between chunks, of the blocks of items that have several: [block][D / 8][thread that multiplies] of four.
    float *totals;
    // Positions of a chunk.
    u32 chunk, box_rows;
};

// T: q and out. C: the cache. D: the head size, padded.
template <class T, class C, u32 D> struct Prompt {
    static constexpr bool CONVERT = sizeof(C) == 1;
    static constexpr u32 TILE = 128, ROWS = 128, GROUP_ROWS = 64, STAGES = 2, PANELS = D / 64;
    static constexpr u32 THREADS = 3 * WARP_GROUP;
    // Shared memory: queries, stages of K and V as panels of 64 columns, for a cache of one byte the same as stored and a
    // scale for each position, barriers.
    static constexpr u32 PANEL = TILE * PANEL_ROW, STAGE = PANELS * PANEL, STORED = CONVERT ? TILE * D : 0;
    static constexpr u32 KEYS = PANELS * ROWS * PANEL_ROW, VALUES = KEYS + STAGES * STAGE;
    static constexpr u32 STORED_TILES = VALUES + STAGES * STAGE, SCALES = STORED_TILES + 2 * STAGES * STORED;
    static constexpr u32 BARRIERS = SCALES + (CONVERT ? 2 * STAGES * TILE * sizeof(float) : 0);
    static constexpr u32 SHARED_BYTES = BARRIERS + (CONVERT ? 5 : 3) * STAGES * sizeof(u64);
    // Barriers of some warps: each group's own, both groups', each group's turn at the tensor cores, and those who convert.
    static constexpr u32 OWN = 1, BOTH = 3, TURN = 4, CONVERTERS = 6;

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
    // Of a cache of one byte.
    FN u64 *came(u32 stage, u32 which) { return free(STAGES) + 2 * stage + which; }
    FN u8 *stored(u32 stage, u32 which) { return shared_memory() + STORED_TILES + (2 * stage + which) * STORED; }
    FN float *scales(u32 stage, u32 which) {
        return reinterpret_cast<float *>(shared_memory() + SCALES) + (2 * stage + which) * TILE;
    }
    // Whether each head of each token has a scale of its own.
    FN bool scaled_each() { return CONVERT && p.scale_token_stride > 0; }
    FN const u32 *table() { return p.block_tables + static_cast<u64>(item.span) * p.blocks_max; }

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
        low = most(low, item.chunk_first * h.chunk);
        high = least(high, item.chunk_last * h.chunk);
    }

    FN u32 start() { return low / TILE * TILE; }

    // Asks for the pages of a tile of keys or values.
    FN void ask_tile(u32 first, u32 which, u8 *to, u64 *barrier) {
        constexpr u32 PARTS = CONVERT ? 1 : PANELS, ROW = CONVERT ? D : PANEL_ROW;
        const TensorMap *map = which == 0 ? &h.keys : &h.values;
        u32 boxes = divide_up(least(first + TILE, high) - first, h.box_rows);
        barrier_expect(barrier, boxes * h.box_rows * ROW * PARTS);
        ROLL for (u32 box = 0; box < boxes; ++box) {
            u32 at = first + box * h.box_rows;
            i32 page = static_cast<i32>(table()[at / p.block_size]), in_page = static_cast<i32>(at % p.block_size);
            for (u32 part = 0; part < PARTS; ++part)
                tma_load(to + part * PANEL + box * h.box_rows * ROW, map, barrier, static_cast<i32>(64 * part), in_page,
                         static_cast<i32>(head), page);
        }
    }

    // One thread asks for all tiles, each as soon as there is room.
    FN void ask() {
        u32 turn = 0;
        ROLL for (u32 first = start(); first < high; first += TILE, ++turn) {
            u32 stage = turn % STAGES;
            if (turn >= STAGES) barrier_wait(free(stage), (turn / STAGES - 1) % 2);
            for (u32 which = 0; which < 2; ++which)
                ask_tile(first, which, which == 0 ? keys(stage) : values(stage), arrived(stage, which));
        }
    }

    FN void ask_stored(u32 first, u32 stage) {
        if (thread_index() > 0 || first >= high) return;
        for (u32 which = 0; which < 2; ++which) ask_tile(first, which, stored(stage, which), came(stage, which));
    }

    // A tile's numbers as T.
    FN void convert_tile(const u8 *from, u8 *to) {
        for (u32 i = thread_index(); i < TILE * (D / 8); i += WARP_GROUP) {
            u32 row = i / (D / 8), piece = i % (D / 8), eight[4];
            u64 bytes = *reinterpret_cast<const u64 *>(from + i * 8);
            widen_four<T, C>(static_cast<u32>(bytes), eight);
            widen_four<T, C>(static_cast<u32>(bytes >> 32), eight + 2);
            store16(to + piece / 8 * PANEL + row * PANEL_ROW + swizzle(row, piece % 8) * 16, eight);
        }
    }

    // A warp group makes all tiles into T, each as soon as there is room; the next is on its way meanwhile.
    FN void convert() {
        u32 turn = 0;
        ask_stored(start(), 0);
        ROLL for (u32 first = start(); first < high; first += TILE, ++turn) {
            u32 stage = turn % STAGES, at = first + thread_index();
            // All have read what the next tile takes the place of.
            group_sync(CONVERTERS, WARP_GROUP);
            ask_stored(first + TILE, (turn + 1) % STAGES);
            float scale[2] = {0.0f, 0.0f};
            if (scaled_each() && at >= low && at < high) {
                u64 slot = static_cast<u64>(table()[at / p.block_size]) * p.block_size + at % p.block_size;
                u64 place = slot * p.scale_token_stride + head * p.scale_head_stride;
                scale[0] = p.key_scale[place], scale[1] = p.value_scale[place];
            }
            if (turn >= STAGES) barrier_wait(free(stage), (turn / STAGES - 1) % 2);
            for (u32 which = 0; which < 2; ++which) {
                if (scaled_each()) scales(stage, which)[thread_index()] = divide(scale[which], unit<C>());
                barrier_wait(came(stage, which), turn / STAGES % 2);
                convert_tile(stored(stage, which), which == 0 ? keys(stage) : values(stage));
                async_fence();
                warp_sync();
                if (thread_index() % WARP == 0) barrier_arrive(arrived(stage, which));
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

    FN void scale_columns(const float *scale, float *score) {
        for (u32 n = 0; n < TILE / 8; ++n)
            for (u32 i = 0; i < 4; ++i) score[4 * n + i] *= scale[8 * n + 2 * (thread_index() % 4) + i % 2];
    }

    // Scale, cap and minus infinity where a row does not see.
    FN void shape_scores(u32 first, u32 stage, u32 warp_row, float *score) {
        u32 lane = thread_index() % WARP, plain_start, plain_end, unused;
        seen(warp_row, unused, plain_end);
        seen(least(warp_row + 15, rows() - 1), plain_start, unused);
        bool plain = first >= plain_start && first + TILE <= plain_end && warp_row + 16 <= rows();
        float factor = p.softcap > 0.0f ? divide(p.scale, p.softcap) : p.scale * LOG2_E;
        if (CONVERT && !scaled_each()) factor *= divide(*p.key_scale, unit<C>());
        for (u32 i = 0; i < TILE / 2; ++i) score[i] *= factor;
        if (scaled_each()) scale_columns(scales(stage, 0), score);
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
        // Of each row: of the chunk at hand, and of all before it.
        Softmax chunk[2] = {softmax_of_nothing(), softmax_of_nothing()}, total[2] = {chunk[0], chunk[1]};
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
            settle(score);
            // The other group's turn; the last is the second's, and nobody comes after it.
            if (group == 0 || first + TILE < high) group_arrive(TURN + 1 - group, 2 * WARP_GROUP);
            shape_scores(first, stage, warp_row, score);
            float fade[2];
            for (u32 i = 0; i < 2; ++i) {
                float top = chunk[i].most;
                for (u32 n = 0; n < TILE / 8; ++n) top = most(top, most(score[4 * n + 2 * i], score[4 * n + 2 * i + 1]));
                top = warp_most<4>(top);
                float base = softmax_base(top), part = 0.0f;
                fade[i] = exp_2(chunk[i].most - base);
                for (u32 n = 0; n < TILE / 8; ++n)
                    for (u32 j = 0; j < 2; ++j) {
                        float &s = score[4 * n + 2 * i + j];
                        s = exp_2(s - base);
                        part += s;
                    }
                chunk[i] = Softmax{top, fused(chunk[i].sum, fade[i], part)};
            }
            if (scaled_each()) scale_columns(scales(stage, 1), score);
            u32 weight[TILE / 16][4];
            for (u32 k = 0; k < TILE / 16; ++k)
                for (u32 i = 0; i < 4; ++i)
                    weight[k][i] = pack<T>(score[8 * k + 4 * (i / 2) + 2 * (i % 2)], score[8 * k + 4 * (i / 2) + 2 * (i % 2) + 1]);
            for (u32 i = 0; i < D / 2; ++i) sum[i] *= fade[i / 2 % 2];
            barrier_wait(arrived(stage, 1), parity);
            // One byte is always a number.
            if (!CONVERT && (first < low || first + TILE > high)) clear_unseen(stage, first);
            settle(sum);
            for (u32 k = 0; k < TILE / 16; ++k) settle(weight[k]);
            wgmma_fence();
            UNROLL for (u32 k = 0; k < TILE / 16; ++k)
                wgmma_turned<T, D>(sum, weight[k], descriptor(values(stage) + k * 16 * PANEL_ROW, PANEL, 8 * PANEL_ROW));
            wgmma_commit();
            wgmma_wait<0>();
            settle(sum);
            if (lane == 0) barrier_arrive(free(stage));
            bool last = first + TILE >= high;
            if (!last && (first + TILE) % h.chunk != 0) continue;
            for (u32 i = 0; i < 2; ++i) chunk[i].sum = warp_sum<4>(chunk[i].sum);
            if (whole()) add_to_total(first / h.chunk > start() / h.chunk, last, chunk, total, sum);
            else give_out(first / h.chunk, warp_row, chunk, sum);
            for (u32 i = 0; i < 2; ++i) chunk[i] = softmax_of_nothing();
        }
        if (whole()) write(warp_row, total, sum);
    }

    // The result is final.
    FN bool whole() { return item.partial == ~0u; }

    // A chunk is complete. After the last the total stays in `sum`; else it goes to memory, and `sum` is zeros.
    FN void add_to_total(bool more, bool last, const Softmax *chunk, Softmax *total, float *sum) {
        float keep[2], add[2];
        float *at = h.totals + static_cast<u64>(block_index()) * ROWS * D + (thread_index() - WARP_GROUP) * 4;
        for (u32 i = 0; i < 2; ++i) softmax_merge(total[i], chunk[i], keep[i], add[i]);
        for (u32 n = 0; n < D / 8; ++n, at += 2 * WARP_GROUP * 4) {
            u32 four[4] = {0, 0, 0, 0};
            if (more) load16(four, at);
            for (u32 i = 0; i < 4; ++i) {
                float &s = sum[4 * n + i];
                s = fused(s, add[i / 2], as_float(four[i]) * keep[i / 2]);
                if (last) continue;
                four[i] = as_bits(s);
                s = 0.0f;
            }
            if (!last) store16(at, four);
        }
    }

    // A chunk is complete: for `merge`. One scale of all values is left to that, but for the unit.
    FN void give_out(u32 index, u32 warp_row, const Softmax *chunk, float *sum) {
        u32 lane = thread_index() % WARP;
        u64 partial = static_cast<u64>(item.partial + index - item.chunk_first) * p.kv_heads + head;
        float factor = CONVERT && !scaled_each() ? 1.0f / unit<C>() : 1.0f;
        for (u32 i = 0; i < 2; ++i) {
            u32 row = warp_row + lane / 4 + 8 * i;
            u64 at = partial * ROWS + row - item.row;
            if (row < rows() && lane % 4 == 0) p.partial_states[at] = chunk[i];
            float *to = p.partial_values + at * D + 2 * (lane % 4);
            for (u32 n = 0; n < D / 8; ++n)
                for (u32 j = 0; j < 2; ++j) {
                    float &s = sum[4 * n + 2 * i + j];
                    if (row < rows()) to[8 * n + j] = s * factor;
                    s = 0.0f;
                }
        }
    }

    FN void write(u32 warp_row, Softmax *total, const float *sum) {
        u32 lane = thread_index() % WARP;
        for (u32 i = 0; i < 2; ++i) {
            u32 row = warp_row + lane / 4 + 8 * i;
            if (row >= rows()) continue;
            u32 query = query_head(row);
            float lse, factor = softmax_finish(total[i], p.sinks ? p.sinks + query : nullptr, lse);
            if (p.lse && lane % 4 == 0) p.lse[token(row) * p.kv_heads * p.group + query] = lse;
            if (CONVERT && !scaled_each()) factor *= divide(*p.value_scale, unit<C>());
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
                for (u32 which = 0; which < 2; ++which) {
                    barrier_init(arrived(stage, which), CONVERT ? WARP_GROUP / WARP : 1);
                    if (CONVERT) barrier_init(came(stage, which), 1);
                }
                barrier_init(free(stage), 2 * WARP_GROUP / WARP);
            }
            barrier_init_fence();
        }
        block_sync();
        u32 group = thread_index() / WARP_GROUP;
        if (group == 0) {
            registers_give<CONVERT ? 40 : 24>();
            if constexpr (CONVERT) convert();
            else if (thread_index() == 0) ask();
        } else {
            registers_take<CONVERT ? 232 : 240>();
            multiply(group - 1);
        }
    }
};

#define HOPPER_KERNEL(name, T, C, D) \
    KERNEL(name, HopperAttention, (Prompt<T, C, D>::THREADS)) { Prompt<T, C, D>(p).run(); }
#define HOPPER_KERNELS(suffix, T, C)                       \
    HOPPER_KERNEL(hopper_attention_64_##suffix, T, C, 64)  \
    HOPPER_KERNEL(hopper_attention_128_##suffix, T, C, 128)
