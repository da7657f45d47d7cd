// The apply phase of Adafactor: what both kinds of second moment share, and a chunk of a factored one by one warp.
#pragma once

#include "adafactor_stage.cuh"

// What the apply phase needs besides, with the noise from the lane's first pair and element on.
template <bool kFull>
A8_FN a8_factor_write a8_lane_write_of(const a8_factor_job& job) {
  a8_factor_write write = a8_factor_write_of(job);
  const uint32_t start = a8_lane_start<kFull>();
  write.write.first += start / 2;
  write.phase = a8_phase_at(write.phase, start);
  a8_settle(&write.phase);
  return write;
}

// Writes the lane's eight parameters of a line and adds the squares of what is stored.
template <uint32_t kParam, bool kFull>
A8_FN void a8_put_params(const a8_factor_job& job, const a8_factor_write& write, const a8_lane_place<kFull>& place,
                         uint32_t line, uint32_t update_sign, const a8_eight<kParam>& param, const float* u,
                         float* accumulators) {
  float p[8], step_size = a8_signed(write.rule.step_size, update_sign);
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = a8_value<kParam>(param.w, i) * write.rule.decay - step_size * u[i];
  a8_eight<kParam> out;
  if (kParam != A8_F32 && (job.hyper.flags & A8_STOCHASTIC_WRITE)) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = a8_noise_word(write.write, line * (place.kStep / 2) + i);
    a8_pack_eight_stochastic<kParam>(p, words, out.w);
  } else {
    a8_pack_eight<kParam>(p, out.w);
  }
  a8_put<kParam>(out, const_cast<char*>(place.param) + (uint64_t)line * (place.kStep * (kParam == A8_F32 ? 4 : 2)), 0);
  if (!a8_scales(job)) return;
  float stored[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) stored[i] = a8_value<kParam>(out.w, i);
  a8_add_eight_squares(stored, accumulators);
}

// Where the factors of the confidence lie: rows seen from those of the second moment; cols_end as in a8_matrix_place, 0
// where there is no confidence.
typedef struct a8_confidence_place {
  uint32_t row_shift, cols_end;
} a8_confidence_place;

A8_FN a8_confidence_place a8_confidence_place_of(const a8_tensor* t) {
  return {(uint32_t)(t->residual_at - t->row_at),
          t->third_format == A8_FACTORED ? (uint32_t)(a8_confidence_cols_at(t) + t->cols) : 0u};
}

// The first moment times the factors of 1 / sqrt(s), where there is a confidence.
A8_FN void a8_confident_eight(const a8_confidence_place& confidence, const a8_matrix_place& place, bool active,
                              const float* m, float* u) {
#pragma unroll
  for (int i = 0; i < 8; ++i) u[i] = m[i];
  if (confidence.cols_end == 0) return;
  float root[8];
  a8_factored_roots(place, confidence.row_shift, confidence.cols_end, a8_float(0x7f800000u), active, root);
#pragma unroll
  for (int i = 0; i < 8; ++i) u[i] = u[i] * root[i];
}

