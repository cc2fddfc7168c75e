// Acts out a grid of thread blocks on an ordinary machine, so that kernels run where there is no GPU.
//
// Every thread of a block is a fibre of one operating-system thread. A fibre runs until it meets an operation that
// several lanes do together: a barrier, a shuffle, a matrix instruction. There it waits until all have come. Blocks run one
// after the other. The order of fibres and blocks is ascending or descending, as the launch says: a kernel
// that lacks a barrier reads in one of the two orders what is not yet there.
//
// What is there before it is written is no number: shared memory starts as 0xff bytes, and so does the target of an
// asynchronous copy from the moment it is asked for until it has been waited for.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>

#define FN inline
#define UNROLL
#define ROLL
// The kernel, and beside it `run_<name>`, which acts out a launch and writes what went wrong into `complaint`.
#define KERNEL(name, Params, threads)                                                                           \
    static void name(const Params &p);                                                                          \
    extern "C" int run_##name(const void *params, size_t params_bytes, const emulator::Launch *launch) {        \
        static_assert(threads % 32 == 0 && threads <= 1024, "whole warps");                                     \
        if (params_bytes != sizeof(Params)) {                                                                   \
            snprintf(launch->complaint, launch->complaint_bytes, "its argument has %zu bytes, expected %zu",    \
                     params_bytes, sizeof(Params));                                                             \
            return 1;                                                                                           \
        }                                                                                                       \
        return emulator::run([](const void *p) { name(*static_cast<const Params *>(p)); }, params, threads,     \
                             *launch);                                                                          \
    }                                                                                                           \
    static void name(const Params &p)

namespace emulator {

struct Launch {
    u32 blocks, threads, shared_bytes, descending;
    char *complaint;
    size_t complaint_bytes;
    // Counted over the launch: 16-byte pieces of `ldmatrix` that had to wait for a bank.
    u64 *bank_conflicts;
};

// What a lane brings to an operation of its warp, or takes from it.
struct Lane {
    u32 word;
    const void *row;
    u32 a[4], b[2];
    float c[4];
};

struct Warp {
    u32 arrived = 0, turn = 0;
    // Two sets: a lane may bring its next operands before all have taken the last results.
    Lane lanes[2][32];
};

struct Copy {
    void *to;
    const void *from;
    u32 bytes, group;
};

struct Fibre {
    ucontext_t start;
    jmp_buf here;
    bool started = false;
    std::unique_ptr<char[]> stack;
    // Asked for and not yet waited for, and the group that is open.
    std::vector<Copy> copies;
    u32 group = 0;
};

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t GUARD_BYTES = 1024;

struct Block {
    std::vector<Fibre *> fibres;
    std::vector<Warp> warps;
    // Of each warp, the lanes that can run.
    std::vector<u32> ready;
    std::vector<u8> shared;
    u8 *shared_start = nullptr;
    // Of each 16 bytes of it, one more than the thread that stored them last and has not told the units beside the threads.
    std::vector<u16> unfenced;
    Launch launch{};
    u32 index = 0, self = 0, at_block = 0, done = 0;
    jmp_buf scheduler;
    void (*body)(const void *) = nullptr;
    const void *params = nullptr;
};

inline thread_local Block *now = nullptr;
// They outlive a launch that went well: where its block ended, the next one begins.
inline thread_local std::vector<std::unique_ptr<Fibre>> kept;

inline Fibre &fibre() { return *now->fibres[now->self]; }

// Ends the launch.
[[noreturn]] inline void complain(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    char what[256];
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    snprintf(now->launch.complaint, now->launch.complaint_bytes, "block %u, thread %u: %s", now->index, now->self,
             what);
    _longjmp(now->scheduler, 2);
}

[[noreturn]] inline void resume(u32 next) {
    now->self = next;
    if (fibre().started) _longjmp(fibre().here, 1);
    fibre().started = true;
    setcontext(&fibre().start);
    __builtin_unreachable();
}

// Goes on with the next fibre that can run.
__attribute__((noinline)) inline void yield() {
    Block &block = *now;
    u32 warps = static_cast<u32>(block.warps.size()), warp = block.self / 32, lane = block.self % 32;
    bool descending = block.launch.descending;
    // The other lanes of this warp that follow, the other warps, and the first lanes of this one.
    u32 lanes = block.ready[warp] & (descending ? (1u << lane) - 1 : ~0u << lane << 1);
    for (u32 step = 0; lanes == 0 && step < warps; ++step) {
        warp = descending ? (warp + warps - 1) % warps : (warp + 1) % warps;
        lanes = block.ready[warp];
    }
    if (lanes == 0)
        complain("waits for lanes that never come (%u of %u threads are at the barrier, %u have ended)",
                 block.at_block, block.launch.threads, block.done);
    u32 next = warp * 32 + static_cast<u32>(descending ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes));
    if (next != block.self && _setjmp(fibre().here) == 0) resume(next);
}

