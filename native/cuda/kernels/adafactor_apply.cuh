// The apply phase of Adafactor on one chunk by one warp.
#pragma once

#include "adafactor_stage.cuh"

// What the apply phase needs besides, with the noise from the lane's first pair and element on.
A8_FN a8_factor_write a8_lane_write_of(const a8_factor_job& job) {
  a8_factor_write write = a8_factor_write_of(job);
  write.write.first += 4 * a8_lane();
  write.phase = a8_phase_at(write.phase, 8 * a8_lane());
  a8_settle(&write.phase);
  return write;
}

// Writes the lane's eight parameters of a line and adds the squares of what is stored.
template <uint32_t kParam>
A8_FN void a8_put_params(const a8_factor_job& job, const a8_factor_write& write, const a8_lane_place& place,
                         uint32_t line, uint32_t update_sign, const a8_eight<kParam>& param, const float* u,
                         float* accumulators) {
  float p[8], step_size = a8_signed(write.rule.step_size, update_sign);
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = a8_value<kParam>(param.w, i) * write.rule.decay - step_size * u[i];
  a8_eight<kParam> out;
  if (kParam != A8_F32 && (job.hyper.flags & A8_STOCHASTIC_WRITE)) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = a8_noise_word(write.write, line * (A8_LINE / 2) + i);
    a8_pack_eight_stochastic<kParam>(p, words, out.w);
  } else {
    a8_pack_eight<kParam>(p, out.w);
  }
  a8_put<kParam>(out, const_cast<char*>(place.param) + (uint64_t)line * (A8_LINE * (kParam == A8_F32 ? 4 : 2)), 0);
  if (!a8_scales(job)) return;
  float stored[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) stored[i] = a8_value<kParam>(out.w, i);
  a8_add_eight_squares(stored, accumulators);
}

// Leaves the chunk's sum of squares and fingerprint to the next step. Lane 0 reads what it has written itself.
A8_FN void a8_leave_squares(const a8_factor_job& job, float squares) {
  if (!a8_scales(job) || a8_lane() != 0) return;
  job.sums[0] = squares;
  job.sums[2 * (int64_t)job.tensor->chunks] = a8_float(a8_fingerprint_of(job));
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
  Stages stages = {arena, 0};
  a8_lane_place place = a8_lane_place_of(job);
  place.first_format = kFirst;
  const a8_factor_write write = a8_lane_write_of(job);
  a8_matrix_place matrix = a8_matrix_place_of(job);
  const a8_confidence_place confidence = a8_confidence_place_of(job.tensor);
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < Stages::kCount; ++i) {
    stages.template load<0>(place, i, true);
    stages.turn();
  }
  // Lanes that share nothing go their own ways.
  const uint32_t lines = kMomentum ? place.warp_lines : place.lines;
#pragma unroll 1
  for (uint32_t line = 0; line < lines; ++line) {
    a8_settle(&line);  // an address each from its number costs less than one that moves on
    bool active = !kMomentum || line < place.lines;
    a8_eight<kGrad> grad;
    a8_eight<kParam> param;
    a8_first_eight first;
    uint32_t none[3];
    float root[8], m[8], u[8];
    a8_copies_wait<Stages::kCount - 1>();
    stages.read_values(0, &grad);
    if (kMomentum) stages.read_state(place.first_format, &first, none, none + 2);
    if (kEarly) {
      stages.read_values(Stages::kParamAt, &param);
      stages.template load<Stages::kCount>(place, line, true);
    }
    a8_factored_roots(matrix, 0, matrix.cols_end, job.bound, active, root);
    if (kMomentum) a8_decode_first(first, kFirst, place.first + (uint64_t)line * (A8_LINE * 4), active, table, m);
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
      stages.template load<Stages::kCount>(place, line, true);
    }
    stages.turn();
    if (active) a8_put_params<kParam>(job, write, place, line, a8_update_sign<kMomentum>(job), param, u, accumulators);
  }
  return a8_fold_warp(accumulators);
}

// The maximum over groups of `lanes` lanes: 4, 8, 16 or 32.
A8_FN uint32_t a8_group_max(uint32_t x, uint32_t lanes) {
  if (lanes == 32) return a8_lanes_max<32>(x);
  if (lanes == 16) return a8_lanes_max<16>(x);
  for (uint32_t bit = lanes / 2; bit > 0; bit /= 2) x = max(x, __shfl_xor_sync(A8_LANE_MASK, x, bit));
  return x;
}

// How the lines of one block of log8 (or of several, if they share a line) are encoded anew.
typedef struct a8_log8_plan {
  a8_log8_header old_header;
  int32_t origin;
  float inverse_step;
  bool ordinary;  // all new values of the warp are at most A8_ROOT_MAX
} a8_log8_plan;

