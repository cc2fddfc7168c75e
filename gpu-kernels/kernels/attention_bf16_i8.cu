// Attention, bf16, over a cache of eight-bit whole numbers with a scale for each head of each token.
#include "attention.cuh"

ATTENTION_KERNELS(bf16_i8, bf16, i8)
