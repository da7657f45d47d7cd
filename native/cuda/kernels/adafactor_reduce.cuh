// Sums of g^2 over the rows and the columns of one tile, by one block of threads. Reads the gradient once.
#pragma once

#include "adafactor_sums.cuh"
#include "eight.cuh"

#define A8_RUNS (A8_TILE_ROWS / A8_RUN_ROWS)
#define A8_TILE_LINES (A8_TILE_COLS / A8_LANES)  // pieces of a tile's row that a warp loads at once

// Matrices of so few columns leave most lanes of a warp idle: they go through shared memory.
#define A8_NARROW_COLS 64
#define A8_NARROW_ELEMENTS 8192

typedef union a8_reduce_room {
  float runs[A8_RUNS][A8_TILE_COLS];
  struct {
    float squares[A8_NARROW_ELEMENTS];
    float runs[A8_RUNS][A8_NARROW_COLS];
  } narrow;
} a8_reduce_room;

// Eight values, raw, at a 16-byte boundary.
template <uint32_t kDtype>
A8_FN void a8_load_eight(const char* at, uint32_t* w) {
#pragma unroll
  for (int i = 0; i < (kDtype == A8_F32 ? 8 : 4); i += 4) {
    uint4 x = __ldg(reinterpret_cast<const uint4*>(at) + i / 4);
    w[i] = x.x, w[i + 1] = x.y, w[i + 2] = x.z, w[i + 3] = x.w;
  }
}

// Eight values of any type as float32, of which the first `exist` exist; zero for the others.
A8_FN void a8_load_any(const char* at, uint32_t dtype, int exist, uint32_t* w) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t bits = i < exist ? a8_load_bits(at, dtype, i) : 0u;
    w[i] = dtype == A8_F32 ? bits : a8_bits(a8_from_half(bits, dtype));
  }
}

// A run's column sums from registers to shared memory.
A8_FN void a8_put_columns(const float (*column)[8], float* columns) {
#pragma unroll
  for (int k = 0; k < A8_TILE_LINES; ++k)
#pragma unroll
    for (int i = 0; i < 8; i += 4)
      *reinterpret_cast<float4*>(columns + k * A8_LANES + 8 * a8_lane() + i) =
          make_float4(column[k][i], column[k][i + 1], column[k][i + 2], column[k][i + 3]);
}

// The runs' column sums, in order. By every thread of the block.
A8_FN void a8_add_runs(const a8_matrix_tile& tile, const a8_reduce_room* room, float* col_sums) {
  __syncthreads();
  for (int col = (int)threadIdx.x; col < tile.cols; col += A8_THREADS) {
    float total = 0.0f;
    for (int r = 0; r * A8_RUN_ROWS < tile.rows; ++r) total += room->runs[r][col];
    col_sums[col] = total;
  }
}

// One run of rows by one warp: row sums to `row_sums`, the run's column sums to `columns` in shared memory.
// at: its first element. kAligned: every row begins at a 16-byte boundary and has whole eights of kDtype; else kDtype
// is A8_F32, what a8_load_any makes of `dtype`.
template <uint32_t kDtype, bool kAligned>
A8_FN void a8_reduce_run(const char* at, int64_t row_bytes, uint32_t dtype, int rows, int cols, float* row_sums,
                         float* columns) {
  const int kWords = kDtype == A8_F32 ? 8 : 4;
  const int kAhead = kAligned ? 8 / kWords : 1;  // rows in flight
  int lane = (int)(threadIdx.x & 31u), bytes = dtype == A8_F32 ? 4 : 2;
  uint32_t raw[kAhead][A8_TILE_LINES][kWords];
  float column[A8_TILE_LINES][8];
  const char* next = at + 8 * lane * bytes;  // of the row to be loaded
  auto load = [&](int k, uint32_t* w) {
    int exist = cols - k * A8_LANES - 8 * lane;
    if (exist <= 0) return;
    if (kAligned)
      a8_load_eight<kDtype>(next + k * A8_LANES * (kDtype == A8_F32 ? 4 : 2), w);
    else
      a8_load_any(next + k * A8_LANES * bytes, dtype, exist, w);
  };
#pragma unroll
  for (int row = 0; row < kAhead; ++row) {
#pragma unroll
    for (int k = 0; k < A8_TILE_LINES; ++k) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) raw[row][k][i] = 0u;  // what lies outside the matrix stays zero
      if (row < rows) load(k, raw[row][k]);
    }
    next += row_bytes;
  }
#pragma unroll
  for (int k = 0; k < A8_TILE_LINES; ++k)
#pragma unroll
    for (int i = 0; i < 8; ++i) column[k][i] = 0.0f;
