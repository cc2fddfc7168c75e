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

// What `widen_four` makes of 1: so f16 has room for all numbers of one byte times their scales.
template <class C> FN constexpr float unit();
template <> FN constexpr float unit<e4m3>() { return 1.0f / 256; }
template <> FN constexpr float unit<i8>() { return 1.0f / 128; }
template <> FN constexpr float unit<bf16>() { return 1.0f; }
template <> FN constexpr float unit<f16>() { return 1.0f; }

#ifdef __CUDACC_RTC__
#include "hopper_device.cuh"
#else
#include "emulator/hopper.hpp"
#endif
