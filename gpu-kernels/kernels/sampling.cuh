// The distribution that a row of logits stands for, and a draw from it, for one row by one block.
//
// Nothing is sorted. Which tokens stay is a threshold on the logit: the k-th largest, the one at which the mass
// reaches p, and the largest plus ln(min_p), found by radix selection (eight bits a round). Masses are whole
// numbers of 2^-40, so sums do not depend on their order, and a row's token on nothing but its logits and its
// random number. Equal logits stay or go together.
#pragma once
#include "prelude.cuh"

struct SampleRow {
    // Of the draw: a fraction of 2^64.
    u64 random;
    // A fraction of 2^64; all ones keeps everything.
    u64 top_p;
    // 0: the largest logit.
    float temperature;
    // ln(min_p); minus infinity keeps everything.
    float min_p_log;
    // 0 keeps everything.
    u32 top_k;
    // Penalties: logits above 0 are divided by the first, others multiplied; the others are subtracted, once and for
    // each time a token was given out.
    float repetition, presence, frequency;
    // Of `seen`.
    u32 seen_start, seen_count;
    // Row of the mask; ~0: all are allowed.
    u32 mask_row, unused;
};

// A token that occurred, and how often in the output: 0 when in the prompt alone.
struct Seen {
    u32 token, count;
};

// Rows of logits, and how each is drawn from.
struct Logits {
    const void *logits;
    // [rows][vocabulary], for the kernel to use.
    float *work;
    const SampleRow *rows;
    const Seen *seen;
    // Bits of the tokens allowed, [mask rows][mask_words], lowest bit first.
    const u32 *mask;
    u64 stride;
    u32 vocabulary, mask_words;
};

constexpr u32 BLOCK = 512;
constexpr u32 BINS = 256;

// What a block shares.
struct Shared {
    u64 bins[BINS];
    u64 sums[BLOCK];
    float numbers[BLOCK / WARP];
    u64 above;
    u32 chosen;
};

FN Shared &shared() { return *reinterpret_cast<Shared *>(shared_memory()); }

FN float block_most(float x) {
    x = warp_most(x);
    block_sync();
    if (thread_index() % WARP == 0) shared().numbers[thread_index() / WARP] = x;
    block_sync();
    for (u32 i = 0; i < BLOCK / WARP; ++i) x = most(x, shared().numbers[i]);
    return x;
}

// The sum over all threads.
FN u64 block_total(u64 x) {
    block_sync();
    shared().sums[thread_index()] = x;
    block_sync();
    for (u32 step = BLOCK / 2; step > 0; step /= 2) {
        if (thread_index() < step) shared().sums[thread_index()] += shared().sums[thread_index() + step];
        block_sync();
    }
    return shared().sums[0];
}

