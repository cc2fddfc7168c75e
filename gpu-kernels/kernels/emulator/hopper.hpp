// Acts out what `hopper_device.cuh` wraps, on top of `emulator.hpp`.
//
// Units that work beside the threads do so as late as they may: a copy happens when somebody waits for its barrier, a product when
// its warp waits for the group it is in. Until then the target is no number; and what a product reads is what is there
// at that time, so memory that is given back too early shows.
#pragma once

#include <map>

namespace emulator {

// A box of a tensor, as the test's device encodes it in a `TensorMap`.
struct Box {
    const u8 *start;
    u64 sizes[4];
    u64 strides[3];
    u32 box[4];
    // Of two bytes: rows of 128 bytes, permuted. Of one: rows as they are.
    u32 element_bytes;
};

// To or from shared memory.
struct Load {
    u8 *to;
    Box box;
    i32 at[4];
};

struct Barrier {
    u32 count = 0, left = 0, phase = 0;
    i64 bytes = 0;
    std::vector<Load> loads;
};

struct Product {
    float *d;
    u32 n;
    bool add, turned, is_f16;
    // The two rows of this lane, from registers; or where all rows lie.
    float rows[2][16];
    u64 a, b;
};

struct Group {
    u32 arrived = 0, turn = 0;
};

// What the units beside the threads have to do.
struct Units {
    std::map<const void *, Barrier> barriers;
    std::map<u32, Group> groups;
    // Of each fibre: products by group, the last still open; and what accumulators under way hold.
    std::map<u32, std::vector<std::vector<Product>>> products;
    std::map<u32, std::map<float *, std::vector<float>>> sums;
    // Stores of each fibre, by group.
    std::map<u32, std::vector<std::vector<Load>>> stores;
    u32 spins = 0;
};

// A pointer: a process that loads many kernels has little room for what is a thread's own.
inline Units &units() {
    static thread_local Units *mine = nullptr;
    if (!mine) mine = new Units;
    return *mine;
}

// Lets others run while there is nothing to do here.
inline void spin(const char *what) {
    if (++units().spins > 50000000) complain("waits forever at %s", what);
    yield();
}

inline Barrier &barrier_at(const u64 *barrier) {
    auto found = units().barriers.find(barrier);
    if (found == units().barriers.end()) complain("a barrier that was never made");
    return found->second;
}

inline void settle(Barrier &barrier) {
    if (barrier.left > 0 || barrier.bytes != 0) return;
    barrier.left = barrier.count;
    barrier.phase += 1;
    units().spins = 0;
}

// The place of a byte in panels of 128 bytes a row.
inline u64 permuted(u64 address) { return address ^ (address >> 7 & 7u) << 4; }

// Bytes of rows of `box[0]` elements; what is outside of the tensor is zeros, or stays.
template <bool STORE = false> inline u32 move_box(const Load &load) {
    const Box &box = load.box;
    u32 rows = 0, size = box.element_bytes, row_bytes = box.box[0] * size;
    for (u32 c3 = 0; c3 < box.box[3]; ++c3)
        for (u32 c2 = 0; c2 < box.box[2]; ++c2)
            for (u32 c1 = 0; c1 < box.box[1]; ++c1, ++rows)
                for (u32 i = 0; i < box.box[0]; ++i) {
                    i64 at[4] = {load.at[0] + i64(i), load.at[1] + i64(c1), load.at[2] + i64(c2), load.at[3] + i64(c3)};
                    bool inside = true;
                    u64 offset = 0;
                    for (u32 k = 0; k < 4; ++k) {
                        inside &= at[k] >= 0 && at[k] < static_cast<i64>(box.sizes[k]);
                        offset += static_cast<u64>(at[k]) * (k == 0 ? size : box.strides[k - 1]);
                    }
                    u16 element = 0;
                    u64 to = reinterpret_cast<u64>(load.to) + rows * row_bytes + size * i;
                    u8 *shared = reinterpret_cast<u8 *>(size == 2 ? permuted(to) : to);
                    u8 *global = const_cast<u8 *>(box.start) + offset;
                    if (!STORE && inside) std::memcpy(&element, global, size);
                    if (!STORE) std::memcpy(shared, &element, size);
                    if (STORE && inside) std::memcpy(global, shared, size);
                }
    return rows * row_bytes;
}

}  // namespace emulator

