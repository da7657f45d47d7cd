// Adafactor's update of eight neighbouring elements a lane, for what the fast paths take: arrays aligned to 16 bytes and
// whole eights. A warp works on one chunk, a line of A8_LANES elements at a time, in order: so a lane holds eight
// accumulators of the chunk's sums, and they are summed in the canonical order.
#pragma once

#include "adafactor_sums.cuh"
#include "eight.cuh"
#include "exact.cuh"
#include "nf4_table.cuh"

#define A8_MOMENT_BLOCK 128  // block size of a quantised first moment here
#define A8_LINE A8_LANES

// Beyond these a root is taken by the compiler's guarded functions. Below the minimum every root meets the bound.
#define A8_ROOT_MIN A8_TWO_TO(-100)
#define A8_ROOT_MAX A8_TWO_TO(100)
#define A8_BOUND_MAX A8_TWO_TO(49)

#define A8_TYPES(param, grad) ((param) * 4u + (grad))

// --- Loads and stores of a lane's eight. ---

template <uint32_t kDtype>
struct a8_eight {
  static const int kWords = kDtype == A8_F32 ? 8 : 4;
  uint32_t w[kWords];
};

// kLast: nobody reads it again in this step.
template <uint32_t kDtype, bool kLast>
A8_FN void a8_get(a8_eight<kDtype>* x, const void* base, int64_t e) {
  const uint4* in = reinterpret_cast<const uint4*>(static_cast<const char*>(base) + e * (kDtype == A8_F32 ? 4 : 2));
#pragma unroll
  for (int i = 0; i < a8_eight<kDtype>::kWords; i += 4) {
    uint4 y = kLast ? __ldcs(in + i / 4) : in[i / 4];
    x->w[i] = y.x, x->w[i + 1] = y.y, x->w[i + 2] = y.z, x->w[i + 3] = y.w;
  }
}

template <uint32_t kDtype>
A8_FN void a8_put(const a8_eight<kDtype>& x, void* base, int64_t e) {
  uint4* out = reinterpret_cast<uint4*>(static_cast<char*>(base) + e * (kDtype == A8_F32 ? 4 : 2));
#pragma unroll
  for (int i = 0; i < a8_eight<kDtype>::kWords; i += 4)
    __stcs(out + i / 4, make_uint4(x.w[i], x.w[i + 1], x.w[i + 2], x.w[i + 3]));
}

template <uint32_t kDtype>
A8_FN void a8_clear(a8_eight<kDtype>* x) {
#pragma unroll
  for (int i = 0; i < a8_eight<kDtype>::kWords; ++i) x->w[i] = 0u;
}

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

// Brings the line of L2 that holds an address, without waiting.
A8_FN void a8_fetch(const void* base, int64_t bytes) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(base) + bytes));
}

// --- The first moment. ---

typedef struct a8_first_eight {
  uint32_t codes[2];
  float scale;
} a8_first_eight;

// Codes and scale of the eight from `e` on; a float32 moment is read when it is decoded.
A8_FN void a8_get_first(a8_first_eight* x, const a8_tensor* t, int64_t e) {
  if (t->first_format == A8_INT8) {
    uint2 codes = *reinterpret_cast<const uint2*>(a8_at<uint8_t>(t->first, e));
    x->codes[0] = codes.x, x->codes[1] = codes.y;
    x->scale = *a8_at<float>(t->first_block, e / A8_MOMENT_BLOCK);
  } else if (t->first_format == A8_NF4) {
    x->codes[0] = *reinterpret_cast<const uint32_t*>(a8_at<uint8_t>(t->first, e / 2));
    x->scale = *a8_at<float>(t->first_block, e / A8_MOMENT_BLOCK);
  }
}

A8_FN void a8_decode_first(const a8_first_eight& x, const a8_tensor* t, int64_t e, bool active,
                           const a8_nf4_table* table, float* m) {
  if (t->first_format == A8_INT8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = a8_int8_decode((int32_t)(int8_t)(x.codes[i / 4] >> (8 * (i % 4))), x.scale);
  } else if (t->first_format == A8_NF4) {
    a8_nf4_decode_eight(table, x.codes[0], x.scale, m);
  } else if (active) {
    a8_get_floats(t->first, e, m);
  }
  if (!active) {
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = 0.0f;
  }
}

// Called by whole warps; lanes that are not active hold zeros.
A8_FN void a8_put_first(const a8_tensor* t, int64_t e, bool active, const a8_nf4_table* table, const float* m) {
  if (t->first_format == A8_STATE_F32) {
    if (active) a8_put_floats(m, t->first, e);
    return;
  }
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max(most, a8_magnitude_bits(m[i]));
  most = a8_lanes_max<A8_MOMENT_BLOCK / 8>(most);
  bool finite = a8_absmax_finite(most), int8 = t->first_format == A8_INT8;
  float levels = int8 ? A8_INT8_LEVELS : 1.0f;
  float inverse = a8_absmax_inverse(most, levels);
  if (int8) {
    uint32_t packed[2];
    a8_int8_eight(m, inverse, packed);
    if (active)
      __stcs(reinterpret_cast<uint2*>(a8_at<uint8_t>(t->first, e)),
             make_uint2(finite ? packed[0] : 0u, finite ? packed[1] : 0u));
  } else {
    uint32_t packed = a8_nf4_eight(table, m, inverse);
    if (active)
      __stcs(reinterpret_cast<uint32_t*>(a8_at<uint8_t>(t->first, e / 2)), finite ? packed : A8_NF4_ZERO * 0x11111111u);
  }
  if (active && threadIdx.x % (A8_MOMENT_BLOCK / 8) == 0)
    __stcs(a8_at<float>(t->first_block, e / A8_MOMENT_BLOCK), a8_absmax_scale(most, levels));
}