#pragma unroll 1
  for (int row0 = 0; row0 < rows; row0 += 2) {
    float lanes[16];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) lanes[8 * r + i] = 0.0f;
      if (row0 + r < rows) {
        bool more = row0 + r + kAhead < rows;
#pragma unroll
        for (int k = 0; k < A8_TILE_LINES; ++k) {
          uint32_t* w = raw[r % kAhead][k];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float g = a8_value<kDtype>(w, i), square = g * g;
            lanes[8 * r + i] += square;
            column[k][i] += square;
          }
          if (more) load(k, w);
        }
        next += row_bytes;
      }
    }
    float sum = a8_fold_two(lanes);
    if (lane % 16 == 0 && row0 + lane / 16 < rows) row_sums[row0 + lane / 16] = sum;
  }
  a8_put_columns(column, columns);
}

A8_FN void a8_reduce_wide(const a8_matrix_tile& tile, float* row_sums, float* col_sums, a8_reduce_room* room) {
  const a8_tensor* t = tile.tensor;
  int run = (int)a8_warp_number(), first = run * A8_RUN_ROWS, rows = min(tile.rows - first, A8_RUN_ROWS);
  int64_t bytes = t->grad_dtype == A8_F32 ? 4 : 2, row_bytes = t->cols * bytes;
  const char* at = static_cast<const char*>(t->grad) + (tile.row + first) * row_bytes + tile.col * bytes;
  float* columns = room->runs[run];
  row_sums += first;
  if (rows > 0) {
    bool aligned = t->cols % 8 == 0 && a8_aligned(t->grad, 16);
    if (aligned && t->grad_dtype == A8_BF16)
      a8_reduce_run<A8_BF16, true>(at, row_bytes, A8_BF16, rows, tile.cols, row_sums, columns);
    else if (aligned && t->grad_dtype == A8_F32)
      a8_reduce_run<A8_F32, true>(at, row_bytes, A8_F32, rows, tile.cols, row_sums, columns);
    else if (aligned)
      a8_reduce_run<A8_F16, true>(at, row_bytes, A8_F16, rows, tile.cols, row_sums, columns);
    else
      a8_reduce_run<A8_F32, false>(at, row_bytes, t->grad_dtype, rows, tile.cols, row_sums, columns);
  }
  a8_add_runs(tile, room, col_sums);
}

// A tile of a matrix of at most A8_NARROW_COLS columns: its elements are neighbours in memory.
A8_FN void a8_reduce_narrow(const a8_matrix_tile& tile, float* row_sums, float* col_sums, a8_reduce_room* room) {
  const a8_tensor* t = tile.tensor;
  float* squares = room->narrow.squares;
  int cols = tile.cols, width = 1;
  while (width < cols) width *= 2;
  int batch = min(A8_NARROW_ELEMENTS / cols / A8_RUN_ROWS * A8_RUN_ROWS, A8_TILE_ROWS);
  float total = 0.0f;  // of column threadIdx.x
  for (int row0 = 0; row0 < tile.rows; row0 += batch) {
    int rows = min(tile.rows - row0, batch), count = rows * cols, runs = (rows + A8_RUN_ROWS - 1) / A8_RUN_ROWS;
    int64_t from = (tile.row + row0) * cols;
    __syncthreads();
#pragma unroll 8
    for (int i = (int)threadIdx.x; i < count; i += A8_THREADS) {
      uint32_t bits = a8_load_bits(t->grad, t->grad_dtype, from + i);
      float g = t->grad_dtype == A8_F32 ? a8_float(bits) : a8_from_half(bits, t->grad_dtype);
      squares[i] = g * g;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < runs * cols; i += A8_THREADS) {
      int run = i / cols, col = i % cols, last = min(rows - run * A8_RUN_ROWS, A8_RUN_ROWS);
      const float* in = squares + run * A8_RUN_ROWS * cols + col;
      float sum = 0.0f;
#pragma unroll 8
      for (int r = 0; r < last; ++r) sum += in[r * cols];
      room->narrow.runs[run][col] = sum;
    }
    __syncthreads();
    if ((int)threadIdx.x < cols)
      for (int run = 0; run < runs; ++run) total += room->narrow.runs[run][threadIdx.x];
    // A row has fewer elements than accumulators: they are folded where they lie.
    for (int half = width / 2; half > 0; half /= 2) {
      for (int i = (int)threadIdx.x; i < rows * half; i += A8_THREADS) {
        int row = i / half, col = i % half;
        if (col + half < cols) squares[row * cols + col] += squares[row * cols + col + half];
      }
      __syncthreads();
    }
    for (int row = (int)threadIdx.x; row < rows; row += A8_THREADS) row_sums[row0 + row] = squares[row * cols];
  }
  if ((int)threadIdx.x < cols) col_sums[threadIdx.x] = total;
}

A8_FN void a8_reduce_tile(const a8_matrix_tile& tile, float* scratch, a8_reduce_room* room) {
  const a8_tensor* t = tile.tensor;
  float* row_sums = scratch + t->row_at + tile.across * t->rows + tile.row;
  float* col_sums = scratch + t->col_at + tile.down * t->cols + tile.col;
  if (t->cols <= A8_NARROW_COLS)
    a8_reduce_narrow(tile, row_sums, col_sums, room);
  else
    a8_reduce_wide(tile, row_sums, col_sums, room);
}
