// The arithmetic of the element-wise rules, once for every backend; see math.h for what it may use.
//
// A rule is a function of one element: from the parameter, the gradient and up to three moments to the new moments and
// the update u; then p <- p * decay - step_size * u. A new rule is a kind in abi.h, a specialisation of a8_rule_update
// and, where its step size is not lr, a line of a8_rule_of. KIND: an a8_rule_kind.
#pragma once

#include "math.h"

typedef struct a8_rule {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3;
  float decay;       // 1 - lr * weight_decay, or 1 where it is part of the gradient or of the update
  float l2;          // weight_decay where it is added to the gradient, else 0
  float in_update;   // weight_decay where it is added to the update, else 0
  float step_size;   // lr and all that scales u
  float first_bias;  // 1 / (1 - beta1^t), where it cannot be part of step_size
  float root_bias;   // 1 / sqrt(1 - beta2^t)
  float mix;         // weight of the slow average
  float eps;
  float local;     // LARS: what scales the gradient
  uint32_t sign;   // flips the gradient when maximising
  uint32_t flags;  // of the hyper-parameters
} a8_rule;

// Which sums over the tensor a rule needs before it can be applied: of p^2 and of a8_rule_measure.
A8_FN bool a8_rule_has_norm(uint32_t kind) { return kind == A8_LAMB || kind == A8_LARS; }

// Whether an int8 first moment is rounded by phases where A8_STOCHASTIC_STATE is set: Lion's is slow, and small values
// of it matter as much as large ones (docs/decisions/0019).
A8_FN bool a8_rule_phases_first(uint32_t kind) { return kind == A8_LION; }

// LARS's coefficient: trust * |p| / (|g| + weight_decay * |p|), 1 where a norm is zero.
// You et al. 2017, arXiv:1708.03888, equation 6.
A8_FN float a8_lars_local(const a8_hyper* h, const float* totals) {
  float p = a8_sqrt(totals[0]), g = a8_sqrt(totals[1]);
  float local = a8_div(h->trust * p, g + h->weight_decay * p + h->eps);
  return p > 0.0f && g > 0.0f ? local : 1.0f;
}

// LAMB's trust ratio |p| / |u|, 1 where a norm is zero. You et al. 2020, arXiv:1904.00962, Algorithm 2 with phi(z) = z.
A8_FN float a8_lamb_trust(const float* totals) {
  float p = a8_sqrt(totals[0]), u = a8_sqrt(totals[1]);
  return p > 0.0f && u > 0.0f ? a8_div(p, u) : 1.0f;
}

// totals: sums of p^2 and of a8_rule_measure over the tensor, for the kinds that have them; else not read.
A8_FN a8_rule a8_rule_of(const a8_hyper* h, float lr, uint32_t kind, const float* totals) {
  bool l2 = h->flags & A8_L2_DECAY, inside = kind == A8_LAMB || kind == A8_LARS;
  a8_rule rule;
  rule.beta1 = h->beta1;
  rule.one_minus_beta1 = h->one_minus_beta1;
  rule.beta2 = h->beta2;
  rule.one_minus_beta2 = h->one_minus_beta2;
  rule.beta3 = h->beta3;
  rule.one_minus_beta3 = h->one_minus_beta3;
  rule.decay = l2 || inside ? 1.0f : 1.0f - lr * h->weight_decay;
  rule.l2 = l2 && !inside ? h->weight_decay : 0.0f;
  rule.in_update = inside ? h->weight_decay : 0.0f;
  rule.step_size = kind == A8_ADAM || kind == A8_ADAGRAD ? lr * h->bias1 : lr;
  rule.first_bias = h->bias1;
  rule.root_bias = h->bias2;
  rule.mix = h->mix;
  rule.eps = h->eps;
  rule.local = 1.0f;
  rule.sign = h->flags & A8_MAXIMIZE ? 0x80000000u : 0u;
  rule.flags = h->flags;
  if (kind == A8_LAMB && totals) rule.step_size = lr * a8_lamb_trust(totals);
  if (kind == A8_LARS && totals) rule.local = a8_lars_local(h, totals);
  return rule;
}

// The gradient that the moments see. With no L2 term it is untouched: 0 * p is not 0 for an infinite p.
template <typename F>
A8_FN F a8_rule_gradient(const a8_rule* r, F g, F p) {
  F gradient = a8_signed(g, r->sign);
  return r->l2 != 0.0f ? gradient + r->l2 * p : gradient;
}

template <typename F>
A8_FN F a8_rule_param(const a8_rule* r, F p, F u) {
  return p * r->decay - r->step_size * u;
}

// --- Averages that several rules have. ---

template <typename F>
A8_FN F a8_rule_first(const a8_rule* r, F m, F g) {
  return r->beta1 * m + r->one_minus_beta1 * g;
}

template <typename F>
A8_FN F a8_rule_second(const a8_rule* r, F v, F g) {
  return r->beta2 * v + (r->one_minus_beta2 * g) * g;
}

