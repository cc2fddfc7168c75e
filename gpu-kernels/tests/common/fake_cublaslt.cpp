// The part of cuBLASLt's interface that we call, on the host's memory: what a product is described with decides what is read
// and written, as in NVIDIA's library, so that wrong orders, strides and epilogues give wrong numbers.
//
// FAKE_VERSION is what it says it is; WITHOUT_MATMUL leaves a call out. Products of 13 outputs have no algorithm.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {
enum Status { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Element { F32 = 0, F16 = 2, BF16 = 14 };

struct Product {
    int compute, scale;
    uint32_t transposed_a = 0, transposed_b = 0, epilogue = 1;
    const void *bias = nullptr;
};

struct Layout {
    int element;
    uint64_t rows, cols;
    int64_t leading;
};

[[maybe_unused]] float load(const void *from, uint64_t at, int element) {
    if (element == F16) return static_cast<const _Float16 *>(from)[at];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t *>(from)[at]) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

[[maybe_unused]] void store(void *to, uint64_t at, int element, float value) {
    if (element == F16) {
        static_cast<_Float16 *>(to)[at] = static_cast<_Float16>(value);
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    static_cast<uint16_t *>(to)[at] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

bool fits(const Product &product, const Layout &a, const Layout &b, const Layout &d) {
    const uint64_t m = product.transposed_a ? a.cols : a.rows, k = product.transposed_a ? a.rows : a.cols;
    const uint64_t k_of_b = product.transposed_b ? b.cols : b.rows, n = product.transposed_b ? b.rows : b.cols;
    const auto whole = [](const Layout &layout) {
        return layout.leading >= static_cast<int64_t>(layout.rows) && (layout.element == F16 || layout.element == BF16);
    };
    return m == d.rows && n == d.cols && k == k_of_b && whole(a) && whole(b) && whole(d) && product.compute == 68 &&
           product.scale == F32 && (product.epilogue == 1 || (product.epilogue == 4 && product.bias));
}
}  // namespace

extern "C" {
// How many products were computed.
int fake_products = 0;
// How many of what was made is still there.
int fake_alive = 0;

size_t cublasLtGetVersion() { return FAKE_VERSION; }

const char *cublasLtGetStatusName(int status) {
    return status == INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS_OTHER";
}

int cublasLtCreate(void **handle) {
    fake_alive++;
    *handle = new int(1);
    return SUCCESS;
}

int cublasLtDestroy(void *handle) {
    fake_alive--;
    delete static_cast<int *>(handle);
    return SUCCESS;
}

int cublasLtMatmulDescCreate(Product **product, int compute, int scale) {
    fake_alive++;
    *product = new Product{compute, scale};
    return SUCCESS;
}

int cublasLtMatmulDescSetAttribute(Product *product, int attribute, const void *value, size_t bytes) {
    switch (attribute) {
    case 3: return bytes == 4 ? memcpy(&product->transposed_a, value, 4), SUCCESS : INVALID_VALUE;
    case 4: return bytes == 4 ? memcpy(&product->transposed_b, value, 4), SUCCESS : INVALID_VALUE;
    case 7: return bytes == 4 ? memcpy(&product->epilogue, value, 4), SUCCESS : INVALID_VALUE;
    case 8: return bytes == 8 ? memcpy(&product->bias, value, 8), SUCCESS : INVALID_VALUE;
    default: return INVALID_VALUE;
    }
}

int cublasLtMatmulDescDestroy(Product *product) {
    fake_alive--;
    delete product;
    return SUCCESS;
}

int cublasLtMatrixLayoutCreate(Layout **layout, int element, uint64_t rows, uint64_t cols, int64_t leading) {
    fake_alive++;
    *layout = new Layout{element, rows, cols, leading};
    return SUCCESS;
}

int cublasLtMatrixLayoutDestroy(Layout *layout) {
    fake_alive--;
    delete layout;
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(uint64_t **workspace) {
    fake_alive++;
    *workspace = new uint64_t(0);
    return SUCCESS;
}

int cublasLtMatmulPreferenceSetAttribute(uint64_t *workspace, int attribute, const void *value, size_t bytes) {
    return attribute == 1 && bytes == 8 ? memcpy(workspace, value, 8), SUCCESS : INVALID_VALUE;
}

int cublasLtMatmulPreferenceDestroy(uint64_t *workspace) {
    fake_alive--;
    delete workspace;
    return SUCCESS;
}

struct Choice {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

int cublasLtMatmulAlgoGetHeuristic(void *, Product *product, Layout *a, Layout *b, Layout *, Layout *d, uint64_t *workspace,
                                   int room, Choice *choices, int *count) {
    *count = 0;
    if (room < 1 || *workspace == 0 || !fits(*product, *a, *b, *d)) return INVALID_VALUE;
    if (d->rows == 13) return NOT_SUPPORTED;
    *count = 1;
    choices[0] = Choice{{d->rows, d->cols, a->rows}, *workspace, SUCCESS, 1.0f, {}};
    return SUCCESS;
}

#ifndef WITHOUT_MATMUL
int cublasLtMatmul(void *, Product *product, const float *alpha, const void *a, Layout *of_a, const void *b, Layout *of_b,
                   const float *beta, const void *c, Layout *of_c, void *d, Layout *of_d, const uint64_t *algorithm,
                   void *workspace, size_t, void *stream) {
    const bool chosen = algorithm[0] == of_d->rows && algorithm[1] == of_d->cols && algorithm[2] == of_a->rows;
    const bool aligned = ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(d) |
                           reinterpret_cast<uintptr_t>(workspace)) & 255) == 0;
    if (!chosen || !aligned || stream || !workspace || of_c->leading != of_d->leading || !fits(*product, *of_a, *of_b, *of_d))
        return INVALID_VALUE;
    const uint64_t depth = product->transposed_a ? of_a->rows : of_a->cols;
    const auto element = [](const void *x, const Layout &layout, bool transposed, uint64_t row, uint64_t col) {
        return load(x, transposed ? col + row * layout.leading : row + col * layout.leading, layout.element);
    };
    for (uint64_t col = 0; col < of_d->cols; col++) {
        for (uint64_t row = 0; row < of_d->rows; row++) {
            float sum = 0.0f;
            for (uint64_t k = 0; k < depth; k++)
                sum += element(a, *of_a, product->transposed_a, row, k) * element(b, *of_b, product->transposed_b, k, col);
            sum *= *alpha;
            if (*beta != 0.0f) sum += *beta * element(c, *of_c, false, row, col);
            if (product->epilogue == 4) sum += load(product->bias, row, of_d->element);
            store(d, row + col * of_d->leading, of_d->element, sum);
        }
    }
    fake_products++;
    return SUCCESS;
}
#endif
}
