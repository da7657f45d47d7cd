// Sums of CAME's residual over the rows and the columns of one tile, by one block of threads, in the order of
// adafactor_reduce.cuh. A tile's rows begin anywhere in a block of the first moment, so headers are read from memory.
#pragma once

#include "adafactor_fast.cuh"
#include "adafactor_reduce.cuh"

// What the residual of an element follows from, besides the element.
typedef struct a8_residual_rule {
  float bound;  // of 1 / sqrt(v)
  float beta1, one_minus_beta1, eps3;
  float clipped;  // as in a8_adafactor_rule
  uint32_t sign;  // flips the gradient when maximising
  bool averages;  // A8_AVERAGE_UPDATE
} a8_residual_rule;

// kAverages: of a tensor with A8_AVERAGE_UPDATE; else of any.
template <bool kAverages>
A8_FN float a8_residual_of(const a8_residual_rule& r, float g, float root, float m) {
  if (kAverages) {
    float u = g * root * a8_signed(r.clipped, r.sign);
    return a8_residual(u, r.beta1 * m + r.one_minus_beta1 * u, r.eps3);
  }
  float gradient = a8_signed(g, r.sign), u = gradient * root;
  if (r.averages) u = u * r.clipped;
  m = r.beta1 * m + r.one_minus_beta1 * (r.averages ? u : gradient);
  return a8_residual(u, r.averages ? m : m * root, r.eps3);
}

// Where a lane's eight of a tile's row come from.
typedef struct a8_residual_place {
  const a8_tensor* tensor;
  // The tensor's, which the compiler would read anew after every sum that is stored.
  const char *grad, *first;
  const float* first_block;
  int64_t cols;
  const float* row_factor;    // of the matrix
  const float* col_factor;    // of the tile, in shared memory; zero beyond its last column
  const a8_nf4_table* table;  // in shared memory
  uint32_t first_shift;       // log2 of the first moment's block size
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
  return a8_decode(format, code, a8_load_header(t->first_block, format, e >> place.first_shift), place.table->levels);
}

// What is stored of eight elements from a multiple of eight on, aligned (a8_suits_residual): they lie in one block.
// Codes only.
A8_FN void a8_load_first(uint32_t format, const char* at, const float* scale, a8_first_eight* x) {
  if (format == A8_INT8) {
    uint2 codes = __ldg(reinterpret_cast<const uint2*>(at));
    x->codes[0] = codes.x, x->codes[1] = codes.y;
  } else if (format == A8_NF4) {
    x->codes[0] = __ldg(reinterpret_cast<const uint32_t*>(at));
  } else {
    return;
  }
  x->scale = __ldg(scale);
}

// Their values, from the codes or, of a moment that has none, from memory.
A8_FN void a8_first_values(const a8_residual_place& place, uint32_t format, int64_t e, const a8_first_eight& x,
                           float* m) {
  if (format == A8_STATE_BF16) {
    a8_eight<A8_BF16> raw;
    a8_get<A8_BF16, false>(&raw, place.first, e);
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = a8_value<A8_BF16>(raw.w, i);
  } else {
    a8_decode_first(x, format, place.first + 4 * e, format == A8_STATE_F32, place.table, m);
  }
}

// Whether rows begin at multiples of eight elements, and every array where wide loads need it.
A8_FN bool a8_suits_residual(const a8_residual_place& place) {
  const a8_tensor* t = place.tensor;
  uint32_t first = t->first_format == A8_NF4 ? 4 : t->first_format == A8_INT8 ? 8 : 16;
  return t->cols % 8 == 0 && a8_aligned(t->grad, 16) && (t->first_format == A8_NONE || a8_aligned(t->first, first));
}

