// Square root, division and reciprocal without the range checks of the compiler's, so without a branch an element: the
// same correctly rounded bits inside the ranges named here, and nothing promised outside. bench/gpu_exact.cu checks
// them against the compiler's on the device.
//
// Each ends with the remainder computed exactly by one fma. The rest of the arithmetic has no fma (a8/math.h).
#pragma once

#include "a8/format.h"

#define A8_TWO_TO(exponent) a8_float((uint32_t)(127 + (exponent)) << 23)

// The processor's approximate instructions, whatever the compiler's flags: relative errors of about 2^-23.
A8_FN float a8_rough_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
A8_FN float a8_rough_reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sqrt(x) for 2^-100 <= x <= 2^100, and with kZero for x = 0 too: the maximum keeps 0 * infinity away.
template <bool kZero>
A8_FN float a8_exact_sqrt(float x) {
  float y = a8_rough_reciprocal_root(kZero ? fmaxf(x, A8_TWO_TO(-110)) : x);
  float root = x * y;
  return __fmaf_rn(__fmaf_rn(-root, root, x), 0.5f * y, root);
}

// 1 / sqrt(x) with both operations rounded, for 2^-100 <= x <= 2^100; NaN for x = 0.
A8_FN float a8_exact_reciprocal_root(float x) {
  float y = a8_rough_reciprocal_root(x);
  float root = x * y;
  root = __fmaf_rn(__fmaf_rn(-root, root, x), 0.5f * y, root);
  y = a8_rough_reciprocal(root);
  return __fmaf_rn(__fmaf_rn(-root, y, 1.0f), y, y);
}

// 1 / x for 2^-100 <= x <= 2^100; NaN for x = 0. What a8_exact_reciprocal_root does with its root, which can have every
// mantissa.
A8_FN float a8_exact_reciprocal_of_any(float x) {
  float y = a8_rough_reciprocal(x);
  return __fmaf_rn(__fmaf_rn(-x, y, 1.0f), y, y);
}

// a / b for b, a / b and their reciprocals within 2^-120 .. 2^120 and 2^-100 <= |a|, or a = 0, whose sign is kept.
A8_FN float a8_exact_div(float a, float b) {
  float y = a8_rough_reciprocal(b);
  y = __fmaf_rn(__fmaf_rn(-b, y, 1.0f), y, y);
  float q = a * y;
  q = __fmaf_rn(-__fmaf_rn(b, q, -a), y, q);
  return __fmaf_rn(-__fmaf_rn(b, q, -a), y, q);
}

// 1 / step for an integer 1 <= step <= 2^23, or any float of which a8_has_exact_reciprocal holds.
A8_FN float a8_exact_reciprocal(float step) {
  float y = a8_rough_reciprocal(step);
  y = __fmaf_rn(__fmaf_rn(-step, y, 1.0f), y, y);
  return __fmaf_rn(__fmaf_rn(-step, y, 1.0f), y, y);
}

// Of the bits of a number in 2^-100 .. 2^100: not of a mantissa of ones alone, which comes out one place low.
A8_FN bool a8_has_exact_reciprocal(uint32_t bits) { return (bits & 0x7fffffu) != 0x7fffffu; }

// a / 127 for 2^-100 <= a <= 2^100.
A8_FN float a8_exact_div_127(float a) {
  float q = a * 0.007874015748031496f;
  return __fmaf_rn(-__fmaf_rn(127.0f, q, -a), 0.007874015748031496f, q);
}
