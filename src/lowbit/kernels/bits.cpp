// Products of binary (-1, 1) and ternary (-1, 0, 1) weights with packed activations and with floats.
//
// An activation is one bit, or a code of `planes` bits taken as that many rows of bits. With b the bits of a row
// and, for each output, `negative` and `positive` the bits where its weight is -1 and 1,
//
//     count = popcount(b ? positive : negative)              for binary weights that is popcount(b ^ negative)
//     sum of w b = count - popcount(negative)                bits that are codes 0 and 1
//     sum of w (2 b - 1) = 2 count - popcount(negative | positive)       bits that are signs
//
// so that one kernel counts for every pair, and its end makes the sum: see `Epilogue`. A position in the padding has
// the bits of its code; as a sign it has 0 bits, which count as -1, and the sum of its weights is added back.
//
// A plain C interface, without PyTorch: the library outlives any of its releases. The loops are compiled once for
// each instruction set and chosen when they run; all give the same result, in every bit.

#include <cstdint>
#include <cstring>

#include "bits_patches.h"
#include "bits_types.h"
#include "platform.h"
#include "threads.h"

namespace {

enum Path { PORTABLE = 0, NEON = 1, AVX2 = 1, AVX512 = 2 };

namespace portable {

struct Vec {
    using U = uint64_t;
    using Count = uint64_t;
    using Sum = uint64_t;
    using F = float;
    using I = uint32_t;
    static constexpr int LANES = 1, ROWS = 2, W = 1, FLOAT_ROWS = 1;
    static constexpr int64_t BLOCK = INT64_MAX / 2;
    static U load(const uint64_t *p) { return *p; }
    static U set(uint64_t a) { return a; }
    static U differ(U a, U b) { return a ^ b; }
    static U choose(U a, U yes, U no) { return no ^ (a & (yes ^ no)); }
    static Count no_count() { return 0; }
    static Sum no_sum() { return 0; }
    static Count count(Count total, U x) {
        x -= x >> 1 & 0x5555555555555555u;
        x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
        return total + ((((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
    }
    static Sum widen(Sum total, Count count) { return total + count; }
    static void store_sum(uint32_t *p, Sum a) { *p = static_cast<uint32_t>(a); }

    static F load(const float *p) { return *p; }
    static F load(const float *p, int) { return *p; }
    static I load(const uint32_t *p) { return *p; }
    static void store(float *p, F a) { *p = a; }
    static F set(float a) { return a; }
    static I none() { return 0; }
    static F add(F a, F b) { return a + b; }
    static uint32_t at_least(F a, F b) { return a >= b; }
    static I mark(I held, F a, F b, uint32_t bit) { return held | (a >= b ? bit : 0); }
    static void store(uint32_t *p, I a) { *p = a; }
    static I either(I a, I b) { return a | b; }
    static I up(I a) { return a << 1; }
    static I top(I a) { return a & 0x80000000u; }
    static I spread(I a) { return 0u - (a >> 31); }
    static F flip(F a, I sign) { return of_bits(bits_of(a) ^ sign); }
    static F keep(F a, I mask) { return of_bits(bits_of(a) & mask); }
    static I bits_of(F a) {
        uint32_t bits;
        std::memcpy(&bits, &a, 4);
        return bits;
    }
    static F of_bits(I bits) {
        float a;
        std::memcpy(&a, &bits, 4);
        return a;
    }
};

#include "bits_count.h"
#include "bits_loops.h"

}  // namespace portable

#ifdef LOWBIT_NEON
namespace neon {

#include "bits_neon.h"

#include "bits_count.h"
#include "bits_loops.h"

}  // namespace neon
#endif  // LOWBIT_NEON

#ifdef LOWBIT_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {

alignas(32) const int32_t FIRST[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Vec {
    using F = __m256;
    using I = __m256i;
    static constexpr int W = 8, FLOAT_ROWS = 4;
    static F load(const float *p) { return _mm256_loadu_ps(p); }
    static F load(const float *p, int n) {
        return _mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(FIRST + 8 - n)));
    }
    static I load(const uint32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static void store(float *p, F a) { _mm256_storeu_ps(p, a); }
    static F set(float a) { return _mm256_set1_ps(a); }
    static I none() { return _mm256_setzero_si256(); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static uint32_t at_least(F a, F b) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
    }
    static I mark(I held, F a, F b, uint32_t bit) {
        const __m256i set = _mm256_set1_epi32(static_cast<int32_t>(bit));
        return _mm256_or_si256(held, _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GE_OQ)), set));
    }
    static void store(uint32_t *p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a); }
    static I either(I a, I b) { return _mm256_or_si256(a, b); }
    static I up(I a) { return _mm256_slli_epi32(a, 1); }
    static I top(I a) { return _mm256_and_si256(a, _mm256_set1_epi32(INT32_MIN)); }
    static I spread(I a) { return _mm256_srai_epi32(a, 31); }
    static F flip(F a, I sign) { return _mm256_xor_ps(a, _mm256_castsi256_ps(sign)); }
    static F keep(F a, I mask) { return _mm256_and_ps(a, _mm256_castsi256_ps(mask)); }
};

#include "bits_count_avx2.h"
#include "bits_loops.h"

}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vpopcntdq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vpopcntdq")
#endif
namespace avx512 {

struct Vec {
    using U = __m512i;
    using Count = __m512i;
    using Sum = __m512i;
    using F = __m512;
    using I = __m512i;
    static constexpr int LANES = 8, ROWS = 8, W = 16, FLOAT_ROWS = 8;
    static constexpr int64_t BLOCK = INT64_MAX / 2;
    static U load(const uint64_t *p) { return _mm512_loadu_si512(p); }
    static U set(uint64_t a) { return _mm512_set1_epi64(static_cast<int64_t>(a)); }
    static U differ(U a, U b) { return _mm512_xor_epi64(a, b); }
    static U choose(U a, U yes, U no) { return _mm512_ternarylogic_epi64(a, yes, no, 0xca); }
    static Count no_count() { return _mm512_setzero_si512(); }
    static Sum no_sum() { return _mm512_setzero_si512(); }
    static Count count(Count total, U x) { return _mm512_add_epi64(total, _mm512_popcnt_epi64(x)); }
    static Sum widen(Sum total, Count count) { return _mm512_add_epi64(total, count); }
    static void store_sum(uint32_t *p, Sum a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi64_epi32(a));
    }

