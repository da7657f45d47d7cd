// Adafactor's update of eight neighbouring elements a lane, for what the fast paths take: arrays aligned to 16 bytes
// and whole eights. A warp works on a line of A8_LANES elements at a time, so a lane holds eight accumulators of a sum.
// With a factored second moment it has a chunk of its own; with an element-wise one the warps of a block take the lines
// of a run of chunks in turns (adafactor_full.cuh). Either way they are summed in the canonical order.
#pragma once

#include "adafactor_sums.cuh"
#include "eight.cuh"
#include "exact.cuh"
#include "nf4_table.cuh"

#define A8_LINE A8_LANES

// Elements of a line of every warp of a block.
#define A8_ROUND (A8_LINE * A8_WARPS)

// Beyond the maximum a root is guarded. Below 2^-100 every root meets the bound, which is under 2^50. Only element-wise
// moments need one, for the factors of a factored one are made elsewhere.
#define A8_ROOT_MAX A8_TWO_TO(100)
#define A8_BOUND_MAX 1.1e15f

#define A8_TYPES(param, grad) ((param) * 4u + (grad))

// An element-wise second moment that a kernel is compiled for.
enum a8_second_kind { A8_USUAL_LOG8, A8_ANY_LOG8, A8_FLOATS };

// Where a lane's eights lie: of its first line here, of the next ones kStep elements on.
template <bool kFull>
struct a8_lane_place {
  enum : uint32_t { kStep = kFull ? A8_ROUND : A8_LINE };

  const char *grad, *param, *first, *first_block, *second, *second_block;
  uint32_t lines;      // in which the lane has an eight
  uint32_t all_lines;  // in which a lane has that takes part: of the warp, or with kFull of the block
  uint32_t first_format;
  uint32_t second_shift;  // log2 of the second moment's block size
  bool log8;

  // Of what the code is compiled for: blocks of A8_USUAL_BLOCK are usual.
  A8_MEMBER void expect(a8_second_kind kind) {
    log8 = kind != A8_FLOATS;
    if (kind == A8_USUAL_LOG8) second_shift = 7;
    static_assert(A8_USUAL_BLOCK == 1 << 7, "its logarithm");
  }
};

// Of the lane's first eight, seen from the first element of the chunk or run.
template <bool kFull>
A8_FN uint32_t a8_lane_start() {
  return 8 * (kFull ? threadIdx.x : a8_lane());
}

A8_FN a8_second_kind a8_second_kind_of(const a8_tensor* t) {
  if (t->second_format != A8_LOG8) return A8_FLOATS;
  return t->second_block_size == A8_USUAL_BLOCK ? A8_USUAL_LOG8 : A8_ANY_LOG8;
}

template <bool kFull>
A8_FN a8_lane_place<kFull> a8_lane_place_of(const a8_factor_job& job) {
  const a8_tensor* t = job.tensor;
  const uint32_t start = a8_lane_start<kFull>();
  const int64_t e = job.from + start;
  a8_lane_place<kFull> place;
  place.grad = a8_at<char>(t->grad, e * (t->grad_dtype == A8_F32 ? 4 : 2));
  place.param = a8_at<char>(t->param, e * (t->param_dtype == A8_F32 ? 4 : 2));
  place.first_format = t->first_format;
  place.first = a8_at<char>(t->first, t->first_format == A8_NF4 ? e / 2 : t->first_format == A8_INT8 ? e : e * 4);
  place.first_block = a8_at<char>(t->first_block, e / A8_USUAL_BLOCK * 4);
  place.log8 = t->second_format == A8_LOG8;
  place.second_shift = place.log8 ? 31u - (uint32_t)__clz((int)t->second_block_size) : 31u;
  place.second = a8_at<char>(t->second, place.log8 ? e : e * 4);
  place.second_block = a8_at<char>(t->second_block, (e >> place.second_shift) * 4);
  place.all_lines = (job.count + (place.kStep - 1)) / place.kStep;
  place.lines = (job.count + (place.kStep - 1) - start) / place.kStep;
  // Left to itself the compiler keeps bases and offsets apart, which takes twice the registers.
  a8_settle(&place.grad);
  a8_settle(&place.param);
  a8_settle(&place.first);
  a8_settle(&place.first_block);
  a8_settle(&place.second);
  a8_settle(&place.second_block);
  return place;
}

