// Attention of prompts on Hopper, bf16.
#include "hopper_attention.cuh"

HOPPER_KERNELS(bf16, bf16, bf16)
