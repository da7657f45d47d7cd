// a8_adafactor of abi.h: one step of Adafactor or CAME over a table of tensors, in eight launches for the whole of it,
// or more with a confidence or a limiter.
//
// reduce -> means -> factors -> norm -> totals (totals.cuh) -> apply; the phases of abi.h are reduce (with the first
// half of means), moments (its second half, and factors), norm (with totals) and apply. Where there is a confidence,
// residual -> confidence -> confidence factors come before norm for tensors without A8_AVERAGE_UPDATE, and after totals
// for those with; then limit -> totals. They meet in the scratch.
#pragma once

#include "adafactor_full.cuh"
#include "adafactor_general.cuh"
#include "adafactor_reduce.cuh"
#include "adafactor_residual.cuh"

// Sums of g^2 of every tile. One block of threads a tile.
extern "C" __global__ void __launch_bounds__(A8_THREADS, 2) a8_adafactor_reduce_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_reduce_room room;
  if (a8_skips(batch)) return;
  a8_reduce_tile(a8_tile_of(batch, blockIdx.x), scratch, &room);
}

// One row's or column's partial sums, `stride` apart, in order into the first.
A8_FN float a8_combine(float* sums, int64_t stride, int64_t parts) {
  float sum = sums[0];
#pragma unroll 8
  for (int64_t part = 1; part < parts; ++part) sum += sums[part * stride];
  return sums[0] = sum;
}

// Combined (A8_REDUCE); then its mean, moved by the average's rule (A8_MOMENTS).
A8_FN float a8_mean_of(float* sums, int64_t stride, int64_t parts, float* mean, float count, const a8_hyper* hyper,
                       uint32_t phases) {
  float sum = phases & A8_REDUCE ? a8_combine(sums, stride, parts) : sums[0];
  if (!(phases & A8_MOMENTS)) return sum;  // there may be no mean
  return *mean = a8_average(hyper, *mean, a8_div(sum, count));
}

// Of a tile's rows or columns the part that is its block of threads' to combine: those of all tiles beside each other
// share them evenly, for a sum is one chain of loads. number: the tile's among them.
typedef struct a8_share {
  int64_t first, end;
} a8_share;

A8_FN a8_share a8_share_of(int64_t first, int count, int64_t number, int64_t tiles) {
  int64_t each = (count + tiles - 1) / tiles, from = min((long long)(number * each), (long long)count);
  return {first + from, first + min((long long)(from + each), (long long)count)};
}

A8_FN a8_share a8_rows_of(const a8_matrix_tile& tile) {
  return a8_share_of(tile.row, tile.rows, tile.across, a8_tiles_across(tile.tensor->cols, A8_TILE_COLS));
}

A8_FN a8_share a8_cols_of(const a8_matrix_tile& tile) {
  return a8_share_of(tile.col, tile.cols, tile.down, a8_tiles_across(tile.tensor->rows, A8_TILE_ROWS));
}

// Partial sums of the tiles, in order, into row and column sums (A8_REDUCE); then the means, and each column's factor
// of 1 / sqrt(v) (A8_MOMENTS). One block of threads a tile.
extern "C" __global__ void __launch_bounds__(A8_THREADS)
    a8_adafactor_means_kernel(a8_batch batch, float* scratch, uint32_t phases) {
  if (a8_skips(batch)) return;
  a8_matrix_tile tile = a8_tile_of(batch, blockIdx.x);
  const a8_tensor* t = tile.tensor;
  const a8_hyper* hyper = batch.hypers + t->hyper;
  a8_share rows = a8_rows_of(tile), cols = a8_cols_of(tile);
  for (int64_t row = rows.first + threadIdx.x; row < rows.end; row += A8_THREADS)
    a8_mean_of(scratch + t->row_at + row, t->rows, a8_tiles_across(t->cols, A8_TILE_COLS), a8_at<float>(t->second, row),
               (float)t->cols, hyper, phases);
  for (int64_t col = cols.first + threadIdx.x; col < cols.end; col += A8_THREADS) {
    float* sums = scratch + t->col_at + col;
    float mean = a8_mean_of(sums, t->cols, a8_tiles_across(t->rows, A8_TILE_ROWS), a8_at<float>(t->second_block, col),
                            (float)t->rows, hyper, phases);
    if (phases & A8_MOMENTS) *sums = a8_reciprocal_root(mean);
  }
}

// Each row's factor of 1 / sqrt(v) from the rows' means. By a block of threads whose tile is at the left edge; each
// sums all row means. means: a function of the row; least: of their mean.
template <typename Means>
A8_FN void a8_row_factors(const a8_matrix_tile& tile, Means means, float least, float* factors, float* room) {
  int64_t rows = tile.tensor->rows;
  float mean = a8_at_least(a8_div(a8_sum_block(rows, room, means), (float)rows), least);
  for (int64_t row = tile.row + threadIdx.x; row < tile.row + tile.rows; row += A8_THREADS)
    factors[row] = a8_reciprocal_root(a8_div(means(row), mean));
}