// Extremes of the new values of a lane: a8_log8_low_key and a8_log8_bits of what is never negative or subnormal.
typedef struct a8_log8_extremes {
  uint32_t low, high;
} a8_log8_extremes;

A8_FN void a8_extend_eight(a8_log8_extremes* x, const float* v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x->low = min(x->low, a8_log8_low_key((int32_t)a8_bits(v[i])));
    x->high = max(x->high, a8_bits(v[i]));
  }
}

// The new header of the lane's block of `lanes` lanes, or of several lines, from the extremes of all its elements.
A8_FN a8_log8_plan a8_plan_log8(a8_log8_extremes x, uint32_t lanes, a8_log8_header before, a8_log8_header* header) {
  a8_log8_plan plan;
  uint32_t low = ~a8_group_max(~x.low, lanes), high = min(a8_group_max(x.high, lanes), (uint32_t)A8_LOG8_INFINITY);
  if (low != 0xffffffffu) low = min(low, a8_log8_low_key(A8_LOG8_INFINITY));  // a NaN counts as infinity
  *header = a8_log8_header_of(a8_log8_low(low), (int32_t)high, before);
  plan.old_header = before;
  plan.origin = a8_log8_origin(header->lo);
  plan.inverse_step = a8_exact_reciprocal((float)header->step);
  plan.ordinary = __all_sync(A8_LANE_MASK, high <= a8_bits(A8_ROOT_MAX));
  return plan;
}

A8_FN void a8_put_second(const a8_factor_job& job, const a8_factor_write& write, const a8_lane_place& place,
                         uint32_t line, const a8_log8_plan& plan, float* v) {
  if (!plan.ordinary) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = a8_float(min(a8_bits(v[i]), (uint32_t)A8_LOG8_INFINITY));
  }
  float position[8];
  uint32_t packed[2];
  a8_log8_positions(v, plan.origin, plan.inverse_step, position);
  if (job.hyper.flags & A8_STOCHASTIC_STATE) {
#pragma unroll
    for (int i = 0; i < 8; ++i) position[i] = position[i] + a8_offset(a8_phase_at(write.phase, line * A8_LINE + i));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) position[i] = position[i] + A8_LOG8_NEAREST;
  }
  a8_log8_eight(position, packed);
  __stcs(reinterpret_cast<uint2*>(const_cast<char*>(place.second) + (uint64_t)line * A8_LINE),
         make_uint2(packed[0], packed[1]));
}

// The order in which the lines of a chunk are worked on: of each log8 block that is longer than a line first all lines
// for its extremes, then all for the update; of a shorter one both at once.
typedef struct a8_full_order {
  uint32_t first;  // of the block's lines
  uint32_t line;
  uint32_t block;  // lines of a block, at least one
  uint32_t lines;  // of the chunk
  bool twice, updates;
} a8_full_order;

A8_FN void a8_next_line(a8_full_order* order) {
  if (!order->twice) {
    order->first = order->line += 1;
    return;
  }
  order->line += 1;
  if (order->line < min(order->first + order->block, order->lines)) return;
  if (order->updates) order->first += order->block;
  order->updates = !order->updates;
  order->line = order->first;
}

