// Latent attention, bf16, over a cache of the same type and of E4M3.
#include "attention.cuh"

LATENT_KERNELS(bf16, bf16, bf16)
LATENT_KERNELS(bf16_e4m3, bf16, e4m3)
