// a8_adafactor of abi.h: one step of Adafactor over a table of tensors, in eight launches for the whole of it.
//
// reduce -> means -> factors -> norm -> totals -> apply; the phases of abi.h are reduce (with the first half of means),
// moments (its second half, and factors), norm (with totals) and apply. They meet in the scratch.
#pragma once

#include "adafactor_apply.cuh"
#include "adafactor_general.cuh"
#include "adafactor_norm.cuh"
#include "adafactor_reduce.cuh"

// Sums of g^2 of every tile. One block of threads a tile.
extern "C" __global__ void __launch_bounds__(A8_THREADS, 2) a8_adafactor_reduce_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_reduce_room room;
  a8_reduce_tile(a8_tile_of(batch, blockIdx.x), scratch, &room);
}

// One row's or column's partial sums, `stride` apart, into the first; then its mean, moved by the average's rule.
A8_FN float a8_mean_of(float* sums, int64_t stride, int64_t parts, float* mean, float count, const a8_hyper* hyper,
                       uint32_t phases) {
  float sum = sums[0];
  if (phases & A8_REDUCE) {
#pragma unroll 8
    for (int64_t part = 1; part < parts; ++part) sum += sums[part * stride];
    sums[0] = sum;
  }
  if (phases & A8_MOMENTS) *mean = a8_average(hyper, *mean, a8_div(sum, count));
  return *mean;
}

// Partial sums of the tiles, in order, into row and column sums (A8_REDUCE); then the means, and each column's factor of
// 1 / sqrt(v) (A8_MOMENTS). One block of threads a tile: those at the matrix's left edge do its rows, at the top its columns.
extern "C" __global__ void __launch_bounds__(A8_THREADS)
    a8_adafactor_means_kernel(a8_batch batch, float* scratch, uint32_t phases) {
  a8_matrix_tile tile = a8_tile_of(batch, blockIdx.x);
  const a8_tensor* t = tile.tensor;
  const a8_hyper* hyper = batch.hypers + t->hyper;
  if (tile.across == 0)
    for (int64_t row = tile.row + threadIdx.x; row < tile.row + tile.rows; row += A8_THREADS)
      a8_mean_of(scratch + t->row_at + row, t->rows, a8_tiles_across(t->cols, A8_TILE_COLS),
                 a8_at<float>(t->second, row), (float)t->cols, hyper, phases);
  if (tile.down == 0)
    for (int64_t col = tile.col + threadIdx.x; col < tile.col + tile.cols; col += A8_THREADS) {
      float* sums = scratch + t->col_at + col;
      float mean = a8_mean_of(sums, t->cols, a8_tiles_across(t->rows, A8_TILE_ROWS), a8_at<float>(t->second_block, col),
                              (float)t->rows, hyper, phases);
      if (phases & A8_MOMENTS) *sums = a8_reciprocal_root(mean);
    }
}

// Each row's factor of 1 / sqrt(v). One block of threads a tile; those at the left edge each sum all row means.
extern "C" __global__ void __launch_bounds__(A8_THREADS) a8_adafactor_factors_kernel(a8_batch batch, float* scratch) {
  __shared__ float room[A8_LANES];
  a8_matrix_tile tile = a8_tile_of(batch, blockIdx.x);
  const a8_tensor* t = tile.tensor;
  if (tile.across != 0) return;
  const float* means = a8_at<float>(t->second, 0);
  float mean = a8_div(a8_sum_block(means, t->rows, room), (float)t->rows);
  mean = a8_at_least(mean, batch.hypers[t->hyper].eps);
  for (int64_t row = tile.row + threadIdx.x; row < tile.row + tile.rows; row += A8_THREADS)
    scratch[t->row_at + row] = a8_reciprocal_root(a8_div(means[row], mean));
}

// The chunks of one block of threads, a warp each; those that no fast path takes are left to all warps together.
typedef struct a8_chunk_room {
  union {
    a8_factor_room general;
    alignas(16) char arena[A8_WARPS][A8_ARENA_BYTES];
  };
  a8_nf4_table table;
  uint32_t left[A8_WARPS];
} a8_chunk_room;

// Blocks of threads that share a multiprocessor: the compiler then allows itself 80 registers, or 128. Before Ampere shared
// memory has room for one. Kernels of their own for the two kinds of second moment: each with the registers it needs.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900)
#define A8_THREE_RESIDENT 3
#else
#define A8_THREE_RESIDENT (A8_AMPERE ? 2 : 1)
#endif
#define A8_TWO_RESIDENT (A8_AMPERE ? 2 : 1)

