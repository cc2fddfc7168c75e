// Attention, f16, over a cache of E4M3 with scales.
#include "attention.cuh"

ATTENTION_KERNELS(f16_e4m3, f16, e4m3)