// --- The second moment. ---

// Where a lane's eight lie in a factored matrix. They share a row, whose length is a multiple of eight.
typedef struct a8_matrix_place {
  const float* row;
  const float* col;  // of column 0
  uint32_t at, cols;
  uint32_t rows_a_line, cols_a_line;  // from a line of the chunk to the next
  bool aligned;                       // col, to 16 bytes
} a8_matrix_place;

A8_FN a8_matrix_place a8_place_of(const a8_factor_job& job) {
  a8_matrix_place place;
  int64_t e = job.from + 8 * (threadIdx.x & 31u), cols = job.tensor->cols, row = e / cols;
  place.row = job.row_factor + row;
  place.col = job.col_factor;
  place.at = (uint32_t)(e - row * cols);
  place.cols = (uint32_t)cols;
  place.rows_a_line = A8_LINE / place.cols;
  place.cols_a_line = A8_LINE % place.cols;
  place.aligned = a8_aligned(job.col_factor, 16);
  return place;
}

A8_FN void a8_next_line(a8_matrix_place* place) {
  place->row += place->rows_a_line;
  place->at += place->cols_a_line;
  if (place->at >= place->cols) {
    place->at -= place->cols;
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

A8_FN void a8_factored_roots(const a8_matrix_place& place, float bound, bool active, float* root) {
#pragma unroll
  for (int i = 0; i < 8; ++i) root[i] = 0.0f;
  if (!active) return;
  float row = *place.row;
  const float* col = place.col + place.at;
  if (place.aligned) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float4 x = *reinterpret_cast<const float4*>(col + i);
      root[i] = x.x, root[i + 1] = x.y, root[i + 2] = x.z, root[i + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) root[i] = col[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) root[i] = a8_bounded(row * root[i], bound);
}

// a8_at_most(a8_reciprocal_root(v), bound) for v = 0 .. A8_ROOT_MAX and bound <= A8_BOUND_MAX.
A8_FN float a8_bounded_root(float v, float bound) {
  return fminf(a8_exact_reciprocal_root(fmaxf(v, A8_ROOT_MIN)), bound);
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

typedef struct a8_second_eight {
  uint32_t codes[2];
  int2 header;  // lo, step
} a8_second_eight;

A8_FN int2 a8_get_header(const a8_tensor* t, int64_t e, uint32_t shift) {
  return *(reinterpret_cast<const int2*>(t->second_block) + (e >> shift));
}

A8_FN void a8_get_codes(a8_second_eight* x, const a8_tensor* t, int64_t e) {
  uint2 codes = *reinterpret_cast<const uint2*>(a8_at<uint8_t>(t->second, e));
  x->codes[0] = codes.x, x->codes[1] = codes.y;
}

// The new second moment of eight elements that keep theirs in log8.
template <uint32_t kGrad>
A8_FN void a8_new_second(const a8_second_eight& x, const a8_eight<kGrad>& grad, const a8_hyper& hyper, float* v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float g = a8_value<kGrad>(grad.w, i);
    v[i] = a8_log8_decode(__byte_perm(x.codes[i / 4], 0u, 0x4440u + i % 4), x.header.x, x.header.y);
    v[i] = a8_average(&hyper, v[i], g * g);
  }
}

// Of eight elements that keep it in float32.
template <uint32_t kGrad>
A8_FN void a8_new_second(const a8_tensor* t, int64_t e, const a8_eight<kGrad>& grad, const a8_hyper& hyper, float* v) {
  a8_get_floats(t->second, e, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float g = a8_value<kGrad>(grad.w, i);
    v[i] = a8_average(&hyper, v[i], g * g);
  }
}

// --- The update. ---

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

template <bool kMomentum>
A8_FN uint32_t a8_update_sign(const a8_factor_job& job) {
  return kMomentum ? 0u : job.sign;
}

A8_FN void a8_add_eight_squares(const float* x, float* accumulators) {
#pragma unroll
  for (int i = 0; i < 8; ++i) accumulators[i] += x[i] * x[i];
}

// Whether a fast path takes the chunk, for types that have one.
A8_FN bool a8_suits_warp(const a8_factor_job& job) {
  const a8_tensor* t = job.tensor;
  bool block = t->first_block_size == A8_MOMENT_BLOCK;
  bool first = t->first_format == A8_NONE || (t->first_format == A8_INT8 && block && a8_aligned(t->first, 8)) ||
               (t->first_format == A8_NF4 && block && a8_aligned(t->first, 4)) ||
               (t->first_format == A8_STATE_F32 && a8_aligned(t->first, 16));
  bool second = t->second_format == A8_FACTORED ? t->cols % 8 == 0 && t->cols <= 0x7fffffff
                : t->second_format == A8_LOG8   ? a8_aligned(t->second, 8) && a8_aligned(t->second_block, 8)
                                                : a8_aligned(t->second, 16);
  return first && second && job.count % 8 == 0 && job.bound <= A8_BOUND_MAX && a8_aligned(t->param, 16) &&
         a8_aligned(t->grad, 16);
}
