// Sums of CAME's residual over the rows and the columns of one tile, by one block of threads, in the order of
// adafactor_reduce.cuh. A tile's rows begin anywhere in a block of the first moment, so headers are read from memory.
#pragma once

#include "adafactor_reduce.cuh"
#include "moments.cuh"

// What the residual of an element follows from, besides the element.
typedef struct a8_residual_rule {
  float bound;  // of 1 / sqrt(v)
  float beta1, one_minus_beta1, eps3;
  float clipped;  // as in a8_adafactor_rule
  uint32_t sign;  // flips the gradient when maximising
  bool averages;  // A8_AVERAGE_UPDATE
} a8_residual_rule;

A8_FN float a8_residual_of(const a8_residual_rule& r, float g, float root, float m) {
  float gradient = a8_signed(g, r.sign), u = gradient * root;
  if (r.averages) u = u * r.clipped;
  m = r.beta1 * m + r.one_minus_beta1 * (r.averages ? u : gradient);
  return a8_residual(u, r.averages ? m : m * root, r.eps3);
}

// Where a lane's eight of a tile's row come from.
typedef struct a8_residual_place {
  const a8_tensor* tensor;
  const float *row_factor, *col_factor;  // of the matrix
  const float* levels;                   // of nf4, in shared memory
  uint32_t first_shift;                  // log2 of the first moment's block size
} a8_residual_place;

// The first moment of one element.
A8_FN float a8_first_at(const a8_residual_place& place, int64_t e) {
  const a8_tensor* t = place.tensor;
  uint32_t format = t->first_format;
  if (format == A8_NONE) return 0.0f;
  if (format == A8_STATE_F32) return *a8_at<float>(t->first, e);
  if (format == A8_STATE_BF16) return a8_from_bf16(*a8_at<uint16_t>(t->first, e));
  uint32_t code =
      format == A8_NF4 ? *a8_at<uint8_t>(t->first, e / 2) >> (4 * (e & 1)) & 15u : *a8_at<uint8_t>(t->first, e);
  return a8_decode(format, code, a8_load_header(t->first_block, format, e >> place.first_shift), place.levels);
}

// Of eight elements from a multiple of eight on, aligned (a8_suits_eight): they lie in one block.
A8_FN void a8_first_eight_at(const a8_residual_place& place, int64_t e, float* m) {
  const a8_tensor* t = place.tensor;
  const char* first = static_cast<const char*>(t->first);
  uint32_t raw[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) m[i] = 0.0f;
  if (t->first_format == A8_NF4) {
    uint32_t codes = *reinterpret_cast<const uint32_t*>(first + e / 2);
    float scale = *a8_at<float>(t->first_block, e >> place.first_shift);
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = place.levels[codes >> (4 * i) & 15u] * scale;
  } else if (t->first_format == A8_INT8) {
    uint2 codes = *reinterpret_cast<const uint2*>(first + e);
    float scale = *a8_at<float>(t->first_block, e >> place.first_shift);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      m[i] = a8_int8_decode((int32_t)(int8_t)((i < 4 ? codes.x : codes.y) >> (8 * (i % 4))), scale);
  } else if (t->first_format == A8_STATE_F32) {
    a8_load_eight<A8_F32>(first + 4 * e, raw);
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = a8_float(raw[i]);
  } else if (t->first_format == A8_STATE_BF16) {
    a8_load_eight<A8_BF16>(first + 2 * e, raw);
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = a8_value<A8_BF16>(raw, i);
  }
}

// Whether rows begin at multiples of eight elements, and every array where wide loads need it.
A8_FN bool a8_suits_eight(const a8_tensor* t) {
  uint32_t first = t->first_format == A8_NF4 ? 4 : t->first_format == A8_INT8 ? 8 : 16;
  return t->cols % 8 == 0 && a8_aligned(t->grad, 16) && (t->first_format == A8_NONE || a8_aligned(t->first, first));
}

