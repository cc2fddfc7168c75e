// What Hopper has beyond the prelude: barriers in shared memory that count bytes, copies of tiles by the memory
// unit (TMA), and products of warp groups (wgmma). As with the prelude, a test's compiler gets the same from the
// emulator.
#pragma once
#include "prelude.cuh"

// How a tensor of four dimensions lies in memory, as the driver encodes it. CUDA 13 wants it at a multiple of 128, before that
// 64 was enough.
struct alignas(128) TensorMap {
    u8 bytes[128];
};

constexpr u32 WARP_GROUP = 128;
// Tiles lie in panels of 128 bytes a row, whose 16-byte pieces are permuted over eight rows.
constexpr u32 PANEL_ROW = 128;

#ifdef __CUDACC_RTC__
#include "hopper_device.cuh"
#else
#include "emulator/hopper.hpp"
#endif
