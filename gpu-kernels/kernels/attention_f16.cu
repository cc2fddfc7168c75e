// Attention, f16, over a cache of the same type.
#include "attention.cuh"

ATTENTION_KERNELS(f16, f16, f16)