// One block of threads a tile.
extern "C" __global__ void __launch_bounds__(A8_THREADS) a8_adafactor_factors_kernel(a8_batch batch, float* scratch) {
  __shared__ float room[A8_LANES];
  if (a8_skips(batch)) return;
  a8_matrix_tile tile = a8_tile_of(batch, blockIdx.x);
  const a8_tensor* t = tile.tensor;
  if (tile.across != 0) return;
  const float* means = a8_at<float>(t->second, 0);
  a8_row_factors(
      tile, [means](int64_t row) { return means[row]; }, batch.hypers[t->hyper].eps, scratch + t->row_at, room);
}

// Whether the tile's tensor has a confidence whose turn it is. averages: that of tensors with A8_AVERAGE_UPDATE, which
// comes after the norm phase, else of those without.
A8_FN bool a8_has_confidence(const a8_batch& batch, const a8_matrix_tile& tile, uint32_t averages) {
  bool does = batch.hypers[tile.tensor->hyper].flags & A8_AVERAGE_UPDATE;
  return tile.tensor->third_format == A8_FACTORED && does == (averages != 0);
}

// Sums of CAME's residual of every tile. One block of threads a tile.
extern "C" __global__ void __launch_bounds__(A8_THREADS, 2)
    a8_adafactor_residual_kernel(a8_batch batch, float* scratch, uint32_t averages) {
  __shared__ a8_reduce_room room;
  __shared__ a8_nf4_table table;
  alignas(16) __shared__ float col_factor[A8_TILE_COLS];
  if (a8_skips(batch)) return;
  a8_matrix_tile tile = a8_tile_of(batch, blockIdx.x);
  if (a8_has_confidence(batch, tile, averages)) a8_residual_tile(batch, tile, scratch, &room, &table, col_factor);
}

// Like a8_adafactor_means_kernel, of the confidence s: with A8_AVERAGE_UPDATE each column's factor of 1 / sqrt(s), else
// that of 1 / sqrt(v s) in the place of that of v.
extern "C" __global__ void __launch_bounds__(A8_THREADS)
    a8_adafactor_confidence_kernel(a8_batch batch, float* scratch, uint32_t averages) {
  if (a8_skips(batch)) return;
  a8_matrix_tile tile = a8_tile_of(batch, blockIdx.x);
  if (!a8_has_confidence(batch, tile, averages)) return;
  const a8_tensor* t = tile.tensor;
  const a8_hyper* hyper = batch.hypers + t->hyper;
  a8_share rows = a8_rows_of(tile), cols = a8_cols_of(tile);
  for (int64_t row = rows.first + threadIdx.x; row < rows.end; row += A8_THREADS) {
    float sum = a8_combine(scratch + t->residual_at + row, t->rows, a8_tiles_across(t->cols, A8_TILE_COLS));
    float* mean = a8_at<float>(t->third, row);
    *mean = a8_confidence(hyper, *mean, a8_div(sum, (float)t->cols));
  }
  for (int64_t col = cols.first + threadIdx.x; col < cols.end; col += A8_THREADS) {
    float* sums = scratch + a8_confidence_cols_at(t) + col;
    float sum = a8_combine(sums, t->cols, a8_tiles_across(t->rows, A8_TILE_ROWS));
    float* mean = a8_at<float>(t->third_block, col);
    *mean = a8_confidence(hyper, *mean, a8_div(sum, (float)t->rows));
    if (averages)
      *sums = a8_reciprocal_root(*mean);
    else
      scratch[t->col_at + col] = a8_reciprocal_root(*a8_at<float>(t->second_block, col) * *mean);
  }
}

// Like a8_adafactor_factors_kernel, of the confidence.
extern "C" __global__ void __launch_bounds__(A8_THREADS)
    a8_adafactor_confidence_factors_kernel(a8_batch batch, float* scratch, uint32_t averages) {
  __shared__ float room[A8_LANES];
  if (a8_skips(batch)) return;
  a8_matrix_tile tile = a8_tile_of(batch, blockIdx.x);
  if (tile.across != 0 || !a8_has_confidence(batch, tile, averages)) return;
  const a8_tensor* t = tile.tensor;
  const float *v = a8_at<float>(t->second, 0), *s = a8_at<float>(t->third, 0);
  const float kSmallestNormal = 1.17549435e-38f;
  if (averages)
    a8_row_factors(tile, [s](int64_t row) { return s[row]; }, kSmallestNormal, scratch + t->residual_at, room);
  else
    a8_row_factors(
        tile, [s, v](int64_t row) { return v[row] * s[row]; }, batch.hypers[t->hyper].eps, scratch + t->row_at, room);
}