// With an element-wise second moment: with kUsual in log8 with blocks of A8_USUAL_BLOCK, else in log8 or float32.
template <uint32_t kParam, uint32_t kGrad, bool kMomentum, bool kUsual>
A8_FN float a8_apply_full(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  typedef a8_stages<kParam == A8_F32 ? 4 : 2, kGrad, kMomentum, true> Stages;
  Stages stages = {arena, 0};
  a8_lane_place place = a8_lane_place_of(job);
  if (kUsual) place.expect_usual();
  const a8_factor_write write = a8_lane_write_of(job);
  const uint32_t block = place.log8 ? max((1u << place.second_shift) / A8_LINE, 1u) : 1u;
  const uint32_t lanes = min(1u << place.second_shift >> 3, 32u);  // of a block
  const bool twice = block > 1;
  a8_full_order now = {0, 0, block, place.warp_lines, twice, !twice}, ahead = now;
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (int i = 0; i < Stages::kCount; ++i) {
    stages.template load<0>(place, ahead.line, ahead.updates, !twice || !ahead.updates);
    stages.turn();
    a8_next_line(&ahead);
  }
  a8_log8_plan plan;
  plan.old_header = {0, 0};
  plan.origin = 0;
  plan.inverse_step = 0.0f;
  plan.ordinary = false;
  a8_log8_extremes extremes = {0xffffffffu, 0u};
#pragma unroll 1
  while (now.first < place.warp_lines) {
    uint32_t line = now.line, codes[2], header_word;
    bool active = line < place.lines, updates = now.updates, first_line = line == now.first;
    a8_eight<kGrad> grad;
    a8_eight<kParam> param;
    a8_first_eight first;
    float v[8];
    a8_copies_wait<Stages::kCount - 1>();
    stages.read_values(0, &grad);
    stages.read_state(place.first_format, &first, codes, &header_word);
    if (updates) stages.read_values(Stages::kParamAt, &param);
    if (first_line && (!twice || !updates)) plan.old_header = a8_log8_unpack(header_word);
    if (twice) {
      stages.template load<0>(place, ahead.line, ahead.updates, !ahead.updates);
      a8_next_line(&ahead);
    } else {
      stages.template load<Stages::kCount>(place, line, true);
    }
    stages.turn();
    a8_next_line(&now);
    a8_new_second_of<kGrad>(place.log8, codes, plan.old_header, place.second + (uint64_t)line * (A8_LINE * 4), active,
                            grad, job.hyper, v);
    if (place.log8 && (!twice || !updates)) {
      a8_extend_eight(&extremes, v);
      if (twice && !now.updates) continue;
      uint32_t of = twice ? now.line : line;
      a8_log8_header header;
      plan = a8_plan_log8(extremes, lanes, plan.old_header, &header);
      extremes = {0xffffffffu, 0u};
      if (of < place.lines && (threadIdx.x & (lanes - 1u)) == 0)
        *reinterpret_cast<uint32_t*>(const_cast<char*>(a8_second_block(place, of))) = a8_log8_pack(header);
      if (twice) continue;
    }
    float root[8], m[8], u[8];
    if (!place.log8) plan.ordinary = a8_are_ordinary(v);
    a8_roots(v, job.bound, plan.ordinary, root);
    if (kMomentum)
      a8_decode_first(first, place.first_format, place.first + (uint64_t)line * (A8_LINE * 4), active, table, m);
    a8_update_eight<kGrad, kMomentum>(job, grad, root, m, u);
    if (kMomentum) a8_put_first(place, line, active, table, m);
    if (active) {
      a8_put_params<kParam>(job, write, place, line, a8_update_sign<kMomentum>(job), param, u, accumulators);
      if (place.log8)
        a8_put_second(job, write, place, line, plan, v);
      else
        a8_put_floats(v, const_cast<char*>(place.second) + (uint64_t)line * (A8_LINE * 4), 0);
    }
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

template <uint32_t kParam, uint32_t kGrad, bool kFactored>
A8_FN float a8_apply_typed(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  bool momentum = job.tensor->first_format != A8_NONE;
  if constexpr (kFactored) {
    if (!momentum) return a8_apply_factored<kParam, kGrad, A8_NO_MOMENTUM, A8_NONE>(job, arena, table);
    return a8_averages_update(job) ? a8_apply_averaged<kParam, kGrad, A8_OF_UPDATE>(job, arena, table)
                                   : a8_apply_averaged<kParam, kGrad, A8_OF_GRADIENT>(job, arena, table);
  } else {
    if (a8_is_usual_second(job.tensor))
      return momentum ? a8_apply_full<kParam, kGrad, true, true>(job, arena, table)
                      : a8_apply_full<kParam, kGrad, false, true>(job, arena, table);
    return momentum ? a8_apply_full<kParam, kGrad, true, false>(job, arena, table)
                    : a8_apply_full<kParam, kGrad, false, false>(job, arena, table);
  }
}

// Whether there is a fast path for these types and this order of averages.
A8_FN bool a8_applies_warp(const a8_factor_job& job) {
  const a8_tensor* t = job.tensor;
  if (a8_averages_update(job) && (t->second_format != A8_FACTORED || t->first_format == A8_NONE ||
                                  !a8_suits_factors(job, a8_confidence_cols_at(t))))
    return false;
  return t->param_dtype == t->grad_dtype || (t->param_dtype == A8_BF16 && t->grad_dtype == A8_F32);
}

template <bool kFactored>
A8_FN float a8_apply_warp(const a8_factor_job& job, char* arena, const a8_nf4_table* table) {
  switch (A8_TYPES(job.tensor->param_dtype, job.tensor->grad_dtype)) {
    case A8_TYPES(A8_BF16, A8_BF16):
      return a8_apply_typed<A8_BF16, A8_BF16, kFactored>(job, arena, table);
    case A8_TYPES(A8_F32, A8_F32):
      return a8_apply_typed<A8_F32, A8_F32, kFactored>(job, arena, table);
    case A8_TYPES(A8_F16, A8_F16):
      return a8_apply_typed<A8_F16, A8_F16, kFactored>(job, arena, table);
    default:
      return a8_apply_typed<A8_BF16, A8_F32, kFactored>(job, arena, table);
  }
}
