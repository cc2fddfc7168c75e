// Attention over paged memory (arXiv 2309.06180) with tensor cores (arXiv 2205.14135, 2307.08691).
//
// A work item is a tile of query rows of one span and one kv head, and a range of its context in chunks of 256
// positions. A row is one query head of one token: all heads that share a kv head are rows of the same tiles, so
// one read of K and V serves them, whatever the group's size. A tile is walked through in ascending order, TILE
// positions at a time; while one tile is computed, the next is on its way from memory.
//
// **Bits.** The sum over a tile starts from zero and is added to the chunk's; chunks start at multiples of 256 and
// are added to the total in ascending order. An item may hold all chunks of its rows and add them up itself, or
// give them out for `merge` to add: the additions are the same. So are those of the two block shapes: warps along
// rows only (prefill), or warps that share rows, split the positions of a tile for the scores and the head's
// elements for the values (decode). A row's bits therefore depend on its own query and context alone.
#pragma once
#include "softmax.cuh"

struct Span {
    u32 query_start, query_len, context_len, unused;
};

struct Item {
    // First row of the tile: token · group + head, from the span's start.
    u32 span, row;
    // Chunks first..last; the results go to `partial` and the following, or to the output if that is ~0.
    u32 chunk_first, chunk_last, partial;
};

struct Attention {
    const void *q;
    // Latents only: the rotated elements of the queries, which follow those of `q`.
    const void *q_rope;
    void *out;
    // [tokens, query heads], natural logarithm; or null.
    float *lse;
    const void *keys;
    const void *values;
    const u32 *block_tables;
    const Span *spans;
    const Item *items;
    // [partial][kv head][row][D], and the state of each row.
    float *partial_values;
    Softmax *partial_states;
    // Per query head, or null: ALiBi's slope (arXiv 2108.12409), and the score of a sink.
    const float *slopes;
    const float *sinks;
    // [tokens][mask_words], or null: bit j of a token's row says that it sees token j of its span (a tree of drafts).
    const u32 *mask;
    // What stored numbers are multiplied by: one number, or one per [slot][kv head].
    const float *key_scale;
    const float *value_scale;
    u64 scale_token_stride, scale_head_stride;
    // In elements. `dim` is contiguous.
    u64 page_stride, token_stride, head_stride, q_stride, q_rope_stride, out_stride;
    u32 blocks_max, block_size, mask_words;
    // `value_dim` is `dim`, but for latents.
    u32 kv_heads, group, dim, value_dim;
    // 0: all that comes before.
    u32 window;
    u32 causal;
    float scale;
    // Scores become cap · tanh(score / cap); 0: they stay.
    float softcap;
    u32 unused;
};

