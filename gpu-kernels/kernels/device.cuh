// The instructions of sm_80 and later that kernels use, by their names in the PTX ISA.
#pragma once

#define FN __device__ __forceinline__
// From Hopper on a launch may begin while the one before it ends (programmatic dependent launch). So nothing is read or
// written before all that came earlier is done and seen; then the launch after this one may come and wait. The PTX for
// sm_80 and later has the same two instructions as comments, which `src/cuda/embedded.rs` opens for a GPU that has them.
#if __CUDA_ARCH__ >= 900
#define AFTER_EARLIER_LAUNCHES "griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;"
#else
#define AFTER_EARLIER_LAUNCHES "/*griddepcontrol.wait;*/\n\t/*griddepcontrol.launch_dependents;*/"
#endif

// A kernel of at most `threads` threads a block; its argument is `p`.
#define KERNEL(name, Params, threads)                                                                   \
    FN void name##_body(const Params &p);                                                               \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Params p) {   \
        asm volatile(AFTER_EARLIER_LAUNCHES ::: "memory");                                              \
        name##_body(p);                                                                                 \
    }                                                                                                   \
    FN void name##_body(const Params &p)

// Before a loop whose indices must be known to the compiler, and before one that is not worth the registers.
#define UNROLL _Pragma("unroll")
#define ROLL _Pragma("unroll 1")

extern __shared__ __align__(1024) u8 shared_bytes[];

FN u32 thread_index() { return threadIdx.x; }
FN u32 thread_count() { return blockDim.x; }
FN u32 block_index() { return blockIdx.x; }
FN u32 block_count() { return gridDim.x; }
FN void block_sync() { __syncthreads(); }
FN void warp_sync() { __syncwarp(); }
FN u8 *shared_memory() { return shared_bytes; }

// The same number, of which the compiler does not know that it is: what is computed from it stays where it is.
FN u32 opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

FN float as_float(u32 bits) { return __uint_as_float(bits); }
FN u32 as_bits(float x) { return __float_as_uint(x); }
FN float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FN float square_root(float x) { return __fsqrt_rn(x); }
FN float divide(float a, float b) { return __fdiv_rn(a, b); }
FN float round_even(float x) { return rintf(x); }
FN float log_2(float x) { return log2f(x); }
FN float erfc_of(float x) { return erfcf(x); }
// Within 1 unit in the last place.
FN float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Within 2 units in the last place; 0 for minus infinity, subnormal results are 0.
FN float exp_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FN float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
// Two numbers in a register, the first in the low half; to nearest, ties to even.
template <class T> FN u32 pack(float first, float second);
template <> FN u32 pack<bf16>(float first, float second) {
    u32 two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
}
template <> FN u32 pack<f16>(float first, float second) {
    u32 two;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
}

FN float shuffle_xor(float x, u32 lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
FN u32 shuffle_xor(u32 x, u32 lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// Adds to a number in shared memory, whoever else does.
FN void shared_add(u64 *to, u64 x) { atomicAdd(to, x); }
FN u64 multiply_high(u64 a, u64 b) { return __umul64hi(a, b); }

FN void load16(u32 *to, const void *from) {
    uint4 x = *static_cast<const uint4 *>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
FN void store16(void *to, const u32 *from) {
    *static_cast<uint4 *>(to) = make_uint4(from[0], from[1], from[2], from[3]);
}

FN u32 shared_address(const void *p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, of which the first `bytes` are read and the others become zero.
FN void cp_async(void *to, const void *from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the latest N groups of this thread are on their way.
template <u32 N> FN void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit numbers. Lanes 8i..8i+7 give the addresses of the rows of matrix i; lane l gets of each
// matrix row l / 4, columns 2 (l mod 4) and the next.
FN void ldmatrix(u32 *to, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same, turned: column l / 4, rows 2 (l mod 4) and the next.
FN void ldmatrix_trans(u32 *to, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a · b: a 16x16, b 16x8, c 16x8. Lane l holds, with g = l / 4 and t = 2 (l mod 4): of a, rows g and g + 8 at
// columns t, then both at t + 8; of b, rows t and t + 8 of column g; of c, rows g and g + 8 at columns t and t + 1.
template <class T> FN void mma(float *c, const u32 *a, u32 b0, u32 b1);
template <> FN void mma<bf16>(float *c, const u32 *a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> FN void mma<f16>(float *c, const u32 *a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
