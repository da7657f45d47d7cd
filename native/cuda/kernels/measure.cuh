// The norm phase of the element-wise rules that have one: sums of p^2 and of a8_rule_measure^2 of every chunk, left
// where Adafactor's norm phase leaves its own. totals.cuh ends it.
#pragma once

#include "element_lanes.cuh"

// Shared memory of a block of threads.
typedef struct a8_measure_room {
  union {
    a8_square_room general;
    alignas(16) char arena[A8_WARPS][A8_ARENA_BYTES];
  };
  a8_nf4_table table;
  uint32_t left[A8_WARPS];
} a8_measure_room;

A8_FN void a8_leave_sums(const a8_tensor* t, uint32_t part, float* scratch, float2 squares) {
  float* sums = scratch + t->sum_at + A8_TOTALS + part;
  sums[0] = squares.x;
  sums[t->chunks] = squares.y;
}

// One chunk by a block of threads, of any format, block size, alignment and length.
template <int KIND>
static __device__ __noinline__ void a8_measure_general(const a8_tensor* t, const a8_hyper* h, uint32_t part,
                                                       float* scratch, a8_square_room* room) {
  const a8_element_job job = a8_element_job_of<KIND>(t, h, part, 1, nullptr);
  float param_squares = 0.0f, measure_squares = 0.0f;
  __syncthreads();  // the room may be in use
  a8_share_levels(room->moments.levels);
  for (uint32_t start = 0; start < job.count; start += A8_MAX_BLOCK) {
    a8_span span = a8_span_of(t, job.from + start, job.count - start, 0xffffffffu);
    __syncthreads();
    a8_load_headers(span, &room->moments);
    __syncthreads();
    for (uint32_t e = 2 * threadIdx.x; e < span.count; e += 2 * A8_THREADS) {
      a8_element_pair x = a8_load_element_pair<KIND>(job, span, &room->moments, e);
      const a8_moment_pairs& m = x.before;
      a8_moments<float> even = {m.first.x, m.second.x, m.third.x}, odd = {m.first.y, m.second.y, m.third.y};
      a8_keep_squares(room, e,
                      make_float2(a8_rule_measure<KIND>(&job.rule, x.p.x, x.g.x, even),
                                  a8_rule_measure<KIND>(&job.rule, x.p.y, x.g.y, odd)));
    }
    a8_add_squares(room, span.count, &measure_squares);
    for (uint32_t e = 2 * threadIdx.x; e < span.count; e += 2 * A8_THREADS)
      a8_keep_squares(room, e, a8_load_pair(t->param, t->param_dtype, (span.from + e) / 2, e + 1 < span.count));
    a8_add_squares(room, span.count, &param_squares);
  }
  param_squares = a8_fold_block(param_squares, room->squares);
  measure_squares = a8_fold_block(measure_squares, room->squares);
  if (threadIdx.x == 0) a8_leave_sums(t, part, scratch, make_float2(param_squares, measure_squares));
}

// Whether a warp takes the chunk. LARS measures the gradient, whatever its moment.
template <int KIND>
A8_FN bool a8_measures_lanes(const a8_element_job& job) {
  const a8_tensor* t = job.tensor;
  bool aligned = a8_aligned(t->param, 16) && a8_aligned(t->grad, 16);
  return job.count % A8_UNIT == 0 && (KIND == A8_LARS ? aligned : a8_suits_eights<KIND>(t));
}

// A8_WARPS chunks, from number `first` on, a warp each; those that no warp takes are left to all warps together.
template <int KIND>
A8_FN void a8_measure_chunks(const a8_batch& batch, float* scratch, uint32_t first, a8_measure_room* room) {
  uint32_t warp = a8_warp_number(), index = first + warp;
  bool exists = index < batch.chunk_count, left = false;
  a8_chunk chunk = batch.chunks[exists ? index : first];
  const a8_tensor* t = batch.tensors + chunk.tensor;
  if (__syncthreads_or(KIND != A8_LARS && a8_wants_nf4_table(t))) {
    a8_share_nf4_table(&room->table);
    __syncthreads();
  }
  if (exists) {
    const a8_element_job job = a8_element_job_of<KIND>(t, batch.hypers + t->hyper, chunk.part, 1, nullptr);
    left = !a8_measures_lanes<KIND>(job);
    if (!left) {
      float2 squares = a8_measure_lanes<KIND>(job, room->arena[warp], &room->table);
      if (a8_lane() == 0) a8_leave_sums(t, chunk.part, scratch, squares);
    }
  }
  room->left[warp] = left;
  a8_copies_wait<0>();  // none may land in what the general path writes
  __syncthreads();
  for (uint32_t i = 0; i < A8_WARPS; ++i) {
    if (!room->left[i]) continue;
    chunk = batch.chunks[first + i];
    t = batch.tensors + chunk.tensor;
    a8_measure_general<KIND>(t, batch.hypers + t->hyper, chunk.part, scratch, &room->general);
  }
}

// One block of threads A8_WARPS chunks.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_AMPERE ? 2 : 1)
    a8_measure_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_measure_room room;
  if (a8_skips(batch)) return;
  if (batch.rule == A8_LAMB)
    a8_measure_chunks<A8_LAMB>(batch, scratch, blockIdx.x * A8_WARPS, &room);
  else
    a8_measure_chunks<A8_LARS>(batch, scratch, blockIdx.x * A8_WARPS, &room);
}
