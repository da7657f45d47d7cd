// The norm and apply phases of Adafactor on one chunk by one block of threads, for every type, format, block size,
// alignment and length. Like a8_adam_general: spans of A8_MAX_BLOCK elements, a pair a thread, the extremes first.
//
// The squares of a span wait in shared memory until each thread has added those of its accumulator, in order.
#pragma once

#include "adafactor_sums.cuh"
#include "moments.cuh"

typedef struct a8_factor_room {
  a8_moment_room moments;
  float squares[A8_MAX_BLOCK];
} a8_factor_room;

static_assert(A8_LANES == A8_THREADS, "a thread an accumulator");

typedef struct a8_factor_pair {
  float2 m, v, u;  // the moments after the step, and the update before clipping
} a8_factor_pair;

A8_FN float a8_factor_update(const a8_factor_job& job, float g, float root, float* m) {
  float gradient = a8_signed(g, job.sign);
  if (job.tensor->first_format == A8_NONE) return gradient * root;
  *m = job.hyper.beta1 * *m + job.hyper.one_minus_beta1 * gradient;
  return *m * root;
}

// Elements (e, e + 1) of the span, whose second may not exist: then its moments are zero.
static __device__ __noinline__ a8_factor_pair a8_factor_moments(const a8_factor_job& job, const a8_span& span,
                                                                const a8_moment_room* room, uint32_t e) {
  const a8_tensor* t = job.tensor;
  bool both = e + 1 < span.count;
  int64_t at = span.from + e;
  a8_factor_pair x;
  x.m = x.v = make_float2(0.0f, 0.0f);
  float2 root, g = a8_load_pair(t->grad, t->grad_dtype, at / 2, both);
  if (t->second_format == A8_FACTORED) {
    int64_t row = a8_row_of(at, t->cols), col = at - row * t->cols;
    bool next = col + 1 == t->cols;
    root.x = job.row_factor[row] * job.col_factor[col];
    root.y = both ? job.row_factor[row + next] * job.col_factor[next ? 0 : col + 1] : 0.0f;
  } else {
    x.v = a8_load_moment(t->second, t->second_format, at / 2, both, room->second[e >> span.second_shift], room->levels);
    if (!both) x.v.y = 0.0f;
    x.v.x = a8_average(&job.hyper, x.v.x, g.x * g.x);
    x.v.y = a8_average(&job.hyper, x.v.y, g.y * g.y);
    root = make_float2(a8_reciprocal_root(x.v.x), a8_reciprocal_root(x.v.y));
  }
  if (t->first_format != A8_NONE) {
    x.m = a8_load_moment(t->first, t->first_format, at / 2, both, room->first[e >> span.first_shift], room->levels);
    if (!both) x.m.y = 0.0f;
  }
  x.u.x = a8_factor_update(job, g.x, a8_at_most(root.x, job.bound), &x.m.x);
  x.u.y = a8_factor_update(job, g.y, a8_at_most(root.y, job.bound), &x.m.y);
  return x;
}

A8_FN void a8_keep_squares(a8_factor_room* room, uint32_t e, float2 x) {
  room->squares[e] = x.x * x.x;
  room->squares[e + 1] = x.y * x.y;
}

// Adds a span's squares to the accumulators. Synchronises before and after.
A8_FN void a8_add_squares(const a8_factor_room* room, uint32_t count, float* accumulator) {
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < count; e += A8_LANES) *accumulator += room->squares[e];
  __syncthreads();
}

