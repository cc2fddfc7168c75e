// Attention of prompts on Hopper, f16.
#include "hopper_attention.cuh"

HOPPER_KERNEL(hopper_attention_64_f16, f16, 64)
HOPPER_KERNEL(hopper_attention_128_f16, f16, 128)