// One run of rows by one warp: row sums to `row_sums`, the run's column sums to `columns` in shared memory. row0, col0:
// of the matrix, the run's first. kAligned: a8_suits_residual, with gradients of kDtype, of 16 bits loaded while the
// row before is worked on; else of any type. kFirst: the format of a first moment of a8_is_usual_residual, or A8_NONE
// for all others: a loop for each format would not fit the instruction cache.
template <uint32_t kDtype, bool kAligned, uint32_t kFirst>
A8_FN void a8_residual_run(const a8_residual_place& place, const a8_residual_rule& rule, int64_t row0, int64_t col0,
                           int rows, int cols, float* row_sums, float* columns) {
  const a8_tensor* t = place.tensor;
  const uint32_t format = kFirst == A8_NONE ? t->first_format : kFirst;
  const bool kUsual = kFirst != A8_NONE;
  const bool kAhead = kAligned && kDtype != A8_F32;  // of float32 it would not fit the registers
  int lane = (int)a8_lane();
  float column[A8_TILE_LINES][8];
  uint32_t grad[A8_TILE_LINES][kDtype == A8_F32 ? 8 : 4];
  a8_first_eight first[A8_TILE_LINES];
  int64_t next = row0 * place.cols + col0 + 8 * lane;  // of the row to be loaded: the lane's first element
  auto load = [&](int k) {
    int exist = cols - k * A8_LANES - 8 * lane;
    if (!kUsual && exist <= 0) return;
    if (kAligned) {
      // Each line's place from the row's, by a constant.
      const int kBytes = kDtype == A8_F32 ? 4 : 2;
      a8_load_eight<kDtype>(place.grad + next * kBytes + k * (A8_LANES * kBytes), grad[k]);
      const char* first_at =
          format == A8_NF4 ? place.first + next / 2 + k * (A8_LANES / 2) : place.first + next + k * A8_LANES;
      const float* scale = place.first_block + (kUsual ? next / A8_USUAL_BLOCK + k * (A8_LANES / A8_USUAL_BLOCK)
                                                       : (next + k * A8_LANES) >> place.first_shift);
      a8_load_first(format, first_at, scale, &first[k]);
    } else {
      a8_load_any(a8_at<char>(t->grad, (next + k * A8_LANES) * (t->grad_dtype == A8_F32 ? 4 : 2)), t->grad_dtype, exist,
                  grad[k]);
    }
  };
#pragma unroll
  for (int k = 0; k < A8_TILE_LINES; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) column[k][i] = 0.0f;
    if (kAhead) load(k);
  }
  float row_factor = place.row_factor[row0];
#pragma unroll 1
  for (int row = 0; row < rows; row += 2) {
    float lanes[16];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) lanes[8 * r + i] = 0.0f;
      if (row + r >= rows) continue;
      bool more = row + r + 1 < rows;
      int64_t at = next;
      float factor = row_factor;
      if (kAhead && (more || !kUsual)) next += place.cols;  // the last row is loaded twice: no line needs a branch
      if (more) row_factor = place.row_factor[row0 + row + r + 1];
#pragma unroll
      for (int k = 0; k < A8_TILE_LINES; ++k) {
        int exist = cols - k * A8_LANES - 8 * lane;
        float g[8], m[8], root[8];
        if (kUsual || exist > 0) {
          int64_t e = at + k * A8_LANES;
          if (!kAhead) load(k);
#pragma unroll
          for (int i = 0; i < 8; i += 4) {
            float4 x = *reinterpret_cast<const float4*>(place.col_factor + k * A8_LANES + 8 * lane + i);
            root[i] = x.x, root[i + 1] = x.y, root[i + 2] = x.z, root[i + 3] = x.w;
          }
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            g[i] = a8_value<kDtype>(grad[k], i);
            if (!kAligned) m[i] = i < exist ? a8_first_at(place, e + i) : 0.0f;
          }
          if (kAligned) a8_first_values(place, format, e, first[k], m);
          if (kAhead && (more || kUsual)) load(k);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (!kAligned && i >= exist) continue;
            float x = a8_residual_of<kUsual>(rule, g[i], a8_bounded(factor * root[i], rule.bound), m[i]);
            lanes[8 * r + i] = kUsual && k == 0 ? x : lanes[8 * r + i] + x;
            column[k][i] += x;
          }
        }
      }
      if (!kAhead) next += place.cols;
    }
    float sum = a8_fold_two(lanes);
    if (lane % 16 == 0 && row + lane / 16 < rows) row_sums[row + lane / 16] = sum;
  }
  a8_put_columns(column, columns);
}

