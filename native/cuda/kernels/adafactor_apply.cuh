// The apply phase of Adafactor on one chunk by one warp.
#pragma once

#include "adafactor_fast.cuh"

// Lines that are brought to L2 before they are read, for the full second moment.
#define A8_LINES_FETCHED 8

// Writes the eight parameters number e .. e + 7 of the chunk and adds the squares of what is stored.
template <uint32_t kParam>
A8_FN void a8_put_params(const a8_factor_job& job, const a8_factor_write& write, uint32_t e, uint32_t update_sign,
                         const a8_eight<kParam>& param, const float* u, float* accumulators) {
  float p[8], step_size = a8_signed(write.rule.step_size, update_sign);
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = a8_value<kParam>(param.w, i) * write.rule.decay - step_size * u[i];
  a8_eight<kParam> out;
  if (kParam != A8_F32 && (job.hyper.flags & A8_STOCHASTIC_WRITE)) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = a8_noise_word(write.write, e / 2 + i);
    a8_pack_eight_stochastic<kParam, true>(p, words, out.w);
  } else {
    a8_pack_eight<kParam, true>(p, out.w);
  }
  a8_put<kParam>(out, job.tensor->param, job.from + e);
  if (!a8_scales(job)) return;
  float stored[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) stored[i] = a8_value<kParam>(out.w, i);
  a8_add_eight_squares(stored, accumulators);
}

// Leaves the chunk's sum and fingerprint to the next step. Lane 0 reads what it has written itself.
A8_FN void a8_leave_squares(const a8_factor_job& job, float* accumulators) {
  if (!a8_scales(job)) return;
  float squares = a8_fold_warp(accumulators);
  if ((threadIdx.x & 31u) == 0) {
    job.sums[0] = squares;
    job.sums[2 * (int64_t)job.tensor->chunks] = a8_float(a8_fingerprint_of(job));
  }
}

template <uint32_t kParam, uint32_t kGrad>
struct a8_apply_line {
  a8_eight<kGrad> grad;
  a8_eight<kParam> param;
  a8_first_eight first;
};

template <uint32_t kParam, uint32_t kGrad, bool kMomentum>
A8_FN void a8_get_apply_line(a8_apply_line<kParam, kGrad>* line, const a8_factor_job& job, int64_t e) {
  a8_get<kGrad, true>(&line->grad, job.tensor->grad, e);
  a8_get<kParam, true>(&line->param, job.tensor->param, e);
  if (kMomentum) a8_get_first(&line->first, job.tensor, e);
}

// With a factored second moment.
template <uint32_t kParam, uint32_t kGrad, bool kMomentum>
static __device__ __noinline__ void a8_apply_factored(a8_factor_chunk chunk, const a8_nf4_table* table) {
  a8_factor_job job = a8_factor_job_of(chunk);
  a8_factor_write write = a8_factor_write_of(job);
  const int kAhead = kParam == A8_F32 || kGrad == A8_F32 ? 2
                     : !kMomentum                        ? 4
                     : kParam == A8_F16                  ? 2
                                                         : 3;  // lines in flight
  uint32_t e = 8 * (threadIdx.x & 31u);
  a8_apply_line<kParam, kGrad> ahead[kAhead];
  a8_matrix_place place = a8_place_of(job);
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (e + i * A8_LINE < job.count)
      a8_get_apply_line<kParam, kGrad, kMomentum>(&ahead[i], job, job.from + e + i * A8_LINE);
  for (uint32_t line0 = 0; line0 < job.count; line0 += kAhead * A8_LINE) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (line0 + i * A8_LINE >= job.count) break;
      a8_apply_line<kParam, kGrad> line = ahead[i];
      bool active = e < job.count;
      if (e + kAhead * A8_LINE < job.count)
        a8_get_apply_line<kParam, kGrad, kMomentum>(&ahead[i], job, job.from + e + kAhead * A8_LINE);
      float root[8], m[8], u[8];
      a8_factored_roots(place, job.bound, active, root);
      a8_next_line(&place);
      if (kMomentum) {
        if (!active) a8_clear<kGrad>(&line.grad);
        a8_decode_first(line.first, job.tensor, job.from + e, active, table, m);
      }
      a8_update_eight<kGrad, kMomentum>(job, line.grad, root, m, u);
      if (active) a8_put_params<kParam>(job, write, e, a8_update_sign<kMomentum>(job), line.param, u, accumulators);
      if (kMomentum) a8_put_first(job.tensor, job.from + e, active, table, m);
      e += A8_LINE;
    }
  }
  a8_leave_squares(job, accumulators);
}

