// The next token of each row of logits: penalties, mask, temperature, min-p, top-k, top-p, and a draw.
//
// Nothing is sorted. Which tokens stay is a threshold on the logit: the k-th largest, the one at which the
// mass reaches p, and the largest plus ln(min_p), found by radix selection (eight bits a round). Masses are whole
// numbers of 2^-40, so sums do not depend on their order, and a row's token on nothing but its logits and its random number.
// Equal logits stay or go together.
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

struct Sampled {
    // ~0: every token was masked.
    u32 token;
    // Natural logarithm of its probability by the logits as they came.
    float logprob;
};

struct Sample {
    const void *logits;
    // [rows][vocabulary], for this kernel to use.
    float *work;
    const SampleRow *rows;
    const Seen *seen;
    // Bits of the tokens allowed, [mask rows][mask_words], lowest bit first.
    const u32 *mask;
    Sampled *out;
    u64 stride;
    u32 count, vocabulary, mask_words, unused;
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

// e^((x - most) / temperature) in units of 2^-40.
struct Weight {
    float largest, factor;
    FN u64 operator()(float x) const { return static_cast<u64>(exp_2((x - largest) * factor) * 0x1p40f); }
};
struct One {
    FN u64 operator()(float) const { return 1; }
};

// The largest key t, at least `floor`, for which the masses of keys from t on reach `wanted`; `floor` if they never do.
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

// The first token, in order of the vocabulary, at which the sum of weights passes `target`.
FN u32 draw(const float *work, u32 n, u32 floor, u64 target, Weight weight) {
    u32 length = divide_up(n, BLOCK), first = thread_index() * length, last = least(first + length, n);
    u64 sum = 0;
    for (u32 i = first; i < last; ++i)
        if (key_of(work[i]) >= floor) sum += weight(work[i]);
    block_sync();
    shared().sums[thread_index()] = sum;
    if (thread_index() == 0) shared().chosen = ~0u;
    block_sync();
    u64 before = 0;
    for (u32 i = 0; i < thread_index(); ++i) before += shared().sums[i];
    if (before <= target && target < before + sum) {
        for (u32 i = first; i < last; ++i) {
            if (key_of(work[i]) < floor) continue;
            before += weight(work[i]);
            if (target < before) {
                shared().chosen = i;
                break;
            }
        }
    }
    block_sync();
    return shared().chosen;
}

template <class T> FN void sample(const Sample &p) {
    const SampleRow row = p.rows[block_index()];
    const T *logits = static_cast<const T *>(p.logits) + block_index() * p.stride;
    float *work = p.work + static_cast<u64>(block_index()) * p.vocabulary;
    u32 n = p.vocabulary;

    // Logits as they came, and those that are allowed. What is no number is not allowed either.
    float raw_most = NEGATIVE_INFINITY;
    for (u32 i = thread_index(); i < n; i += BLOCK) {
        float x = widen(logits[i]);
        if (x != x) x = NEGATIVE_INFINITY;
        raw_most = most(raw_most, x);
        bool allowed = row.mask_row == ~0u || p.mask[static_cast<u64>(row.mask_row) * p.mask_words + i / 32] >> i % 32 & 1u;
        work[i] = allowed ? x : NEGATIVE_INFINITY;
    }
    raw_most = block_most(raw_most);
    u64 raw_sum = 0;
    Weight raw{raw_most, LOG2_E};
    for (u32 i = thread_index(); i < n && raw_most > NEGATIVE_INFINITY; i += BLOCK) {
        float x = widen(logits[i]);
        raw_sum += x != x ? 0 : raw(x);
    }
    raw_sum = block_total(raw_sum);

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

    u32 token = ~0u;
    if (largest > NEGATIVE_INFINITY) {
        bool greedy = row.temperature == 0.0f;
        Weight weight{largest, greedy ? 0.0f : divide(LOG2_E, row.temperature)};
        // min-p bounds the probability, which falls with the temperature.
        u32 floor = greedy ? key_of(largest) : key_of(fused(row.min_p_log, row.temperature, largest));
        floor = most(floor, key_of(NEGATIVE_INFINITY) + 1);
        if (!greedy && row.top_k > 0 && row.top_k < n) floor = select(work, n, floor, row.top_k, One());
        u64 total = 0;
        for (u32 i = thread_index(); i < n; i += BLOCK)
            if (key_of(work[i]) >= floor) total += weight(work[i]);
        total = block_total(total);
        if (!greedy && row.top_p != ~0ull) {
            floor = select(work, n, floor, multiply_high(total, row.top_p) + 1, weight);
            total = 0;
            for (u32 i = thread_index(); i < n; i += BLOCK)
                if (key_of(work[i]) >= floor) total += weight(work[i]);
            total = block_total(total);
        }
        // The first of equals when greedy.
        token = draw(work, n, floor, greedy ? 0 : multiply_high(total, row.random), weight);
    }
    if (thread_index() == 0) {
        float logprob = NEGATIVE_INFINITY;
        if (token != ~0u) {
            float sum = static_cast<float>(raw_sum) * 0x1p-40f;
            logprob = widen(logits[token]) - raw_most - log_2(sum) * LN_2;
        }
        p.out[block_index()] = Sampled{token, logprob};
    }
}

KERNEL(sample_bf16, Sample, BLOCK) { sample<bf16>(p); }
KERNEL(sample_f16, Sample, BLOCK) { sample<f16>(p); }
