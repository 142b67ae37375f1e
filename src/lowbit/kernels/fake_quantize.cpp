// Fake quantization and its gradients, each in one pass over memory, for CPU tensors of float32.
//
//     v = x / s,  c = clamp(rint(v) + z, qmin, qmax) - z,  y = c * s,  inside = qmin - z <= v <= qmax - z
//
// and, where codes are odd, c = clamp(2 floor(v / 2) + 1, qmin, qmax), inside = qmin - 1 <= v <= qmax + 1.
// A plain C interface, without PyTorch: the library outlives any of its releases. A tensor is contiguous and
// seen as [outer, scales, inner]. The loops are compiled once for each instruction set and chosen when they run.
// Division is division and every step is rounded as in PyTorch, so that y equals its y in every bit.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "platform.h"
#include "threads.h"

namespace {

enum ZeroKind { NONE = 0, FLOAT = 1, INT32 = 2, ODD = 3 };
enum Path { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

struct Quantizer {
    const float *scale;
    const void *zero;
    int zero_kind;
    float qmin, qmax;

    // what lies beyond the outermost codes and is not clipped, without the zero point
    float margin() const { return zero_kind == ODD ? 1.0f : 0.0f; }

    float zero_at(int64_t i) const {
        if (zero_kind == FLOAT) return static_cast<const float *>(zero)[i];
        return zero_kind == INT32 ? static_cast<float>(static_cast<const int32_t *>(zero)[i]) : 0.0f;
    }
};

struct Forward {
    const float *x;
    float *y;
    uint8_t *mask;
    int64_t scales;
};

struct Backward {
    const float *g, *x;
    float *gx;
    bool inside_scale;
};

struct Sums {
    double scale = 0.0, zero = 0.0;
};

// Appends a few bits at a time to a string of bytes.
struct Bits {
    uint8_t *to;
    uint64_t held = 0;
    int count = 0;

    void append(uint32_t bits, int n) {
        held |= static_cast<uint64_t>(bits) << count;
        count += n;
        if (count >= 32) {
            for (int i = 0; i < 4; ++i) *to++ = static_cast<uint8_t>(held >> (8 * i));
            held >>= 32;
            count -= 32;
        }
    }