// The maximum over groups of `lanes` lanes: 4, 8, 16 or 32.
A8_FN uint32_t a8_group_max(uint32_t x, uint32_t lanes) {
  if (lanes == 32) return a8_lanes_max<32>(x);
  for (uint32_t bit = lanes / 2; bit > 0; bit /= 2) x = max(x, __shfl_xor_sync(A8_LANE_MASK, x, bit));
  return x;
}

// How the lines of one block of log8 (or of several, if they share a line) are encoded anew.
typedef struct a8_log8_plan {
  int2 old_header;  // lo, step
  int32_t origin;
  float inverse_step;
  bool ordinary;  // all new values of the warp are at most A8_ROOT_MAX
} a8_log8_plan;

// Finds the extremes of `lines` lines from element e of the chunk on and writes the new headers.
template <uint32_t kGrad>
A8_FN a8_log8_plan a8_plan_log8(const a8_factor_job& job, uint32_t e, uint32_t lines, uint32_t shift) {
  const a8_tensor* t = job.tensor;
  a8_log8_plan plan;
  plan.old_header = make_int2(0, 1);
  if (e < job.count) plan.old_header = a8_get_header(t, job.from + e, shift);
  uint32_t low = 0xffffffffu, high = 0;
#pragma unroll 4
  for (uint32_t i = 0; i < lines; ++i) {
    uint32_t at = e + i * A8_LINE;
    if (at < job.count) {
      a8_second_eight second;
      a8_eight<kGrad> grad;
      float v[8];
      second.header = plan.old_header;
      a8_get_codes(&second, t, job.from + at);
      a8_get<kGrad, false>(&grad, t->grad, job.from + at);
      a8_new_second<kGrad>(second, grad, job.hyper, v);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        // a8_log8_bits of what is never negative or subnormal: only NaN becomes infinity.
        uint32_t bits = min(a8_bits(v[k]), (uint32_t)A8_LOG8_INFINITY);
        low = min(low, a8_log8_low_key((int32_t)bits));
        high = max(high, bits);
      }
    }
  }
  uint32_t lanes = min(1u << shift >> 3, 32u);
  low = ~a8_group_max(~low, lanes);
  high = a8_group_max(high, lanes);
  bool noisy = job.hyper.flags & A8_STOCHASTIC_STATE;
  a8_log8_header header =
      a8_log8_header_of(a8_log8_low(low), (int32_t)high, a8_header_before(noisy, plan.old_header.x, plan.old_header.y));
  plan.origin = a8_log8_origin(header.lo);
  plan.inverse_step = a8_exact_reciprocal((float)header.step);
  plan.ordinary = __all_sync(A8_LANE_MASK, high <= a8_bits(A8_ROOT_MAX));
  if (e < job.count && (threadIdx.x & (lanes - 1u)) == 0)
    *(reinterpret_cast<int2*>(t->second_block) + ((job.from + e) >> shift)) = make_int2(header.lo, header.step);
  return plan;
}

A8_FN void a8_put_second(const a8_factor_job& job, const a8_factor_write& write, uint32_t e, const a8_log8_plan& plan,
                         float* v) {
  if (!plan.ordinary) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = a8_float(min(a8_bits(v[i]), (uint32_t)A8_LOG8_INFINITY));
  }
  float position[8];
  uint32_t packed[2];
  a8_log8_positions(v, plan.origin, plan.inverse_step, position);
  if (job.hyper.flags & A8_STOCHASTIC_STATE) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      uint32_t word = a8_noise_word(write.second, (e + i) / 2);
      position[i] = position[i] + a8_offset(word, write.second.turn);
      position[i + 1] = position[i + 1] + a8_offset(word >> 16, write.second.turn);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) position[i] = position[i] + A8_LOG8_NEAREST;
  }
  a8_log8_eight(position, packed);
  __stcs(reinterpret_cast<uint2*>(a8_at<uint8_t>(job.tensor->second, job.from + e)), make_uint2(packed[0], packed[1]));
}

// Asks for the line of the chunk that holds element e.
template <uint32_t kParam, uint32_t kGrad>
A8_FN void a8_fetch_line(const a8_factor_job& job, uint32_t e) {
  const a8_tensor* t = job.tensor;
  if (e >= job.count) return;
  a8_fetch(t->grad, (job.from + e) * (kGrad == A8_F32 ? 4 : 2));
  a8_fetch(t->param, (job.from + e) * (kParam == A8_F32 ? 4 : 2));
  if (threadIdx.x % 4 == 0) a8_fetch(t->second, (job.from + e) * (t->second_format == A8_LOG8 ? 1 : 4));
}

