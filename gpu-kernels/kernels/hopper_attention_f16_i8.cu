// Attention of prompts on Hopper, f16, over a cache of whole numbers of one byte with scales.
#include "hopper_attention.cuh"

HOPPER_KERNELS(f16_i8, f16, i8)
