// Fixed-width names and function qualifiers for every compiler that reads these headers:
// the C++ compiler (once per instruction set), nvcc, and NVRTC, which has no <stdint.h>.
// Must not include anything when NVRTC compiles it.
#pragma once

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define A8_FN static __device__ __forceinline__
#elif defined(_MSC_VER)
#define A8_FN static __forceinline
#else
// static and always inlined: an out-of-line copy compiled for AVX-512 must never be linked into the baseline.
#define A8_FN static inline __attribute__((always_inline, unused))
#endif

// For member functions, what A8_FN is for others.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define A8_MEMBER __device__ __forceinline__
#elif defined(_MSC_VER)
#define A8_MEMBER __forceinline
#else
#define A8_MEMBER __attribute__((always_inline))
#endif

// The bits of a float and back. The one place where the compilers differ.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
A8_FN uint32_t a8_bits(float x) { return __float_as_uint(x); }
A8_FN float a8_float(uint32_t bits) { return __uint_as_float(bits); }
A8_FN float a8_sqrt(float x) { return __fsqrt_rn(x); }
A8_FN float a8_div(float a, float b) { return __fdiv_rn(a, b); }
#else
#include <math.h>
#include <string.h>
A8_FN uint32_t a8_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
A8_FN float a8_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
A8_FN float a8_sqrt(float x) { return sqrtf(x); }
A8_FN float a8_div(float a, float b) { return a / b; }
#endif

// Conversions and choice by name, so that a formula can be written once for numbers and for vectors of them: the CPU's
// fast paths overload these, a8_bits, a8_float, a8_sqrt and a8_div for the vectors of native/cpu/vector.inc.
A8_FN float a8_to_float(int32_t x) { return (float)x; }
A8_FN int32_t a8_truncate(float x) { return (int32_t)x; }
A8_FN uint32_t a8_select(bool condition, uint32_t yes, uint32_t no) { return condition ? yes : no; }
A8_FN int32_t a8_select(bool condition, int32_t yes, int32_t no) { return condition ? yes : no; }
A8_FN float a8_select(bool condition, float yes, float no) { return condition ? yes : no; }
