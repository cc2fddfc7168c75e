// Attention, bf16, over a cache of the same type.
#include "attention.cuh"

ATTENTION_KERNELS(bf16, bf16, bf16)