    static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static F load(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static I load(const uint32_t *p) { return _mm512_loadu_si512(p); }
    static void store(float *p, F a) { _mm512_storeu_ps(p, a); }
    static F set(float a) { return _mm512_set1_ps(a); }
    static I none() { return _mm512_setzero_si512(); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static I mark(I held, F a, F b, uint32_t bit) {
        const __m512i set = _mm512_set1_epi32(static_cast<int32_t>(bit));
        return _mm512_mask_or_epi32(held, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), held, set);
    }
    static void store(uint32_t *p, I a) { _mm512_storeu_si512(p, a); }
    static I either(I a, I b) { return _mm512_or_si512(a, b); }
    static I up(I a) { return _mm512_slli_epi32(a, 1); }
    static I top(I a) { return _mm512_and_si512(a, _mm512_set1_epi32(INT32_MIN)); }
    static I spread(I a) { return _mm512_srai_epi32(a, 31); }
    static F flip(F a, I sign) { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), sign)); }
    static F keep(F a, I mask) { return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), mask)); }
};

#include "bits_count.h"
#include "bits_loops.h"

}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // LOWBIT_X86

struct Loops {
    int unit, panel;
    decltype(&portable::count) count;
    decltype(&portable::finish) finish;
    decltype(&portable::add) add;
    decltype(&portable::pack_run) pack_run;
    decltype(&portable::pack_plane) pack_plane;
};

int best_path() {
#ifdef LOWBIT_X86
    if (__builtin_cpu_supports("avx512vpopcntdq")) return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
#ifdef LOWBIT_NEON
    return NEON;
#endif
    return PORTABLE;
}

#define LOWBIT_LOOPS(set) {set::UNIT, set::PANEL, set::count, set::finish, set::add, set::pack_run, set::pack_plane}