// T: q and out. C: the cache. D: the head size, padded. ALONG warps side by side along rows, ACROSS warps on the
// same. DV: elements of a value. Where they are fewer than D, values are the first elements of the keys themselves
// (latents of multi-head latent attention, arXiv 2405.04434, in the form that has taken the up-projections into q
// and out).
template <class T, class C, u32 D, u32 ALONG, u32 ACROSS, u32 DV = D> struct Attend {
    static constexpr u32 TILE = D > 128 ? 32 : 64;
    static constexpr u32 ROWS = 16 * ALONG;
    static constexpr u32 THREADS = WARP * ALONG * ACROSS;
    static constexpr u32 COLUMNS = TILE / ACROSS;
    static constexpr u32 SLICE = DV / ACROSS;
    static constexpr bool CONVERT = sizeof(C) == 1;
    static constexpr bool LATENT = DV != D;
    // Tiles of a stage: keys and values, or what is both.
    static constexpr u32 TILES = LATENT ? 1 : 2;

    // A tile's columns in the order of summation: four groups, each in one warp.
    static constexpr u32 GROUP = TILE / 4;

    // Shared memory: the queries, two stages of K and V, for a cache of another type the tile at hand as T, where
    // its rows lie, and, where warps share rows, their largest scores. Their weights and sums go where the tile's
    // keys were, if nobody needs those any more.
    static constexpr u32 Q_BYTES = ROWS * D * 2;
    static constexpr u32 STAGE_BYTES = TILE * D * sizeof(C);
    static constexpr u32 TILE_BYTES = TILE * D * 2;
    static constexpr u32 CONVERTED = Q_BYTES + 2 * TILES * STAGE_BYTES;
    static constexpr u32 PLACES = CONVERTED + (CONVERT ? TILES * TILE_BYTES : 0);
    static constexpr u32 SCALES = PLACES + 2 * TILE * sizeof(i64);
    static constexpr u32 MOST = SCALES + (CONVERT ? 5 * TILE * sizeof(float) : 0);
    // Rows of weights are 16 bytes apart modulo 128: `ldmatrix` meets no bank twice.
    static constexpr u32 WEIGHT_ROW = TILE + 8;
    static constexpr u32 WEIGHT_BYTES = ROWS * WEIGHT_ROW * 2 + ALONG * 4 * WARP * 8;
    static constexpr u32 WEIGHTS = MOST + (ACROSS > 1 ? ACROSS * ROWS * sizeof(float) : 0);
    static constexpr u32 SHARED_BYTES = WEIGHTS + (LATENT ? WEIGHT_BYTES : 0);
    static_assert(ACROSS == 1 || LATENT || WEIGHT_BYTES <= TILE_BYTES, "weights and sums fit");

    const Attention &p;
    const Item item;
    const Span span;
    const u32 head, lane, along, across;
    // Positions that some row of the item sees.
    u32 low, high;
    Softmax chunk[2], total[2];
    float values[SLICE / 8][4], totals[SLICE / 8][4];

    FN u8 *stage(u32 parity, u32 which) {
        return shared_memory() + Q_BYTES + (TILES * parity + which % TILES) * STAGE_BYTES;
    }
    FN T *tile(u32 parity, u32 which) {
        which %= TILES;
        return reinterpret_cast<T *>(CONVERT ? shared_memory() + CONVERTED + which * TILE_BYTES : stage(parity, which));
    }
    FN i64 *places(u32 parity) { return reinterpret_cast<i64 *>(shared_memory() + PLACES) + parity * TILE; }
    FN float *scales(u32 parity, u32 which) {
        return reinterpret_cast<float *>(shared_memory() + SCALES) + (2 * parity + which) * TILE;
    }

    // The scales of the keys of the tile at hand.
    FN float *key_scales() { return scales(2, 0); }

    FN u32 rows() { return span.query_len * p.group; }
    FN u64 token(u32 row) { return span.query_start + row / p.group; }
    FN u32 query_head(u32 row) { return head * p.group + row % p.group; }
    FN u32 position(u32 row) { return span.context_len + row / p.group - span.query_len; }

    // The positions that a row sees, masks aside. A query beyond the context's start sees none.
    FN void seen(u32 row, u32 &from, u32 &to) {
        from = to = 0;
        if (row >= rows()) return;
        u32 before = span.context_len + row / p.group + 1;
        to = p.causal && !p.mask ? before - least(before, span.query_len) : span.context_len;
        to = least(to, span.context_len);
        u32 reach = before - least(before, span.query_len);
        if (p.window && reach > p.window) from = reach - p.window;
    }

    FN Attend(const Attention &p)
        : p(p), item(p.items[block_index() / p.kv_heads]), span(p.spans[item.span]),
          head(block_index() % p.kv_heads), lane(thread_index() % WARP), along(thread_index() / WARP % ALONG),
          across(thread_index() / WARP / ALONG) {
        u32 last = least(item.row + ROWS, rows()) - 1, unused;
        seen(item.row, low, unused);
        seen(last, unused, high);
        low = most(low, item.chunk_first * CHUNK);
        high = least(high, item.chunk_last * CHUNK);
        for (u32 i = 0; i < 2; ++i) {
            total[i] = softmax_of_nothing();
        }
        for (u32 n = 0; n < SLICE / 8; ++n)
            for (u32 i = 0; i < 4; ++i) totals[n][i] = 0.0f;
        clear();
    }

    FN void clear() {
        for (u32 i = 0; i < 2; ++i) chunk[i] = softmax_of_nothing();
        for (u32 n = 0; n < SLICE / 8; ++n)
            for (u32 i = 0; i < 4; ++i) values[n][i] = 0.0f;
    }

    // Queries to shared memory; rows and elements that are not there are zeros.
    FN void load_queries() {
        bool aligned = p.dim % 8 == 0;
        for (u32 i = thread_index(); i < ROWS * (D / 8); i += THREADS) {
            u32 at = i / (D / 8), piece = i % (D / 8), row = item.row + at;
            u32 eight[4] = {0, 0, 0, 0};
            if (row < rows()) {
                const T *from = static_cast<const T *>(p.q) + token(row) * p.q_stride +
                                static_cast<u64>(query_head(row)) * p.value_dim + piece * 8;
                if (LATENT && piece * 8 >= p.value_dim)
                    from = static_cast<const T *>(p.q_rope) + token(row) * p.q_rope_stride +
                           static_cast<u64>(query_head(row)) * (p.dim - p.value_dim) + piece * 8 - p.value_dim;
                if (LATENT || aligned) {
                    if (piece * 8 < p.dim) load16(eight, from);
                } else {
                    for (u32 j = 0; j < 8; ++j)
                        if (piece * 8 + j < p.dim) eight[j / 2] |= static_cast<u32>(from[j].bits) << 16 * (j % 2);
                }
            }
            store16(shared_memory() + (at * (D / 8) + swizzle(at, piece)) * 16, eight);
        }
    }

    // Where the positions of a tile lie in the cache; -1 where nobody looks.
    FN void find(u32 parity, u32 first) {
        for (u32 i = thread_index(); i < TILE; i += THREADS) {
            u32 at = first + i;
            i64 place = -1;
            float key_scale = 0.0f, value_scale = 0.0f;
            if (at >= low && at < high) {
                u64 page = p.block_tables[static_cast<u64>(item.span) * p.blocks_max + at / p.block_size];
                u64 offset = at % p.block_size;
                place = page * p.page_stride + offset * p.token_stride + head * p.head_stride;
                if (CONVERT) {
                    u64 scale = (page * p.block_size + offset) * p.scale_token_stride + head * p.scale_head_stride;
                    key_scale = p.key_scale[scale], value_scale = p.value_scale[scale];
                }
            }
            places(parity)[i] = place;
            if (CONVERT) scales(parity, 0)[i] = key_scale, scales(parity, 1)[i] = value_scale;
        }
    }

    // Asks for K and V of a tile. What nobody sees becomes zeros: a weight of zero does not undo what is no number.
    FN void fetch(u32 parity) {
        constexpr u32 PIECE = 16 / sizeof(C), PIECES = D / PIECE;
        ROLL for (u32 i = thread_index(); i < TILE * PIECES; i += THREADS) {
            u32 row = i / PIECES, piece = i % PIECES;
            i64 place = places(parity)[row];
            u32 here = most(p.dim, piece * PIECE) - piece * PIECE;
            u32 bytes = place < 0 ? 0 : least(here * static_cast<u32>(sizeof(C)), 16u);
            u64 from = bytes > 0 ? place + piece * PIECE : 0;
            u32 to = (row * PIECES + (CONVERT ? piece : swizzle(row, piece))) * 16;
            cp_async(stage(parity, 0) + to, static_cast<const C *>(p.keys) + from, bytes);
            if (!LATENT) cp_async(stage(parity, 1) + to, static_cast<const C *>(p.values) + from, bytes);
        }
        cp_async_commit();
    }

    // Eight-bit numbers of the stage to the tile: values times their scale. Keys stay exact; `shape_scores` has
    // theirs, and for latents `weigh`.
    FN void convert(u32 parity) {
        constexpr u32 PIECES = D / 8;
        for (u32 i = thread_index(); i < TILE; i += THREADS) key_scales()[i] = scales(parity, 0)[i];
        ROLL for (u32 i = thread_index(); i < TILES * TILE * PIECES; i += THREADS) {
            u32 which = i / (TILE * PIECES), row = i / PIECES % TILE, piece = i % PIECES;
            if (places(parity)[row] < 0) {
                u32 zeros[4] = {0, 0, 0, 0};
                store16(tile(parity, which) + (row * PIECES + swizzle(row, piece)) * 8, zeros);
                continue;
            }
            const C *from = reinterpret_cast<const C *>(stage(parity, which)) + row * D + piece * 8;
            float scale = which == 0 ? 1.0f : scales(parity, 1)[row], x[8];
            for (u32 j = 0; j < 8; ++j) x[j] = widen(from[j]) * scale;
            store_eight(tile(parity, which) + (row * PIECES + swizzle(row, piece)) * 8, x);
        }
    }

    // score[n] = q · k for this warp's rows and columns.
    FN void multiply_keys(u32 parity, float (*score)[4]) {
        const T *k = tile(parity, 0);
        for (u32 n = 0; n < COLUMNS / 8; ++n)
            for (u32 i = 0; i < 4; ++i) score[n][i] = 0.0f;
        ROLL for (u32 d = 0; d < D / 32; ++d) {
            u32 q[2][4], q_row = 16 * along + lane % 16;
            for (u32 i = 0; i < 2; ++i)
                ldmatrix(q[i], shared_memory() + (q_row * (D / 8) + swizzle(q_row, 4 * d + 2 * i + lane / 16)) * 16);
            UNROLL for (u32 n = 0; n < COLUMNS / 8; ++n) {
                u32 b[4], row = COLUMNS * across + 8 * n + lane % 8;
                ldmatrix(b, k + (row * (D / 8) + swizzle(row, 4 * d + lane / 8)) * 8);
                mma<T>(score[n], q[0], b[0], b[1]);
                mma<T>(score[n], q[1], b[2], b[3]);
            }
        }
    }

    // Scale, cap and bias, in base 2, and minus infinity where a row does not see.
    FN void shape_scores(u32 first, float (*score)[4]) {
        // Between these, all rows of the warp see all positions.
        u32 plain_start, plain_end, unused, warp_row = item.row + 16 * along;
        seen(warp_row, unused, plain_end);
        seen(least(warp_row + 15, rows() - 1), plain_start, unused);
        if (p.mask) plain_end = span.context_len - least(span.context_len, span.query_len);
        if (warp_row + 16 > rows()) plain_end = 0;
        bool plain = first >= plain_start && first + TILE <= plain_end;
        float factor = p.softcap > 0.0f ? divide(p.scale, p.softcap) : p.scale * LOG2_E;
        for (u32 n = 0; n < COLUMNS / 8; ++n)
            for (u32 i = 0; i < 4; ++i)
                score[n][i] *= CONVERT ? factor * key_scales()[COLUMNS * across + 8 * n + 2 * (lane % 4) + i % 2] : factor;
        if (p.softcap > 0.0f)
            for (u32 n = 0; n < COLUMNS / 8; ++n)
                for (u32 i = 0; i < 4; ++i) score[n][i] = tanh_of(score[n][i]) * (p.softcap * LOG2_E);
        if (plain && !p.slopes) return;
        for (u32 i = 0; i < 2; ++i) {
            u32 row = item.row + 16 * along + lane / 4 + 8 * i, from, to;
            seen(row, from, to);
            if (row >= rows()) row = item.row;
            float slope = p.slopes ? p.slopes[query_head(row)] * LOG2_E : 0.0f;
            u32 own = span.context_len - least(span.context_len, span.query_len);
            for (u32 n = 0; n < COLUMNS / 8; ++n) {
                for (u32 j = 0; j < 2; ++j) {
                    u32 at = first + COLUMNS * across + 8 * n + 2 * (lane % 4) + j;
                    float &s = score[n][2 * i + j];
                    s = fused(slope, static_cast<float>(static_cast<i32>(at - position(row))), s);
                    bool sees = at >= from && at < to;
                    if (p.mask && sees && at >= own) {
                        u32 bit = at - own;
                        sees = p.mask[token(row) * p.mask_words + bit / 32] >> bit % 32 & 1u;
                    }
                    if (!sees) s = NEGATIVE_INFINITY;
                }
            }
        }
    }

    // The largest score of each of the lane's two rows over the tile.
    FN void largest(float (*score)[4], float *top) {
        for (u32 i = 0; i < 2; ++i) {
            top[i] = NEGATIVE_INFINITY;
            for (u32 n = 0; n < COLUMNS / 8; ++n) top[i] = most(top[i], most(score[n][2 * i], score[n][2 * i + 1]));
            top[i] = warp_most<4>(top[i]);
        }
        if (ACROSS == 1) return;
        float *shared = reinterpret_cast<float *>(shared_memory() + MOST);
        for (u32 i = 0; i < 2; ++i)
            if (lane % 4 == 0) shared[across * ROWS + 16 * along + lane / 4 + 8 * i] = top[i];
        block_sync();
        for (u32 i = 0; i < 2; ++i)
            for (u32 w = 0; w < ACROSS; ++w) top[i] = most(top[i], shared[w * ROWS + 16 * along + lane / 4 + 8 * i]);
    }

    // Weights of all positions of the tile, as the left operand of `mma`, and their sums over the lane's columns:
    // each group's by itself, then the groups in order, as the other block shapes do.
    FN void weigh(u32 parity, float (*score)[4], const float *base, u32 (*weight)[4], float *sum) {
        constexpr u32 GROUPS = 4 / ACROSS;
        u32 own[COLUMNS / 8][2];
        float sums[GROUPS][2];
        for (u32 i = 0; i < GROUPS; ++i) sums[i][0] = sums[i][1] = 0.0f;
        for (u32 n = 0; n < COLUMNS / 8; ++n)
            for (u32 i = 0; i < 2; ++i) {
                float first = exp_2(score[n][2 * i] - base[i]), second = exp_2(score[n][2 * i + 1] - base[i]);
                sums[8 * n / GROUP][i] += first + second;
                if (LATENT && CONVERT) {
                    const float *scale = key_scales() + COLUMNS * across + 8 * n + 2 * (lane % 4);
                    first *= scale[0], second *= scale[1];
                }
                own[n][i] = pack<T>(first, second);
            }
        if (ACROSS == 1) {
            for (u32 i = 0; i < 2; ++i) sum[i] = sums[0][i] + sums[1 % GROUPS][i] + sums[2 % GROUPS][i] + sums[3 % GROUPS][i];
            for (u32 k = 0; k < TILE / 16; ++k)
                for (u32 i = 0; i < 4; ++i) weight[k][i] = own[(2 * k + i / 2) % (COLUMNS / 8)][i % 2];
            return;
        }
        T *shared = LATENT ? reinterpret_cast<T *>(shared_memory() + WEIGHTS) : tile(parity, 0);
        float *shared_sums = reinterpret_cast<float *>(shared + ROWS * WEIGHT_ROW) + along * 4 * WARP * 2 + lane * 2;
        for (u32 n = 0; n < COLUMNS / 8; ++n)
            for (u32 i = 0; i < 2; ++i) {
                u32 row = 16 * along + lane / 4 + 8 * i, column = COLUMNS * across + 8 * n + 2 * (lane % 4);
                *reinterpret_cast<u32 *>(shared + row * WEIGHT_ROW + column) = own[n][i];
            }
        for (u32 g = 0; g < GROUPS; ++g)
            for (u32 i = 0; i < 2; ++i) shared_sums[(GROUPS * across + g) * WARP * 2 + i] = sums[g][i];
        block_sync();
        for (u32 i = 0; i < 2; ++i) {
            sum[i] = shared_sums[i];
            for (u32 g = 1; g < 4; ++g) sum[i] += shared_sums[g * WARP * 2 + i];
        }
        for (u32 k = 0; k < TILE / 16; ++k)
            ldmatrix(weight[k], shared + (16 * along + lane % 16) * WEIGHT_ROW + 16 * k + 8 * (lane / 16));
    }

    // One tile: scores, weights, and values times weights on top of the chunk's.
    FN void step(u32 parity, u32 first) {
        float score[COLUMNS / 8][4], top[2], base[2], fade[2];
        multiply_keys(parity, score);
        shape_scores(first, score);
        largest(score, top);
        for (u32 i = 0; i < 2; ++i) {
            top[i] = most(top[i], chunk[i].most);
            base[i] = softmax_base(top[i]);
            fade[i] = exp_2(chunk[i].most - base[i]);
            chunk[i].most = top[i];
        }
        u32 weight[TILE / 16][4];
        float sum[2];
        weigh(parity, score, base, weight, sum);
        for (u32 i = 0; i < 2; ++i) chunk[i].sum = fused(chunk[i].sum, fade[i], sum[i]);
        const T *v = tile(parity, 1);
        // Addresses of so many pieces are not worth a register each over the whole loop.
        u32 own = LATENT ? opaque(lane) : lane;
        UNROLL for (u32 n = 0; n < SLICE / 8; n += 2) {
            float part[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
            UNROLL for (u32 k = 0; k < TILE / 16; ++k) {
                u32 b[4], row = 16 * k + own % 16;
                ldmatrix_trans(b, v + (row * (D / 8) + swizzle(row, SLICE / 8 * across + n + own / 16)) * 8);
                mma<T>(part[0], weight[k], b[0], b[1]);
                mma<T>(part[1], weight[k], b[2], b[3]);
            }
            for (u32 m = 0; m < 2; ++m)
                for (u32 i = 0; i < 4; ++i) values[n + m][i] = fused(values[n + m][i], fade[i / 2], part[m][i]);
        }
    }

    // The chunk is complete: on to the total, or out.
    FN void finish_chunk(u32 index) {
        for (u32 i = 0; i < 2; ++i) chunk[i].sum = warp_sum<4>(chunk[i].sum);
        if (item.partial == ~0u) {
            float keep[2], add[2];
            for (u32 i = 0; i < 2; ++i) softmax_merge(total[i], chunk[i], keep[i], add[i]);
            for (u32 n = 0; n < SLICE / 8; ++n)
                for (u32 i = 0; i < 4; ++i)
                    totals[n][i] = fused(values[n][i], add[i / 2], totals[n][i] * keep[i / 2]);
        } else {
            u64 partial = static_cast<u64>(item.partial + index - item.chunk_first) * p.kv_heads + head;
            for (u32 i = 0; i < 2; ++i) {
                u32 row = 16 * along + lane / 4 + 8 * i;
                if (item.row + row >= rows()) continue;
                if (across == 0 && lane % 4 == 0) p.partial_states[partial * ROWS + row] = chunk[i];
                float *to = p.partial_values + (partial * ROWS + row) * DV + SLICE * across + 2 * (lane % 4);
                for (u32 n = 0; n < SLICE / 8; ++n) {
                    to[8 * n] = values[n][2 * i];
                    to[8 * n + 1] = values[n][2 * i + 1];
                }
            }
        }
        clear();
    }

    FN void write() {
        for (u32 i = 0; i < 2; ++i) {
            u32 row = item.row + 16 * along + lane / 4 + 8 * i;
            if (row >= rows()) continue;
            u32 query = query_head(row);
            float lse, factor = softmax_finish(total[i], p.sinks ? p.sinks + query : nullptr, lse);
            if (p.lse && across == 0 && lane % 4 == 0) p.lse[token(row) * p.kv_heads * p.group + query] = lse;
            T *to = static_cast<T *>(p.out) + token(row) * p.out_stride + static_cast<u64>(query) * p.value_dim;
            for (u32 n = 0; n < SLICE / 8; ++n) {
                u32 d = SLICE * across + 8 * n + 2 * (lane % 4);
                float x = totals[n][2 * i] * factor, y = totals[n][2 * i + 1] * factor;
                if (p.value_dim % 2 == 0) {
                    if (d < p.value_dim) *reinterpret_cast<u32 *>(to + d) = pack<T>(x, y);
                } else {
                    if (d < p.value_dim) to[d] = narrow<T>(x);
                    if (d + 1 < p.value_dim) to[d + 1] = narrow<T>(y);
                }
            }
        }
    }

    FN void run() {
        load_queries();
        u32 from = low / TILE * TILE;
        if (low < high) {
            find(0, from);
            find(1, from + TILE);
            block_sync();
            fetch(0);
        }
        u32 parity = 0;
        for (u32 first = from; first < high; first += TILE, parity ^= 1) {
            cp_async_wait<0>();
            block_sync();
            if (first + TILE < high) fetch(parity ^ 1);
            if (CONVERT) {
                convert(parity);
                block_sync();
            }
            find(parity, first + 2 * TILE);
            step(parity, first);
            if ((first + TILE) % CHUNK == 0 || first + TILE >= high) finish_chunk(first / CHUNK);
        }
        if (item.partial == ~0u) write();
    }
};

#define ATTENTION_KERNEL(name, T, C, D, ALONG, ACROSS)                     \
    KERNEL(name, Attention, (Attend<T, C, D, ALONG, ACROSS>::THREADS)) {   \
        Attend<T, C, D, ALONG, ACROSS>(p).run();                           \
    }
// Prefill: 64 rows; decode: 16.
#define ATTENTION_KERNELS(suffix, T, C)                                    \
    ATTENTION_KERNEL(attention_64_rows_64_##suffix, T, C, 64, 4, 1)        \
    ATTENTION_KERNEL(attention_64_rows_128_##suffix, T, C, 128, 4, 2)      \
    ATTENTION_KERNEL(attention_64_rows_256_##suffix, T, C, 256, 4, 2)      \
    ATTENTION_KERNEL(attention_16_rows_64_##suffix, T, C, 64, 1, 4)        \
    ATTENTION_KERNEL(attention_16_rows_128_##suffix, T, C, 128, 1, 4)      \
    ATTENTION_KERNEL(attention_16_rows_256_##suffix, T, C, 256, 1, 4)
// Latents of up to 512 elements with up to 64 rotated ones; 32 rows where shared memory is large enough.
#define LATENT_KERNELS(suffix, T, C)                                                     \
    KERNEL(attention_32_rows_latent_##suffix, Attention, (Attend<T, C, 576, 2, 4, 512>::THREADS)) { \
        Attend<T, C, 576, 2, 4, 512>(p).run();                                           \
    }                                                                                    \
    KERNEL(attention_16_rows_latent_##suffix, Attention, (Attend<T, C, 576, 1, 4, 512>::THREADS)) { \
        Attend<T, C, 576, 1, 4, 512>(p).run();                                           \
    }