// Shared memory of the norm and apply phases. What no fast path takes goes the general way, by all warps together.
typedef struct a8_chunk_room {
  union {
    a8_general_room general;
    alignas(16) char arena[A8_WARPS][A8_ARENA_BYTES];
  };
  a8_nf4_table table;
  union {
    uint32_t left[A8_WARPS];  // of the chunks of a block of threads, a warp each, which ones
    struct {
      uint32_t at, end;  // numbers of the chunks that are left
      a8_run_room run;
    };
  };
} a8_chunk_room;

// Blocks of threads that share a multiprocessor: the compiler then allows itself 80 registers, or 128. Before Ampere
// shared memory has room for one.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900)
#define A8_THREE_RESIDENT 3
#else
#define A8_THREE_RESIDENT (A8_AMPERE ? 2 : 1)
#endif

A8_FN void a8_norm_left(const a8_batch& batch, uint32_t index, float* scratch, a8_chunk_room* room) {
  const a8_chunk unit = batch.chunks[index];
  const a8_tensor* t = batch.tensors + unit.tensor;
  a8_norm_general(t, batch.hypers + t->hyper, unit.part, scratch, &room->general);
}

A8_FN float a8_apply_left(const a8_batch& batch, uint32_t index, float* scratch, a8_chunk_room* room) {
  const a8_chunk unit = batch.chunks[index];
  const a8_tensor* t = batch.tensors + unit.tensor;
  return a8_apply_general(t, batch.hypers + t->hyper, unit.part, scratch, &room->general);
}

// At the end of a chunk's apply phase, by a thread as a8_leave_squares wants it: a lane that has had the chunk's first
// elements, or any thread after a barrier. The job anew: kept, its pointers would take the registers of the update.
static_assert(A8_SAMPLES <= 8, "of a lane's own eight");
A8_FN void a8_leave_squares_of(const a8_batch& batch, uint32_t index, float* scratch, float squares) {
  const a8_factor_job job = a8_factor_job_again(batch, scratch, index);
  if (a8_scales(job)) a8_leave_squares(job, squares);
}

// --- Chunks of factored tensors, a warp each. A kernel is launched for the chunks of its kind, or for all when it is
// not known which they are. ---

// Whether the block of threads has such a chunk, of A8_WARPS from number `first` on; mine: whether this warp has.
A8_FN bool a8_has_factored(const a8_batch& batch, uint32_t first, bool* mine) {
  uint32_t end = batch.factored_chunks ? batch.factored_chunks : batch.chunk_count;
  uint32_t index = first + a8_warp_number();
  *mine = index < end && batch.tensors[batch.chunks[index].tensor].second_format == A8_FACTORED;
  return __syncthreads_or(*mine);
}

// Ends the fast path of a block's chunks. left: whether the warp's goes the general way.
A8_FN void a8_leave_chunk(a8_chunk_room* room, bool left) {
  room->left[a8_warp_number()] = left;
  a8_copies_wait<0>();  // none may land in what the general path writes
  __syncthreads();
}

// One block of threads A8_WARPS chunks; from the last on, whose gradients the reduce phase has read last.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_THREE_RESIDENT)
    a8_adafactor_norm_factored_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_chunk_room room;
  if (a8_skips(batch)) return;
  uint32_t first = (gridDim.x - 1 - blockIdx.x) * A8_WARPS, warp = a8_warp_number();
  bool mine, left = false;
  if (!a8_has_factored(batch, first, &mine)) return;
  a8_share_nf4_table(&room.table);
  __syncthreads();
  if (mine) {
    a8_factor_job job = a8_factor_job_of(batch, scratch, first + warp);
    left = !a8_suits_warp(job);
    if (!left) a8_norm_warp(job, room.arena[warp], &room.table);
  }
  a8_leave_chunk(&room, left);
  for (uint32_t i = 0; i < A8_WARPS; ++i)
    if (room.left[i]) a8_norm_left(batch, first + i, scratch, &room);
}

// One block of threads A8_WARPS chunks.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_THREE_RESIDENT)
    a8_adafactor_apply_factored_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_chunk_room room;
  if (a8_skips(batch)) return;
  uint32_t first = blockIdx.x * A8_WARPS, warp = a8_warp_number();
  bool mine, left = false;
  if (!a8_has_factored(batch, first, &mine)) return;
  a8_share_nf4_table(&room.table);
  __syncthreads();
  if (mine) {
    a8_factor_job job = a8_factor_job_of(batch, scratch, first + warp);
    left = !a8_suits_warp(job) || !a8_suits_apply(job);
    if (!left) {
      float squares = a8_apply_warp(job, room.arena[warp], &room.table);
      if (a8_lane() == 0) a8_leave_squares_of(batch, first + warp, scratch, squares);
    }
  }
  a8_leave_chunk(&room, left);
