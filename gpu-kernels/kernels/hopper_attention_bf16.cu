// Attention of prompts on Hopper, bf16.
#include "hopper_attention.cuh"

HOPPER_KERNEL(hopper_attention_64_bf16, bf16, 64)
HOPPER_KERNEL(hopper_attention_128_bf16, bf16, 128)
