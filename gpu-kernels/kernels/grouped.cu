// Products of groups of rows, each group with a weight of its own: the experts of a mixture, the adapters of a
// batch (LoRA, arXiv 2106.09685; SGMV, arXiv 2310.18547), the heads of latent attention. Sums are as in `gemm.cu`, so a row's bits are those of
// `gemm` with that weight.
#include "gemm.cuh"

// Rows `first` up to `last`, at most 64, of the list of rows; ~0 for a tile that is not there.
struct GroupTile {
    u32 weight, first, last;
};

struct Grouped {
    // `weight` is the first of all weights; `rows` is not used.
    Gemm gemm;
    const GroupTile *tiles;
    // Of each row of the list, where it is in x and in out.
    const u32 *from;
    const u32 *to;
    // Per weight, or null: what sums are multiplied by.
    const float *factors;
    u64 weight_size;
    // Sums are added to what is there.
    u32 accumulate, unused;
};

struct Listed {
    const Grouped &p;
    const GroupTile tile;
    FN u32 from(u32 row) const { return p.from[row]; }
    template <class T> FN void put(const Gemm &gemm, u32 row, u32 column, float x) const {
        if (row >= tile.last || column >= gemm.out_cols) return;
        T *out = static_cast<T *>(gemm.out) + p.to[row] * gemm.out_stride + column;
        if (p.factors) x *= p.factors[tile.weight];
        *out = narrow<T>(p.accumulate ? widen(*out) + x : x);
    }
};

template <class T> FN void grouped(const Grouped &p) {
    u32 across = divide_up(p.gemm.out_cols, TALL_COLUMNS);
    Listed list{p, p.tiles[block_index() / across]};
    if (list.tile.weight == ~0u) return;
    Gemm gemm = p.gemm;
    gemm.weight = static_cast<const T *>(gemm.weight) + list.tile.weight * p.weight_size;
    tall<T>(gemm, list, list.tile.first, list.tile.last, block_index() % across * TALL_COLUMNS);
}

KERNEL(grouped_bf16, Grouped, TALL_THREADS) { grouped<bf16>(p); }
KERNEL(grouped_f16, Grouped, TALL_THREADS) { grouped<f16>(p); }

struct HeadLinear {
    // `weight` is the first head's, `rows` are tokens; the strides of x and out are from head to head.
    Gemm gemm;
    u64 weight_size;
    u32 heads, unused;
};

// A head's part of each token.
struct OfHead {
    u32 head, heads;
    FN u32 from(u32 token) const { return token * heads + head; }
    template <class T> FN void put(const Gemm &p, u32 token, u32 column, float x) const {
        if (token >= p.rows || column >= p.out_cols) return;
        static_cast<T *>(p.out)[from(token) * p.out_stride + column] = narrow<T>(x);
    }
};

template <class T> FN void head_linear(const HeadLinear &p) {
    u32 down = divide_up(p.gemm.rows, TALL_ROWS), across = divide_up(p.gemm.out_cols, TALL_COLUMNS);
    u32 tile = block_index() / down, head = tile / across;
    Gemm gemm = p.gemm;
    gemm.weight = static_cast<const T *>(gemm.weight) + head * p.weight_size;
    tall<T>(gemm, OfHead{head, p.heads}, block_index() % down * TALL_ROWS, gemm.rows, tile % across * TALL_COLUMNS);
}

KERNEL(head_linear_bf16, HeadLinear, TALL_THREADS) { head_linear<bf16>(p); }
KERNEL(head_linear_f16, HeadLinear, TALL_THREADS) { head_linear<f16>(p); }