// The header of the lane's eight in a line: what its own offset adds is in the place.
template <bool kFull>
A8_FN const char* a8_second_block(const a8_lane_place<kFull>& place, uint32_t line) {
  return place.second_block + ((uint64_t)line * place.kStep >> place.second_shift) * 4;
}

// --- Loads and stores of a lane's eight. ---

A8_FN void a8_get_floats(const void* base, int64_t e, float* x) {
  a8_eight<A8_F32> raw;
  a8_get<A8_F32, false>(&raw, base, e);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = a8_float(raw.w[i]);
}

A8_FN void a8_put_floats(const float* x, void* base, int64_t e) {
  a8_eight<A8_F32> raw;
#pragma unroll
  for (int i = 0; i < 8; ++i) raw.w[i] = a8_bits(x[i]);
  a8_put<A8_F32>(raw, base, e);
}

// --- The first moment. ---

typedef struct a8_first_eight {
  uint32_t codes[2];
  float scale;
} a8_first_eight;

// floats: where a float32 moment lies; read only when `active`.
A8_FN void a8_decode_first(const a8_first_eight& x, uint32_t format, const void* floats, bool active,
                           const a8_nf4_table* table, float* m) {
  if (format == A8_NF4) {
    a8_nf4_decode_eight(table, x.codes[0], x.scale, m);
  } else if (format == A8_INT8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = a8_int8_decode((int32_t)(int8_t)(x.codes[i / 4] >> (8 * (i % 4))), x.scale);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = 0.0f;
    if (active) a8_get_floats(floats, 0, m);
  }
}

// Called by whole warps; lanes that are not active hold zeros.
template <bool kFull>
A8_FN void a8_put_first(const a8_lane_place<kFull>& place, uint32_t line, bool active, const a8_nf4_table* table,
                        const float* m) {
  char* first = const_cast<char*>(place.first);
  if (place.first_format == A8_STATE_F32) {
    if (active) a8_put_floats(m, first + (uint64_t)line * (place.kStep * 4), 0);
    return;
  }
  const bool nf4 = place.first_format == A8_NF4;
  uint32_t most = a8_most_of_lanes(m), codes[2];
  float absmax = a8_float(most), inverse, scale;
  // One branch for the warp: the ranges of exact.cuh, or what has to be guarded.
  bool ordinary = most - a8_bits(A8_TWO_TO(-100)) <= a8_bits(A8_TWO_TO(100)) - a8_bits(A8_TWO_TO(-100));
  if (__all_sync(A8_LANE_MASK, ordinary && a8_has_exact_reciprocal(most))) {
    inverse = nf4 ? a8_exact_reciprocal(absmax) : a8_exact_div(A8_INT8_LEVELS, absmax);
    scale = nf4 ? absmax : a8_exact_div_127(absmax);
  } else {
    inverse = a8_absmax_inverse(most, nf4 ? 1.0f : A8_INT8_LEVELS);
    scale = a8_absmax_scale(most, nf4 ? 1.0f : A8_INT8_LEVELS);
  }
  if (nf4)
    codes[0] = a8_nf4_eight(table, m, inverse);
  else
    a8_int8_eight(m, inverse, codes);
  if (scale != scale) codes[0] = codes[1] = nf4 ? A8_NF4_ZERO * 0x11111111u : 0u;  // not a8_absmax_finite
  if (!active) return;
  if (nf4)
    __stcs(reinterpret_cast<uint32_t*>(first + (uint64_t)line * (place.kStep / 2)), codes[0]);
  else
    __stcs(reinterpret_cast<uint2*>(first + (uint64_t)line * place.kStep), make_uint2(codes[0], codes[1]));
  if (threadIdx.x % (A8_USUAL_BLOCK / 8) == 0) {
    char* to = const_cast<char*>(place.first_block) + (uint64_t)line * (place.kStep / A8_USUAL_BLOCK * 4);
    __stcs(reinterpret_cast<float*>(to), scale);
  }
}