// This fibre is not to run until others say so.
inline void rest() {
    now->ready[now->self / 32] &= ~(1u << now->self % 32);
    yield();
}

inline void fibre_main() {
    for (;;) {
        now->body(now->params);
        if (++now->done < now->launch.threads) rest();
        else if (_setjmp(fibre().here) == 0) _longjmp(now->scheduler, 1);
    }
}

// Lanes of a warp meet. The last to come runs `together`.
template <class F> inline void meet(F together) {
    u32 id = now->self / 32;
    Warp &warp = now->warps[id];
    if (++warp.arrived == 32) {
        together(warp.lanes[warp.turn % 2]);
        warp.arrived = 0;
        warp.turn += 1;
        now->ready[id] = ~0u;
    } else {
        rest();
    }
}

// Where this lane puts its operands, and where it finds results after `meet`.
inline Lane &mine() { return now->warps[now->self / 32].lanes[now->warps[now->self / 32].turn % 2][now->self % 32]; }
inline const Lane *all(u32 turn) { return now->warps[now->self / 32].lanes[turn % 2]; }
inline u32 turn() { return now->warps[now->self / 32].turn; }

inline u8 *shared_memory() { return now->shared_start; }

inline void check_shared(const void *p, size_t bytes, const char *what) {
    const u8 *at = static_cast<const u8 *>(p), *start = now->shared_start;
    if (at < start || at + bytes > start + now->launch.shared_bytes)
        complain("%s outside of shared memory, at %td of %u bytes", what, at - start, now->launch.shared_bytes);
    if ((at - start) % 16 != 0) complain("%s at shared byte %td, no multiple of 16", what, at - start);
}

inline bool in_shared(const void *p) {
    const u8 *at = static_cast<const u8 *>(p), *start = now->shared_start;
    return at >= start && at < start + now->launch.shared_bytes;
}

inline u16 *unfenced_at(const void *p) {
    return now->unfenced.data() + (static_cast<const u8 *>(p) - now->shared_start) / 16;
}

inline void check_aligned(const void *p, const char *what) {
    if (reinterpret_cast<u64>(p) % 16 != 0) complain("%s at %p, no multiple of 16", what, p);
}

// One block after the other; 0 when all went well.
inline int run(void (*body)(const void *), const void *params, u32 threads_max, const Launch &launch) {
    Block block;
    now = &block;
    block.launch = launch;
    block.body = body;
    block.params = params;
    if (launch.threads > threads_max || launch.threads == 0 || launch.threads % 32 != 0) {
        snprintf(launch.complaint, launch.complaint_bytes, "%u threads, at most %u and whole warps are allowed",
                 launch.threads, threads_max);
        return 1;
    }
    block.warps.resize(launch.threads / 32);
    block.shared.resize(launch.shared_bytes + 2 * GUARD_BYTES);
    block.shared_start = block.shared.data() + GUARD_BYTES / 2;
    block.shared_start += (1024 - reinterpret_cast<u64>(block.shared_start) % 1024) % 1024;
    while (kept.size() < launch.threads) {
        Fibre &fibre = *kept.emplace_back(new Fibre);
        fibre.stack.reset(new char[STACK_BYTES]);
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = fibre.stack.get();
        fibre.start.uc_stack.ss_size = STACK_BYTES;
        fibre.start.uc_link = nullptr;
        makecontext(&fibre.start, fibre_main, 0);
    }
    for (u32 i = 0; i < launch.threads; ++i) block.fibres.push_back(kept[i].get());
    for (volatile u32 count = 0; count < launch.blocks; count = count + 1) {
        block.index = launch.descending ? launch.blocks - 1 - count : count;
        std::fill(block.shared.begin(), block.shared.end(), u8(0xff));
        block.unfenced.assign(launch.shared_bytes / 16 + 1, 0);
        block.ready.assign(block.warps.size(), ~0u);
        for (Fibre *fibre : block.fibres) fibre->copies.clear(), fibre->group = 0;
        block.done = block.at_block = 0;
        int how = _setjmp(block.scheduler);
        if (how == 0) resume(launch.descending ? launch.threads - 1 : 0);
        if (how == 2) {
            kept.clear();
            return 1;
        }
        const u8 *end = block.shared_start + launch.shared_bytes;
        const u8 *last = block.shared.data() + block.shared.size();
        if (std::any_of(end, last, [](u8 byte) { return byte != 0xff; })) {
            snprintf(launch.complaint, launch.complaint_bytes, "block %u wrote past its %u bytes of shared memory",
                     block.index, launch.shared_bytes);
            return 1;
        }
    }
    return 0;
}

}  // namespace emulator

