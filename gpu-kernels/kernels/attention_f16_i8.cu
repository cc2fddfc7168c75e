// Attention, f16, over a cache of eight-bit whole numbers with a scale for each head of each token.
#include "attention.cuh"

ATTENTION_KERNELS(f16_i8, f16, i8)