// Larger numbers have larger keys.
FN u32 key_of(float x) {
    u32 bits = as_bits(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A weight of at most 1 in units of 2^-40.
FN u64 mass(float weight) { return static_cast<u64>(weight * 0x1p40f); }

// e^((x - largest) / temperature); `factor` is the temperature's.
struct Weight {
    float largest, factor;
    FN float of(float x) const { return exp_2((x - largest) * factor); }
    FN u64 operator()(float x) const { return mass(of(x)); }
};
struct One {
    FN u64 operator()(float) const { return 1; }
};

// The largest key t, at least `floor`, for which the masses of keys from t on reach `wanted`; `floor` if they
// never do.
template <class Mass> FN u32 select(const float *work, u32 n, u32 floor, u64 wanted, Mass mass) {
    u32 prefix = 0;
    u64 above = 0;
    for (u32 shift = 24;; shift -= 8) {
        block_sync();
        for (u32 i = thread_index(); i < BINS; i += BLOCK) shared().bins[i] = 0;
        block_sync();
        for (u32 i = thread_index(); i < n; i += BLOCK) {
            u32 key = key_of(work[i]);
            bool here = shift == 24 || key >> (shift + 8) == prefix >> (shift + 8);
            if (here && key >= floor) shared_add(&shared().bins[key >> shift & 0xffu], mass(work[i]));
        }
        block_sync();
        if (thread_index() == 0) {
            u32 bin = BINS;
            u64 sum = above;
            while (bin > 0 && sum < wanted) sum += shared().bins[--bin];
            bool reached = sum >= wanted && bin < BINS;
            shared().chosen = reached ? bin : BINS;
            shared().above = reached ? sum - shared().bins[bin] : sum;
        }
        block_sync();
        if (shared().chosen == BINS) return floor;
        prefix |= shared().chosen << shift;
        above = shared().above;
        if (shift == 0) return most(prefix, floor);
    }
}

// The first token, in order of the vocabulary, at which the sum of masses passes `target`; ~0 if none does.
template <class MassOf> FN u32 draw(u32 n, u64 target, MassOf mass_of) {
    u32 length = divide_up(n, BLOCK), first = thread_index() * length, last = least(first + length, n);
    u64 sum = 0;
    for (u32 i = first; i < last; ++i) sum += mass_of(i);
    block_sync();
    shared().sums[thread_index()] = sum;
    if (thread_index() == 0) shared().chosen = ~0u;
    block_sync();
    u64 before = 0;
    for (u32 i = 0; i < thread_index(); ++i) before += shared().sums[i];
    if (before <= target && target < before + sum) {
        for (u32 i = first; i < last; ++i) {
            before += mass_of(i);
            if (target < before) {
                shared().chosen = i;
                break;
            }
        }
    }
    block_sync();
    return shared().chosen;
}

// What a row may draw from: tokens whose logit's key is at least `floor`, with masses that sum to `total`.
struct Kept {
    const float *work;
    u32 floor;
    u64 total;
    Weight weight;
    FN float weight_of(u32 i) const { return key_of(work[i]) >= floor ? weight.of(work[i]) : 0.0f; }
    FN u64 mass_of(u32 i) const { return key_of(work[i]) >= floor ? weight(work[i]) : 0; }
};

// The block's row after penalties, mask and temperature, cut by min-p, top-k and top-p. A `total` of 0: nothing is
// allowed.
template <class T> FN Kept keep(const Logits &p) {
    const SampleRow row = p.rows[block_index()];
    const T *logits = static_cast<const T *>(p.logits) + block_index() * p.stride;
    float *work = p.work + static_cast<u64>(block_index()) * p.vocabulary;
    u32 n = p.vocabulary;
    // What is no number is not allowed either. Adding 0 makes one zero of the two.
    for (u32 i = thread_index(); i < n; i += BLOCK) {
        float x = widen(logits[i]);
        bool allowed = row.mask_row == ~0u || p.mask[static_cast<u64>(row.mask_row) * p.mask_words + i / 32] >> i % 32 & 1u;
        work[i] = allowed && x == x ? x + 0.0f : NEGATIVE_INFINITY;
    }
    block_sync();
    // A token is in the list once.
    for (u32 i = thread_index(); i < row.seen_count; i += BLOCK) {
        Seen seen = p.seen[row.seen_start + i];
        float x = work[seen.token];
        x = x > 0.0f ? divide(x, row.repetition) : x * row.repetition;
        if (seen.count > 0) x -= fused(row.frequency, static_cast<float>(seen.count), row.presence);
        work[seen.token] = x;
    }
    block_sync();
    float largest = NEGATIVE_INFINITY;
    for (u32 i = thread_index(); i < n; i += BLOCK) largest = most(largest, work[i]);
    largest = block_most(largest);
    if (largest == NEGATIVE_INFINITY) return Kept{work, ~0u, 0, Weight{0.0f, 0.0f}};

    bool greedy = row.temperature == 0.0f;
    Kept kept{work, 0, 0, Weight{largest, greedy ? 0.0f : divide(LOG2_E, row.temperature)}};
    // min-p bounds the probability, which falls with the temperature.
    kept.floor = greedy ? key_of(largest) : key_of(fused(row.min_p_log, row.temperature, largest));
    kept.floor = most(kept.floor, key_of(NEGATIVE_INFINITY) + 1);
    if (!greedy && row.top_k > 0 && row.top_k < n) kept.floor = select(work, n, kept.floor, row.top_k, One());
    auto sum = [&] {
        u64 total = 0;
        for (u32 i = thread_index(); i < n; i += BLOCK) total += kept.mass_of(i);
        return block_total(total);
    };
    kept.total = sum();
    if (!greedy && row.top_p != ~0ull) {
        kept.floor = select(work, n, kept.floor, multiply_high(kept.total, row.top_p) + 1, kept.weight);
        kept.total = sum();
    }
    return kept;
}

// The token at which a draw falls: the first of equals when the temperature is 0, ~0 when nothing is allowed.
FN u32 draw(const Kept &kept, u32 n, const SampleRow &row) {
    u64 target = row.temperature == 0.0f ? 0 : multiply_high(kept.total, row.random);
    return draw(n, target, [&](u32 i) { return kept.mass_of(i); });
}