Loops loops_of([[maybe_unused]] int path) {
#ifdef LOWBIT_X86
    if (path == AVX512) return LOWBIT_LOOPS(avx512);
    if (path == AVX2) return LOWBIT_LOOPS(avx2);
#endif
#ifdef LOWBIT_NEON
    if (path == NEON) return LOWBIT_LOOPS(neon);
#endif
    return LOWBIT_LOOPS(portable);
}

int64_t panels_of(int64_t outputs, int64_t panel) { return (outputs + panel - 1) / panel; }

}  // namespace

// Raised when a signature changes, so that a library of an older build is never called.
LOWBIT_API int lowbit_bits_version() { return 1; }

// The best of the paths that this processor runs: portable (0), then AVX2 (1) and AVX512 (2), or NEON (1).
LOWBIT_API int lowbit_bits_best_path() { return best_path(); }

// Bytes of one output that are neighbours in a panel of weights: 8 in panels of 8 outputs, 1 in panels of 32.
LOWBIT_API int lowbit_bits_unit(int path) { return loops_of(path).unit; }

// One bit for each float of [runs][channels], x >= threshold, each run in whole words.
LOWBIT_API void lowbit_bits_pack_rows(const float *x, uint64_t *to, int64_t runs, int64_t channels, float threshold,
                                      int threads, int path) {
    const Loops loops = loops_of(path);
    const int64_t words = (channels + 63) / 64;
    split(runs, 1, runs * channels / 4, threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) loops.pack_run(x + r * channels, channels, threshold, to + r * words);
    });
}

// The same from [batch][groups][channels][pixels] to [batch][pixels][groups][words].
LOWBIT_API void lowbit_bits_pack_planes(const float *x, uint64_t *to, int64_t batch, int64_t groups, int64_t channels,
                                        int64_t pixels, float threshold, int threads, int path) {
    const Loops loops = loops_of(path);
    const int64_t words = (channels + 63) / 64, row = groups * words;
    split(batch * row, 1, batch * groups * channels * pixels / 4, threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t word = i % words, n = channels - 64 * word < 64 ? channels - 64 * word : 64;
            const float *from = x + (i / words * channels + 64 * word) * pixels;
            uint64_t *at = to + i / row * pixels * row + i % row;
            loops.pack_plane(from, static_cast<int>(n), pixels, threshold, at, row);
        }
    });
}

// The bits of codes, from [pixels][groups][channels] to [pixels][planes][groups][words], lowest plane first.
LOWBIT_API void lowbit_bits_pack_codes(const uint8_t *x, uint64_t *to, int64_t pixels, int64_t groups,
                                       int64_t channels, int64_t planes, int threads) {
    const int64_t words = (channels + 63) / 64;
    split(pixels * groups, 1, pixels * groups * channels, threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const uint8_t *run = x + r * channels;
            uint64_t *first = to + r / groups * planes * groups * words + r % groups * words;
            for (int64_t c = 0; c < channels; c += 8) {
                const int64_t n = channels - c < 8 ? channels - c : 8;
                uint8_t codes[8] = {};
                std::memcpy(codes, run + c, static_cast<size_t>(n));
                for (int64_t p = 0; p < planes; ++p) {
                    first[p * groups * words + c / 64] |= gather_bits(codes) << (c % 64);
                    for (uint8_t &code : codes) code = static_cast<uint8_t>(code >> 1);
                }
            }
        }
    });
}

// The bits that are set anywhere in a window; padding holds none.
LOWBIT_API void lowbit_bits_max_pool(const Geometry *geometry, const uint64_t *x, uint64_t *to, int threads) {
    const Geometry &g = *geometry;
    const int64_t words = g.run / 8, work = g.pixels() * g.taps() * words;
    const std::vector<uint64_t> none(static_cast<size_t>(words));
    split(g.pixels(), TILE, work, threads, [&](int64_t, int64_t begin, int64_t end) {
        Patches patches(g, x, none.data());
        for (int64_t at = begin; at < end; at += TILE) {
            const int64_t n = std::min<int64_t>(TILE, end - at);
            patches.gather(at, n, 0);
            for (int64_t i = 0; i < n; ++i) {
                const uint64_t *row = *patches.rows<uint64_t>(i);
                for (int64_t k = 0; k < g.taps() * words; ++k) to[(at + i) * words + k % words] |= row[k];
            }
        }
    });
}

