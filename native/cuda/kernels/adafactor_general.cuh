// The norm and apply phases of Adafactor on one chunk by one block of threads, for every type, format, block size,
// alignment and length. Like a8_element_general: spans of A8_MAX_BLOCK elements, a pair a thread, the extremes first.
#pragma once

#include "adafactor_sums.cuh"

typedef struct a8_factor_pair {
  a8_moment_pairs after;  // the moments after the step
  float2 u;
} a8_factor_pair;

// The products of two vectors' elements at elements `at` and `at + 1` of the matrix; zero for one that does not exist.
A8_FN float2 a8_factor_product(const float* rows, const float* cols, int64_t col_count, int64_t at, bool both) {
  int64_t row = a8_row_of(at, col_count), col = at - row * col_count;
  bool next = col + 1 == col_count;
  return make_float2(rows[row] * cols[col], both ? rows[row + next] * cols[next ? 0 : col + 1] : 0.0f);
}

// rule: null where the update is wanted before clipping, as the norm phase does. confidence: 1 / sqrt(s).
A8_FN float a8_factor_update(const a8_factor_job& job, const a8_adafactor_rule* rule, float g, float root,
                             float confidence, float* m) {
  float gradient = a8_signed(g, job.sign);
  if (a8_averages_update(job)) {
    float u = gradient * root;
    if (!rule) return u;
    *m = job.hyper.beta1 * *m + job.hyper.one_minus_beta1 * (u * rule->clipped);
    return *m * confidence;
  }
  if (job.tensor->first_format == A8_NONE) return gradient * root;
  *m = job.hyper.beta1 * *m + job.hyper.one_minus_beta1 * gradient;
  return *m * root;
}

// Whether the norm phase sums a8_update_square, not the squares of u. rule: as in a8_factor_update.
A8_FN bool a8_sums_without_roots(const a8_tensor* t, const a8_adafactor_rule* rule) {
  return !rule && t->second_format != A8_FACTORED;
}

// Elements (e, e + 1) of the span; the moments of one that does not exist are zero. In the place of u may be its square
// (a8_sums_without_roots).
A8_FN a8_factor_pair a8_factor_moments(const a8_factor_job& job, const a8_adafactor_rule* rule, const a8_span& span,
                                       const a8_moment_room* room, uint32_t e) {
  const a8_tensor* t = job.tensor;
  bool both = e + 1 < span.count;
  int64_t at = span.from + e;
  a8_factor_pair x;
  x.after = a8_load_moments(span, room, e, false);
  float2 root, confidence = make_float2(1.0f, 1.0f), g = a8_load_pair(t->grad, t->grad_dtype, at / 2, both);
  if (t->second_format == A8_FACTORED) {
    root = a8_factor_product(job.row_factor, job.col_factor, t->cols, at, both);
  } else {
    float2* v = &x.after.second;
    *v = make_float2(a8_average(&job.hyper, v->x, g.x * g.x), a8_average(&job.hyper, v->y, g.y * g.y));
    if (a8_sums_without_roots(t, rule)) {
      x.u.x = a8_update_square(a8_factor_update(job, rule, g.x, 1.0f, 1.0f, &x.after.first.x), v->x, job.bound);
      x.u.y = a8_update_square(a8_factor_update(job, rule, g.y, 1.0f, 1.0f, &x.after.first.y), v->y, job.bound);
      return x;
    }
    root = make_float2(a8_reciprocal_root(v->x), a8_reciprocal_root(v->y));
  }
  if (t->third_format == A8_FACTORED && rule && a8_averages_update(job))
    confidence =
        a8_factor_product(job.scratch + t->residual_at, job.scratch + a8_confidence_cols_at(t), t->cols, at, both);
  x.u.x = a8_factor_update(job, rule, g.x, a8_at_most(root.x, job.bound), confidence.x, &x.after.first.x);
  x.u.y = a8_factor_update(job, rule, g.y, a8_at_most(root.y, job.bound), confidence.y, &x.after.first.y);
  if (!both) x.after.first.y = x.after.second.y = 0.0f;
  return x;
}

// Shared memory of a block of threads.
typedef struct a8_general_room {
  a8_square_room span;
  a8_dealt_room dealt;
} a8_general_room;

A8_FN uint32_t a8_dealt_sums(const a8_tensor* t) { return t->second_format == A8_FACTORED ? 1 : A8_DEALT; }

enum a8_squares { A8_OF_PARAM, A8_OF_NORM, A8_OF_WHOLE };  // of p, of u as the norm phase sees it, or as it is applied

// The sum of squares of one chunk. rule: for the last kind, else null. By every thread of the block.
template <a8_squares kOf>
static __device__ __noinline__ float a8_chunk_squares(const a8_factor_job& job, const a8_adafactor_rule* rule,
                                                      a8_general_room* room) {
  const a8_tensor* t = job.tensor;
  __syncthreads();  // the room may be in use
  a8_begin_dealt(&room->dealt);
  a8_share_levels(room->span.moments.levels);
  for (uint32_t start = 0; start < job.count; start += A8_MAX_BLOCK) {
    a8_span span = a8_span_of(t, job.from + start, job.count - start, 0xffffffffu);
    if (kOf != A8_OF_PARAM) {
      __syncthreads();
      a8_load_headers(span, &room->span.moments);
      __syncthreads();
    }
    for (uint32_t e = 2 * threadIdx.x; e < span.count; e += 2 * A8_THREADS) {
      if (kOf == A8_OF_PARAM) {
        a8_keep_squares(&room->span, e,
                        a8_load_pair(t->param, t->param_dtype, (span.from + e) / 2, e + 1 < span.count));
        continue;
      }
      const a8_adafactor_rule* asked = kOf == A8_OF_WHOLE ? rule : nullptr;
      float2 u = a8_factor_moments(job, asked, span, &room->span.moments, e).u;
      if (a8_sums_without_roots(t, asked))
        room->span.squares[e] = u.x, room->span.squares[e + 1] = u.y;
      else
        a8_keep_squares(&room->span, e, u);
    }
    a8_add_dealt_squares(&room->span, span.count, a8_dealt_sums(t), &room->dealt);
  }
  return a8_fold_dealt_block(a8_dealt_sums(t), &room->dealt);
}

