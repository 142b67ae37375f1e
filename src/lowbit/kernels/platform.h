// What the compiler and the processor it compiles for offer to the kernels.

#pragma once

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define LOWBIT_X86 1
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define LOWBIT_NEON 1
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own _mm512_undefined_ps, which its other intrinsics use, trips it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(_WIN32)
#define LOWBIT_API extern "C" __declspec(dllexport)
#else
#define LOWBIT_API extern "C" __attribute__((visibility("default")))
#endif

// A loop that is compiled apart from its callers, for registers of its own.
#if defined(__GNUC__) || defined(__clang__)
#define LOWBIT_APART __attribute__((noinline))
#else
#define LOWBIT_APART
#endif

// Unrolls the short loop that follows before anything else, so that arrays it indexes become registers.
#if defined(__clang__)
#define LOWBIT_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define LOWBIT_UNROLL _Pragma("GCC unroll 16")
#else
#define LOWBIT_UNROLL
#endif
