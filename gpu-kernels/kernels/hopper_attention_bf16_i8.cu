// Attention of prompts on Hopper, bf16, over a cache of whole numbers of one byte with scales.
#include "hopper_attention.cuh"

HOPPER_KERNELS(bf16_i8, bf16, i8)
