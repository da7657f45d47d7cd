// Adafactor's update of eight neighbouring elements a lane, for what the fast paths take: arrays aligned to 16 bytes and
// whole eights. A warp works on one chunk, a line of A8_LANES elements at a time, in order: so a lane holds eight
// accumulators of the chunk's sums, and they are summed in the canonical order.
#pragma once

#include "adafactor_sums.cuh"
#include "eight.cuh"
#include "exact.cuh"
#include "nf4_table.cuh"

#define A8_LINE A8_LANES

// Beyond the maximum a root is taken by the compiler's guarded functions. Below 2^-100 every root meets the bound, which is
// under 2^50; only element-wise moments need one, for the factors of a factored one are made elsewhere.
#define A8_ROOT_MAX A8_TWO_TO(100)
#define A8_BOUND_MAX 1.1e15f

#define A8_TYPES(param, grad) ((param) * 4u + (grad))

// Where a chunk's arrays lie.
typedef struct a8_lane_place {
  const char *grad, *param, *first, *first_block, *second, *second_block;
  uint32_t count;  // elements of the chunk
  uint32_t first_format;
  uint32_t second_shift;  // log2 of the second moment's block size
  bool log8;
} a8_lane_place;

// Hides from the compiler how a pointer was made.
A8_FN void a8_settle(const char** pointer) { asm("" : "+l"(*pointer)); }