// One run of rows by one warp: row sums to `row_sums`, the run's column sums to `columns` in shared memory. row0, col0: of the
// matrix, the run's first. kAligned: a8_suits_eight, with gradients of kDtype; else of `dtype`.
template <uint32_t kDtype, bool kAligned>
A8_FN void a8_residual_run(const a8_residual_place& place, const a8_residual_rule& rule, int64_t row0, int64_t col0,
                           int rows, int cols, float* row_sums, float* columns) {
  const a8_tensor* t = place.tensor;
  int lane = (int)a8_lane();
  float column[A8_TILE_LINES][8];
#pragma unroll
  for (int k = 0; k < A8_TILE_LINES; ++k)
#pragma unroll
    for (int i = 0; i < 8; ++i) column[k][i] = 0.0f;
#pragma unroll 1
  for (int row = 0; row < rows; row += 2) {
    float lanes[16];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) lanes[8 * r + i] = 0.0f;
      if (row + r >= rows) continue;
      float row_factor = place.row_factor[row0 + row + r];
#pragma unroll
      for (int k = 0; k < A8_TILE_LINES; ++k) {
        int at = k * A8_LANES + 8 * lane, exist = cols - at;
        if (exist <= 0) continue;
        int64_t e = (row0 + row + r) * t->cols + col0 + at;
        const float* col_factor = place.col_factor + col0 + at;
        uint32_t raw[8];
        float m[8];
        if (kAligned) {
          a8_load_eight<kDtype>(static_cast<const char*>(t->grad) + e * (kDtype == A8_F32 ? 4 : 2), raw);
          a8_first_eight_at(place, e, m);
        } else {
          a8_load_any(static_cast<const char*>(t->grad) + e * (t->grad_dtype == A8_F32 ? 4 : 2), t->grad_dtype, exist,
                      raw);
#pragma unroll
          for (int i = 0; i < 8; ++i) m[i] = i < exist ? a8_first_at(place, e + i) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (!kAligned && i >= exist) continue;
          float root = a8_at_most(row_factor * col_factor[i], rule.bound);
          float x = a8_residual_of(rule, a8_value<kDtype>(raw, i), root, m[i]);
          lanes[8 * r + i] += x;
          column[k][i] += x;
        }
      }
    }
    float sum = a8_fold_two(lanes);
    if (lane % 16 == 0 && row + lane / 16 < rows) row_sums[row + lane / 16] = sum;
  }
  a8_put_columns(column, columns);
}

A8_FN void a8_residual_tile(const a8_batch& batch, const a8_matrix_tile& tile, float* scratch, a8_reduce_room* room,
                            float* levels) {
  const a8_tensor* t = tile.tensor;
  const a8_hyper* h = batch.hypers + t->hyper;
  a8_share_levels(levels);
  __syncthreads();
  int run = (int)a8_warp_number(), first = run * A8_RUN_ROWS, rows = min(tile.rows - first, A8_RUN_ROWS);
  float* row_sums = scratch + t->residual_at + tile.across * t->rows + tile.row + first;
  float* col_sums = scratch + a8_confidence_cols_at(t) + tile.down * t->cols + tile.col;
  a8_residual_place place = {t, scratch + t->row_at, scratch + t->col_at, levels, 0};
  place.first_shift = a8_block_shift(t->first_format, t->first_block_size);
  a8_residual_rule rule;
  rule.bound = a8_div(1.0f, h->eps);
  rule.beta1 = h->beta1, rule.one_minus_beta1 = h->one_minus_beta1, rule.eps3 = h->eps3;
  rule.averages = h->flags & A8_AVERAGE_UPDATE;
  rule.clipped = rule.averages ? a8_adafactor_rule_of(h, 0.0f, (float)t->numel, scratch + t->sum_at).clipped : 1.0f;
  rule.sign = h->flags & A8_MAXIMIZE ? 0x80000000u : 0u;
  if (rows > 0) {
    int64_t row0 = tile.row + first;
    if (!a8_suits_eight(t))
      a8_residual_run<A8_F32, false>(place, rule, row0, tile.col, rows, tile.cols, row_sums, room->runs[run]);
    else if (t->grad_dtype == A8_BF16)
      a8_residual_run<A8_BF16, true>(place, rule, row0, tile.col, rows, tile.cols, row_sums, room->runs[run]);
    else if (t->grad_dtype == A8_F32)
      a8_residual_run<A8_F32, true>(place, rule, row0, tile.col, rows, tile.cols, row_sums, room->runs[run]);
    else
      a8_residual_run<A8_F16, true>(place, rule, row0, tile.col, rows, tile.cols, row_sums, room->runs[run]);
  }
  a8_add_runs(tile, room, col_sums);
}