    void flush() {
        for (; count > 0; count -= 8, held >>= 8) *to++ = static_cast<uint8_t>(held);
    }
};

namespace portable {

struct Vec {
    using F = float;
    using D = double;
    using M = bool;
    static constexpr int W = 1;
    static F load(const float *p) { return *p; }
    static F load(const float *p, int) { return *p; }
    static void store(float *p, F a) { *p = a; }
    static void store(float *p, F a, int) { *p = a; }
    static F set(float a) { return a; }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F rint(F a) { return std::rint(a); }
    static F floor(F a) { return std::floor(a); }
    static F clamp(F a, F lo, F hi) {
        a = a < lo ? lo : a;
        return hi < a ? hi : a;
    }
    // no branches: what is inside follows no pattern
    static M inside(F a, F lo, F hi) { return (lo <= a) & (a <= hi); }
    static F keep(M m, F a) {
        uint32_t bits;
        std::memcpy(&bits, &a, 4);
        bits &= 0u - static_cast<uint32_t>(m);
        std::memcpy(&a, &bits, 4);
        return a;
    }
    static F drop(M m, F a) { return keep(!m, a); }
    static uint32_t bits(M m) { return m; }
    static D nothing() { return 0.0; }
    static D widen(D total, F a) { return total + a; }
    static double sum(D a) { return a; }
};

#include "fake_quantize_loops.h"

void masked_backward(const float *g, const uint8_t *mask, float *gx, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gx[i] = Vec::keep((mask[i / 8] >> (i % 8)) & 1, g[i]);
}

}  // namespace portable

#ifdef LOWBIT_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {

alignas(32) const int32_t LANES[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Vec {
    using F = __m256;
    using D = __m256d;
    using M = __m256;
    static constexpr int W = 8;
    static __m256i first(int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(LANES + 8 - n)); }
    static F load(const float *p) { return _mm256_loadu_ps(p); }
    static F load(const float *p, int n) { return _mm256_maskload_ps(p, first(n)); }
    static void store(float *p, F a) { _mm256_storeu_ps(p, a); }
    static void store(float *p, F a, int n) { _mm256_maskstore_ps(p, first(n), a); }
    static F set(float a) { return _mm256_set1_ps(a); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F rint(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F floor(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
    // min and max return their second operand when one is NaN
    static F clamp(F a, F lo, F hi) { return _mm256_min_ps(hi, _mm256_max_ps(lo, a)); }
    static M inside(F a, F lo, F hi) {
        return _mm256_and_ps(_mm256_cmp_ps(lo, a, _CMP_LE_OQ), _mm256_cmp_ps(a, hi, _CMP_LE_OQ));
    }
    static F keep(M m, F a) { return _mm256_and_ps(m, a); }
    static F drop(M m, F a) { return _mm256_andnot_ps(m, a); }
    static uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
    static D nothing() { return _mm256_setzero_pd(); }
    static D widen(D total, F a) {
        total = _mm256_add_pd(total, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
        return _mm256_add_pd(total, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
    }
    static double sum(D a) {
        double lane[4];
        _mm256_storeu_pd(lane, a);
        return (lane[0] + lane[1]) + (lane[2] + lane[3]);
    }
};

#include "fake_quantize_loops.h"

void masked_backward(const float *g, const uint8_t *mask, float *gx, int64_t begin, int64_t end) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
        __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask[i / 8]), bit), bit);
        Vec::store(gx + i, Vec::keep(_mm256_castsi256_ps(set), Vec::load(g + i)));
    }
    portable::masked_backward(g, mask, gx, i, end);
}

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
    using D = __m512d;
    using M = __mmask16;
    static constexpr int W = 16;
    static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static F load(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static void store(float *p, F a) { _mm512_storeu_ps(p, a); }
    static void store(float *p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
    static F set(float a) { return _mm512_set1_ps(a); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F rint(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F floor(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
    static F clamp(F a, F lo, F hi) { return _mm512_min_ps(hi, _mm512_max_ps(lo, a)); }
    static M inside(F a, F lo, F hi) {
        return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(lo, a, _CMP_LE_OQ), a, hi, _CMP_LE_OQ);
    }
    static F keep(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
    static F drop(M m, F a) { return _mm512_mask_mov_ps(a, m, _mm512_setzero_ps()); }
    static uint32_t bits(M m) { return m; }
    static D nothing() { return _mm512_setzero_pd(); }
    static D widen(D total, F a) {
        const __m256d high = _mm512_extractf64x4_pd(_mm512_castps_pd(a), 1);
        total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
        return _mm512_add_pd(total, _mm512_cvtps_pd(_mm256_castpd_ps(high)));
    }
    static double sum(D a) {
        double lane[8];
        _mm512_storeu_pd(lane, a);
        return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
};

#include "fake_quantize_loops.h"

void masked_backward(const float *g, const uint8_t *mask, float *gx, int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
        uint16_t bits;
        std::memcpy(&bits, mask + i / 8, 2);
        Vec::store(gx + i, _mm512_maskz_loadu_ps(bits, g + i));
    }
    portable::masked_backward(g, mask, gx, i, end);
}

}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // LOWBIT_X86

struct Loops {
    void (*forward)(const Forward &, const Quantizer &, int64_t row, int64_t rows, int64_t inner);
    Sums (*backward)(const Backward &, const Quantizer &, int64_t scale, int64_t offset, int64_t inner);
    void (*masked_backward)(const float *, const uint8_t *, float *, int64_t, int64_t);
};

int best_path() {
#ifdef LOWBIT_X86
    if (__builtin_cpu_supports("avx512f")) return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return PORTABLE;
}

Loops loops_of([[maybe_unused]] int path) {
#ifdef LOWBIT_X86
    if (path == AVX512) return {avx512::forward, avx512::backward, avx512::masked_backward};
    if (path == AVX2) return {avx2::forward, avx2::backward, avx2::masked_backward};
#endif
    return {portable::forward, portable::backward, portable::masked_backward};
}

// 64 elements are whole bytes of the mask, and whole cache lines.
constexpr int64_t LINE = 64;

}  // namespace

// Raised when a signature changes, so that a library of an older build is never called.
LOWBIT_API int lowbit_version() { return 2; }

// The best of portable (0), AVX2 (1) and AVX-512 (2) that this processor runs.
LOWBIT_API int lowbit_best_path() { return best_path(); }

// y, and where mask is not null one bit for each element: is it inside?
LOWBIT_API void lowbit_fake_quantize(const float *x, float *y, uint8_t *mask, const float *scale, const void *zero,
                                     int zero_kind, int64_t outer, int64_t scales, int64_t inner, int qmin, int qmax,
                                     int threads, int path) {
    const Loops loops = loops_of(path);
    const Quantizer q{scale, zero, zero_kind, static_cast<float>(qmin), static_cast<float>(qmax)};
    if (scales == 1) {
        const int64_t n = outer * inner;
        split(n, LINE, n, threads, [&](int64_t, int64_t begin, int64_t end) {
            loops.forward({x + begin, y + begin, mask ? mask + begin / 8 : nullptr, 1}, q, 0, 1, end - begin);
        });
        return;
    }
    // eight rows are whole bytes of the mask, however long they are
    split(outer * scales, 8, outer * scales * inner, threads, [&](int64_t, int64_t begin, int64_t end) {
        const int64_t at = begin * inner;
        loops.forward({x + at, y + at, mask ? mask + at / 8 : nullptr, scales}, q, begin, end - begin, inner);
    });
}

// gx = inside ? g : 0, from the mask.
LOWBIT_API void lowbit_masked_backward(const float *g, const uint8_t *mask, float *gx, int64_t n, int threads,
                                       int path) {
    const Loops loops = loops_of(path);
    split(n, LINE, n, threads,
          [&](int64_t, int64_t begin, int64_t end) { loops.masked_backward(g, mask, gx, begin, end); });
}

// gx = inside ? g : 0, and for each scale gs = sum of g (inside ? w (c - v) : c) with w = inside_scale, and where
// gzero is not null gz = sum over what is not inside of -g s.
LOWBIT_API void lowbit_fake_quantize_backward(const float *g, const float *x, float *gx, float *gscale, float *gzero,
                                              const float *scale, const void *zero, int zero_kind, int64_t outer,
                                              int64_t scales, int64_t inner, int qmin, int qmax, int inside_scale,
                                              int threads, int path) {
    const Loops loops = loops_of(path);
    const Quantizer q{scale, zero, zero_kind, static_cast<float>(qmin), static_cast<float>(qmax)};
    const Backward b{g, x, gx, inside_scale != 0};
    auto finish = [&](int64_t s, const Sums &sums) {
        gscale[s] = static_cast<float>(sums.scale);
        if (gzero) gzero[s] = static_cast<float>(-sums.zero * scale[s]);
    };
    if (scales == 1) {
        std::vector<Sums> parts(threads > 1 ? static_cast<size_t>(threads) : 1);
        split(outer * inner, LINE, outer * inner, threads, [&](int64_t part, int64_t begin, int64_t end) {
            parts[static_cast<size_t>(part)] = loops.backward(b, q, 0, begin, end - begin);
        });
        Sums total;
        for (const Sums &part : parts) total = {total.scale + part.scale, total.zero + part.zero};
        return finish(0, total);
    }
    // a scale belongs to one thread, so that no sum crosses threads
    split(scales, 1, outer * scales * inner, threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
            Sums total;
            for (int64_t o = 0; o < outer; ++o) {
                const Sums row = loops.backward(b, q, s, (o * scales + s) * inner, inner);
                total = {total.scale + row.scale, total.zero + row.zero};
            }
            finish(s, total);
        }
    });
}
