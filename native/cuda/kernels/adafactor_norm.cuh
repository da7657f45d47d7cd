// The norm phase of Adafactor on one chunk by one warp: sums of p^2 and u^2.
#pragma once

#include "adafactor_stage.cuh"

// kFirst: the format of a first moment that averages gradients, A8_NONE for none, A8_ANY_FORMAT for one of any. kUsual:
// of a second moment in log8 with blocks of A8_USUAL_BLOCK.
template <uint32_t kGrad, uint32_t kFirst, bool kFactored, bool kUsual>
A8_FN float a8_update_squares(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  const bool kMomentum = kFirst != A8_NONE;
  typedef a8_stages<0, kGrad, kMomentum, !kFactored> Stages;
  Stages stages = {arena, 0};
  a8_lane_place place = a8_lane_place_of(job);
  if (kFirst != A8_ANY_FORMAT) place.first_format = kFirst;
  if (kUsual) place.expect_usual();
  a8_matrix_place matrix;
  if (kFactored) matrix = a8_matrix_place_of(job);
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < Stages::kCount; ++i) {
    stages.template load<0>(place, i, true);
    stages.turn();
  }
  // Lanes that share nothing go their own ways.
  const uint32_t lines = kFactored ? place.lines : place.warp_lines;
#pragma unroll 1
  for (uint32_t line = 0; line < lines; ++line) {
    a8_settle(&line);  // an address each from its number costs less than one that moves on
    bool active = kFactored || line < place.lines;
    a8_eight<kGrad> grad;
    a8_first_eight first;
    uint32_t codes[2], header;
    float root[8], m[8], u[8];
    a8_copies_wait<Stages::kCount - 1>();
    stages.read_values(0, &grad);
    if (kMomentum || !kFactored) stages.read_state(place.first_format, &first, codes, &header);
    stages.template load<Stages::kCount>(place, line, true);
    stages.turn();
    if (kFactored) {
      a8_factored_roots(matrix, 0, matrix.cols_end, job.bound, active, root);
      a8_next_line(&matrix);
    } else {
      float v[8];
      a8_new_second_of<kGrad>(place.log8, codes, a8_log8_unpack(header), place.second + (uint64_t)line * (A8_LINE * 4),
                              active, grad, job.hyper, v);
      a8_roots(v, job.bound, a8_are_ordinary(v), root);
    }
    if (kMomentum)
      a8_decode_first(first, place.first_format, place.first + (uint64_t)line * (A8_LINE * 4), active, table, m);
    a8_update_eight<kGrad, kMomentum>(job, grad, root, m, u);
    if (active) a8_add_eight_squares(u, accumulators);
  }
  return a8_fold_warp(accumulators);
}

template <uint32_t kParam>
A8_FN float a8_param_squares(const a8_factor_job& job) {
  float accumulators[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) accumulators[i] = 0.0f;
#pragma unroll 4
  for (uint32_t e = 8 * a8_lane(); e < job.count; e += A8_LINE) {
    a8_eight<kParam> raw;
    float p[8];
    a8_get<kParam, false>(&raw, job.tensor->param, job.from + e);
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = a8_value<kParam>(raw.w, i);
    a8_add_eight_squares(p, accumulators);
  }
  return a8_fold_warp(accumulators);
}

template <uint32_t kGrad, bool kFactored>
A8_FN float a8_update_squares_of(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  uint32_t first = a8_averages_update(job) ? A8_NONE : job.tensor->first_format;
  if constexpr (kFactored) {
    if (first == A8_NONE) return a8_update_squares<kGrad, A8_NONE, true, false>(job, arena, table);
    if (first == A8_NF4) return a8_update_squares<kGrad, A8_NF4, true, false>(job, arena, table);
    if (first == A8_INT8) return a8_update_squares<kGrad, A8_INT8, true, false>(job, arena, table);
    return a8_update_squares<kGrad, A8_STATE_F32, true, false>(job, arena, table);
  } else if (a8_is_usual_second(job.tensor)) {
    return first == A8_NONE ? a8_update_squares<kGrad, A8_NONE, false, true>(job, arena, table)
                            : a8_update_squares<kGrad, A8_ANY_FORMAT, false, true>(job, arena, table);
  } else {
    return first == A8_NONE ? a8_update_squares<kGrad, A8_NONE, false, false>(job, arena, table)
                            : a8_update_squares<kGrad, A8_ANY_FORMAT, false, false>(job, arena, table);
  }
}

template <bool kFactored>
A8_FN void a8_norm_warp(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
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
  if (a8_needs_squares(job)) {
    if (t->grad_dtype == A8_BF16)
      update_squares = a8_update_squares_of<A8_BF16, kFactored>(job, arena, table);
    else if (t->grad_dtype == A8_F32)
      update_squares = a8_update_squares_of<A8_F32, kFactored>(job, arena, table);
    else
      update_squares = a8_update_squares_of<A8_F16, kFactored>(job, arena, table);
  }
  if (a8_lane() == 0) {
    if (!known) job.sums[0] = param_squares;
    job.sums[t->chunks] = update_squares;
  }
}