// The product of packed activations and packed weights, [groups][panels] in the layout of the path.
LOWBIT_API void lowbit_bits_product(const Geometry *geometry, const uint64_t *x, const uint64_t *fill,
                                    const uint64_t *w, int ternary, const Epilogue *epilogue, int threads, int path) {
    const Geometry &g = *geometry;
    const Loops loops = loops_of(path);
    const int64_t words = g.taps() * g.run / 8, planes = g.planes, panels = panels_of(g.outputs, loops.panel);
    const int64_t panel = words * loops.panel * (ternary ? 2 : 1);
    const int64_t tile = TILE / planes > 0 ? TILE / planes : 1, per_chunk = CHUNK / loops.panel;
    const int64_t work = g.pixels() * planes * g.groups * g.outputs * words / 8;
    convolve(g, x, fill, work, threads,
             [&](const Patches &patches, int64_t at, int64_t pixels, int64_t group, int64_t chunk) {
        const int n = static_cast<int>(std::min<int64_t>(CHUNK, g.outputs - chunk * CHUNK));
        const uint64_t *weights = w + (group * panels + chunk * per_chunk) * panel;
        for (int64_t i = 0; i < pixels; i += tile) {
            uint32_t counts[TILE * CHUNK];
            const int64_t some = std::min(tile, pixels - i);
            loops.count(patches.rows<uint64_t>(i), static_cast<int>(some * planes), words, weights,
                        panels_of(n, loops.panel), ternary != 0, counts);
            for (int64_t j = 0; j < some; ++j)
                loops.finish(*epilogue, counts + j * planes * CHUNK, static_cast<int>(planes), at + i + j,
                             group * g.outputs + chunk * CHUNK, n, patches.outside(i + j),
                             epilogue->taps ? patches.n_outside(i + j) : 0);
        }
    });
}

// The sums of signed floats, times scale, plus bias; sums alone where scale is null. The order of a sum is fixed:
// blocks of 32 activations, tap by tap and then channel by channel, each added up from its first to its last, and
// the blocks from the first to the last.
LOWBIT_API void lowbit_bits_float_product(const Geometry *geometry, const float *x, const float *fill,
                                          const uint32_t *w, int ternary, const float *scale, const float *bias,
                                          float *to, int threads, int path) {
    const Geometry &g = *geometry;
    const Loops loops = loops_of(path);
    const int64_t length = g.taps() * g.run / static_cast<int64_t>(sizeof(float));
    const int64_t panels = panels_of(g.outputs, FLOAT_PANEL), outputs = g.groups * g.outputs;
    const int64_t panel = panels_of(length, FLOAT_BLOCK) * FLOAT_PANEL * (ternary ? 2 : 1);
    convolve(g, x, fill, g.pixels() * outputs * length / 8, threads,
             [&](const Patches &patches, int64_t at, int64_t pixels, int64_t group, int64_t chunk) {
        const int n = static_cast<int>(std::min<int64_t>(CHUNK, g.outputs - chunk * CHUNK));
        const uint32_t *weights = w + (group * panels + chunk * (CHUNK / FLOAT_PANEL)) * panel;
        const int64_t from = group * g.outputs + chunk * CHUNK;
        for (int64_t i = 0; i < pixels; i += TILE) {
            float sums[TILE * CHUNK];
            const int64_t some = std::min<int64_t>(TILE, pixels - i);
            loops.add(patches.rows<float>(i), static_cast<int>(some), length, weights, panels_of(n, FLOAT_PANEL),
                      ternary != 0, sums);
            for (int64_t j = 0; j < some; ++j) {
                float *out = to + (at + i + j) * outputs + from;
                for (int k = 0; k < n; ++k) {
                    const float sum = sums[j * CHUNK + k];
                    out[k] = scale ? sum * scale[from + k] + bias[from + k] : sum;
                }
            }
        }
    });
}
