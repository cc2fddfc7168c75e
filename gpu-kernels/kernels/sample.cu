// The next token of each row of logits, and its logprob; or the whole distribution that it would be drawn from.
#include "sampling.cuh"

struct Sampled {
    // ~0: every token was masked.
    u32 token;
    // Natural logarithm of its probability by the logits as they came.
    float logprob;
};

struct Sample {
    Logits logits;
    Sampled *out;
};

template <class T> FN void sample(const Sample &p) {
    u32 n = p.logits.vocabulary;
    const T *logits = static_cast<const T *>(p.logits.logits) + block_index() * p.logits.stride;
    float largest = NEGATIVE_INFINITY;
    for (u32 i = thread_index(); i < n; i += BLOCK) largest = most(largest, widen(logits[i]));
    largest = block_most(largest);
    u64 sum = 0;
    Weight weight{largest, LOG2_E};
    for (u32 i = thread_index(); i < n && largest > NEGATIVE_INFINITY; i += BLOCK) {
        float x = widen(logits[i]);
        sum += x != x ? 0 : weight(x);
    }
    sum = block_total(sum);

    Kept kept = keep<T>(p.logits);
    u32 token = draw(kept, n, p.logits.rows[block_index()]);
    if (thread_index() == 0) {
        float logprob = NEGATIVE_INFINITY;
        if (token != ~0u) logprob = widen(logits[token]) - largest - log_2(static_cast<float>(sum) * 0x1p-40f) * LN_2;
        p.out[block_index()] = Sampled{token, logprob};
    }
}

KERNEL(sample_bf16, Sample, BLOCK) { sample<bf16>(p); }
KERNEL(sample_f16, Sample, BLOCK) { sample<f16>(p); }

struct Distributions {
    Logits logits;
    // [rows][vocabulary]: a token's weight, of which the row's largest is 1; and the sum of a row's masses.
    float *weights;
    u64 *totals;
};

// At temperature 0 the first of the largest has all.
template <class T> FN void distributions(const Distributions &p) {
    u32 n = p.logits.vocabulary;
    const SampleRow row = p.logits.rows[block_index()];
    float *weights = p.weights + static_cast<u64>(block_index()) * n;
    Kept kept = keep<T>(p.logits);
    bool greedy = row.temperature == 0.0f;
    u32 first = greedy ? draw(kept, n, row) : ~0u;
    for (u32 i = thread_index(); i < n; i += BLOCK) weights[i] = greedy ? (i == first ? 1.0f : 0.0f) : kept.weight_of(i);
    if (thread_index() == 0) p.totals[block_index()] = greedy && first != ~0u ? mass(1.0f) : kept.total;
}

KERNEL(distributions_bf16, Distributions, BLOCK) { distributions<bf16>(p); }
KERNEL(distributions_f16, Distributions, BLOCK) { distributions<f16>(p); }