// --- The second moment. ---

// Where a lane's eight lie in a factored matrix. They share a row, whose length is a multiple of eight.
typedef struct a8_matrix_place {
  const float* scratch;  // the same for all tensors, so it takes no registers; the rest are indices
  uint32_t row;          // of the lane's row factor
  uint32_t col;          // the lane's column, seen from the row's end: below zero, so that a step past the end carries
  uint32_t cols_end;     // past the last column's factor
  uint32_t col_count;
  uint64_t line;  // from a line of the chunk to the next: rows in the high half, columns in the low
} a8_matrix_place;

A8_FN a8_matrix_place a8_matrix_place_of(const a8_factor_job& job) {
  a8_matrix_place place;
  int64_t e = job.from + 8 * a8_lane(), cols = job.tensor->cols, row = a8_row_of(e, cols);
  place.scratch = job.scratch;
  place.row = (uint32_t)(job.tensor->row_at + row);
  place.col = (uint32_t)(e - (row + 1) * cols);
  place.cols_end = (uint32_t)(job.tensor->col_at + cols);
  place.col_count = (uint32_t)cols;
  place.line = (uint64_t)(A8_LINE / place.col_count) << 32 | A8_LINE % place.col_count;
  return place;
}

A8_FN void a8_next_line(a8_matrix_place* place) {
  uint64_t next = ((uint64_t)place->row << 32 | place->col) + place->line;
  uint32_t col = (uint32_t)next;
  place->row = (uint32_t)(next >> 32);
  place->col = max(col, col - place->col_count);  // back below zero
  a8_settle(&place->row);
  a8_settle(&place->col);
}

A8_FN float a8_bounded(float root, float bound) {
#if A8_AMPERE
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(root), "f"(bound));  // a8_at_most in one instruction
  return y;
#else
  return a8_at_most(root, bound);
#endif
}

// What lies beyond the chunk's end has no row, but some column. row_shift: to the row factors from those of the place.
A8_FN void a8_factored_roots(const a8_matrix_place& place, uint32_t row_shift, uint32_t cols_end, float bound,
                             bool active, float* root) {
  float row = 0.0f;
  if (active) row = place.scratch[place.row + row_shift];
  const float* col = place.scratch + (cols_end + place.col);
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    float4 x = *reinterpret_cast<const float4*>(col + i);
    root[i] = x.x, root[i + 1] = x.y, root[i + 2] = x.z, root[i + 3] = x.w;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) root[i] = a8_bounded(row * root[i], bound);
}

// a8_at_most(a8_reciprocal_root(v), bound) for v = 0 .. A8_ROOT_MAX and bound <= A8_BOUND_MAX.
A8_FN float a8_bounded_root(float v, float bound) {
  return fminf(a8_exact_reciprocal_root(v), bound);  // NaN, and what is inexact below 2^-100, become the bound
}

// Whether every v of the warp is at most A8_ROOT_MAX, and none is NaN. No v is negative.
A8_FN bool a8_are_ordinary(const float* v) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max(most, a8_bits(v[i]));
  return __all_sync(A8_LANE_MASK, most <= a8_bits(A8_ROOT_MAX));
}

// a8_bounded_root for any v that is not negative. Powers of four are taken out of what is too large.
A8_FN float a8_guarded_root(float v, float bound) {
  bool large = v > A8_ROOT_MAX;
  float root = a8_exact_reciprocal_root(large ? v * A8_TWO_TO(-64) : v);
  root = fminf(large ? root * A8_TWO_TO(-32) : root, bound);
  float infinite = v != v ? v : 0.0f;
  return v < a8_float(0x7f800000u) ? root : infinite;
}

// ordinary: a8_are_ordinary, or known to be.
A8_FN void a8_roots(const float* v, float bound, bool ordinary, float* root) {
  if (ordinary) {
#pragma unroll
    for (int i = 0; i < 8; ++i) root[i] = a8_bounded_root(v[i], bound);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) root[i] = a8_guarded_root(v[i], bound);
  }
}