FN u32 thread_index() { return emulator::now->self; }
FN u32 thread_count() { return emulator::now->launch.threads; }
FN u32 block_index() { return emulator::now->index; }
FN u32 block_count() { return emulator::now->launch.blocks; }
using emulator::shared_memory;

FN void warp_sync() {
    emulator::meet([](emulator::Lane *) {});
}

FN void block_sync() {
    emulator::Block &block = *emulator::now;
    if (++block.at_block == block.launch.threads) {
        block.at_block = 0;
        std::fill(block.ready.begin(), block.ready.end(), ~0u);
    } else {
        emulator::rest();
    }
}

FN u32 opaque(u32 x) { return x; }

FN float as_float(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
FN u32 as_bits(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
FN float fused(float a, float b, float c) { return std::fma(a, b, c); }
FN float square_root(float x) { return std::sqrt(x); }
FN float divide(float a, float b) { return a / b; }
FN float round_even(float x) { return std::nearbyint(x); }
FN float log_2(float x) { return std::log2(x); }
FN float erfc_of(float x) { return std::erfc(x); }
FN float reciprocal(float x) { return 1.0f / x; }
FN float exp_2(float x) {
    float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

FN float widen(f16 x) {
    u32 size = x.bits & 0x7fffu, sign = static_cast<u32>(x.bits & 0x8000u) << 16;
    if (size >= 0x7c00u) return as_float(sign | 0x7f800000u | (size & 0x3ffu) << 13);
    return as_float(sign | as_bits(as_float(size << 13) * 0x1p112f));
}

namespace emulator {

inline u16 narrow_bf16(float x) {
    u32 bits = as_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline u16 narrow_f16(float x) {
    u32 bits = as_bits(x), sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7fffu;
    if (bits >= 0x477ff000u) return static_cast<u16>(sign | 0x7c00u);
    // The spacing around x is 2^-10 of its power of two, and 2^-24 below 2^-14.
    u32 exponent = std::max(bits >> 23, 113u);
    u32 steps = static_cast<u32>(std::nearbyint(as_float(bits) * as_float((254u + 10u - exponent) << 23)));
    return static_cast<u16>(sign | ((exponent - 113u) * 1024u + steps));
}

}  // namespace emulator

template <class T> FN u32 pack(float first, float second);
template <> FN u32 pack<bf16>(float first, float second) {
    return emulator::narrow_bf16(first) | static_cast<u32>(emulator::narrow_bf16(second)) << 16;
}
template <> FN u32 pack<f16>(float first, float second) {
    return emulator::narrow_f16(first) | static_cast<u32>(emulator::narrow_f16(second)) << 16;
}

FN u32 shuffle_xor(u32 x, u32 lanes) {
    u32 turn = emulator::turn();
    emulator::mine().word = x;
    emulator::meet([](emulator::Lane *) {});
    return emulator::all(turn)[(emulator::now->self % 32) ^ lanes].word;
}
FN float shuffle_xor(float x, u32 lanes) { return as_float(shuffle_xor(as_bits(x), lanes)); }

FN void shared_add(u64 *to, u64 x) { *to += x; }
FN u64 multiply_high(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }

FN void load16(u32 *to, const void *from) {
    emulator::check_aligned(from, "a load of 16 bytes");
    std::memcpy(to, from, 16);
}
FN void store16(void *to, const u32 *from) {
    emulator::check_aligned(to, "a store of 16 bytes");
    if (emulator::in_shared(to)) *emulator::unfenced_at(to) = static_cast<u16>(emulator::now->self + 1);
    std::memcpy(to, from, 16);
}

// The copy happens when it is waited for; until then the target is no number.
FN void cp_async(void *to, const void *from, u32 bytes) {
    emulator::check_shared(to, 16, "an asynchronous copy");
    if (bytes > 0) emulator::check_aligned(from, "an asynchronous copy from");
    std::memset(to, 0xff, 16);
    emulator::Fibre &mine = emulator::fibre();
    mine.copies.push_back({to, from, bytes, mine.group});
}
FN void cp_async_commit() { emulator::fibre().group += 1; }
template <u32 N> FN void cp_async_wait() {
    emulator::Fibre &mine = emulator::fibre();
    auto copy = mine.copies.begin();
    for (; copy != mine.copies.end() && copy->group + N < mine.group; ++copy) {
        std::memset(copy->to, 0, 16);
        std::memcpy(copy->to, copy->from, copy->bytes);
    }
    mine.copies.erase(mine.copies.begin(), copy);
}

namespace emulator {

// Rows of 16 bytes that a group of eight lanes reads at once collide when their addresses agree modulo 128.
inline void count_conflicts(const Lane *lanes) {
    for (u32 matrix = 0; matrix < 4; ++matrix) {
        u32 banks = 0;
        for (u32 i = 0; i < 8; ++i) banks |= 1u << (reinterpret_cast<u64>(lanes[matrix * 8 + i].row) / 16 % 8);
        *now->launch.bank_conflicts += 8 - static_cast<u32>(__builtin_popcount(banks));
    }
}

// The last lane to come reads for all: what another lane writes next is not seen.
template <bool TURNED> inline void read_matrices(Lane *lanes) {
    count_conflicts(lanes);
    for (u32 lane = 0; lane < 32; ++lane) {
        for (u32 i = 0; i < 4; ++i) {
            u16 two[2];
            for (u32 j = 0; j < 2; ++j) {
                u32 row = TURNED ? 2 * (lane % 4) + j : lane / 4, column = TURNED ? lane / 4 : 2 * (lane % 4) + j;
                std::memcpy(&two[j], static_cast<const u8 *>(lanes[8 * i + row].row) + 2 * column, 2);
            }
            std::memcpy(&lanes[lane].a[i], two, 4);
        }
    }
}

template <bool TURNED> inline void ldmatrix(u32 *to, const void *row) {
    check_shared(row, 16, "a row of ldmatrix");
    u32 before = turn();
    mine().row = row;
    meet(read_matrices<TURNED>);
    std::memcpy(to, all(before)[now->self % 32].a, 16);
}

}  // namespace emulator

FN void ldmatrix(u32 *to, const void *row) { emulator::ldmatrix<false>(to, row); }
FN void ldmatrix_trans(u32 *to, const void *row) { emulator::ldmatrix<true>(to, row); }

namespace emulator {

// Gathers the operands of 32 lanes, multiplies, and hands out the results. Sums run over k in order, in f32.
template <class T> inline void multiply(Lane *lanes) {
    float a[16][16], b[16][8], c[16][8];
    auto two = [](u32 word, float *to) {
        to[0] = widen(T{static_cast<u16>(word & 0xffffu)});
        to[1] = widen(T{static_cast<u16>(word >> 16)});
    };
    for (u32 l = 0; l < 32; ++l) {
        u32 g = l / 4, t = 2 * (l % 4);
        for (u32 i = 0; i < 4; ++i) two(lanes[l].a[i], &a[g + 8 * (i % 2)][t + 8 * (i / 2)]);
        for (u32 i = 0; i < 2; ++i) {
            float pair[2];
            two(lanes[l].b[i], pair);
            b[t + 8 * i][g] = pair[0];
            b[t + 8 * i + 1][g] = pair[1];
        }
        for (u32 i = 0; i < 4; ++i) c[g + 8 * (i / 2)][t + i % 2] = lanes[l].c[i];
    }
    for (u32 row = 0; row < 16; ++row)
        for (u32 k = 0; k < 16; ++k)
            for (u32 column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    for (u32 l = 0; l < 32; ++l)
        for (u32 i = 0; i < 4; ++i) lanes[l].c[i] = c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}

}  // namespace emulator

template <class T> FN void mma(float *c, const u32 *a, u32 b0, u32 b1) {
    u32 turn = emulator::turn();
    emulator::Lane &lane = emulator::mine();
    std::memcpy(lane.a, a, 16);
    lane.b[0] = b0, lane.b[1] = b1;
    std::memcpy(lane.c, c, 16);
    emulator::meet(emulator::multiply<T>);
    std::memcpy(c, emulator::all(turn)[emulator::now->self % 32].c, 16);
}