template <typename F>
A8_FN F a8_rule_root(const a8_rule* r, F v) {
  return a8_sqrt(v) * r->root_bias + r->eps;
}

// --- The rules. `moments`: in: as they are, out: as they are to be stored. Without one it is zero and not stored. ---

template <typename F>
struct a8_moments {
  F first, second, third;
};

template <int KIND>
struct a8_rule_update;

// Kingma & Ba 2015, Algorithm 1; AdamW: Loshchilov & Hutter 2019, Algorithm 2.
template <>
struct a8_rule_update<A8_ADAM> {
  template <typename F>
  static A8_MEMBER F of(const a8_rule* r, F, F g, a8_moments<F>* m) {
    m->first = a8_rule_first(r, m->first, g);
    m->second = a8_rule_second(r, m->second, g);
    return a8_div(m->first, a8_rule_root(r, m->second));
  }
};

// Chen et al. 2023, arXiv:2302.06675, Algorithm 2. The sign of NaN is NaN, that of zero is zero.
template <>
struct a8_rule_update<A8_LION> {
  template <typename F>
  static A8_MEMBER F of(const a8_rule* r, F, F g, a8_moments<F>* m) {
    F c = a8_rule_first(r, m->first, g), one = 1.0f - F{};
    m->first = r->beta2 * m->first + r->one_minus_beta2 * g;
    return a8_select(c > 0.0f, one, a8_select(c < 0.0f, -one, c));
  }
};

// torch.optim.RMSprop (Hinton, lecture 6e; centered: Graves 2013, arXiv:1308.0850). first: the momentum, third: the
// average gradient of the centered variant; beta1 or beta3 is 0 without.
template <>
struct a8_rule_update<A8_RMSPROP> {
  template <typename F>
  static A8_MEMBER F of(const a8_rule* r, F, F g, a8_moments<F>* m) {
    F zero = F{};
    m->second = a8_rule_second(r, m->second, g);
    m->third = r->beta3 * m->third + r->one_minus_beta3 * g;
    F u = a8_div(g, a8_rule_root(r, a8_at_least(m->second - m->third * m->third, zero)));
    m->first = r->beta1 * m->first + u;
    return m->first;
  }
};

// torch.optim.SGD. one_minus_beta1: 1 - dampening.
template <>
struct a8_rule_update<A8_SGD> {
  template <typename F>
  static A8_MEMBER F of(const a8_rule* r, F, F g, a8_moments<F>* m) {
    m->first = a8_rule_first(r, m->first, g);
    return r->flags & A8_NESTEROV ? g + r->beta1 * m->first : m->first;
  }
};

// Duchi, Hazan & Singer 2011; torch.optim.Adagrad.
template <>
struct a8_rule_update<A8_ADAGRAD> {
  template <typename F>
  static A8_MEMBER F of(const a8_rule* r, F, F g, a8_moments<F>* m) {
    m->second = m->second + g * g;
    return a8_div(g, a8_rule_root(r, m->second));
  }
};

// Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137, Algorithm 1. third: the slow average, which has no bias
// correction.
template <>
struct a8_rule_update<A8_ADEMAMIX> {
  template <typename F>
  static A8_MEMBER F of(const a8_rule* r, F, F g, a8_moments<F>* m) {
    m->first = a8_rule_first(r, m->first, g);
    m->second = a8_rule_second(r, m->second, g);
    m->third = r->beta3 * m->third + r->one_minus_beta3 * g;
    return a8_div(m->first * r->first_bias + r->mix * m->third, a8_rule_root(r, m->second));
  }
};

// You et al. 2020, arXiv:1904.00962, Algorithm 2.
template <>
struct a8_rule_update<A8_LAMB> {
  template <typename F>
  static A8_MEMBER F of(const a8_rule* r, F p, F g, a8_moments<F>* m) {
    m->first = a8_rule_first(r, m->first, g);
    m->second = a8_rule_second(r, m->second, g);
    F u = a8_div(m->first * r->first_bias, a8_rule_root(r, m->second));
    return r->in_update != 0.0f ? u + r->in_update * p : u;
  }
};

// You et al. 2017, arXiv:1708.03888, Algorithm 1, with the learning rate outside of the momentum as torch.optim.SGD has
// it.
template <>
struct a8_rule_update<A8_LARS> {
  template <typename F>
  static A8_MEMBER F of(const a8_rule* r, F p, F g, a8_moments<F>* m) {
    F scaled = r->local * (r->in_update != 0.0f ? g + r->in_update * p : g);
    m->first = a8_rule_first(r, m->first, scaled);
    return r->flags & A8_NESTEROV ? scaled + r->beta1 * m->first : m->first;
  }
};

// Whose square the norm phase sums, beside p^2: LAMB's update, LARS's gradient.
template <int KIND, typename F>
A8_FN F a8_rule_measure(const a8_rule* r, F p, F g, a8_moments<F> m) {
  return KIND == A8_LARS ? g : a8_rule_update<KIND>::of(r, p, g, &m);
}
