// Attention of prompts on Hopper, f16.
#include "hopper_attention.cuh"

HOPPER_KERNELS(f16, f16, f16)
