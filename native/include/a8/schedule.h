// How the fields of a8_hyper that depend on the step follow from it: once for the CPU library, nvcc and NVRTC. In
// Python a8multi/plan/schedule.py is this file's mirror; a test compares their bits.
//
// Only +, -, *, / and sqrt of doubles, all correctly rounded, and no fma: a device, a host and Python get the same
// bits, and a replayed graph those of eager steps (docs/decisions/0010-derived-on-device.md). pow() promises no such
// thing.
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

// 2^(exponent * whole + exponent * fraction) for exponent <= 0, 0 <= whole < 64, |fraction| <= 1/2. The product with
// the whole number is split so that it is exact: the relative error stays below 2^-50 for any `whole`.
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

// AdEMAMix's beta3 on its way from beta1 to its value: arXiv:2409.03137, section 3.1, where 1 / log(beta3) goes evenly
// from one to the other, and so does `half`, the number of steps in which the average loses half of what it held.
// progress: in [0, 1].
A8_FN double a8_beta_between(double first_half, double last_half, double progress) {
  double half = first_half + (last_half - first_half) * progress;
  return half > 0.0 ? a8_exp2_product(-1.0 / half, 1.0, 0.0) : 0.0;
}

// AdEMAMix's weight and decay of the slow average at step t.
A8_FN void a8_derive_slow(const a8_schedule* s, int64_t t, a8_hyper* h) {
  double mix = s->mix, beta3 = s->beta3, step = (double)t;
  if (s->rules & A8_MIX_WARMS_UP && step < s->mix_steps) mix = mix * step / s->mix_steps;
  if (s->rules & A8_BETA3_WARMS_UP && step < s->beta3_steps)
    beta3 = a8_beta_between(s->first_half, s->last_half, step / s->beta3_steps);
  h->mix = (float)mix;
  h->beta3 = (float)beta3;
  h->one_minus_beta3 = (float)(1.0 - beta3);
}

// Writes what `s` derives for step number t >= 1; the other fields of `h` stay.
A8_FN void a8_derive_row(const a8_schedule* s, int64_t t, a8_hyper* h) {
  double first = 1.0 / (1.0 - a8_power(s->beta1, t));
  double root = a8_sqrt_double(1.0 - a8_power(s->beta2, t));
  h->step = (uint32_t)t;
  if (s->rules & A8_FIRST_WHOLE) h->one_minus_beta1 = t == 1 ? 1.0f : (float)(1.0 - s->decay);
  if (s->rules & (A8_MIX_WARMS_UP | A8_BETA3_WARMS_UP)) a8_derive_slow(s, t, h);
  if (s->rules & A8_BETA2_DECAYS) {
    double one_minus_beta2 = a8_decay(t, s->beta2_decay);
    h->beta2 = (float)(1.0 - one_minus_beta2);
    h->one_minus_beta2 = (float)one_minus_beta2;
  }
  if (s->rules & (A8_ADAM_BIAS | A8_UNBIASED)) {
    bool unbiased = s->rules & A8_UNBIASED;
    h->bias1 = unbiased ? 1.0f : (float)first;
    h->bias2 = unbiased ? 1.0f : (float)(1.0 / root);
    if (s->rules & A8_LR_DECAYS) h->bias1 = (float)(1.0 / (1.0 + (double)(t - 1) * s->decay));
    return;
  }
  if (s->rules & A8_BETA2_DECAYS) root = 1.0;
  h->bias1 = s->rules & A8_CORRECT_BIAS ? (float)(first * root) : 1.0f;
  h->bias2 = s->rules & A8_RELATIVE_STEP ? (float)(1.0 / a8_sqrt_double((double)t)) : 3.4028234663852886e38f;
}