FN void barrier_init(u64 *barrier, u32 count) {
    // A block's first: nothing of the block before is left.
    if (emulator::units().barriers.count(barrier)) emulator::units().groups.clear(), emulator::units().barriers.clear();
    emulator::Barrier made;
    made.count = made.left = count;
    emulator::units().barriers[barrier] = made;
}
FN void barrier_init_fence() {}
FN void barrier_arrive(u64 *barrier) {
    emulator::Barrier &at = emulator::barrier_at(barrier);
    if (at.left == 0) emulator::complain("more arrivals at a barrier than it counts");
    at.left -= 1;
    emulator::settle(at);
}
FN void barrier_expect(u64 *barrier, u32 bytes) {
    emulator::barrier_at(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
FN void barrier_wait(u64 *barrier, u32 parity) {
    for (;;) {
        emulator::Barrier &at = emulator::barrier_at(barrier);
        if (at.phase % 2 != parity) return;
        std::vector<emulator::Load> loads;
        std::swap(loads, at.loads);
        for (const emulator::Load &load : loads) at.bytes -= emulator::move_box(load);
        if (!loads.empty()) emulator::settle(at);
        else emulator::spin("a barrier");
    }
}
FN void group_arrive(u32 id, u32 threads) {
    emulator::Group &group = emulator::units().groups[id];
    if (++group.arrived < threads) return;
    group.arrived = 0;
    group.turn += 1;
    emulator::units().spins = 0;
}
FN void group_sync(u32 id, u32 threads) {
    emulator::Group &group = emulator::units().groups[id];
    u32 turn = group.turn;
    group_arrive(id, threads);
    while (group.turn == turn) emulator::spin("a barrier of some warps");
}
FN void async_fence() {
    for (u16 &writer : emulator::now->unfenced)
        if (writer == emulator::now->self + 1) writer = 0;
}

namespace emulator {

// A copy that is asked for, and how many bytes it has.
inline Load asked(const void *to, const TensorMap *map, const i32 (&at)[4], u32 &bytes) {
    Load load{const_cast<u8 *>(static_cast<const u8 *>(to)), {}, {at[0], at[1], at[2], at[3]}};
    std::memcpy(&load.box, map, sizeof load.box);
    u32 size = load.box.element_bytes, row_bytes = size * load.box.box[0];
    bytes = row_bytes * load.box.box[1] * load.box.box[2] * load.box.box[3];
    if (size == 2 ? row_bytes != PANEL_ROW : row_bytes % 16 != 0) complain("a box of %u bytes a row", row_bytes);
    check_shared(to, bytes, "a copy of a tile");
    u32 multiple = size == 2 ? 1024 : 128;
    if (reinterpret_cast<u64>(to) % multiple != 0) complain("a tile at %p, no multiple of %u", to, multiple);
    return load;
}

}  // namespace emulator

FN void tma_load(void *to, const TensorMap *map, u64 *barrier, i32 a, i32 b, i32 c, i32 d) {
    u32 bytes;
    emulator::Load load = emulator::asked(to, map, {a, b, c, d}, bytes);
    std::fill_n(emulator::unfenced_at(to), bytes / 16, u16(0));
    std::memset(to, 0xff, bytes);
    emulator::barrier_at(barrier).loads.push_back(load);
}

FN void store4(void *to, u32 x) {
    std::memcpy(to, &x, 4);
    *emulator::unfenced_at(to) = static_cast<u16>(emulator::now->self + 1);
}
FN void tma_store(const TensorMap *map, const void *from, i32 a, i32 b, i32 c, i32 d) {
    u32 bytes;
    emulator::Load load = emulator::asked(from, map, {a, b, c, d}, bytes);
    const u16 *unfenced = emulator::unfenced_at(from);
    if (std::any_of(unfenced, unfenced + bytes / 16, [](u16 writer) { return writer > 0; }))
        emulator::complain("a store of what was not fenced");
    auto &mine = emulator::units().stores[emulator::now->self];
    if (mine.empty()) mine.resize(1);
    mine.back().push_back(load);
}
FN void stores_commit() { emulator::units().stores[emulator::now->self].push_back({}); }
template <u32 N> FN void stores_read() {
    auto &mine = emulator::units().stores[emulator::now->self];
    while (mine.size() > N + 1) {
        for (const emulator::Load &store : mine.front()) emulator::move_box<true>(store);
        mine.erase(mine.begin());
    }
}

FN u32 bytes_of(u32 first, u32 second, u32 which) {
    u64 all = static_cast<u64>(second) << 32 | first;
    u32 bytes = 0;
    for (u32 i = 0; i < 4; ++i) bytes |= static_cast<u32>(all >> 8 * (which >> 4 * i & 7u) & 0xffu) << 8 * i;
    return bytes;
}
template <class T> FN u32 fused_two(u32 a, u32 b, u32 c) {
    return pack<T>(std::fma(low<T>(a), low<T>(b), low<T>(c)), std::fma(high<T>(a), high<T>(b), high<T>(c)));
}

template <u32 N> FN void registers_give() {}
template <u32 N> FN void registers_take() {}

FN u64 descriptor(const void *first, u32 panel_bytes, u32 eight_rows_bytes) {
    u64 offset = static_cast<u64>(static_cast<const u8 *>(first) - emulator::now->shared_start);
    return offset >> 4 | static_cast<u64>(panel_bytes >> 4) << 16 | static_cast<u64>(eight_rows_bytes >> 4) << 32;
}

template <class X, u32 N> FN void settle(X (&)[N]) {}
FN void wgmma_fence() {}
FN void wgmma_commit() {
    auto &mine = emulator::units().products[emulator::now->self];
    if (mine.empty()) mine.resize(1);
    mine.push_back({});
}

namespace emulator {

template <class T> inline float element(u64 first, u64 offset) {
    u16 bits;
    u64 at = permuted(reinterpret_cast<u64>(now->shared_start) + first + offset);
    if (u32 writer = *unfenced_at(reinterpret_cast<const u8 *>(at)))
        complain("a product reads what thread %u wrote and did not fence", writer - 1);
    std::memcpy(&bits, reinterpret_cast<const u8 *>(at), 2);
    return widen(T{bits});
}

// This lane's part of a product: two rows, and of every eight columns two.
template <class T> inline void multiply_group(const Product &product, std::vector<float> &d) {
    u32 lane = now->self % 32, warp = now->self / 32 % 4;
    auto field = [](u64 of, u32 shift) { return (of >> shift & 0x3fffu) << 4; };
    float a[2][16];
    for (u32 i = 0; i < 2; ++i)
        for (u32 k = 0; k < 16; ++k) {
            u32 row = 16 * warp + lane / 4 + 8 * i;
            a[i][k] = product.turned ? product.rows[i][k]
                                     : element<T>(field(product.a, 0), row / 8 * field(product.a, 32) + row % 8 * PANEL_ROW + 2 * k);
        }
    u64 first = field(product.b, 0), panel = field(product.b, 16), eight = field(product.b, 32);
    for (u32 n = 0; n < product.n / 8; ++n)
        for (u32 j = 0; j < 2; ++j) {
            u32 column = 8 * n + 2 * (lane % 4) + j;
            float b[16];
            for (u32 k = 0; k < 16; ++k) {
                u64 offset = product.turned ? column / 64 * panel + column % 64 * 2 + k / 8 * eight + k % 8 * PANEL_ROW
                                            : column / 8 * eight + column % 8 * PANEL_ROW + 2 * k;
                b[k] = element<T>(first, offset);
            }
            for (u32 i = 0; i < 2; ++i) {
                float &sum = d[4 * n + 2 * i + j];
                if (!product.add) sum = 0.0f;
                for (u32 k = 0; k < 16; ++k) sum += a[i][k] * b[k];
            }
        }
}

inline void begin(const Product &product) {
    auto &mine = units().products[now->self];
    if (mine.empty()) mine.resize(1);
    auto &held = units().sums[now->self];
    if (!held.count(product.d)) held[product.d].assign(product.d, product.d + product.n / 2);
    std::fill(product.d, product.d + product.n / 2, as_float(0x7fffffffu));
    mine.back().push_back(product);
}

}  // namespace emulator

template <class T> constexpr bool IS_F16 = false;
template <> constexpr bool IS_F16<f16> = true;

template <class T, u32 N> FN void wgmma(float *d, u64 a, u64 b, bool add) {
    emulator::begin({d, N, add, false, IS_F16<T>, {}, a, b});
}
template <class T, u32 N> FN void wgmma_turned(float *d, const u32 *a, u64 b) {
    u32 turn = emulator::turn(), lane = emulator::now->self % 32;
    std::memcpy(emulator::mine().a, a, 16);
    emulator::meet([](emulator::Lane *) {});
    emulator::Product product{d, N, true, true, IS_F16<T>, {}, 0, b};
    for (u32 t = 0; t < 4; ++t)
        for (u32 i = 0; i < 4; ++i) {
            u32 two = emulator::all(turn)[lane / 4 * 4 + t].a[i], k = 2 * t + 8 * (i / 2);
            product.rows[i % 2][k] = low<T>(two);
            product.rows[i % 2][k + 1] = high<T>(two);
        }
    emulator::begin(product);
}

template <u32 N> FN void wgmma_wait() {
    auto &mine = emulator::units().products[emulator::now->self];
    auto &held = emulator::units().sums[emulator::now->self];
    while (mine.size() > N + 1) {
        for (const emulator::Product &product : mine.front()) {
            std::vector<float> &d = held[product.d];
            if (product.is_f16) emulator::multiply_group<f16>(product, d);
            else emulator::multiply_group<bf16>(product, d);
        }
        mine.erase(mine.begin());
    }
    for (auto sum = held.begin(); sum != held.end();) {
        bool pending = false;
        for (const auto &group : mine)
            for (const emulator::Product &product : group) pending |= product.d == sum->first;
        if (pending) {
            ++sum;
            continue;
        }
        std::copy(sum->second.begin(), sum->second.end(), sum->first);
        sum = held.erase(sum);
    }
    // The lanes of a warp wait as one.
    warp_sync();
}