// Sums of p^2 and u^2 of one chunk. By every thread of the block.
static __device__ __noinline__ void a8_norm_general(const a8_factor_job& job, a8_factor_room* room) {
  const a8_tensor* t = job.tensor;
  bool of_param = a8_scales(job) && !a8_squares_are_known(job), of_update = job.hyper.clip > 0.0f;
  float param_squares = 0.0f, update_squares = 0.0f;
  a8_share_levels(room->moments.levels);
  for (uint32_t start = 0; start < job.count; start += A8_MAX_BLOCK) {
    a8_span span = a8_span_of(t, job.from + start, job.count - start, 0xffffffffu);
    if (of_update) {
      __syncthreads();
      a8_load_headers(span, &room->moments);
      __syncthreads();
      for (uint32_t e = 2 * threadIdx.x; e < span.count; e += 2 * A8_THREADS)
        a8_keep_squares(room, e, a8_factor_moments(job, span, &room->moments, e).u);
      a8_add_squares(room, span.count, &update_squares);
    }
    if (of_param) {
      for (uint32_t e = 2 * threadIdx.x; e < span.count; e += 2 * A8_THREADS)
        a8_keep_squares(room, e, a8_load_pair(t->param, t->param_dtype, (span.from + e) / 2, e + 1 < span.count));
      a8_add_squares(room, span.count, &param_squares);
    }
  }
  bool writes_param = of_param || !a8_scales(job);
  param_squares = a8_fold_block(param_squares, room->squares);
  update_squares = a8_fold_block(update_squares, room->squares);
  if (threadIdx.x == 0) {
    if (writes_param) job.sums[0] = param_squares;
    job.sums[t->chunks] = update_squares;
  }
}

// Updates one chunk. By every thread of the block.
static __device__ __noinline__ void a8_apply_general(const a8_factor_job& job, const a8_factor_write& write,
                                                     a8_factor_room* room) {
  const a8_tensor* t = job.tensor;
  a8_moment_room* moments = &room->moments;
  bool quantised = a8_is_quantised(t->first_format) || a8_is_quantised(t->second_format);
  bool noisy_write = (job.hyper.flags & A8_STOCHASTIC_WRITE) && t->param_dtype != A8_F32;
  bool noisy_state = job.hyper.flags & A8_STOCHASTIC_STATE;
  float param_squares = 0.0f;
  a8_share_levels(moments->levels);
  for (uint32_t start = 0; start < job.count; start += A8_MAX_BLOCK) {
    a8_span span = a8_span_of(t, job.from + start, job.count - start, 0xffffffffu);
    __syncthreads();
    a8_load_headers(span, moments);
    __syncthreads();
    if (quantised) {
      for (uint32_t at = 0; at < span.count; at += 2 * A8_THREADS) {
        uint32_t e = at + 2 * threadIdx.x;
        a8_factor_pair x;
        x.m = x.v = make_float2(0.0f, 0.0f);
        if (e < span.count) x = a8_factor_moments(job, span, moments, e);
        a8_join_pair(span, moments, e, x.m, x.v);
      }
      __syncthreads();
      a8_renew_headers(span, moments);
      __syncthreads();
    }
    for (uint32_t e = 2 * threadIdx.x; e < span.count; e += 2 * A8_THREADS) {
      int64_t pair = (span.from + e) / 2;
      bool both = e + 1 < span.count;
      uint32_t in_chunk = (start + e) / 2;
      a8_factor_pair x = a8_factor_moments(job, span, moments, e);
      float2 p = a8_load_pair(t->param, t->param_dtype, pair, both);
      p.x = p.x * write.rule.decay - write.rule.step_size * x.u.x;
      p.y = p.y * write.rule.decay - write.rule.step_size * x.u.y;
      a8_store_pair(t->param, t->param_dtype, pair, both, p, noisy_write,
                    noisy_write ? a8_noise_word(write.write, in_chunk) : 0u);
      if (a8_scales(job)) {
        a8_keep_squares(room, e, a8_load_pair(t->param, t->param_dtype, pair, both));
      }
      if (t->first_format != A8_NONE)
        a8_store_moment(t->first, t->first_format, pair, both, x.m, moments->new_first[e >> span.first_shift], false, 0,
                        moments->levels);
      if (t->second_format != A8_FACTORED)
        a8_store_moment(t->second, t->second_format, pair, both, x.v, moments->new_second[e >> span.second_shift],
                        noisy_state, a8_phase_at(write.phase, 2 * in_chunk), moments->levels);
    }
    if (a8_scales(job)) a8_add_squares(room, span.count, &param_squares);
  }
  if (!a8_scales(job)) return;
  param_squares = a8_fold_block(param_squares, room->squares);
  if (threadIdx.x == 0) {
    job.sums[0] = param_squares;
    job.sums[2 * (int64_t)t->chunks] = a8_float(a8_fingerprint_of(job));
  }
}