// --- The phases on chunk number `part` of a tensor, by every thread of the block. Not inlined, and they make the job
// anew: their registers are not to weigh on the fast paths. ---

// Sums of p^2 and u^2.
static __device__ __noinline__ void a8_norm_general(const a8_tensor* t, const a8_hyper* h, uint32_t part,
                                                    float* scratch, a8_general_room* room) {
  const a8_factor_job job = a8_factor_job_of(t, h, scratch, part);
  bool of_param = a8_scales(job) && !a8_squares_are_known(job);
  float param_squares = of_param ? a8_chunk_squares<A8_OF_PARAM>(job, nullptr, room) : 0.0f;
  float update_squares = a8_needs_squares(job) ? a8_chunk_squares<A8_OF_NORM>(job, nullptr, room) : 0.0f;
  if (threadIdx.x != 0) return;
  if (of_param || !a8_scales(job)) job.sums[0] = param_squares;
  job.sums[t->chunks] = update_squares;
}

// The sum of the squares of the update as CAME leaves it, in the place of those of u.
static __device__ __noinline__ void a8_limit_general(const a8_tensor* t, const a8_hyper* h, uint32_t part,
                                                     float* scratch, a8_general_room* room) {
  const a8_factor_job job = a8_factor_job_of(t, h, scratch, part);
  const a8_adafactor_rule rule = a8_factor_write_of(job).rule;
  float squares = a8_chunk_squares<A8_OF_WHOLE>(job, &rule, room);
  if (threadIdx.x == 0) job.sums[t->chunks] = squares;
}

// Updates. Returns the sum of the squares of what is stored, in the first thread, if a8_scales.
static __device__ __noinline__ float a8_apply_general(const a8_tensor* t, const a8_hyper* h, uint32_t part,
                                                      float* scratch, a8_general_room* room) {
  const a8_factor_job job = a8_factor_job_of(t, h, scratch, part);
  const a8_factor_write write = a8_factor_write_of(job);
  a8_moment_room* moments = &room->span.moments;
  __syncthreads();  // the room may be in use
  a8_begin_dealt(&room->dealt);
  a8_share_levels(moments->levels);
  for (uint32_t start = 0; start < job.count; start += A8_MAX_BLOCK) {
    a8_span span = a8_span_of(t, job.from + start, job.count - start, 0xffffffffu);
    __syncthreads();
    a8_load_headers(span, moments);
    __syncthreads();
    if (a8_has_headers(t)) {
      for (uint32_t at = 0; at < span.count; at += 2 * A8_THREADS) {
        uint32_t e = at + 2 * threadIdx.x;
        a8_factor_pair x;
        x.after.first = x.after.second = x.after.third = make_float2(0.0f, 0.0f);
        if (e < span.count) x = a8_factor_moments(job, &write.rule, span, moments, e);
        a8_join_pair(span, moments, e, x.after, false);
      }
      __syncthreads();
      a8_renew_headers(span, moments);
      __syncthreads();
    }
    for (uint32_t e = 2 * threadIdx.x; e < span.count; e += 2 * A8_THREADS) {
      int64_t pair = (span.from + e) / 2;
      bool both = e + 1 < span.count;
      uint32_t in_chunk = (start + e) / 2;
      a8_factor_pair x = a8_factor_moments(job, &write.rule, span, moments, e);
      float2 p = a8_load_pair(t->param, t->param_dtype, pair, both);
      p.x = p.x * write.rule.decay - write.rule.step_size * x.u.x;
      p.y = p.y * write.rule.decay - write.rule.step_size * x.u.y;
      // Here, not before the loops, for the registers.
      const bool noisy_write = (job.hyper.flags & A8_STOCHASTIC_WRITE) && t->param_dtype != A8_F32;
      const bool noisy_state = job.hyper.flags & A8_STOCHASTIC_STATE;
      a8_store_pair(t->param, t->param_dtype, pair, both, p, noisy_write,
                    noisy_write ? a8_noise_word(write.write, in_chunk) : 0u);
      if (a8_scales(job)) a8_keep_squares(&room->span, e, a8_load_pair(t->param, t->param_dtype, pair, both));
      a8_store_moments(span, moments, e, x.after, false, noisy_state, false, a8_phase_at(write.phase, 2 * in_chunk));
    }
    if (a8_scales(job)) a8_add_dealt_squares(&room->span, span.count, a8_dealt_sums(t), &room->dealt);
  }
  return a8_scales(job) ? a8_fold_dealt_block(a8_dealt_sums(t), &room->dealt) : 0.0f;
}
