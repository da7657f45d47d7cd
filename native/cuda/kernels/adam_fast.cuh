// Adam on one unit in the default state: int8 first and log8 second moment.
//
// Instruction slots are the other limit: 76 an element last as long as its bytes on an H200, so one branch a unit
// decides that no element needs the compiler's guarded division and square root, which branch for each. Where a formula
// of a8/rules.h, a8/math.h or a8/format.h is spelt differently, the bits are the same.
#pragma once

#include "element_fast.cuh"

// The ranges of exact.cuh hold for a block whose moments lie in these and a rule that a8_is_ordinary; zeros may mix in.
#define A8_ORDINARY_SECOND_MIN A8_TWO_TO(-100)
#define A8_ORDINARY_SECOND_MAX A8_TWO_TO(40)

// Small first moments are divided 2^40 times as large, lest remainders be flushed to zero; the step size undoes it.
#define A8_LIFT 40

A8_FN bool a8_is_fraction(float x) { return x >= 0.0f && x <= 1.0f; }

A8_FN bool a8_is_ordinary(const a8_rule& r) {
  bool step = r.step_size == 0.0f || (r.step_size >= A8_TWO_TO(-80) && r.step_size <= 0.5f);
  return step && r.eps >= A8_TWO_TO(-40) && r.eps <= A8_TWO_TO(20) && r.root_bias >= A8_TWO_TO(-10) &&
         r.root_bias <= A8_TWO_TO(10) && a8_is_fraction(r.beta1) && a8_is_fraction(r.one_minus_beta1) &&
         a8_is_fraction(r.beta2) && a8_is_fraction(r.one_minus_beta2);
}

// The least a8_log8_low_key of eight values.
A8_FN uint32_t a8_low_key_of_eight(const float* v) {
  uint32_t low = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < 8; ++i) low = min(low, a8_log8_low_key((int32_t)a8_bits(v[i])));
  return low;
}

template <uint32_t kParam, uint32_t kGrad>
struct a8_fast_rule<A8_ADAM, kParam, kGrad> : a8_fast_lanes<kParam, kGrad, true> {
  typedef a8_fast_lanes<kParam, kGrad, true> Lanes;
  typedef typename Lanes::Stage Stage;
  static const int kRuns = Lanes::kRuns, kParamBytes = Lanes::kParamBytes, kGradBytes = Lanes::kGradBytes;

  static __device__ __forceinline__ bool suits(const a8_element_job& job) {
    const a8_tensor* t = job.tensor;
    return a8_suits_lanes(t) && t->second_format == A8_LOG8 && t->second_block_size == A8_USUAL_BLOCK &&
           a8_aligned(t->second, 8) && a8_is_ordinary(job.rule);
  }

