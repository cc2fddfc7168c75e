// The instructions of sm_90a that kernels use, by their names in the PTX ISA.
#pragma once

FN void barrier_init(u64 *barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Makes barriers known to the memory unit.
FN void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FN void barrier_arrive(u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the phase last until that many bytes have come.
FN void barrier_expect(u64 *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Waits for the end of the phase of this parity; the first is 0.
FN void barrier_wait(u64 *barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// Of all threads of the block or some of its warps: `threads` meet at barrier `id` of 1 to 15.
FN void group_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Comes to that barrier without waiting at it.
FN void group_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// What threads wrote to shared memory becomes known to the memory and matrix units.
FN void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A box of a tensor to shared memory; the barrier counts its bytes.
FN void tma_load(void *to, const TensorMap *map, u64 *barrier, i32 a, i32 b, i32 c, i32 d) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(a), "r"(b), "r"(c), "r"(d)
        : "memory");
}

// A box from shared memory to a tensor; what lies outside of that stays. Its bytes are read some time before the group of stores
// that it is in counts as read.
FN void tma_store(const TensorMap *map, const void *from, i32 a, i32 b, i32 c, i32 d) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
FN void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but the latest N groups of this thread are read.
template <u32 N> FN void stores_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
FN void store4(void *to, u32 x) { *static_cast<u32 *>(to) = x; }

// A warp group gives registers back, or takes more.
template <u32 N> FN void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <u32 N> FN void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// Where an operand of a product lies: its first byte, and the distances from one panel to the next and from eight
// rows to the next.
FN u64 descriptor(const void *first, u32 panel_bytes, u32 eight_rows_bytes) {
    return (shared_address(first) & 0x3ffffull) >> 4 | static_cast<u64>(panel_bytes >> 4) << 16 |
           static_cast<u64>(eight_rows_bytes >> 4) << 32 | 1ull << 62;
}

// What was computed into these registers is in them here, and what is computed from them comes later: the compiler knows of
// no fence, and would move it.
template <u32 N> FN void settle(float (&x)[N]) {
    UNROLL for (u32 i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <u32 N> FN void settle(u32 (&x)[N]) {
    UNROLL for (u32 i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
// Before the first product that uses registers which threads wrote.
FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 N> FN void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// d (+)= a · bᵀ: a 64x16 and b Nx16 in shared memory, rows along k. d is 64xN: warp w of the group has rows 16w to
// 16w + 15, in its lanes as `mma` of the prelude has them.
template <class T, u32 N> FN void wgmma(float *d, u64 a, u64 b, bool add);
// d += a · b: a 64x16 in registers, as `mma` takes it; b 16xN in shared memory, rows along n.
template <class T, u32 N> FN void wgmma_turned(float *d, const u32 *a, u64 b);

// The bytes of two registers, 0 to 7, that the four lowest digits of `which` name, the lowest first.
FN u32 bytes_of(u32 first, u32 second, u32 which) { return __byte_perm(first, second, which); }
// a · b + c of the two numbers in registers, rounded once.
template <class T> FN u32 fused_two(u32 a, u32 b, u32 c);
template <> FN u32 fused_two<bf16>(u32 a, u32 b, u32 c) {
    u32 two;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(two) : "r"(a), "r"(b), "r"(c));
    return two;
}
template <> FN u32 fused_two<f16>(u32 a, u32 b, u32 c) {
    u32 two;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(two) : "r"(a), "r"(b), "r"(c));
    return two;
}

// The registers of d by their numbers, and what they stand for.
#define D32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define D64 D32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D128 D64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
    "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, " \
    "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
    "%122, %123, %124, %125, %126, %127"
#define OF8(d, n)                                                                                              \
    "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]), "+f"(d[n + 6]), \
        "+f"(d[n + 7])
#define OF32(d) OF8(d, 0), OF8(d, 8), OF8(d, 16), OF8(d, 24)
#define OF64(d) OF32(d), OF8(d, 32), OF8(d, 40), OF8(d, 48), OF8(d, 56)
#define OF128(d) \
    OF64(d), OF8(d, 64), OF8(d, 72), OF8(d, 80), OF8(d, 88), OF8(d, 96), OF8(d, 104), OF8(d, 112), OF8(d, 120)
#define WGMMA(T, NAME)                                                                                             \
    template <> FN void wgmma<T, 128>(float *d, u64 a, u64 b, bool add) {                                          \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" D64 "}, %64, %65, add, 1, " \
                     "1, 0, 0;\n}"                                                                                 \
                     : OF64(d)                                                                                     \
                     : "l"(a), "l"(b), "r"(static_cast<u32>(add)));                                                \
    }                                                                                                              \
    template <> FN void wgmma<T, 256>(float *d, u64 a, u64 b, bool add) {                                          \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {" D128 "}, %128, %129, add, " \
                     "1, 1, 0, 0;\n}"                                                                              \
                     : OF128(d)                                                                                    \
                     : "l"(a), "l"(b), "r"(static_cast<u32>(add)));                                                \
    }                                                                                                              \
    template <> FN void wgmma_turned<T, 64>(float *d, const u32 *a, u64 b) {                                       \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" D32                          \
                     "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                   \
                     : OF32(d)                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                        \
    }                                                                                                              \
    template <> FN void wgmma_turned<T, 128>(float *d, const u32 *a, u64 b) {                                      \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" D64                         \
                     "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                   \
                     : OF64(d)                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                        \
    }
WGMMA(bf16, "bf16")
WGMMA(f16, "f16")
#undef WGMMA
#undef OF128
#undef OF64
#undef OF32
#undef OF8
#undef D128
#undef D64
#undef D32