// a8_at_most(a8_div(1, v), bound), likewise; bound: at most the square of A8_BOUND_MAX.
A8_FN void a8_reciprocals(const float* v, float bound, bool ordinary, float* reciprocal) {
  if (ordinary) {
#pragma unroll
    for (int i = 0; i < 8; ++i) reciprocal[i] = fminf(a8_exact_reciprocal_of_any(v[i]), bound);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) reciprocal[i] = a8_at_most(a8_div(1.0f, v[i]), bound);
  }
}

// The new second moment of eight elements from the old, of any format. floats: where a float32 moment lies; read only
// when `active`. By whole warps.
A8_FN void a8_new_second_of(bool log8, const uint32_t* codes, a8_log8_header header, const void* floats, bool active,
                            const float* g, const a8_hyper& hyper, float* v) {
  if (log8) {
    a8_log8_decode_eight(codes, header, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0.0f;
    if (active) a8_get_floats(floats, 0, v);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = a8_average(&hyper, v[i], g[i] * g[i]);
}

// --- The update. ---

// What the first moment averages.
enum a8_momentum { A8_NO_MOMENTUM, A8_OF_GRADIENT, A8_OF_UPDATE };

// The new first moment of a gradient.
A8_FN float a8_new_first(const a8_factor_job& job, float m, float g) {
  return job.hyper.beta1 * m + a8_signed(job.hyper.one_minus_beta1, job.sign) * g;
}

// u before clipping, without the sign of a maximised objective when there is no first moment: a8_update_sign gives it.
template <uint32_t kGrad, bool kMomentum>
A8_FN void a8_update_eight(const a8_factor_job& job, const a8_eight<kGrad>& grad, const float* root, float* m,
                           float* u) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float g = a8_value<kGrad>(grad.w, i);
    if (kMomentum) m[i] = a8_new_first(job, m[i], g);
    u[i] = (kMomentum ? m[i] : g) * root[i];
  }
}

// CAME's: m takes the clipped update. clipped: with the sign of a maximised objective.
template <uint32_t kGrad>
A8_FN void a8_average_update_eight(const a8_factor_job& job, const a8_eight<kGrad>& grad, const float* root,
                                   float clipped, float* m) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float u = a8_value<kGrad>(grad.w, i) * root[i] * clipped;
    m[i] = job.hyper.beta1 * m[i] + job.hyper.one_minus_beta1 * u;
  }
}

template <bool kMomentum>
A8_FN uint32_t a8_update_sign(const a8_factor_job& job) {
  return kMomentum ? 0u : job.sign;
}

A8_FN void a8_add_eight_squares(const float* x, float* accumulators) {
#pragma unroll
  for (int i = 0; i < 8; ++i) accumulators[i] += x[i] * x[i];
}

// Whether a8_factored_roots takes column factors that begin there in the scratch.
A8_FN bool a8_suits_factors(const a8_factor_job& job, int64_t cols_at) {
  return cols_at + job.tensor->cols <= 0xffffffffll && a8_aligned(job.scratch + cols_at, 16);
}

// Whether a fast path takes the chunk or run, for types that have one.
A8_FN bool a8_suits_warp(const a8_factor_job& job) {
  const a8_tensor* t = job.tensor;
  bool block = t->first_block_size == A8_USUAL_BLOCK;
  bool first = t->first_format == A8_NONE || (t->first_format == A8_INT8 && block && a8_aligned(t->first, 8)) ||
               (t->first_format == A8_NF4 && block && a8_aligned(t->first, 4)) ||
               (t->first_format == A8_STATE_F32 && a8_aligned(t->first, 16));
  bool second = t->second_format == A8_FACTORED
                    ? t->cols % 8 == 0 && t->cols <= 0x7fffffff && a8_suits_factors(job, t->col_at)
                : t->second_format == A8_LOG8 ? a8_aligned(t->second, 8) && t->second_block_size <= A8_ROUND
                                              : a8_aligned(t->second, 16);
  bool bound = t->second_format == A8_FACTORED || job.bound <= A8_BOUND_MAX;
  return first && second && bound && job.count % 8 == 0 && a8_aligned(t->param, 16) && a8_aligned(t->grad, 16);
}