  static __device__ __forceinline__ void store_second(const a8_element_job& job, const a8_fast_place& at, uint32_t pair,
                                                      const float* v, int32_t origin, float inverse_step) {
    float position[8];
    uint32_t packed[2], phase = a8_phase_at(job.phase, 2 * pair);
    a8_log8_positions(v, origin, inverse_step, position);
    if (job.rule.flags & A8_STOCHASTIC_STATE) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        position[i] =
            position[i] + a8_offset(phase + (kRuns == 1 ? i : i / 4 * (A8_USUAL_BLOCK / 2) + i % 4) * A8_PHASE_STRIDE);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) position[i] = position[i] + A8_LOG8_NEAREST;
    }
    a8_log8_eight(position, packed);
    a8_store_eight_codes<kRuns>(at.second, packed);
  }

  // a8_rule_param of eight. kZeros: some v may be zero.
  template <bool kZeros>
  static __device__ __forceinline__ void update(const a8_rule& rule, const float* m, const float* v,
                                                const uint32_t* param, float* p) {
    float lowered_step = rule.step_size * A8_TWO_TO(-A8_LIFT);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float root = a8_exact_sqrt<kZeros>(v[i]) * rule.root_bias + rule.eps;
      float ratio = a8_exact_div(__fmul_rn(m[i], A8_TWO_TO(A8_LIFT)), root);
      p[i] = a8_value<kParam>(param, i) * rule.decay - lowered_step * ratio;
    }
  }

  // Updates a unit from `stage` and, when there is `more`, loads the stage anew. at: what to load; the unit itself is
  // kStages strides behind. A unit that is not ordinary is only noted in `left`.
  static __device__ __forceinline__ void step(const a8_element_job& job, const a8_fast_place& at, uint32_t pair,
                                              uint32_t unit, bool more, Stage* stage, unsigned long long* left) {
    const a8_rule& rule = job.rule;
    float m[8], v[8], p[8];
    uint32_t grad[2 * kGradBytes], param[2 * kParamBytes];
    Lanes::template read_values<kGradBytes>(stage->grad, grad);
    uint4 codes = *reinterpret_cast<const uint4*>(&stage->codes[2 * threadIdx.x]);
    a8_log8_header header = a8_log8_unpack(stage->header[threadIdx.x]);
    float scale = stage->scale[threadIdx.x];
    uint32_t first[2] = {codes.x, codes.y}, second[2] = {codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = a8_value<kGrad>(grad, i);
    // a8_rule_gradient. Without L2 its sign goes to the factor: g itself is only squared.
    float one_minus_beta1 = a8_signed(rule.one_minus_beta1, rule.sign);
    if (rule.l2 != 0.0f) {
      Lanes::template read_values<kParamBytes>(stage->param, param);
      one_minus_beta1 = rule.one_minus_beta1;
#pragma unroll
      for (int i = 0; i < 8; ++i) m[i] = a8_signed(m[i], rule.sign) + rule.l2 * a8_value<kParam>(param, i);
    }
    float most = 0.0f;
    uint32_t low = 0xffffffffu, high = 0;
    a8_log8_decode_eight(second, header, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float g = m[i];
      m[i] = a8_int8_decode((int32_t)(int8_t)(first[i / 4] >> (8 * (i % 4))), scale);
      m[i] = rule.beta1 * m[i] + one_minus_beta1 * g;
      v[i] = a8_rule_second(&rule, v[i], g);
      // No m is NaN unless the scale or a v is not finite, which is not ordinary.
      most = fmaxf(most, fabsf(m[i]));
      // Without a8_log8_bits: no v is negative or subnormal.
      low = min(low, a8_bits(v[i]));
      high = max(high, a8_bits(v[i]));
    }
    // Most warps have no zero, and need neither the key that puts zeros last nor a root of zero.
    bool zeros = __any_sync(A8_LANE_MASK, low == 0);
    low = zeros ? a8_low_key_of_eight(v) : low - 1u;
    bool ordinary = a8_absmax_finite(a8_bits(scale));

    uint32_t most_bits = a8_lanes_max<16>(a8_bits(most));
    low = a8_lanes_min<16>(low);
    high = a8_lanes_max<16>(high);
    most = a8_float(most_bits);
    ordinary &= low >= a8_bits(A8_ORDINARY_SECOND_MIN) - 1u && high <= a8_bits(A8_ORDINARY_SECOND_MAX);
    ordinary &= a8_is_ordinary_first(most_bits);
    bool all_ordinary = __all_sync(A8_LANE_MASK, ordinary);
    Lanes::template read_values<kParamBytes>(stage->param, param);
    if (more) Lanes::load(at, stage);
    if (!all_ordinary) {
      if (threadIdx.x % 32 == 0) a8_leave_unit(left, unit);
      return;
    }

    if (zeros)
      update<true>(rule, m, v, param, p);
    else
      update<false>(rule, m, v, param, p);
    a8_fast_place to = at;
    Lanes::advance(&to, -Lanes::kStages);
    Lanes::store_param(job, to, pair, p);
    float inverse = most_bits == 0 ? 0.0f : a8_exact_div(A8_INT8_LEVELS, most);
    Lanes::template store_first<A8_ADAM>(job, to, pair, m, inverse);
    a8_log8_header after = a8_log8_header_of(a8_log8_low(low), (int32_t)high, header);
    store_second(job, to, pair, v, a8_log8_origin(after.lo), a8_exact_reciprocal((float)after.step));
    if ((threadIdx.x & 15u) == 0) {
      __stcs(reinterpret_cast<float*>(to.first_block), most_bits == 0 ? 0.0f : a8_exact_div_127(most));
      __stcs(reinterpret_cast<uint32_t*>(to.second_block), a8_log8_pack(after));
    }
  }
};
