// A tensor train times its input, core after core, for CPU tensors of float32.
//
// Of one sample, a step turns [batch, depth, rest] into [batch, outputs, rest] by `batch` products with one matrix
// [outputs, depth], and the last adds the bias. A sample takes all steps before the next one begins, so that what
// lies between them stays in the cache.
//
// A plain C interface, without PyTorch: the library outlives any of its releases. The loops are compiled once for
// each instruction set and chosen when they run. Each sum runs from its first product to its last, whatever the
// number of samples and threads.

#include <cstdint>
#include <memory>
#include <utility>

#include "platform.h"
#include "threads.h"

namespace {

enum Path { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// Columns that stand side by side in a matrix that is read from the right: [panels][depth][PANEL].
constexpr int64_t PANEL = 16;

// Multiply-accumulates that take as long as an element of the loops for which threads.h counts.
constexpr int64_t MACS = 8;

// The structs of these names in tensor_train.py.
struct Step {
    // [outputs][depth]; where rest = 1 its transpose, in panels
    const float *matrix;
    int64_t batch, outputs, depth, rest;
};

struct Train {
    const Step *steps;
    // [outputs], or null
    const float *bias;
    int64_t count, samples, inputs, outputs;
    // floats of the largest result between two steps
    int64_t between;
};

// C [rows, columns] = A [rows, depth] B + D, all but B row-major; D may be null.
struct Product {
    const float *a, *b, *d;
    float *c;
    int64_t rows, depth, columns;
    // from a row of B to the next, from a panel of PANEL columns to the next
    int64_t stride, panel;
};

namespace portable {

#if defined(__GNUC__) || defined(__clang__)
struct Vec {
    typedef float F __attribute__((vector_size(16), aligned(4)));
    static constexpr int W = 4;
    static F load(const float *p) { return *reinterpret_cast<const F *>(p); }
    static void store(float *p, F a) { *reinterpret_cast<F *>(p) = a; }
    static F set(float a) { return F{a, a, a, a}; }
    static F load(const float *p, int n) {
        F a{};
        for (int i = 0; i < n; ++i) a[i] = p[i];
        return a;
    }
    static void store(float *p, F a, int n) {
        for (int i = 0; i < n; ++i) p[i] = a[i];
    }
    static F add_product(F sum, F a, F b) { return sum + a * b; }
};
#else
struct Vec {
    struct F {
        float lane[4];
    };
    static constexpr int W = 4;
    static F load(const float *p) { return load(p, W); }
    static void store(float *p, F a) { store(p, a, W); }
    static F set(float a) { return {{a, a, a, a}}; }
    static F load(const float *p, int n) {
        F a{};
        for (int i = 0; i < n; ++i) a.lane[i] = p[i];
        return a;
    }
    static void store(float *p, F a, int n) {
        for (int i = 0; i < n; ++i) p[i] = a.lane[i];
    }
    static F add_product(F sum, F a, F b) {
        for (int i = 0; i < W; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
        return sum;
    }
};
#endif

#include "tensor_train_loops.h"

}  // namespace portable

#ifdef LOWBIT_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {

alignas(32) const int32_t LANES[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Vec {
    using F = __m256;
    static constexpr int W = 8;
    static __m256i first(int n) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(LANES + 8 - n));
    }
    static F load(const float *p) { return _mm256_loadu_ps(p); }
    static F load(const float *p, int n) { return _mm256_maskload_ps(p, first(n)); }
    static void store(float *p, F a) { _mm256_storeu_ps(p, a); }
    static void store(float *p, F a, int n) { _mm256_maskstore_ps(p, first(n), a); }
    static F set(float a) { return _mm256_set1_ps(a); }
    static F add_product(F sum, F a, F b) { return _mm256_fmadd_ps(a, b, sum); }
};

#include "tensor_train_loops.h"

}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif
namespace avx512 {

struct Vec {
    using F = __m512;
    static constexpr int W = 16;
    static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static F load(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static void store(float *p, F a) { _mm512_storeu_ps(p, a); }
    static void store(float *p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
    static F set(float a) { return _mm512_set1_ps(a); }
    static F add_product(F sum, F a, F b) { return _mm512_fmadd_ps(a, b, sum); }
};

#include "tensor_train_loops.h"

}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // LOWBIT_X86

using Run = void (*)(const Product &);

int best_path() {
#ifdef LOWBIT_X86
    if (__builtin_cpu_supports("avx512f")) return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

Run product_of([[maybe_unused]] int path) {
#ifdef LOWBIT_X86
    if (path == AVX512) return avx512::product;
    if (path == AVX2) return avx2::product;
#endif
    return portable::product;
}

void apply(const Step &s, const float *x, const float *bias, float *y, Run product) {
    if (s.rest == 1) {
        return product({x, s.matrix, bias, y, s.batch, s.depth, s.outputs, PANEL, PANEL * s.depth});
    }
    for (int64_t i = 0; i < s.batch; ++i) {
        const int64_t from = i * s.depth * s.rest, to = i * s.outputs * s.rest;
        const float *d = bias ? bias + to : nullptr;
        product({s.matrix, x + from, d, y + to, s.outputs, s.depth, s.rest, s.rest, PANEL});
    }
}

}  // namespace

// Raised when a signature changes, so that a library of an older build is never called.
LOWBIT_API int lowbit_tensor_train_version() { return 1; }

// The best of portable (0), AVX2 (1) and AVX-512 (2) that this processor runs.
LOWBIT_API int lowbit_tensor_train_best_path() { return best_path(); }

// y [samples][outputs] = the train times x [samples][inputs], plus the bias.
LOWBIT_API void lowbit_tensor_train_product(const Train *train, const float *x, float *y, int threads, int path) {
    const Train &t = *train;
    const Run product = product_of(path);
    int64_t macs = 0;
    for (int64_t k = 0; k < t.count; ++k) {
        macs += t.steps[k].batch * t.steps[k].outputs * t.steps[k].depth * t.steps[k].rest;
    }
    split(t.samples, 1, t.samples * macs / MACS, threads, [&](int64_t, int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(2 * t.between)]);
        for (int64_t i = begin; i < end; ++i) {
            const float *from = x + i * t.inputs;
            for (int64_t k = 0; k < t.count; ++k) {
                const bool last = k == t.count - 1;
                float *to = last ? y + i * t.outputs : scratch.get() + k % 2 * t.between;
                apply(t.steps[k], from, last ? t.bias : nullptr, to, product);
                from = to;
            }
        }
    });
}