#pragma unroll 1
  for (uint32_t i = 0; i < A8_WARPS; ++i) {
    if (!room.left[i]) continue;
    float squares = a8_apply_left(batch, first + i, scratch, &room);
    if (threadIdx.x == 0) a8_leave_squares_of(batch, first + i, scratch, squares);
  }
}

// --- Chunks of other tensors, in runs, A8_WARPS chunks a block at most. Where the run is stays in shared memory:
// registers are few. ---

// Begins with the first run of the `width` chunks from number `first` on.
A8_FN void a8_first_run(const a8_batch& batch, uint32_t first, uint32_t width, a8_chunk_room* room) {
  a8_share_nf4_table(&room->table);
  if (threadIdx.x == 0) room->at = first, room->end = min(batch.chunk_count, first + width);
  __syncthreads();
}

// Ends the use of the room by a run, and goes on to the next.
A8_FN void a8_next_run(a8_chunk_room* room) {
  a8_copies_wait<0>();  // none may land in what the next run writes
  __syncthreads();
  if (threadIdx.x == 0) room->at += room->run.chunks;
  __syncthreads();
}

// The job of the run.
A8_FN a8_factor_job a8_this_run(const a8_batch& batch, float* scratch, a8_chunk_room* room) {
  uint32_t chunks;
  a8_factor_job job = a8_run_job_of(batch, scratch, room->at, room->end, &chunks);
  if (threadIdx.x == 0) room->run.chunks = chunks;
  __syncthreads();
  return job;
}

// One block of threads `width` chunks.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_THREE_RESIDENT)
    a8_adafactor_norm_full_kernel(a8_batch batch, float* scratch, uint32_t width) {
  __shared__ a8_chunk_room room;
  if (a8_skips(batch)) return;
  uint32_t first = batch.factored_chunks + (gridDim.x - 1 - blockIdx.x) * width;
#pragma unroll 1
  for (a8_first_run(batch, first, width, &room); room.at < room.end; a8_next_run(&room)) {
    const a8_factor_job job = a8_this_run(batch, scratch, &room);
    if (job.tensor->second_format == A8_FACTORED) continue;
    if (!a8_suits_warp(job)) {
      if (threadIdx.x == 0) room.run.chunks = 1;
      a8_norm_left(batch, room.at, scratch, &room);
      continue;
    }
    a8_norm_run(batch, scratch, room.at, job, room.arena[a8_warp_number()], &room.table, &room.run);
    a8_end_norm_run(batch, scratch, room.at, &room.run);
  }
}

// One block of threads `width` chunks.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_THREE_RESIDENT)
    a8_adafactor_apply_full_kernel(a8_batch batch, float* scratch, uint32_t width) {
  __shared__ a8_chunk_room room;
  if (a8_skips(batch)) return;
  uint32_t first = batch.factored_chunks + blockIdx.x * width;
#pragma unroll 1
  for (a8_first_run(batch, first, width, &room); room.at < room.end; a8_next_run(&room)) {
    const a8_factor_job job = a8_this_run(batch, scratch, &room);
    if (job.tensor->second_format == A8_FACTORED) continue;
    if (!a8_suits_warp(job) || !a8_suits_apply(job)) {
      if (threadIdx.x == 0) room.run.chunks = 1;
      float squares = a8_apply_left(batch, room.at, scratch, &room);
      if (threadIdx.x == 0) a8_leave_squares_of(batch, room.at, scratch, squares);
      continue;
    }
    a8_apply_run(job, room.arena[a8_warp_number()], &room.table, &room.run);
    __syncthreads();
    if (threadIdx.x < room.run.chunks)
      a8_leave_squares_of(batch, room.at + threadIdx.x, scratch, a8_fold_dealt(room.run.param_squares[threadIdx.x]));
  }
}

// The sum of the squares of a chunk's update as CAME leaves it, for tensors whose limiter waits for it. One block of
// threads a chunk.
extern "C" __global__ void __launch_bounds__(A8_THREADS) a8_adafactor_limit_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_general_room room;
  if (a8_skips(batch)) return;
  a8_chunk unit = batch.chunks[blockIdx.x];
  const a8_tensor* t = batch.tensors + unit.tensor;
  const a8_hyper* h = batch.hypers + t->hyper;
  if (t->limiter && h->flags & A8_AVERAGE_UPDATE) a8_limit_general(t, h, unit.part, scratch, &room);
}
