// The state of an online softmax (arXiv 1805.02867) in base 2, and how two of them become one.
#pragma once
#include "prelude.cuh"

// Of a set of scores s: the largest, and the sum of 2^(s - most). The values weighted by 2^(s - most) go with it.
struct Softmax {
    float most, sum;
};

constexpr u32 CHUNK = 256;

FN Softmax softmax_of_nothing() { return Softmax{NEGATIVE_INFINITY, 0.0f}; }

// What 2^(s - most) is taken of: a set that saw nothing gives zeros, not what is no number.
FN float softmax_base(float most) { return most == NEGATIVE_INFINITY ? 0.0f : most; }

// Adds `part` to `total`; the values of the two become total · keep + part · add.
FN void softmax_merge(Softmax &total, Softmax part, float &keep, float &add) {
    float larger = most(total.most, part.most), base = softmax_base(larger);
    keep = exp_2(total.most - base);
    add = exp_2(part.most - base);
    total = Softmax{larger, fused(part.sum, add, total.sum * keep)};
}

// The factor that turns weighted values into an average, and the natural logarithm of the sum of exponentials. An
// attention sink (a learned score per head that weighs nothing) is in the denominator and in the logarithm.
FN float softmax_finish(Softmax total, const float *sink, float &lse) {
    float factor = 1.0f;
    if (sink) {
        float score = *sink * LOG2_E, larger = most(total.most, score), base = softmax_base(larger);
        factor = exp_2(total.most - base);
        total = Softmax{larger, fused(total.sum, factor, exp_2(score - base))};
    }
    bool seen = total.sum > 0.0f;
    lse = seen ? (total.most + log_2(total.sum)) * LN_2 : NEGATIVE_INFINITY;
    return seen ? divide(factor, total.sum) : 0.0f;
}
