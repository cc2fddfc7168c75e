// Latent attention, f16, over a cache of the same type and of E4M3.
#include "attention.cuh"

LATENT_KERNELS(f16, f16, f16)
LATENT_KERNELS(f16_e4m3, f16, e4m3)