// With an element-wise second moment, in log8 or float32: a block's extremes first, then its lines again, from the cache.
template <uint32_t kParam, uint32_t kGrad, bool kMomentum>
static __device__ __noinline__ void a8_apply_full(a8_factor_chunk chunk, const a8_nf4_table* table) {
  a8_factor_job job = a8_factor_job_of(chunk);
  a8_factor_write write = a8_factor_write_of(job);
  const a8_tensor* t = job.tensor;
  bool log8 = t->second_format == A8_LOG8;
  uint32_t shift = log8 ? 31u - (uint32_t)__clz((int)t->second_block_size) : 0u;
  uint32_t lines = max(1u << shift, (uint32_t)A8_LINE) / A8_LINE;  // of a block
  uint32_t e = 8 * (threadIdx.x & 31u);
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  for (uint32_t i = 0; i < A8_LINES_FETCHED; ++i) a8_fetch_line<kParam, kGrad>(job, e + i * A8_LINE);
  for (uint32_t line0 = 0; line0 < job.count; line0 += lines * A8_LINE) {
    a8_log8_plan plan;
    plan.ordinary = false;
    for (uint32_t i = 0; i < lines; ++i) a8_fetch_line<kParam, kGrad>(job, e + (i + A8_LINES_FETCHED) * A8_LINE);
    if (log8) plan = a8_plan_log8<kGrad>(job, e, lines, shift);
#pragma unroll 1
    for (uint32_t i = 0; i < lines && line0 + i * A8_LINE < job.count; ++i) {
      bool active = e < job.count;
      a8_eight<kGrad> grad;
      a8_eight<kParam> param;
      a8_first_eight first;
      float v[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f}, root[8], m[8], u[8];
      a8_clear<kGrad>(&grad);
      if (active) {
        a8_get<kGrad, true>(&grad, t->grad, job.from + e);
        a8_get<kParam, true>(&param, t->param, job.from + e);
        if (kMomentum) a8_get_first(&first, t, job.from + e);
        if (log8) {
          a8_second_eight second;
          second.header = plan.old_header;
          a8_get_codes(&second, t, job.from + e);
          a8_new_second<kGrad>(second, grad, job.hyper, v);
        } else {
          a8_new_second<kGrad>(t, job.from + e, grad, job.hyper, v);
        }
      }
      if (!log8) plan.ordinary = a8_are_ordinary(v);
      a8_roots(v, job.bound, plan.ordinary, root);
      if (kMomentum) a8_decode_first(first, t, job.from + e, active, table, m);
      a8_update_eight<kGrad, kMomentum>(job, grad, root, m, u);
      if (active) {
        a8_put_params<kParam>(job, write, e, a8_update_sign<kMomentum>(job), param, u, accumulators);
        if (log8)
          a8_put_second(job, write, e, plan, v);
        else
          a8_put_floats(v, t->second, job.from + e);
      }
      if (kMomentum) a8_put_first(t, job.from + e, active, table, m);
      e += A8_LINE;
    }
  }
  a8_leave_squares(job, accumulators);
}

template <uint32_t kParam, uint32_t kGrad>
A8_FN void a8_apply_typed(const a8_tensor* t, a8_factor_chunk chunk, const a8_nf4_table* table) {
  bool momentum = t->first_format != A8_NONE;
  if (t->second_format == A8_FACTORED) {
    if (momentum)
      a8_apply_factored<kParam, kGrad, true>(chunk, table);
    else
      a8_apply_factored<kParam, kGrad, false>(chunk, table);
  } else if (momentum) {
    a8_apply_full<kParam, kGrad, true>(chunk, table);
  } else {
    a8_apply_full<kParam, kGrad, false>(chunk, table);
  }
}

// False for types that have no fast path.
A8_FN bool a8_apply_warp(const a8_tensor* t, a8_factor_chunk chunk, const a8_nf4_table* table) {
  switch (A8_TYPES(t->param_dtype, t->grad_dtype)) {
    case A8_TYPES(A8_BF16, A8_BF16):
      a8_apply_typed<A8_BF16, A8_BF16>(t, chunk, table);
      return true;
    case A8_TYPES(A8_F32, A8_F32):
      a8_apply_typed<A8_F32, A8_F32>(t, chunk, table);
      return true;
    case A8_TYPES(A8_F16, A8_F16):
      a8_apply_typed<A8_F16, A8_F16>(t, chunk, table);
      return true;
    case A8_TYPES(A8_BF16, A8_F32):
      a8_apply_typed<A8_BF16, A8_F32>(t, chunk, table);
      return true;
    default:
      return false;
  }
}
