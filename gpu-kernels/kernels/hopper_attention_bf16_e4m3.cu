// Attention of prompts on Hopper, bf16, over a cache of E4M3 with scales.
#include "hopper_attention.cuh"

HOPPER_KERNELS(bf16_e4m3, bf16, e4m3)