A8_FN a8_lane_place a8_lane_place_of(const a8_factor_job& job) {
  const a8_tensor* t = job.tensor;
  a8_lane_place place;
  place.grad = a8_at<char>(t->grad, job.from * (t->grad_dtype == A8_F32 ? 4 : 2));
  place.param = a8_at<char>(t->param, job.from * (t->param_dtype == A8_F32 ? 4 : 2));
  place.first_format = t->first_format;
  place.first = a8_at<char>(t->first, t->first_format == A8_NF4    ? job.from / 2
                                      : t->first_format == A8_INT8 ? job.from
                                                                   : job.from * 4);
  place.first_block = a8_at<char>(t->first_block, job.from / A8_USUAL_BLOCK * 4);
  place.log8 = t->second_format == A8_LOG8;
  place.second_shift = 31u - (uint32_t)__clz((int)t->second_block_size);
  place.second = a8_at<char>(t->second, place.log8 ? job.from : job.from * 4);
  place.second_block = a8_at<char>(t->second_block, (job.from >> place.second_shift) * 4);
  place.count = job.count;
  // Left to itself the compiler keeps bases and offsets apart, which takes twice the registers.
  a8_settle(&place.grad);
  a8_settle(&place.param);
  a8_settle(&place.first);
  a8_settle(&place.first_block);
  a8_settle(&place.second);
  a8_settle(&place.second_block);
  return place;
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

// Called by whole warps; lanes that are not active hold zeros. e: of the chunk.
A8_FN void a8_put_first(const a8_lane_place& place, uint32_t e, bool active, const a8_nf4_table* table,
                        const float* m) {
  if (place.first_format == A8_STATE_F32) {
    if (active) a8_put_floats(m, const_cast<char*>(place.first) + (uint64_t)e * 4, 0);
    return;
  }
  uint32_t most = a8_most_of_lanes(m);
  float scale, absmax = a8_float(most);
  bool leader = active && threadIdx.x % (A8_USUAL_BLOCK / 8) == 0;
  // One branch for the warp: the ranges of exact.cuh, or what has to be guarded.
  bool ordinary = most == 0 || (absmax >= A8_TWO_TO(-100) && absmax <= A8_TWO_TO(100) && a8_has_exact_reciprocal(most));
  ordinary = __all_sync(A8_LANE_MASK, ordinary);
  char* codes = const_cast<char*>(place.first);
  if (place.first_format == A8_NF4) {
    float inverse = !ordinary ? a8_absmax_inverse(most, 1.0f) : most == 0 ? 0.0f : a8_exact_reciprocal(absmax);
    scale = !ordinary ? a8_absmax_scale(most, 1.0f) : absmax;
    uint32_t packed = a8_nf4_eight(table, m, inverse);
    if (!ordinary && !a8_absmax_finite(most)) packed = A8_NF4_ZERO * 0x11111111u;
    if (active) __stcs(reinterpret_cast<uint32_t*>(codes + e / 2), packed);
  } else {
    float inverse = !ordinary   ? a8_absmax_inverse(most, A8_INT8_LEVELS)
                    : most == 0 ? 0.0f
                                : a8_exact_div(A8_INT8_LEVELS, absmax);
    scale = !ordinary ? a8_absmax_scale(most, A8_INT8_LEVELS) : most == 0 ? 0.0f : a8_exact_div_127(absmax);
    uint32_t packed[2];
    a8_int8_eight(m, inverse, packed);
    if (!ordinary && !a8_absmax_finite(most)) packed[0] = packed[1] = 0u;
    if (active) __stcs(reinterpret_cast<uint2*>(codes + e), make_uint2(packed[0], packed[1]));
  }
  if (leader) __stcs(reinterpret_cast<float*>(const_cast<char*>(place.first_block) + e / A8_USUAL_BLOCK * 4), scale);
}

// --- The second moment. ---

// Where a lane's eight lie in a factored matrix. They share a row, whose length is a multiple of eight.
typedef struct a8_matrix_place {
  const float* scratch;  // the same for all tensors, so it takes no registers; the rest are indices
  uint32_t row;          // of the lane's row factor
  uint32_t cols, col;    // of column 0's factor; the lane's column
  uint32_t col_count;
  uint32_t rows_cols_a_line;  // from a line of the chunk to the next: rows in the high half, columns in the low
} a8_matrix_place;

A8_FN a8_matrix_place a8_matrix_place_of(const a8_factor_job& job) {
  a8_matrix_place place;
  int64_t e = job.from + 8 * a8_lane(), row = a8_row_of(e, job.tensor->cols);
  place.scratch = job.scratch;
  place.row = (uint32_t)(job.tensor->row_at + row);
  place.cols = (uint32_t)job.tensor->col_at;
  place.col_count = (uint32_t)job.tensor->cols;
  place.col = (uint32_t)(e - row * job.tensor->cols);
  place.rows_cols_a_line = A8_LINE / place.col_count << 16 | A8_LINE % place.col_count;
  return place;
}

A8_FN void a8_next_line(a8_matrix_place* place) {
  place->row += place->rows_cols_a_line >> 16;
  place->col += place->rows_cols_a_line & 0xffffu;
  if (place->col >= place->col_count) {
    place->col -= place->col_count;
    place->row += 1;
  }
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

// What lies beyond the chunk's end has no row, but some column.
A8_FN void a8_factored_roots(const a8_matrix_place& place, float bound, bool active, float* root) {
  float row = 0.0f;
  if (active) row = place.scratch[place.row];
  const float* col = place.scratch + (place.cols + place.col);
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

static __device__ __noinline__ a8_float_eight a8_guarded_roots(a8_float_eight v, float bound) {
  a8_float_eight root;
#pragma unroll
  for (int i = 0; i < 8; ++i) root.x[i] = a8_at_most(a8_reciprocal_root(v.x[i]), bound);
  return root;
}

// ordinary: a8_are_ordinary, or known to be.
A8_FN void a8_roots(const float* v, float bound, bool ordinary, float* root) {
  if (ordinary) {
#pragma unroll
    for (int i = 0; i < 8; ++i) root[i] = a8_bounded_root(v[i], bound);
  } else {
    a8_float_eight values = {{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]}};
    a8_float_eight guarded = a8_guarded_roots(values, bound);
#pragma unroll
    for (int i = 0; i < 8; ++i) root[i] = guarded.x[i];
  }
}

// The new second moment of eight elements from the old.
template <uint32_t kGrad>
A8_FN void a8_new_second(const a8_eight<kGrad>& grad, const a8_hyper& hyper, float* v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float g = a8_value<kGrad>(grad.w, i);
    v[i] = a8_average(&hyper, v[i], g * g);
  }
}

// The same for any format. floats: where a float32 moment lies; read only when `active`. By whole warps.
template <uint32_t kGrad>
A8_FN void a8_new_second_of(bool log8, const uint32_t* codes, a8_log8_header header, const void* floats, bool active,
                            const a8_eight<kGrad>& grad, const a8_hyper& hyper, float* v) {
  if (log8) {
    a8_log8_decode_eight(codes, header, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0.0f;
    if (active) a8_get_floats(floats, 0, v);
  }
  a8_new_second<kGrad>(grad, hyper, v);
}

// --- The update. ---

// What the first moment averages.
enum a8_momentum { A8_NO_MOMENTUM, A8_OF_GRADIENT, A8_OF_UPDATE };

// u before clipping, without the sign of a maximised objective when there is no first moment: a8_update_sign gives it.
template <uint32_t kGrad, bool kMomentum>
A8_FN void a8_update_eight(const a8_factor_job& job, const a8_eight<kGrad>& grad, const float* root, float* m,
                           float* u) {
  float one_minus_beta1 = a8_signed(job.hyper.one_minus_beta1, job.sign);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float g = a8_value<kGrad>(grad.w, i);
    if (kMomentum) m[i] = job.hyper.beta1 * m[i] + one_minus_beta1 * g;
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

// Whether a fast path takes the chunk, for types that have one.
A8_FN bool a8_suits_warp(const a8_factor_job& job) {
  const a8_tensor* t = job.tensor;
  bool block = t->first_block_size == A8_USUAL_BLOCK;
  bool first = t->first_format == A8_NONE || (t->first_format == A8_INT8 && block && a8_aligned(t->first, 8)) ||
               (t->first_format == A8_NF4 && block && a8_aligned(t->first, 4)) ||
               (t->first_format == A8_STATE_F32 && a8_aligned(t->first, 16));
  bool second = t->second_format == A8_FACTORED
                    ? t->cols % 8 == 0 && t->cols <= 0x7fffffff && a8_suits_factors(job, t->col_at)
                : t->second_format == A8_LOG8 ? a8_aligned(t->second, 8)
                                              : a8_aligned(t->second, 16);
  bool bound = t->second_format == A8_FACTORED || job.bound <= A8_BOUND_MAX;
  return first && second && bound && job.count % 8 == 0 && a8_aligned(t->param, 16) && a8_aligned(t->grad, 16);
}
