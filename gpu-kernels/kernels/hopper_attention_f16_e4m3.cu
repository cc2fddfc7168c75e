// Attention of prompts on Hopper, f16, over a cache of E4M3 with scales.
#include "hopper_attention.cuh"

HOPPER_KERNELS(f16_e4m3, f16, e4m3)