// Whether the tile has all its columns, and the first moment averages updates in blocks of A8_USUAL_BLOCK.
A8_FN bool a8_is_usual_residual(const a8_residual_place& place, const a8_residual_rule& rule, int cols) {
  return cols == A8_TILE_COLS && rule.averages && place.tensor->first_block_size == A8_USUAL_BLOCK;
}

template <uint32_t kDtype>
A8_FN void a8_residual_aligned(const a8_residual_place& place, const a8_residual_rule& rule, int64_t row0, int64_t col0,
                               int rows, int cols, float* row_sums, float* columns) {
  uint32_t format = a8_is_usual_residual(place, rule, cols) ? place.tensor->first_format : A8_NONE;
  if (format == A8_INT8)
    a8_residual_run<kDtype, true, A8_INT8>(place, rule, row0, col0, rows, cols, row_sums, columns);
  else if (format == A8_NF4)
    a8_residual_run<kDtype, true, A8_NF4>(place, rule, row0, col0, rows, cols, row_sums, columns);
  else
    a8_residual_run<kDtype, true, A8_NONE>(place, rule, row0, col0, rows, cols, row_sums, columns);
}

// first: the run's first row in the tile.
A8_FN void a8_residual_typed(const a8_residual_place& place, const a8_residual_rule& rule, const a8_matrix_tile& tile,
                             int first, int rows, float* row_sums, float* columns) {
  const a8_tensor* t = place.tensor;
  int64_t row0 = tile.row + first;
  if (!a8_suits_residual(place))
    a8_residual_run<A8_F32, false, A8_NONE>(place, rule, row0, tile.col, rows, tile.cols, row_sums, columns);
  else if (t->grad_dtype == A8_BF16)
    a8_residual_aligned<A8_BF16>(place, rule, row0, tile.col, rows, tile.cols, row_sums, columns);
  else if (t->grad_dtype == A8_F32)
    a8_residual_aligned<A8_F32>(place, rule, row0, tile.col, rows, tile.cols, row_sums, columns);
  else
    a8_residual_aligned<A8_F16>(place, rule, row0, tile.col, rows, tile.cols, row_sums, columns);
}

A8_FN void a8_residual_tile(const a8_batch& batch, const a8_matrix_tile& tile, float* scratch, a8_reduce_room* room,
                            a8_nf4_table* table, float* col_factor) {
  const a8_tensor* t = tile.tensor;
  const a8_hyper* h = batch.hypers + t->hyper;
  a8_share_nf4_table(table);
  for (int col = (int)threadIdx.x; col < A8_TILE_COLS; col += A8_THREADS)
    col_factor[col] = col < tile.cols ? scratch[t->col_at + tile.col + col] : 0.0f;
  __syncthreads();
  int run = (int)a8_warp_number(), first = run * A8_RUN_ROWS, rows = min(tile.rows - first, A8_RUN_ROWS);
  float* row_sums = scratch + t->residual_at + tile.across * t->rows + tile.row + first;
  float* col_sums = scratch + a8_confidence_cols_at(t) + tile.down * t->cols + tile.col;
  a8_residual_place place;
  place.tensor = t, place.cols = t->cols, place.table = table;
  place.grad = a8_at<char>(t->grad, 0), place.first = a8_at<char>(t->first, 0);
  place.first_block = a8_at<float>(t->first_block, 0);
  place.row_factor = scratch + t->row_at, place.col_factor = col_factor;
  place.first_shift = a8_block_shift(t->first_format, t->first_block_size);
  a8_residual_rule rule;
  rule.bound = a8_div(1.0f, h->eps);
  rule.beta1 = h->beta1, rule.one_minus_beta1 = h->one_minus_beta1, rule.eps3 = h->eps3;
  rule.averages = h->flags & A8_AVERAGE_UPDATE;
  rule.clipped = rule.averages ? a8_adafactor_rule_of(h, 0.0f, (float)t->numel, scratch + t->sum_at).clipped : 1.0f;
  rule.sign = h->flags & A8_MAXIMIZE ? 0x80000000u : 0u;
  if (rows > 0) a8_residual_typed(place, rule, tile, first, rows, row_sums, room->runs[run]);
  a8_add_runs(tile, room, col_sums);
}