// Whether this block of threads has a chunk of a tensor of the kind that the kernel is for; mine: whether this warp has.
template <bool kFactored>
A8_FN bool a8_has_chunks(const a8_batch& batch, uint32_t index, bool* mine) {
  *mine = false;
  if (index < batch.chunk_count)
    *mine = (batch.tensors[batch.chunks[index].tensor].second_format == A8_FACTORED) == kFactored;
  return __syncthreads_or(*mine);
}

// Sums of p^2 and u^2 of A8_WARPS chunks, from number `first` on, by a block of threads.
template <bool kFactored>
A8_FN void a8_norm_chunks(const a8_batch& batch, float* scratch, uint32_t first, a8_chunk_room* room) {
  uint32_t warp = a8_warp_number(), index = first + warp;
  bool mine, left = false;
  if (!a8_has_chunks<kFactored>(batch, index, &mine)) return;
  a8_share_nf4_table(&room->table);
  __syncthreads();
  if (mine) {
    a8_factor_job job = a8_factor_job_of(batch, scratch, index);
    left = !a8_suits_warp(job);
    if (!left) a8_norm_warp<kFactored>(job, room->arena[warp], &room->table);
  }
  room->left[warp] = left;
  a8_copies_wait<0>();  // none may land in what the general path writes
  __syncthreads();
  for (uint32_t i = 0; i < A8_WARPS; ++i)
    if (room->left[i]) a8_norm_general(a8_factor_job_of(batch, scratch, first + i), &room->general);
}

// One block of threads A8_WARPS chunks; from the last on, whose gradients the reduce phase has read last.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_THREE_RESIDENT)
    a8_adafactor_norm_factored_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_chunk_room room;
  a8_norm_chunks<true>(batch, scratch, (gridDim.x - 1 - blockIdx.x) * A8_WARPS, &room);
}

extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_THREE_RESIDENT)
    a8_adafactor_norm_full_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_chunk_room room;
  a8_norm_chunks<false>(batch, scratch, (gridDim.x - 1 - blockIdx.x) * A8_WARPS, &room);
}

// The chunks' sums, in order. One block of threads a tensor.
extern "C" __global__ void __launch_bounds__(A8_THREADS) a8_adafactor_totals_kernel(a8_batch batch, float* scratch) {
  __shared__ float room[A8_LANES];
  const a8_tensor* t = batch.tensors + blockIdx.x;
  float* sums = scratch + t->sum_at;
  float param_squares = a8_sum_block(sums + A8_TOTALS, t->chunks, room);
  float update_squares = a8_sum_block(sums + A8_TOTALS + t->chunks, t->chunks, room);
  if (threadIdx.x == 0) sums[0] = param_squares, sums[1] = update_squares, sums[2] = 1.0f;
}

// Updates A8_WARPS chunks, from number `first` on, by a block of threads.
template <bool kFactored>
A8_FN void a8_apply_chunks(const a8_batch& batch, float* scratch, uint32_t first, a8_chunk_room* room) {
  uint32_t warp = a8_warp_number(), index = first + warp;
  bool mine, left = false;
  if (!a8_has_chunks<kFactored>(batch, index, &mine)) return;
  a8_share_nf4_table(&room->table);
  __syncthreads();
  if (mine) {
    a8_factor_job job = a8_factor_job_of(batch, scratch, index);
    left = !a8_suits_warp(job) || !a8_applies_warp(job.tensor);
    if (!left) {
      float squares = a8_apply_warp<kFactored>(job, room->arena[warp], &room->table);
      // The job anew: kept, its pointers would take the registers that the update needs.
      a8_leave_squares(a8_factor_job_again(batch, scratch, index), squares);
    }
  }
  room->left[warp] = left;
  a8_copies_wait<0>();  // none may land in what the general path writes
  __syncthreads();
  for (uint32_t i = 0; i < A8_WARPS; ++i) {
    if (!room->left[i]) continue;
    a8_factor_job job = a8_factor_job_of(batch, scratch, first + i);
    a8_apply_general(job, a8_factor_write_of(job), &room->general);
  }
}

// One block of threads A8_WARPS chunks.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_THREE_RESIDENT)
    a8_adafactor_apply_factored_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_chunk_room room;
  a8_apply_chunks<true>(batch, scratch, blockIdx.x * A8_WARPS, &room);
}

extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_TWO_RESIDENT)
    a8_adafactor_apply_full_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_chunk_room room;
  a8_apply_chunks<false>(batch, scratch, blockIdx.x * A8_WARPS, &room);
}
