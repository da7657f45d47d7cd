// The norm phase of Adafactor on one chunk by one warp: sums of p^2 and u^2.
#pragma once

#include "adafactor_fast.cuh"

template <uint32_t kGrad>
struct a8_norm_line {
  a8_eight<kGrad> grad;
  a8_first_eight first;
  a8_second_eight second;
};

template <uint32_t kGrad, bool kMomentum, bool kFactored>
A8_FN void a8_get_norm_line(a8_norm_line<kGrad>* line, const a8_factor_job& job, int64_t e, uint32_t shift) {
  a8_get<kGrad, false>(&line->grad, job.tensor->grad, e);
  if (kMomentum) a8_get_first(&line->first, job.tensor, e);
  if (!kFactored && job.tensor->second_format == A8_LOG8) {
    a8_get_codes(&line->second, job.tensor, e);
    line->second.header = a8_get_header(job.tensor, e, shift);
  }
}

template <uint32_t kGrad, bool kMomentum, bool kFactored>
static __device__ __noinline__ float a8_update_squares(a8_factor_chunk chunk, const a8_nf4_table* table) {
  a8_factor_job job = a8_factor_job_of(chunk);
  // Lines in flight: as many as registers allow.
  const int kAhead = (kMomentum && !kFactored ? 2 : kMomentum || !kFactored ? 4 : 8) / (kGrad == A8_F32 ? 2 : 1);
  const a8_tensor* t = job.tensor;
  uint32_t e = 8 * (threadIdx.x & 31u);  // of the chunk
  uint32_t shift = 31u - (uint32_t)__clz((int)t->second_block_size);
  a8_norm_line<kGrad> ahead[kAhead];
  a8_matrix_place place;
  if (kFactored) place = a8_place_of(job);
  float accumulators[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) accumulators[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (e + i * A8_LINE < job.count)
      a8_get_norm_line<kGrad, kMomentum, kFactored>(&ahead[i], job, job.from + e + i * A8_LINE, shift);
  for (uint32_t line0 = 0; line0 < job.count; line0 += kAhead * A8_LINE) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (line0 + i * A8_LINE >= job.count) break;
      a8_norm_line<kGrad> line = ahead[i];
      bool active = e < job.count;
      if (e + kAhead * A8_LINE < job.count)
        a8_get_norm_line<kGrad, kMomentum, kFactored>(&ahead[i], job, job.from + e + kAhead * A8_LINE, shift);
      float root[8], m[8], u[8];
      if (kFactored) {
        a8_factored_roots(place, job.bound, active, root);
        a8_next_line(&place);
      } else {
        float v[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        bool log8 = t->second_format == A8_LOG8;
        if (log8 && active)
          a8_new_second<kGrad>(line.second, line.grad, job.hyper, v);
        else if (active)
          a8_new_second<kGrad>(t, job.from + e, line.grad, job.hyper, v);
        a8_roots(v, job.bound, a8_are_ordinary(v), root);
      }
      if (kMomentum) a8_decode_first(line.first, t, job.from + e, active, table, m);
      a8_update_eight<kGrad, kMomentum>(job, line.grad, root, m, u);
      if (active) a8_add_eight_squares(u, accumulators);
      e += A8_LINE;
    }
  }
  return a8_fold_warp(accumulators);
}

template <uint32_t kParam>
A8_FN float a8_param_squares(const a8_factor_job& job) {
  float accumulators[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) accumulators[i] = 0.0f;
#pragma unroll 4
  for (uint32_t e = 8 * (threadIdx.x & 31u); e < job.count; e += A8_LINE) {
    a8_eight<kParam> raw;
    float p[8];
    a8_get<kParam, false>(&raw, job.tensor->param, job.from + e);
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = a8_value<kParam>(raw.w, i);
    a8_add_eight_squares(p, accumulators);
  }
  return a8_fold_warp(accumulators);
}

template <uint32_t kGrad>
A8_FN float a8_update_squares_of(const a8_factor_job& job, a8_factor_chunk chunk, const a8_nf4_table* table) {
  bool momentum = job.tensor->first_format != A8_NONE;
  if (job.tensor->second_format == A8_FACTORED)
    return momentum ? a8_update_squares<kGrad, true, true>(chunk, table)
                    : a8_update_squares<kGrad, false, true>(chunk, table);
  return momentum ? a8_update_squares<kGrad, true, false>(chunk, table)
                  : a8_update_squares<kGrad, false, false>(chunk, table);
}

A8_FN void a8_norm_warp(const a8_factor_job& job, a8_factor_chunk chunk, const a8_nf4_table* table) {
  const a8_tensor* t = job.tensor;
  float param_squares = 0.0f, update_squares = 0.0f;
  bool known = a8_scales(job) && a8_squares_are_known(job);
  if (a8_scales(job) && !known) {
    if (t->param_dtype == A8_BF16)
      param_squares = a8_param_squares<A8_BF16>(job);
    else if (t->param_dtype == A8_F32)
      param_squares = a8_param_squares<A8_F32>(job);
    else
      param_squares = a8_param_squares<A8_F16>(job);
  }
  if (job.hyper.clip > 0.0f) {
    if (t->grad_dtype == A8_BF16)
      update_squares = a8_update_squares_of<A8_BF16>(job, chunk, table);
    else if (t->grad_dtype == A8_F32)
      update_squares = a8_update_squares_of<A8_F32>(job, chunk, table);
    else
      update_squares = a8_update_squares_of<A8_F16>(job, chunk, table);
  }
  if ((threadIdx.x & 31u) == 0) {
    if (!known) job.sums[0] = param_squares;
    job.sums[t->chunks] = update_squares;
  }
}
