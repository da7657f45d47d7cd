// The norm phase of Adafactor, sums of p^2 and u^2: a chunk of a factored second moment by one warp.
#pragma once

#include "adafactor_stage.cuh"

// kFirst: the format of a first moment that averages gradients, A8_NONE for none.
template <uint32_t kGrad, uint32_t kFirst>
A8_FN float a8_update_squares(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  const bool kMomentum = kFirst != A8_NONE;
  typedef a8_stages<0, kGrad, kMomentum, false> Stages;
  Stages stages(arena);
  a8_lane_place<false> place = a8_lane_place_of<false>(job);
  place.first_format = kFirst;
  a8_matrix_place matrix = a8_matrix_place_of(job);
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  stages.begin(place);
  // Lanes that share nothing go their own ways.
  const uint32_t lines = Stages::kShares ? place.all_lines : place.lines;
#pragma unroll 1
  for (uint32_t line = 0; line < lines; ++line) {
    a8_settle(&line);  // an address each from its number costs less than one that moves on
    bool active = !Stages::kShares || line < place.lines;
    a8_eight<kGrad> grad;
    a8_first_eight first;
    float root[8], m[8], u[8];
    stages.wait();
    stages.read_values(0, &grad);
    if (kMomentum) first = stages.read_first(kFirst, active);
    stages.template load<Stages::kCount>(place, line);
    stages.turn();
    a8_factored_roots(matrix, 0, matrix.cols_end, job.bound, active, root);
    a8_next_line(&matrix);
    if (kMomentum) a8_decode_first(first, kFirst, place.first + (uint64_t)line * (place.kStep * 4), active, table, m);
    a8_update_eight<kGrad, kMomentum>(job, grad, root, m, u);
    if (active) a8_add_eight_squares(u, accumulators);
  }
  return a8_fold_warp(accumulators);
}

template <uint32_t kGrad>
A8_FN float a8_update_squares_of(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  uint32_t first = a8_averages_update(job) ? A8_NONE : job.tensor->first_format;
  return first == A8_NONE   ? a8_update_squares<kGrad, A8_NONE>(job, arena, table)
         : first == A8_NF4  ? a8_update_squares<kGrad, A8_NF4>(job, arena, table)
         : first == A8_INT8 ? a8_update_squares<kGrad, A8_INT8>(job, arena, table)
                            : a8_update_squares<kGrad, A8_STATE_F32>(job, arena, table);
}

// The sum of p^2 over a chunk's eights from `start` on, `step` apart from each other in a lane.
template <uint32_t kParam>
A8_FN float a8_param_squares(const a8_factor_job& job, uint32_t start, uint32_t step) {
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (uint32_t e = start; e < job.count; e += step) {
    a8_eight<kParam> raw;
    float p[8];
    a8_get<kParam, false>(&raw, job.tensor->param, job.from + e);
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = a8_value<kParam>(raw.w, i);
    a8_add_eight_squares(p, accumulators);
  }
  return a8_fold_warp(accumulators);
}

// kFull: of the warp's lines of the chunk alone, else of all.
template <bool kFull>
A8_FN float a8_param_squares_of(const a8_factor_job& job) {
  const uint32_t start = a8_lane_start<kFull>(), step = a8_lane_place<kFull>::kStep, dtype = job.tensor->param_dtype;
  return dtype == A8_BF16  ? a8_param_squares<A8_BF16>(job, start, step)
         : dtype == A8_F32 ? a8_param_squares<A8_F32>(job, start, step)
                           : a8_param_squares<A8_F16>(job, start, step);
}

A8_FN void a8_norm_warp(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  const a8_tensor* t = job.tensor;
  float param_squares = 0.0f, update_squares = 0.0f;
  bool known = a8_scales(job) && a8_squares_are_known(job);
  if (a8_scales(job) && !known) param_squares = a8_param_squares_of<false>(job);
  if (a8_needs_squares(job)) {
    if (t->grad_dtype == A8_BF16)
      update_squares = a8_update_squares_of<A8_BF16>(job, arena, table);
    else if (t->grad_dtype == A8_F32)
      update_squares = a8_update_squares_of<A8_F32>(job, arena, table);
    else
      update_squares = a8_update_squares_of<A8_F16>(job, arena, table);
  }
  if (a8_lane() == 0) {
    if (!known) job.sums[0] = param_squares;
    job.sums[t->chunks] = update_squares;
  }
}
