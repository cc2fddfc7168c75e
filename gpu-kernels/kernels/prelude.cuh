// What every kernel stands on. Kernels include this file and nothing else: no header of a toolkit or of a library.
//
// The same source is compiled twice. For a GPU by NVRTC, where `device.cuh` wraps instructions. For tests by any
// C++17 compiler, where `emulator/emulator.hpp` acts out what the instructions do, lane by lane. A kernel uses
// only what both files offer, and has one argument, a struct; so it runs on a GPU and in a test without a changed
// letter.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

// Stored numbers. Arithmetic is f32; tensor cores multiply what is stored.
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};
// 1 sign, 4 exponent, 3 fraction bits, bias 7; no infinity, largest 448 (OCP 8-bit floating point, E4M3).
struct e4m3 {
    u8 bits;
};
// A whole number of -127..127.
struct i8 {
    u8 bits;
};

#ifdef __CUDACC_RTC__
#include "device.cuh"
#else
#include "emulator/emulator.hpp"
#endif

constexpr u32 WARP = 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
#define NEGATIVE_INFINITY as_float(0xff800000u)

template <class A> FN A least(A a, A b) { return a < b ? a : b; }
template <class A> FN A most(A a, A b) { return a < b ? b : a; }
FN constexpr u32 round_up(u32 n, u32 multiple) { return (n + multiple - 1) / multiple * multiple; }
FN constexpr u32 divide_up(u32 n, u32 by) { return (n + by - 1) / by; }

// Within 3e-7.
FN float tanh_of(float x) { return fused(-2.0f, reciprocal(1.0f + exp_2(x * (2.0f * LOG2_E))), 1.0f); }

FN float widen(float x) { return x; }
FN float widen(bf16 x) { return as_float(static_cast<u32>(x.bits) << 16); }
// The bits of E4M3 in the place of an f32's are the number times 2^-120; subnormals come out right.
FN float widen(e4m3 x) {
    u32 bits = static_cast<u32>(x.bits & 0x80u) << 24 | static_cast<u32>(x.bits & 0x7fu) << 20;
    return as_float(bits) * as_float((127u + 120u) << 23);
}

FN float widen(i8 x) { return static_cast<float>(static_cast<signed char>(x.bits)); }

template <class T> FN T narrow(float x);
template <> FN float narrow<float>(float x) { return x; }
template <> FN bf16 narrow<bf16>(float x) { return bf16{static_cast<u16>(pack<bf16>(x, 0.0f))}; }
template <> FN f16 narrow<f16>(float x) { return f16{static_cast<u16>(pack<f16>(x, 0.0f))}; }
// To nearest, ties to even, clamped to 448. What is no number becomes E4M3's.
template <> FN e4m3 narrow<e4m3>(float x) {
    u32 bits = as_bits(x), sign = bits >> 24 & 0x80u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return e4m3{static_cast<u8>(sign | 0x7fu)};
    float size = least(as_float(bits), 448.0f);
    // The spacing of numbers around `size` is 2^-3 of its power of two, and 2^-9 below 2^-6.
    u32 exponent = most(as_bits(size) >> 23, 121u);
    float rounded = round_even(size * as_float((254u + 3u - exponent) << 23));
    u32 steps = static_cast<u32>(rounded);
    return e4m3{static_cast<u8>(sign | ((exponent - 121u) * 8 + steps))};
}

// To nearest, ties to even, clamped to 127. What is no number becomes 0.
template <> FN i8 narrow<i8>(float x) {
    float size = x != x ? 0.0f : least(most(x, -127.0f), 127.0f);
    return i8{static_cast<u8>(static_cast<i32>(round_even(size)))};
}

// The largest number of a type of one byte: what scales are made for.
template <class C> FN constexpr float largest();
template <> FN constexpr float largest<e4m3>() { return 448.0f; }
template <> FN constexpr float largest<i8>() { return 127.0f; }
template <> FN constexpr float largest<bf16>() { return 1.0f; }
template <> FN constexpr float largest<f16>() { return 1.0f; }

// The two numbers that a register of two holds.
template <class T> FN float low(u32 two) { return widen(T{static_cast<u16>(two & 0xffffu)}); }
template <class T> FN float high(u32 two) { return widen(T{static_cast<u16>(two >> 16)}); }

// Sums and largest of a value over lanes that differ in the low bits: WIDTH is 2, 4, 8, 16 or 32. All lanes get the
// same bits, because every step adds the same two numbers.
template <u32 WIDTH = WARP> FN float warp_sum(float x) {
    for (u32 step = WIDTH / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
    return x;
}
template <u32 WIDTH = WARP> FN float warp_most(float x) {
    for (u32 step = WIDTH / 2; step > 0; step /= 2) x = most(x, shuffle_xor(x, step));
    return x;
}

// Eight stored numbers of two bytes, moved at once.
template <class T> struct Eight {
    u32 two[4];
    FN float operator[](u32 i) const { return i % 2 ? high<T>(two[i / 2]) : low<T>(two[i / 2]); }
};
template <class T> FN Eight<T> load_eight(const T *from) {
    Eight<T> x;
    load16(x.two, from);
    return x;
}
template <class T> FN void store_eight(T *to, const float *x) {
    u32 two[4];
    for (u32 i = 0; i < 4; ++i) two[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    store16(to, two);
}

// 16-byte pieces of a tile's rows lie rotated in shared memory, so that eight rows of the same column are in
// different banks, as `ldmatrix` reads them. A row is at least 128 bytes.
FN u32 swizzle(u32 row, u32 piece) { return piece ^ (row & 7u); }
