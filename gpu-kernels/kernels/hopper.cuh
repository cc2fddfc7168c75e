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

// What `widen_four` makes of 1: so f16 has room for all numbers of one byte times their scales.
template <class C> FN constexpr float unit() { return 1.0f; }
template <> FN constexpr float unit<e4m3>() { return 1.0f / 256; }
template <> FN constexpr float unit<i8>() { return 1.0f / 128; }

// Four stored numbers of one byte, in order, as two registers of two: exact, but times `unit`.
template <class T, class C> FN void widen_four(u32 four, u32 *two);

// Two of them in the upper bytes of halves: bytes 0 and 1, or 2 and 3.
FN u32 upper_bytes(u32 four, u32 i) { return bytes_of(four, 0, i == 0 ? 0x1404 : 0x3424); }

// The bits of E4M3 in the place of an f16's are the number times 2^-8.
template <> FN void widen_four<f16, e4m3>(u32 four, u32 *two) {
    for (u32 i = 0; i < 2; ++i) {
        u32 upper = upper_bytes(four, i);
        two[i] = (upper & 0x80008000u) | (upper >> 1 & 0x3f803f80u);
    }
}
// In that of a bf16's it is the number times 2^-120; times 2^112, plus -0.
template <> FN void widen_four<bf16, e4m3>(u32 four, u32 *two) {
    for (u32 i = 0; i < 2; ++i) {
        u32 upper = upper_bytes(four, i), bits = (upper & 0x80008000u) | (upper >> 4 & 0x07f007f0u);
        two[i] = fused_two<bf16>(bits, 0x77807780u, 0x80008000u);
    }
}
// A whole number plus 128 in the lowest bits of 1024; times 2^-7, minus 9.
template <> FN void widen_four<f16, i8>(u32 four, u32 *two) {
    for (u32 i = 0; i < 2; ++i) {
        u32 above = bytes_of(four ^ 0x80808080u, 0x64646464u, i == 0 ? 0x4140 : 0x4342);
        two[i] = fused_two<f16>(above, 0x20002000u, 0xc880c880u);
    }
}
// In those of 2^23; times 2^-7, minus 2^16 and 1.
template <> FN void widen_four<bf16, i8>(u32 four, u32 *two) {
    float x[4];
    for (u32 i = 0; i < 4; ++i)
        x[i] = fused(as_float(bytes_of(four ^ 0x80808080u, 0x4b000000u, 0x7440 + i)), 1.0f / 128, -65537.0f);
    for (u32 i = 0; i < 2; ++i) two[i] = pack<bf16>(x[2 * i], x[2 * i + 1]);
}
