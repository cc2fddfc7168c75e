// Attention, bf16, over a cache of E4M3 with scales.
#include "attention.cuh"

ATTENTION_KERNELS(bf16_e4m3, bf16, e4m3)
