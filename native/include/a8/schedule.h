// How the fields of a8_hyper that depend on the step follow from it: once for the CPU library, nvcc and NVRTC. In Python
// a8multi/plan/schedule.py is this file's mirror; a test compares their bits.
//
// Only +, -, *, / and sqrt of doubles, all correctly rounded, and no fma: a device, a host and Python get the same bits,
// and a replayed graph those of eager steps (docs/decisions/0010-derived-on-device.md). pow() promises no such thing.
#pragma once

#include "abi.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
A8_FN double a8_sqrt_double(double x) { return __dsqrt_rn(x); }
#else
A8_FN double a8_sqrt_double(double x) { return sqrt(x); }
#endif

// x^n by squaring, n >= 0.
A8_FN double a8_power(double x, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    if (n & 1) result = result * x;
    x = x * x;
  }
  return result;
}

// 2^(exponent * whole + exponent * fraction) for exponent <= 0, 0 <= whole < 64, |fraction| <= 1/2. The product with the
// whole number is split so that it is exact: the relative error stays below 2^-50 for any `whole`.
A8_FN double a8_exp2_product(double exponent, double whole, double fraction) {
  double spread = 134217729.0 * exponent;  // 2^27 + 1: Veltkamp's splitting
  double high = spread - (spread - exponent);
  double rest = (exponent - high) * whole + exponent * fraction;
  double head = high * whole;
  int64_t shift = (int64_t)(0.5 - (head + rest));  // minus the nearest integer
  double z = ((head + (double)shift) + rest) * 0.6931471805599453;
  double result = 1.0;
  for (int k = 14; k > 0; --k) result = 1.0 + result * z / (double)k;
  return result * a8_power(0.5, shift);
}

// t^exponent for an integer t >= 1 and exponent <= 0.
A8_FN double a8_decay(int64_t t, double exponent) {
  if (exponent < -2000.0) exponent = -2000.0;  // from t = 2 on nothing is left, and the splitting does not overflow
  double mantissa = (double)t, whole = 0.0;
  for (; mantissa > 1.4142135623730951; whole = whole + 1.0) mantissa = mantissa * 0.5;
  // log2(mantissa) = 2 / ln 2 * atanh(s), |s| < 0.172
  double s = (mantissa - 1.0) / (mantissa + 1.0), square = s * s;
  double series = 0.0;
  for (int k = 23; k > 0; k -= 2) series = series * square + 1.0 / (double)k;
  return a8_exp2_product(exponent, whole, 2.8853900817779268 * (s * series));
}

// Writes what `s` derives for step number t >= 1; the other fields of `h` stay.
A8_FN void a8_derive_row(const a8_schedule* s, int64_t t, a8_hyper* h) {
  double first = 1.0 / (1.0 - a8_power(s->beta1, t));
  double root = a8_sqrt_double(1.0 - a8_power(s->beta2, t));
  h->step = (uint32_t)t;
  if (s->rules & A8_BETA2_DECAYS) {
    double one_minus_beta2 = a8_decay(t, s->beta2_decay);
    h->beta2 = (float)(1.0 - one_minus_beta2);
    h->one_minus_beta2 = (float)one_minus_beta2;
  }
  if (s->rules & A8_ADAM_BIAS) {
    h->bias1 = (float)first;
    h->bias2 = (float)(1.0 / root);
    return;
  }
  if (s->rules & A8_BETA2_DECAYS) root = 1.0;
  h->bias1 = s->rules & A8_CORRECT_BIAS ? (float)(first * root) : 1.0f;
  h->bias2 = s->rules & A8_RELATIVE_STEP ? (float)(1.0 / a8_sqrt_double((double)t)) : 3.4028234663852886e38f;
}
