// A rule whose only moment is a first one, without a division, on one unit: int8 in blocks of 128. Of eight bytes an
// element two instruction slots in three are free on an H200, so the formulas are those of a8/rules.h as they stand.
#pragma once

#include "element_fast.cuh"

template <int KIND, uint32_t kParam, uint32_t kGrad>
struct a8_fast_rule : a8_fast_lanes<kParam, kGrad, false> {
  typedef a8_fast_lanes<kParam, kGrad, false> Lanes;
  typedef typename Lanes::Stage Stage;
  static const int kParamBytes = Lanes::kParamBytes, kGradBytes = Lanes::kGradBytes;

  static __device__ __forceinline__ bool suits(const a8_element_job& job) { return a8_suits_lanes(job.tensor); }

  // Updates a unit from `stage` and, when there is `more`, loads the stage anew. at: what to load; the unit itself is
  // kStages strides behind. A unit that is not ordinary is only noted in `left`.
  static __device__ __forceinline__ void step(const a8_element_job& job, const a8_fast_place& at, uint32_t pair,
                                              uint32_t unit, bool more, Stage* stage, unsigned long long* left) {
    const a8_rule& rule = job.rule;
    float m[8], p[8], g[8];
    uint32_t grad[2 * kGradBytes], param[2 * kParamBytes];
    Lanes::template read_values<kGradBytes>(stage->grad, grad);
    Lanes::template read_values<kParamBytes>(stage->param, param);
    uint2 codes = stage->codes[threadIdx.x];
    float scale = stage->scale[threadIdx.x];
    if (more) Lanes::load(at, stage);
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // a8_rule_gradient
      p[i] = a8_value<kParam>(param, i);
      g[i] = a8_signed(a8_value<kGrad>(grad, i), rule.sign);
    }
    if (rule.l2 != 0.0f) {
#pragma unroll
      for (int i = 0; i < 8; ++i) g[i] = g[i] + rule.l2 * p[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t code = (i < 4 ? codes.x : codes.y) >> (8 * (i % 4));
      a8_moments<float> x = {a8_int8_decode((int32_t)(int8_t)code, scale), 0.0f, 0.0f};
      float u = a8_rule_update<KIND>::of(&rule, p[i], g[i], &x);
      m[i] = x.first;
      p[i] = a8_rule_param(&rule, p[i], u);
    }
    uint32_t most_bits = a8_most_of_lanes(m);
    if (!__all_sync(A8_LANE_MASK, a8_is_ordinary_first(most_bits))) {
      if (threadIdx.x % 32 == 0) a8_leave_unit(left, unit);
      return;
    }
    float most = a8_float(most_bits);
    a8_fast_place to = at;
    Lanes::advance(&to, -Lanes::kStages);
    Lanes::store_param(job, to, pair, p);
    float inverse = most_bits == 0 ? 0.0f : a8_exact_div(A8_INT8_LEVELS, most);
    Lanes::template store_first<KIND>(job, to, pair, m, inverse);
    if ((threadIdx.x & 15u) == 0)
      __stcs(reinterpret_cast<float*>(to.first_block), most_bits == 0 ? 0.0f : a8_exact_div_127(most));
  }
};
