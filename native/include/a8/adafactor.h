// The arithmetic of Adafactor and CAME, once for every backend; see math.h for what it may use.
//
// Shazeer & Stern 2018, arXiv:1804.04235, Algorithms 4 and 5, with torch.optim.Adafactor's eps1 and weight decay. CAME:
// Luo et al. 2023, arXiv:2307.02047, Algorithm 2. The norm-growth limiter: Chen et al. 2024 (Fira), arXiv:2410.01623,
// section 3.3.
#pragma once

#include "math.h"

// An average moved towards x. Never negative for x, average >= 0, unlike average + w * (x - average).
A8_FN float a8_average(const a8_hyper* h, float average, float x) {
  return h->beta2 * average + h->one_minus_beta2 * x;
}

// Of the bits of a chunk's first A8_SAMPLES elements as they are stored: enough to notice a parameter that was
// exchanged behind autograd's back (param.data.copy_ does not count as a write). Starts at the chunk's length.
A8_FN uint32_t a8_fingerprint(uint32_t fingerprint, uint32_t bits) { return (fingerprint ^ bits) * 0x01000193u; }

// 1 / sqrt(v), at most 1 / eps: the reciprocal root of max(v, eps^2), for elements, row means and column means alike.
A8_FN float a8_reciprocal_root(float v) { return a8_div(1.0f, a8_sqrt(v)); }

// What the norm phase adds for an element with a second moment of its own: the square of x / sqrt(v), 1 / sqrt(v) at
// most `bound`. Without a root, but where the bound's square overflows.
A8_FN float a8_update_square(float x, float v, float bound) {
  if (bound <= 1.8e19f) return x * a8_at_most(a8_div(1.0f, v), bound * bound) * x;
  float u = x * a8_at_most(a8_reciprocal_root(v), bound);
  return u * u;
}

// max(1, RMS(u) / d), by which the update is divided. squares: the sum of its squares.
A8_FN float a8_excess(const a8_hyper* h, float numel, float squares) {
  return h->clip > 0.0f ? a8_at_least(a8_div(a8_sqrt(a8_div(squares, numel)), h->clip), 1.0f) : 1.0f;
}

// The norm-growth limiter: the factor that keeps the update's norm within h->growth times the last one, and in *last
// the norm that is left. There is nothing to compare with before the first update and after zero ones (a zero gradient
// says nothing of how large the next may be), and what is not finite is not remembered.
A8_FN float a8_limit(const a8_hyper* h, float squares, float* last) {
  float norm = a8_sqrt(squares), most = h->growth * *last, factor = 1.0f;
  if (!(norm > 0.0f && norm <= 3.4028234663852886e38f)) return factor;
  if (*last > 0.0f && norm > most) {
    factor = a8_div(most, norm);
    norm = most;
  }
  *last = norm;
  return factor;
}

typedef struct a8_adafactor_rule {
  float decay;      // of the parameter
  float step_size;  // of the update as the last moment leaves it
  float clipped;    // 1 / max(1, RMS(u) / d) where the first moment averages the clipped update, else 1
} a8_adafactor_rule;

// totals: sums over the tensor's numel elements of p^2 and u^2, and the limiter's factor.
// h->bias1: factor of the step size (bias corrections); h->bias2: upper bound of lr (relative_step), or FLT_MAX.
A8_FN a8_adafactor_rule a8_adafactor_rule_of(const a8_hyper* h, float lr, float numel, const float* totals) {
  const float squares = totals[1], factor = totals[2];
  float rho = a8_at_most(lr, h->bias2);
  float alpha = rho;
  if (h->flags & A8_SCALE_PARAMETER) alpha = a8_at_least(a8_sqrt(a8_div(totals[0], numel)), h->eps2) * rho;
  alpha = alpha * h->bias1;
  a8_adafactor_rule rule;
  rule.decay = 1.0f - (h->flags & A8_SCALE_DECAY ? alpha : rho) * h->weight_decay;
  if (h->flags & A8_AVERAGE_UPDATE) {
    rule.clipped = a8_div(1.0f, a8_excess(h, numel, squares));
    rule.step_size = alpha * factor;
  } else {
    rule.clipped = 1.0f;
    rule.step_size = a8_div(alpha * factor, a8_excess(h, numel, squares * factor * factor));
  }
  return rule;
}

// What CAME averages over rows and columns: u is the clipped update, m the first moment that has taken it in.
template <typename F>
A8_FN F a8_residual(F u, F m, float eps3) {
  F difference = u - m;
  return difference * difference + eps3;
}

A8_FN float a8_confidence(const a8_hyper* h, float confidence, float x) {
  return h->beta3 * confidence + h->one_minus_beta3 * x;
}