// With a factored second moment. Returns the sum of the squares of what is stored. kFirst: the format of a first moment
// that averages what kAverages says.
template <uint32_t kParam, uint32_t kGrad, a8_momentum kAverages, uint32_t kFirst>
A8_FN float a8_apply_factored(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  const bool kMomentum = kAverages != A8_NO_MOMENTUM;
  typedef a8_stages<kParam == A8_F32 ? 4 : 2, kGrad, kMomentum, false> Stages;
  const bool kEarly = !kMomentum;  // registers are left to empty a stage at once
  Stages stages(arena);
  a8_lane_place<false> place = a8_lane_place_of<false>(job);
  place.first_format = kFirst;
  const a8_factor_write write = a8_lane_write_of<false>(job);
  a8_matrix_place matrix = a8_matrix_place_of(job);
  const a8_confidence_place confidence = a8_confidence_place_of(job.tensor);
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  stages.begin(place);
  // Lanes that share nothing go their own ways.
  const uint32_t lines = Stages::kShares ? place.all_lines : place.lines;
#pragma unroll 1
  for (uint32_t line = 0; line < lines; ++line) {
    a8_settle(&line);  // an address each from its number costs less than one that moves on
    bool active = !Stages::kShares || line < place.lines;
    a8_eight<kGrad> grad;
    a8_eight<kParam> param;
    a8_first_eight first;
    float root[8], m[8], u[8];
    stages.wait();
    stages.read_values(0, &grad);
    if (kMomentum) first = stages.read_first(kFirst, active);
    if (kEarly) {
      stages.read_values(Stages::kParamAt, &param);
      stages.template load<Stages::kCount>(place, line);
    }
    a8_factored_roots(matrix, 0, matrix.cols_end, job.bound, active, root);
    if (kMomentum) a8_decode_first(first, kFirst, place.first + (uint64_t)line * (place.kStep * 4), active, table, m);
    if (kAverages == A8_OF_UPDATE) {
      a8_average_update_eight<kGrad>(job, grad, root, a8_signed(write.rule.clipped, job.sign), m);
      a8_confident_eight(confidence, matrix, active, m, u);
    } else {
      a8_update_eight<kGrad, kMomentum>(job, grad, root, m, u);
    }
    a8_next_line(&matrix);
    if (kMomentum) a8_put_first(place, line, active, table, m);
    if (!kEarly) {
      stages.read_values(Stages::kParamAt, &param);
      stages.template load<Stages::kCount>(place, line);
    }
    stages.turn();
    if (active) a8_put_params<kParam>(job, write, place, line, a8_update_sign<kMomentum>(job), param, u, accumulators);
  }
  return a8_fold_warp(accumulators);
}

template <uint32_t kParam, uint32_t kGrad, a8_momentum kAverages>
A8_FN float a8_apply_averaged(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  uint32_t first = job.tensor->first_format;
  return first == A8_NF4    ? a8_apply_factored<kParam, kGrad, kAverages, A8_NF4>(job, arena, table)
         : first == A8_INT8 ? a8_apply_factored<kParam, kGrad, kAverages, A8_INT8>(job, arena, table)
                            : a8_apply_factored<kParam, kGrad, kAverages, A8_STATE_F32>(job, arena, table);
}

template <uint32_t kParam, uint32_t kGrad>
A8_FN float a8_apply_typed(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  if (job.tensor->first_format == A8_NONE)
    return a8_apply_factored<kParam, kGrad, A8_NO_MOMENTUM, A8_NONE>(job, arena, table);
  return a8_averages_update(job) ? a8_apply_averaged<kParam, kGrad, A8_OF_UPDATE>(job, arena, table)
                                 : a8_apply_averaged<kParam, kGrad, A8_OF_GRADIENT>(job, arena, table);
}

// Whether there is a fast path for these types and this order of averages.
A8_FN bool a8_suits_apply(const a8_factor_job& job) {
  const a8_tensor* t = job.tensor;
  if (a8_averages_update(job) && (t->second_format != A8_FACTORED || t->first_format == A8_NONE ||
                                  !a8_suits_factors(job, a8_confidence_cols_at(t))))
    return false;
  return t->param_dtype == t->grad_dtype || (t->param_dtype == A8_BF16 && t->grad_dtype == A8_F32);
}

// One chunk; a type of a8_suits_apply.
A8_FN float a8_apply_warp(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  switch (A8_TYPES(job.tensor->param_dtype, job.tensor->grad_dtype)) {
    case A8_TYPES(A8_BF16, A8_BF16):
      return a8_apply_typed<A8_BF16, A8_BF16>(job, arena, table);
    case A8_TYPES(A8_F32, A8_F32):
      return a8_apply_typed<A8_F32, A8_F32>(job, arena, table);
    case A8_TYPES(A8_F16, A8_F16):
      return a8_apply_typed<A8_F16, A8_F16>(job, arena, table);
    default:
      return a8_apply_typed<A8_BF16, A8_F32>(job, arena, table);
  }
}
